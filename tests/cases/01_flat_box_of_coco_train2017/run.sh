#!/bin/bash
# One box of height 0 among many, as in COCO train2017. Expected: a warning; the box is dropped, and planning goes on.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" -c "
from common import *
c=small('d'); c['annotations'].append(dict(id=9999,image_id=c['images'][0]['id'],category_id=1,bbox=[96.5,88.25,1.25,0.0],area=0.0,iscrowd=0))
write('d/a.json',c)"
"$SNIPER" plan d/a.json -o p >log 2>&1; rc=$?; tail -3 log; no_traceback log
[ $rc = 0 ] || fail "one box without height refuses the whole data set (rc $rc)"
