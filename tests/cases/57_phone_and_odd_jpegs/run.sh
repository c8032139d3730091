#!/bin/bash
# JPEGs: MPO with an EXIF orientation, CMYK, trailing bytes. Expected: read, upright.
START=${START:-$PWD}; cd "$(dirname "$0")"; . ../env.sh
"$PY" - <<'P'
import io, sys, numpy as np
from pathlib import Path
from PIL import Image
from sniper.data.images.files import load_image
a=Image.fromarray(np.dstack([np.tile(np.linspace(0,255,64),(48,1))]*3).astype(np.uint8)); e=Image.Exif(); e[0x112]=6
a.save('m.jpg',format='MPO',save_all=True,append_images=[a.resize((16,12))],exif=e); a.convert('CMYK').save('c.jpg'); b=io.BytesIO(); a.save(b,'JPEG'); Path('t.jpg').write_bytes(b.getvalue()+b'\0'*999)
want={'m.jpg':(64,48,3),'c.jpg':(48,64,3),'t.jpg':(48,64,3)}; got={n:load_image(Path(n)).shape for n in want}; print(got); sys.exit(got!=want)
P
