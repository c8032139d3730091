"""Files whose header cannot be true, or that are no image files, are refused in one line and little memory."""

import base64
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from sniper.data.images import encoded
from sniper.data.images.files import load_image, load_pillow_image, read_image_sides
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def image_file(form: str) -> bytearray:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form)
    return bytearray(file.getvalue())


def claiming(form: str, offset: int | bytes, layout: str, *sides: int) -> bytes:
    """Return an image file whose header claims other sides, at an offset or after a marker."""
    content = image_file(form)
    start = offset if isinstance(offset, int) else content.index(offset) + len(offset)
    struct.pack_into(layout, content, start, *sides)
    return bytes(content)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", *, extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def tiff(
    width: int,
    height: int,
    data: bytes = bytes(1000),
    *,
    compression: int = 1,
    strips: int = 1,
    tile: int = 0,
) -> bytes:
    if tile:
        layout = [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 200), (325, 4, 1, len(data))]
    else:
        layout = [(273, 4, strips, 200), (278, 4, 1, height), (279, 4, strips, len(data))]
    sides = [(256, 4, 1, width), (257, 4, 1, height)]
    tags = sorted([*sides, (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1), (277, 3, 1, 1), *layout])
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + directory).ljust(200, b"\0") + data


ZEROS = zlib.compress(bytes(200_000_000))
CLAIM = r"it claims \d+x\d+ pixels, too many for its [\d,]+ bytes"

LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a png of 2^31 px": (lambda: png(2**31 - 1, 1), CLAIM),
    "a png bomb": (lambda: png(20_000, 20_000, bytes(1_000_000)), CLAIM),
    "a png with a text bomb": (lambda: png(4, 4, extra=png_chunk(b"zTXt", b"a\0\0" + ZEROS)), "too large"),
    "a png with a profile bomb": (lambda: png(4, 4, extra=png_chunk(b"iCCP", b"a\0\0" + ZEROS)), "too large"),
    "jpeg": (lambda: claiming("JPEG", b"\xff\xc0\0\x11\x08", ">HH", 31_000, 31_000), CLAIM),
    "bmp": (lambda: claiming("BMP", 18, "<ii", 31_000, 31_000), CLAIM),
    "a bmp of 2^31 px": (lambda: claiming("BMP", 18, "<ii", 2**31 - 1, 2**31 - 1), CLAIM),
    "gif": (lambda: claiming("GIF", 6, "<HH", 65_000, 15_000), CLAIM),
    "ppm": (lambda: b"P6 2147483647 2147483647 255\nabc", CLAIM),
    "a ppm with a long number": (lambda: b"P6 " + b"9" * 200_000 + b" 1 255\n", "Token too long"),
    "jp2": (lambda: claiming("JPEG2000", b"\xff\x51\0\x2f\0\0", ">II", 2**32 - 1, 2**32 - 1), "."),
    "tga": (lambda: claiming("TGA", 12, "<HH", 31_000, 31_000), CLAIM),
    "qoi": (lambda: claiming("QOI", 4, ">II", 31_000, 31_000), CLAIM),
    "tiff": (lambda: tiff(31_000, 31_000), CLAIM),
    "a tiff of 2^31 px": (lambda: tiff(2**31 - 1, 2**31 - 1), CLAIM),
    "a tiff with one large tile": (
        lambda: tiff(30_000, 30_000, bytes(100_000), compression=8, tile=30_000),
        "a tile or strip has 900,000,000 bytes",
    ),
    "a tiff with 2^31 strips": (lambda: tiff(64, 48, strips=2**31 - 1), "."),
    "a bigtiff with 2^63 tags": (lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63), "TIFF without"),
    "a tiff directory beyond the end": (lambda: b"II*\0" + struct.pack("<I", 2**32 - 1) + bytes(20), "TIFF"),
    "a document that starts programs": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "JPEG, PNG",
    ),
    "a page": (lambda: b"<!DOCTYPE html><html></html>", "(it is a web page)"),
    "a pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid",
        "it is a pointer of Git LFS; git lfs pull",
    ),
    "nothing": (lambda: b"", "it is empty"),
    "a byte": (lambda: b"{", "cannot identify an intact header of JPEG, PNG"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_cannot_be_true_is_refused_in_one_line(
    tmp_path: Path, lie: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, expected = LIES[lie]
    path = tmp_path / "lie"
    path.write_bytes(make())
    with pytest.raises(ImageError, match=rf"^{path}: .*{expected}") as raised:
        load_image(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_blank_images_of_many_pixels_are_read(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (5000, 4000), "blue").save(tmp_path / "blank", form)
    assert load_image(tmp_path / "blank").shape == (4000, 5000, 3)


def test_a_long_file_name_is_shortened(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError,
        match=r"^.*x\.\.\.x*\.jpg: cannot be read as an image \(.*too long; choose shorter names",
    ) as raised:
        load_image(tmp_path / ("x" * 200_000 + ".jpg"))
    assert len(str(raised.value)) < 400


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, Path("/dev/zero")):
        for read in (load_image, read_image_sides):
            with pytest.raises(ImageError, match=rf"^{path}: cannot be read as an image"):
                read(path)


def test_memory_that_does_not_suffice_is_an_error_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")

    def fail(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageError, match=r"a\.png: .*\(it does not fit into memory\)"):
        load_image(tmp_path / "a.png")


def test_a_pillow_image_of_more_pixels_than_the_limit_is_refused() -> None:
    with pytest.raises(ImageError, match=r"Pillow image: has 64x48 pixels, expected at most 1,000"):
        load_pillow_image(Image.fromarray(PIXELS), ReadSpec(max_pixels=1000))


def test_damage_that_pillow_warns_of_is_not_on_standard_error(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "x" * 100
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    damaged = (tmp_path / "a.jpg").read_bytes().replace(b"\0\0\0\x65", b"\0\0\xff\xff")  # length of the text
    (tmp_path / "a.jpg").write_bytes(damaged)
    code = (
        f"from sniper.data.images.files import *; print(load_image(Path({str(tmp_path / 'a.jpg')!r})).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(48, 64, 3)\n", "")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_damage_that_libtiff_reports_is_in_the_error_and_not_on_standard_error(
    tmp_path: Path, compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.tif"
    Image.fromarray(PIXELS).save(path, compression=compression)
    content = bytearray(path.read_bytes())
    content[500:1500] = np.random.default_rng(0).bytes(1000)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"damaged\.tif: cannot be read as an image \((?!decoder error)"):
        load_image(path)
    assert capfd.readouterr().err == ""


# A HEIC of 64x48 with a red upper and a blue lower half, to be rotated by 90° as its EXIF and its container say.
HEIC = (
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAAAAAERA"
    "AAIAAQAAAAAB7AABAAAAAAAAACoAAgAAAAACFgABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQAC"
    "AABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcnAAAADmaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAA"
    "AAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaA"
    "AAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAAAlpcm90AwAA"
    "ABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEAAQAAAFZtZGF0AAAAJigBrxOA5TH3/4A0/41k/zbJmTqDEL/0CT7o"
    "vL+xNLEG92bfiw38AAAABkV4aWYAAE1NACoAAAAIAAEBEgADAAAAAQAGAAAAAAAA"
)


def test_a_heic_image_is_read_upright_where_the_extra_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pi_heif")
    (tmp_path / "phone.heic").write_bytes(base64.b64decode(HEIC))
    pixels = load_image(tmp_path / "phone.heic")
    assert pixels.shape == (64, 48, 3)
    assert read_image_sides(tmp_path / "phone.heic") == (48, 64)
    assert np.abs(pixels[32, [5, -5]] - np.array([[20, 40, 199], [250, 40, 41]])).max() <= 3


def test_a_heic_image_names_the_extra_where_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "has_heif", lambda: False)
    (tmp_path / "phone.heic").write_bytes(base64.b64decode(HEIC))
    with pytest.raises(ImageError, match=r"phone\.heic: is a HEIC image: pip install 'sniper-det\[heic\]'"):
        load_image(tmp_path / "phone.heic")


def test_a_damaged_heic_image_does_not_end_the_process(tmp_path: Path) -> None:
    pytest.importorskip("pi_heif")
    content = base64.b64decode(HEIC)
    (tmp_path / "bad.heic").write_bytes(content[:176] + b"\xff\xfe\xfd\xfc" + content[180:])
    with pytest.raises(ImageError, match=r"bad\.heic: .*an item of an unknown type"):
        load_image(tmp_path / "bad.heic")
