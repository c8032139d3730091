#!/bin/bash
# Images with unusual suffixes or none, and one that cannot be decoded. Expected: readable ones are searched, others reported.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh; tiny
mkdir shots; cp "$SHARED/images/test_000.jpg" shots/IMG_1.jpg
for n in IMG_2.jfif IMG_3.mpo IMG_4.jpe IMG_5; do cp "$SHARED/images/test_001.jpg" shots/$n; done
head -c 5000 /dev/urandom > shots/IMG_6.heic
"$SNIPER" predict "$SHARED/run" shots -o found.json >log 2>&1; rc=$?; cat log; no_traceback log
grep -q "num_images *5" log || grep -qi "jfif\|left out\|not looked\|passed over" log || fail "5 of 6 files are neither searched nor reported"
