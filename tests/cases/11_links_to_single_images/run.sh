#!/bin/bash
# A split made of links to single images (also DVC, git-annex, hub caches). Expected: refused with the setting that allows it, or read;
# check and train agree.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" - <<'P'
import os
from pathlib import Path
from common import *
c=small('all'); Path('split/images').mkdir(parents=True)
for one in c['images']: os.symlink(Path('all/images',one['file_name']).absolute(),Path('split/images',one['file_name']))
write('split/a.json',c)
P
cp "$CASES/tiny.yaml" e.yaml
"$SNIPER" check split/a.json >log0 2>&1; check=$?; cat log0
"$SNIPER" train e.yaml --data.train.annotations split/a.json --run r >log 2>&1; train=$?; cut -c1-160 log
no_traceback log; [ $check = $train ] || fail "check ends with $check, train with $train"
[ $train = 0 ] && exit
grep -q follow_links log && grep -q follow log0 || fail "the error does not name the setting that allows links"
"$SNIPER" check split/a.json --follow-links >log0 2>&1 || { cat log0; fail "check --follow-links"; }
"$SNIPER" train e.yaml --data.train.annotations split/a.json --data.follow_links true --run r2 >log 2>&1 || { cat log; fail "train with links"; }
