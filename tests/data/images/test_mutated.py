"""Damaged image files of every format are decoded or refused: no other error, no hang, little memory."""

import base64
import io
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
from PIL import ExifTags, Image

from sniper.data.images.files import load_image, read_image_sides
from sniper.data.images.formats import has_heif
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from tests.data.images.test_encoded import HEIC

NUM_IMAGES = 500
MAX_SECONDS = 5.0
MAX_MEGABYTES = 4000
ODD_NUMBERS = (0, 2**31 - 1, 2**32 - 1, 65_535, 65_536, 31_000)

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
DEEP = PIXELS.astype(np.uint16) * 257


def saved(form: str, image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def saved_tiff(pixels: np.ndarray, **options: Any) -> bytes:
    height, width, bands = pixels.shape
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=width, height=height, count=bands, dtype=pixels.dtype, **options
        ) as file:
            file.write(np.moveaxis(pixels, 2, 0))
        return memory.read()


def intact_files() -> list[bytes]:
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return [
        saved("JPEG", image, exif=exif),
        saved("JPEG", image, progressive=True),
        saved("MPO", image, save_all=True, append_images=[image]),
        saved("PNG", image, exif=exif),
        saved("PNG", image.quantize(16)),
        saved("PNG", Image.fromarray(DEEP[..., 0])),
        cv2.imencode(".png", DEEP)[1].tobytes(),
        saved("WEBP", image),
        saved("WEBP", image, lossless=True),
        saved("AVIF", image),
        saved("BMP", image),
        saved("GIF", image.quantize(16)),
        saved("PPM", image),
        saved("QOI", image),
        saved("TGA", image, compression="tga_rle"),
        saved("JPEG2000", image),
        cv2.imencode(".jp2", DEEP)[1].tobytes(),
        *(saved("TIFF", image, compression=name) for name in ("raw", "tiff_lzw", "jpeg", "packbits")),
        saved("TIFF", Image.fromarray(DEEP[..., 0]), compression="tiff_adobe_deflate"),
        saved_tiff(DEEP),
        saved_tiff(DEEP, compress="lerc"),
        saved_tiff(DEEP, compress="zstd", tiled=True, blockxsize=16, blockysize=16),
        saved_tiff(DEEP, compress="deflate", BIGTIFF="YES"),
        *([base64.b64decode(HEIC)] if has_heif() else []),
    ]


def mutated_files() -> Iterator[bytes]:
    """Yield damaged files, most of them in their first 400 bytes: the header."""
    rng = np.random.default_rng(18)
    intact = intact_files()
    for index in range(NUM_IMAGES):
        content = bytearray(intact[index % len(intact)])
        end = min(len(content), 400) if rng.random() < 0.7 else len(content)
        kind = rng.integers(4)
        for position in rng.integers(end, size=rng.integers(1, 6)).tolist():
            if kind == 0:
                content[position : position + 1] = rng.bytes(1)
            elif kind == 1:
                number = int(rng.choice(ODD_NUMBERS))
                order: Any = rng.choice(["little", "big"])
                content[position : position + 4] = number.to_bytes(4, order)
            elif kind == 2:
                content[position : position + 1] = bytes(
                    value ^ 16 for value in content[position : position + 1]
                )
            else:
                del content[position : position + int(rng.integers(1, 50))]
        yield bytes(content)


def main(folder: Path) -> None:
    """Read every damaged file; fail at the first that ends in another way than it should."""
    num_read, slowest = 0, 0.0
    path = folder / "damaged"
    for index, content in enumerate(mutated_files()):
        path.write_bytes(content)
        start = time.monotonic()
        for read in (read_image_sides, load_image):
            try:
                read(path, ReadSpec(intensity_range=(0, 65_535)))
                num_read += 1
            except ImageError as error:
                if len(str(error)) > 700 or "\n" in str(error):
                    raise AssertionError(f"file {index}: {error}") from error
        slowest = max(slowest, time.monotonic() - start)
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    sys.stdout.write(f"{num_read} {slowest} {megabytes}")


@pytest.mark.slow
def test_500_damaged_images_are_decoded_or_refused(tmp_path: Path) -> None:
    command = (
        "import sys; from pathlib import Path; from tests.data.images.test_mutated import main; "
        "main(Path(sys.argv[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    num_read, slowest, megabytes = map(float, result.stdout.split())
    assert 100 < num_read < 2 * NUM_IMAGES - 100
    assert slowest < MAX_SECONDS
    assert megabytes < MAX_MEGABYTES
