#!/bin/bash
# TIFFs of several bands as rasterio writes them by default (min-is-black), as most satellite products are. Expected: their pixels.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" -W ignore - <<'P' 2>/dev/null
import sys, numpy as np, rasterio
from pathlib import Path
from sniper.data.images.files import load_image
from sniper.data.spec import ReadSpec
ramp=(np.stack([np.tile(np.linspace(0,1,64),(48,1))]*4)*4000).astype(np.uint16); bad=0
def write(name,a,**kw):
    with rasterio.open(name,'w',driver='GTiff',height=48,width=64,count=len(a),dtype=a.dtype,**kw) as f: f.write(a)
for name,a,kw,spec in (('rgb_photometric.tif',ramp[:3],dict(photometric='RGB'),(0,4000)),('three.tif',ramp[:3],{},(0,4000)),
                       ('four.tif',ramp,{},(0,4000)),('float_three.tif',ramp[:3].astype(np.float32),{},(0,4000)),
                       ('four_bytes_minisblack.tif',(ramp//16).astype(np.uint8),dict(photometric='MINISBLACK'),None),
                       ('lerc.tif',(ramp[:3]//16).astype(np.uint8),dict(compress='lerc'),None)):
    write(name,a,**kw)
    try: print(name,'mean grey level',load_image(Path(name),ReadSpec(intensity_range=spec)).mean().round(1))
    except Exception as e: bad+=1; print(name,type(e).__name__,str(e)[:110])
sys.exit(bad>0)
P
[ $? = 0 ] || fail "a TIFF that rasterio reads was refused"
