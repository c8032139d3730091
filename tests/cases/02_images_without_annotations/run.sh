#!/bin/bash
# A test file without annotations, such as COCO's image_info_test-dev2017.json. Expected: predict searches its images.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh; tiny
"$PY" -c "
from common import *
c=small('d',name='test',n=1); del c['annotations']; write('d/a.json',c)"
"$SNIPER" predict "$SHARED/run" --annotations d/a.json -o found.json >log 2>&1; rc=$?; tail -3 log; no_traceback log
[ $rc = 0 ] || fail "predict requires annotations (rc $rc)"
