#!/bin/bash
# A 16-bit image passed in Python, as a path and as a Pillow image. Expected: both are refused without an intensity range.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh; tiny
"$PY" - "$SHARED" <<'P'
import sys, numpy as np
from pathlib import Path
from PIL import Image
from sniper import Detector
from sniper.errors import ImageError
s=Path(sys.argv[1]); p=Detector.load(s/'run')
Image.fromarray(np.asarray(Image.open(s/'images/test_000.jpg').convert('L')).astype(np.uint16)*16+5000).save('thermal.png'); bad=0
for what,one in (('path',Path('thermal.png')),('picture',Image.open('thermal.png'))):
    try: f=p.predict(one); print(what,'-> accepted,',len(f),'detections'); bad+=1
    except (ImageError,ValueError) as e: print(what,'->',str(e)[:100])
im=Image.open('thermal.png'); print('grey levels that the detector saw of the picture:',np.unique(np.asarray(im.convert('RGB'))))
sys.exit(bad>0)
P
[ $? = 0 ] || fail "the picture is clipped to white, and searched"
