#!/bin/bash
# CVAT exports brush masks with iscrowd: 1. Expected: a warning that so many objects are not trained on.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" -c "
from common import *
c=small('d')
for i,a in enumerate(c['annotations']): a['iscrowd']=i%2
write('d/half.json',c)
for a in c['annotations']: a['iscrowd']=1
write('d/all.json',c)"
"$SNIPER" plan d/half.json -o p >log 2>&1; head -2 log; no_traceback log
"$SNIPER" check d/half.json > log1 2>&1; cp "$CASES/tiny.yaml" e.yaml; "$SNIPER" train e.yaml --data.train.annotations d/all.json --run r >log2 2>&1; cat log2
grep -qi crowd log log1 && grep -qi crowd log2 || fail "crowds are not reported"
