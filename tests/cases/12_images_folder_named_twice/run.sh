#!/bin/bash
# The layout of Label Studio and MMDetection: result.json beside images/, file names 'images/x.jpg'. Expected: found.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" -c "
from common import *
c=small('d')
for one in c['images']: one['file_name']='images/'+one['file_name']
write('d/result.json',c)"
"$SNIPER" check d/result.json >log 2>&1; rc=$?; cut -c1-170 log; no_traceback log
[ $rc = 0 ] || fail "the images are not found"
