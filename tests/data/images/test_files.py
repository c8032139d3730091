"""Image files of every format, depth and orientation are decoded, or refused by name."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, JpegImagePlugin

from sniper.data.images.files import (
    load_image,
    open_image,
    read_image_sides,
)
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides

NOISE = np.random.default_rng(0).integers(0, 256, (131, 203, 3), dtype=np.uint8)
FULL_RANGE = ReadSpec(intensity_range=(0, 65535))


def smooth(height: int = 96, width: int = 128) -> np.ndarray:
    """Return three gradients, which lossy formats preserve well."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    return np.stack(channels, axis=2).astype(np.uint8)


def grey_of(pixels: np.ndarray) -> np.ndarray:
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    return np.repeat(grey[..., None], 3, axis=2)


def as_stored(pixels: np.ndarray) -> np.ndarray:
    return pixels


# Name, function that saves it, function of the expected pixels, and tolerance in grey levels.
Format = tuple[str, Callable[[Path], None], Callable[[np.ndarray], np.ndarray], int]


def saved(mode: str, **options: Any) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        image = Image.fromarray(smooth())
        if mode in ("RGBA", "LA"):
            image = image.convert(mode)
            image.putalpha(Image.fromarray(smooth()[..., 0]))
        Image.Image.save(image.convert(mode), path, **options)

    return save


def saved_palette_with_transparency(path: Path) -> None:
    image = Image.fromarray(smooth()).quantize(256)
    image.save(path, transparency=bytes(range(256)))


FORMATS: list[Format] = [
    ("rgb.jpg", saved("RGB", quality=95), as_stored, 12),
    ("progressive.jpg", saved("RGB", quality=95, progressive=True), as_stored, 12),
    ("grey.jpg", saved("L", quality=95), grey_of, 4),
    ("cmyk.jpg", saved("CMYK", quality=95), as_stored, 12),
    ("rgb.png", saved("RGB"), as_stored, 0),
    ("grey.png", saved("L"), grey_of, 0),
    ("grey_alpha.png", saved("LA"), grey_of, 0),
    ("alpha.png", saved("RGBA"), as_stored, 0),
    ("palette.png", saved("P"), as_stored, 60),
    ("palette_transparent.png", saved_palette_with_transparency, as_stored, 60),
    ("rgb.webp", saved("RGB", lossless=True), as_stored, 0),
    ("lossy.webp", saved("RGB", quality=95), as_stored, 16),
    ("alpha.webp", saved("RGBA", lossless=True, exact=True), as_stored, 0),
    ("rgb.tif", saved("RGB"), as_stored, 0),
    ("lzw.tif", saved("RGB", compression="tiff_lzw"), as_stored, 0),
    ("jpeg.tif", saved("RGB", compression="jpeg", quality=95), as_stored, 12),
    ("cmyk.tif", saved("CMYK"), as_stored, 0),
    ("grey.tif", saved("L"), grey_of, 0),
    ("rgb.bmp", saved("RGB"), as_stored, 0),
    ("palette.gif", saved("P"), as_stored, 60),
]


@pytest.mark.parametrize("case", FORMATS, ids=[case[0] for case in FORMATS])
def test_every_format_is_read_as_rgb(tmp_path: Path, case: Format) -> None:
    name, save, expected, tolerance = case
    save(tmp_path / name)
    pixels = load_image(tmp_path / name)
    assert read_image_sides(tmp_path / name) == (128, 96)
    difference = np.abs(pixels.astype(np.int64) - expected(smooth()))
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 2


DEEP_NAMES = ["grey.png", "grey.tif", "rgb.png", "rgb.tif"]


def write_deep(path: Path) -> np.ndarray:
    """Write an image of 16 bits, and return its values."""
    grey = (np.arange(96 * 128).reshape(96, 128) * 5).astype(np.uint16)
    if path.stem == "grey":
        Image.fromarray(grey).save(path)
        return np.repeat(grey[..., None], 3, axis=2)
    colors = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=2)
    cv2.imwrite(str(path), colors[..., ::-1])
    return colors


@pytest.mark.parametrize("name", DEEP_NAMES)
def test_16_bits_are_mapped_to_8_by_the_intensity_range(tmp_path: Path, name: str) -> None:
    values = write_deep(tmp_path / name)
    np.testing.assert_array_equal(load_image(tmp_path / name, FULL_RANGE), np.rint(values / 257))
    narrow = load_image(tmp_path / name, ReadSpec(intensity_range=(1000, 21_000)))
    expected = np.clip((values - 1000.0) * 255 / 20_000, 0, 255)
    assert np.abs(narrow - expected).max() <= 0.51


def test_16_bits_of_a_portable_pixmap_are_not_cut_to_8(tmp_path: Path) -> None:
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    with pytest.raises(ImageError, match=r"deep\.ppm: has more than 8 bits"):
        load_image(tmp_path / "deep.ppm")


@pytest.mark.parametrize("name", DEEP_NAMES)
@pytest.mark.parametrize("read", [load_image, read_image_sides])
def test_more_than_8_bits_without_an_intensity_range_are_refused(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    write_deep(tmp_path / name)
    with pytest.raises(
        ImageError, match=rf"{name}: has more than 8 bits.*data\.read\.intensity_range: \[0, 65535\]"
    ):
        read(tmp_path / name)


def test_floating_point_images_use_the_intensity_range_and_nan_is_black(tmp_path: Path) -> None:
    values = np.linspace(-1, 2, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "float.tif")
    pixels = load_image(tmp_path / "float.tif", ReadSpec(intensity_range=(0, 1)))
    expected = np.nan_to_num(np.clip(values, 0, 1)) * 255
    assert np.abs(pixels[..., 0] - expected).max() <= 0.51


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["rotated.jpg", "rotated.png", "rotated.tif"])
def test_the_exif_orientation_is_applied_or_ignored(tmp_path: Path, name: str, orientation: int) -> None:
    upright = smooth()
    stored_by = {  # the pixels that a camera stores with each orientation
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(stored_by[orientation])
    Image.fromarray(stored).save(tmp_path / name, exif=exif, quality=95)
    applied = load_image(tmp_path / name)
    assert applied.shape == upright.shape
    assert np.abs(applied.astype(np.int64) - upright).mean() < 3
    assert read_image_sides(tmp_path / name) == (128, 96)
    ignore = ReadSpec(exif_orientation="ignore")
    assert load_image(tmp_path / name, ignore).shape == stored.shape
    assert read_image_sides(tmp_path / name, ignore) == (stored.shape[1], stored.shape[0])


@pytest.mark.parametrize(
    "name", ["cut.jpg", "cut_progressive.jpg", "cut.png", "cut.webp", "cut.tif", "cut_lzw.tif"]
)
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF", "ignore:Metadata Warning")
def test_a_truncated_file_is_refused_by_name_or_complete(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    options: dict[str, dict[str, Any]] = {
        "cut_progressive.jpg": {"progressive": True},
        "cut_lzw.tif": {"compression": "tiff_lzw"},
        "cut.webp": {"quality": 80},
    }
    Image.fromarray(smooth(48, 64)).save(path, **options.get(name, {}))
    content, whole = path.read_bytes(), load_image(path)
    refused = 0
    for length in range(0, len(content), 10):
        path.write_bytes(content[:length])
        try:
            pixels = load_image(path)
        except ImageError as error:
            refused += str(error).startswith(f"{path}: ")
        else:
            np.testing.assert_array_equal(pixels, whole)
    assert refused >= 0.9 * len(content) / 10


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}])
def test_a_jpeg_has_the_pixels_that_pillow_decodes(
    tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "image.jpg"
    image = Image.fromarray(smooth(75, 101)).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(path, exif=exif, **options)
    stored = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(load_image(path), np.rot90(stored, -1))
    np.testing.assert_array_equal(load_image(path, ReadSpec(exif_orientation="ignore")), stored)
    red = ReadSpec(exif_orientation="ignore", bands=(1,))
    np.testing.assert_array_equal(load_image(path, red), stored[..., [0, 0, 0]])


def test_an_intact_jpeg_is_decoded_by_simplejpeg_where_the_extra_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("simplejpeg")
    file = io.BytesIO()
    Image.fromarray(smooth(75, 101)).save(file, format="JPEG")
    expected = np.asarray(Image.open(file))

    def load(self: Image.Image) -> None:
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
    np.testing.assert_array_equal(load_image(file.getvalue()), expected)
    with pytest.raises(ImageError, match="decoded by Pillow"):
        load_image(file.getvalue()[:-200])  # truncated


def test_damage_that_pillow_accepts_gives_the_pixels_that_pillow_decodes() -> None:
    file = io.BytesIO()
    Image.fromarray(smooth(75, 101)).save(file, format="JPEG")
    content = file.getvalue()
    for damaged in (content + b"appended", content[:-2] + b"\0" * 9 + content[-2:]):
        expected = np.asarray(Image.open(io.BytesIO(damaged)).convert("RGB"))
        np.testing.assert_array_equal(load_image(damaged), expected)


def test_a_file_that_is_not_an_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "empty.png", "none.jpg"):
        with pytest.raises(ImageError, match=rf"{name}: cannot be read"):
            load_image(tmp_path / name)


def test_images_may_have_a_hundred_megapixels_but_not_more_than_the_limit(tmp_path: Path) -> None:
    Image.new("1", (12_000, 9_000)).save(tmp_path / "large.png")
    assert read_image_sides(tmp_path / "large.png") == (12_000, 9_000)
    Image.new("1", (40_000, 30_000)).save(tmp_path / "bomb.png")
    with pytest.raises(
        ImageError, match=r"bomb\.png: has 40000x30000 pixels, expected at most 1,000,000,000"
    ):
        read_image_sides(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match=r"bomb\.png: .*\(data\.read\.max_pixels\)"):
        load_image(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match=r"large\.png: .*expected at most 1,000"):
        load_image(tmp_path / "large.png", ReadSpec(max_pixels=1000))


def test_an_image_of_unexpected_sides_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "image.png")
    image = open_image(tmp_path / "image.png", sides=Sides(200, 131))
    with pytest.raises(ImageError, match=r"image\.png: has 203x131 pixels, but the annotations say 200x131"):
        image.read((0, 0, 10, 10))


def test_an_animation_is_read_as_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((20, 30, 3), level, dtype=np.uint8)) for level in (10, 200)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert (load_image(tmp_path / "moving.webp") == 10).all()


def test_bytes_after_the_image_are_ignored(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    (tmp_path / "long.png").write_bytes(file.getvalue() + b"more")
    np.testing.assert_array_equal(load_image(tmp_path / "long.png"), NOISE)
