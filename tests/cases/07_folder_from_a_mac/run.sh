#!/bin/bash
# A folder copied from a Mac: IMG_1.jpg, and ._IMG_1.jpg with attributes. Expected: the image is searched, the other file ignored.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh; tiny
mkdir shots; cp "$SHARED/images/test_000.jpg" shots/IMG_1.jpg
"$PY" -c "open('shots/._IMG_1.jpg','wb').write(b'\0\5\x16\7\0\2\0\0Mac OS X        '+b'\0'*4064)"
"$SNIPER" predict "$SHARED/run" shots -o found.json >log 2>&1; rc=$?; tail -2 log; no_traceback log
[ $rc = 0 ] || fail "a Mac's attribute file ends the search (rc $rc)"
