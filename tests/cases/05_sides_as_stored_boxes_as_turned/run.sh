#!/bin/bash
# Portrait photos of a phone: boxes in the upright frame, width and height as stored (Label Studio, labelme2coco, supervision).
# Expected: no advice that leads to boxes beside the objects; boxes lie on the objects or the file is refused.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" - <<'P'
import numpy as np
from PIL import Image
from common import write
from pathlib import Path
Path('d/images').mkdir(parents=True); images=[]; anns=[]
for i in (1,2,3):
    up=np.full((400,300,3),90,np.uint8); boxes=[(40,60,60,80),(200,150,50,60),(120,320,40,60)]
    for x,y,w,h in boxes: up[y:y+h,x:x+w]=(250,40,40)
    exif=Image.Exif(); exif[0x112]=6
    Image.fromarray(np.rot90(up,1)).save(f'd/images/p{i}.jpg',exif=exif)
    images.append(dict(id=i,file_name=f'p{i}.jpg',width=400,height=300))
    anns+=[dict(id=10*i+k,image_id=i,category_id=1,bbox=list(b),area=b[2]*b[3],iscrowd=0) for k,b in enumerate(boxes if i>1 else boxes[:2])]
for name,own in (('fits',[a for a in anns if a['bbox'][1]+a['bbox'][3]<=300]),('reaches',anns)):
    write(f'd/{name}.json',dict(images=images,annotations=own,categories=[dict(id=1,name='red')]))
P
"$PY" - >log 2>&1 <<'P' || { cat log; fail "boxes do not lie on the objects"; }
import sys
from pathlib import Path
from sniper import SniperError, load_dataset
from sniper.data.images.files import load_image
bad = 0
for name in ('reaches', 'fits'):
    try: dataset = load_dataset(Path(f'd/{name}.json'))
    except SniperError as error: print(name, 'refused:', error); continue
    print(name, 'accepted:', *dataset.warnings)
    for record in dataset:
        pixels = load_image(record.path)
        for x1, y1, x2, y2 in record.boxes.astype(int): bad += bool(abs(pixels[y1:y2, x1:x2].reshape(-1, 3).mean(0) - (250, 40, 40)).max() > 20)
sys.exit(bad > 0)
P
cat log; no_traceback log
! grep -q "which are its sides with data.read.exif_orientation: ignore" log || fail "the advice leads to boxes beside the objects"
