#!/bin/bash
# Ids that are negative, such as signed hashes. Expected: scored.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" - <<'P'
from common import *
c=small('d',name='test',n=4)
for one in c['images']: one['id']*=-1
for a in c['annotations']: a['image_id']*=-1
write('d/a.json',c); write('found.json',[dict(image_id=a['image_id'],category_id=a['category_id'],bbox=a['bbox'],score=.9) for a in c['annotations']])
P
"$SNIPER" plan d/a.json -o p >log0 2>&1; echo "plan rc $?"
"$SNIPER" evaluate found.json d/a.json --json >log 2>&1; rc=$?; echo "evaluate rc $rc"; tail -1 log | cut -c1-150; no_traceback log; [ $rc = 0 ] || fail "rc $rc"
