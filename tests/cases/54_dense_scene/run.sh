#!/bin/bash
# 6,000 boxes in one image. Expected: planned within seconds; evaluate reports that COCO's limit of 100 cuts.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" - <<'P'
import numpy as np
from common import write
r=np.random.default_rng(0).uniform(0,990,(6000,2)).round(1).tolist(); an=[dict(id=k+1,image_id=1,category_id=1,bbox=[x,y,8,8],area=64,iscrowd=0) for k,(x,y) in enumerate(r)]
write('a.json',dict(images=[dict(id=1,file_name='1.png',width=1000,height=1000)],annotations=an,categories=[dict(id=1,name='x')]))
write('f.json',[dict(image_id=1,category_id=1,bbox=a['bbox'],score=.5) for a in an])
P
timeout 60 "$SNIPER" plan a.json -o p >log 2>&1 || fail "plan"
"$SNIPER" evaluate f.json a.json 2>&1 | grep -q "more than 100 detections" || fail "no word of the limit"
