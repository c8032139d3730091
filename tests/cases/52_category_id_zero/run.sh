#!/bin/bash
# Category ids that start from 0 (Label Studio, Roboflow). Expected: trained on; results have id 0.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" -c "
from common import *
c=small('d')
for k in c['categories']: k['id']-=1
for a in c['annotations']: a['category_id']-=1
write('d/a.json',c)"
cp "$CASES/tiny.yaml" e.yaml; "$SNIPER" train e.yaml --data.train.annotations d/a.json --run r >log 2>&1 || { cat log; fail "train"; }
"$SNIPER" predict r --annotations d/a.json -o f.json >log 2>&1 && "$SNIPER" evaluate f.json d/a.json >log 2>&1 || { tail -3 log; fail "predict, evaluate"; }
"$PY" -c "
import json; print(sorted({e['category_id'] for e in json.load(open('f.json'))}))"
