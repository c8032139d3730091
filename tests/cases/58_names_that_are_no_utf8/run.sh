#!/bin/bash
# A file name in GBK bytes, from a Windows zip. Expected: searched; a bad file is named without a traceback.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh; tiny
mkdir good bad; "$PY" -c "
import os,shutil,sys; s=sys.argv[1]
shutil.copy(s,os.fsencode('good')+b'/\xb2\xe2.jpg'); open(os.fsencode('bad')+b'/\xb2\xe2.jpg','wb').write(b'x')" "$SHARED/images/test_000.jpg"
"$SNIPER" predict "$SHARED/run" good -o f.json >log 2>&1 || { tail -2 log; fail "good"; }
"$SNIPER" predict "$SHARED/run" bad -o f.json >log 2>&1; rc=$?; no_traceback log; [ $rc = 2 ] || fail "rc $rc"
