#!/bin/bash
# A test file with the same category names, but other ids. Expected: mapped by name, and a message.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh; tiny
"$PY" - <<'P'
from common import *
c=small('d',name='test',n=2); ids=[k['id'] for k in c['categories']]; to=dict(zip(ids,ids[1:]+ids[:1]))
for k in c['categories']: k['id']=to[k['id']]
for a in c['annotations']: a['category_id']=to[a['category_id']]
write('d/a.json',c)
P
"$SNIPER" predict "$SHARED/run" --annotations d/a.json -o found.json >log 2>&1; rc=$?; cat log; no_traceback log
"$SNIPER" evaluate found.json d/a.json 2>&1 | head -2
[ $rc = 2 ] || grep -qi "categor" log || fail "nothing reports the other ids"
[ $rc = 2 ] && exit
"$PY" - "$SHARED" <<'P' || fail "the classes of the results are not those of the file"
import json, sys
names = lambda path: {category['id']: category['name'] for category in json.load(open(path))['categories']}
ours, theirs = names(sys.argv[1] + '/train.json'), names('d/a.json')
results = json.load(open('found.json'))
sys.exit(not {theirs[entry['category_id']] for entry in results} <= set(ours.values()))
P
