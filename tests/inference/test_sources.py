"""An image is the same in whatever form it is given."""

import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from sniper.data.images.files import load_image
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.inference.sources import ImageSource, open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65_536, (64, 80, 3), dtype=np.uint16)
FULL_RANGE = ReadSpec(intensity_range=(0, 65_535))


def pixels_of(source: ImageSource, spec: ReadSpec = ReadSpec(), **options: Any) -> np.ndarray:
    reader = open_source(source, spec, **options)
    return reader.read((0, 0, reader.width, reader.height))


def content_of(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def write_geotiff(path: Path, pixels: np.ndarray) -> None:
    height, width, bands = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=bands, dtype=pixels.dtype
    ) as file:
        file.write(np.moveaxis(pixels, 2, 0))


def saved(form: str, *, mode: str = "RGB", **options: Any) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        Image.fromarray(PIXELS).convert(mode).save(path, form, **options)

    return save


def write_deep_grey(path: Path) -> None:
    Image.fromarray(DEEP[..., 0]).save(path)


def write_with_opencv(path: Path) -> None:
    assert cv2.imwrite(str(path), DEEP)


def write_late_exif(path: Path) -> None:
    """Write a PNG with its orientation after the pixels."""
    content = content_of(Image.fromarray(PIXELS), "PNG", exif=rotated(6))
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    path.write_bytes(content[:start] + content[stop:-12] + content[start:stop] + content[-12:])


def write_profile(path: Path) -> None:
    """Write a PNG with its orientation in a text, as ImageMagick does."""
    exif = b"Exif\0\0" + rotated(6).tobytes().removeprefix(b"Exif\0\0")
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n")
    Image.fromarray(PIXELS).save(path, pnginfo=text)


FILES: dict[str, Callable[[Path], None]] = {
    "rgb.png": saved("PNG"),
    "palette.png": saved("PNG", mode="P"),
    "alpha.png": saved("PNG", mode="RGBA"),
    "bits.png": saved("PNG", mode="1"),
    "rotated.png": saved("PNG", exif=rotated(6)),
    "rotated late.png": write_late_exif,
    "rotated as a profile.png": write_profile,
    "rotated.jpg": saved("JPEG", exif=rotated(5)),
    "cmyk.jpg": saved("JPEG", mode="CMYK"),
    "grey.jpg": saved("JPEG", mode="L"),
    "rotated.webp": saved("WEBP", exif=rotated(8)),
    "rotated.tif": saved("TIFF", exif=rotated(7)),
    "rotated.avif": saved("AVIF", exif=rotated(6).tobytes()),  # Pillow takes the orientation out of an `Exif`
    "plain.jp2": saved("JPEG2000"),
    "frame.gif": saved("GIF", mode="P"),
    "deep_grey.png": write_deep_grey,
    "deep_grey.tif": write_deep_grey,
    "deep_grey.pgm": write_deep_grey,
    "deep.png": write_with_opencv,
    "deep.jp2": write_with_opencv,
    "deep.ppm": write_with_opencv,
}

WAYS: dict[str, Callable[[Path], ImageSource]] = {
    "name": str,
    "bytes": Path.read_bytes,
    "pillow": Image.open,
    "pillow of bytes": lambda path: Image.open(io.BytesIO(path.read_bytes())),
}


@pytest.mark.parametrize("orientation", ["apply", "ignore"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_same_pixels_whichever_way_it_is_handed_over(
    name: str, way: str, orientation: Any, tmp_path: Path
) -> None:
    path = tmp_path / name
    FILES[name](path)
    spec = ReadSpec(exif_orientation=orientation, intensity_range=(1000, 60_000))
    source = WAYS[way](path)
    np.testing.assert_array_equal(pixels_of(source, spec), load_image(path, spec))
    if isinstance(source, Image.Image):
        source.close()


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("way", [way for way in WAYS if "pillow" not in way])
def test_a_geotiff_that_pillow_cannot_open_is_read_from_bytes_too(way: str, tmp_path: Path) -> None:
    write_geotiff(tmp_path / "bands.tif", DEEP)
    source = WAYS[way](tmp_path / "bands.tif")
    np.testing.assert_array_equal(pixels_of(source, FULL_RANGE), np.rint(DEEP / 257))


@pytest.mark.parametrize("name", [name for name in FILES if "deep" in name])
@pytest.mark.parametrize("way", WAYS)
def test_deep_images_without_an_intensity_range_are_refused_in_every_way(
    name: str, way: str, tmp_path: Path
) -> None:
    FILES[name](tmp_path / name)
    source = WAYS[way](tmp_path / name)
    with pytest.raises(ImageError, match=r"has more than 8 bits a channel .*data\.read\.intensity_range"):
        pixels_of(source)
    if isinstance(source, Image.Image):
        source.close()


@pytest.mark.parametrize("name", [name for name in FILES if "rotated" in name])
def test_a_decoded_pillow_image_is_in_the_frame_of_its_path(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        image.load()
        np.testing.assert_array_equal(pixels_of(image), load_image(tmp_path / name))
        assert load_image(tmp_path / name).shape == (50, 30, 3)
        copied = image.copy()
    np.testing.assert_array_equal(pixels_of(copied), load_image(tmp_path / name))


def test_a_transposed_pillow_image_is_not_turned_again(tmp_path: Path) -> None:
    FILES["rotated.jpg"](tmp_path / "rotated.jpg")
    with Image.open(tmp_path / "rotated.jpg") as image:
        upright = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(pixels_of(upright), load_image(tmp_path / "rotated.jpg"))


def test_a_later_frame_and_a_drafted_size_are_those_of_the_pillow_image(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "frames.gif") as image:
        image.seek(1)
        assert pixels_of(image)[0, 0].tolist() == [0, 0, 255]
    Image.fromarray(PIXELS).resize((400, 240)).save(tmp_path / "large.jpg")
    with Image.open(tmp_path / "large.jpg") as image:
        image.draft(None, (100, 60))
        assert pixels_of(image).shape == (60, 100, 3)


def test_a_pillow_image_decoded_to_the_upper_8_of_16_bits_is_refused(tmp_path: Path) -> None:
    write_with_opencv(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        image.load()
        with pytest.raises(ImageError, match=r"only the upper 8 bits .*deep\.png; pass the path instead"):
            pixels_of(image, FULL_RANGE)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_deep_pillow_images_need_an_intensity_range(mode: str) -> None:
    with pytest.raises(ImageError, match="Pillow image: has more than 8 bits a channel"):
        pixels_of(Image.new(mode, (4, 5)))
    values = np.arange(20, dtype={"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]).reshape(4, 5)
    levels = pixels_of(Image.fromarray(values), ReadSpec(intensity_range=(0, 19)))
    np.testing.assert_array_equal(levels[..., 1], np.rint(values * 255 / 19))


def test_a_pillow_image_is_not_changed(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).quantize(8).save(tmp_path / "clear.png", transparency=bytes(range(8)))
    with Image.open(tmp_path / "clear.png") as image:
        image.load()
        before = dict(image.info)
        pixels_of(image)
        assert image.info == before
        assert image.mode == "P"


ALPHA = np.dstack([PIXELS, PIXELS[..., :1]])
GREY = np.repeat(PIXELS[..., :1], 3, axis=2)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PIXELS, PIXELS),
        (np.asfortranarray(PIXELS), PIXELS),
        (ALPHA, PIXELS),
        (PIXELS[..., 0], GREY),
        (PIXELS[..., :1], GREY),
        (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS),
        (torch.from_numpy(ALPHA).permute(2, 0, 1), PIXELS),
        (torch.from_numpy(PIXELS[..., :1]).permute(2, 0, 1), GREY),
        (torch.from_numpy(PIXELS[..., 0].copy()), GREY),
    ],
)
def test_arrays_and_tensors_are_rgb_grey_or_have_alpha(
    source: np.ndarray | torch.Tensor, expected: np.ndarray
) -> None:
    np.testing.assert_array_equal(pixels_of(source), expected)


@pytest.mark.parametrize(
    "dtype", ["uint16", "int16", "int32", "int64", "float16", "float32", "float64", ">u2"]
)
def test_arrays_of_other_types_are_mapped_by_the_intensity_range(dtype: str) -> None:
    values = (PIXELS.astype(np.float64) * 8 - (0 if "u" in dtype else 100)).astype(dtype)
    with pytest.raises(ImageError, match=r"image array: has more than 8 bits a channel \(.*intensity_range"):
        pixels_of(values)
    levels = pixels_of(values, ReadSpec(intensity_range=(0, 1000)))
    np.testing.assert_array_equal(levels, np.rint(np.clip(values.astype(np.float64) * 255 / 1000, 0, 255)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (PIXELS.astype(np.uint16), r"\[0, 65535\]"),
        (PIXELS.astype(np.int16), r"\[-32768, 32767\]"),
        (PIXELS.astype(np.int64), r"\[0, 65535\]"),
        (PIXELS / 255, r"\[0, 1\]"),
        (np.full((4, 4), np.nan), r"\[0, 1\]"),
        (np.array([[-3.5, 17.2, np.inf]]), r"\[-4, 18\]"),
        (np.full((4, 4), 5.0), r"\[5, 6\]"),
    ],
)
def test_the_range_that_is_advised_suits_the_values(values: np.ndarray, expected: str) -> None:
    with pytest.raises(ImageError, match=rf"data\.read\.intensity_range: {expected}"):
        pixels_of(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_point_tensors_are_mapped_by_the_intensity_range(dtype: torch.dtype) -> None:
    tensor = (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).to(dtype)
    with pytest.raises(ImageError, match="image tensor: has more than 8 bits a channel"):
        pixels_of(tensor)
    levels = pixels_of(tensor, ReadSpec(intensity_range=(0, 1)))
    assert np.abs(levels.astype(int) - PIXELS).max() <= (0 if dtype != torch.bfloat16 else 1)


def test_nan_and_infinite_values_are_black_and_white() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 0.5]], dtype=np.float32)
    levels = pixels_of(values, ReadSpec(intensity_range=(0, 1)))
    assert levels[0, :, 0].tolist() == [0, 255, 0, 128]


def test_bgr_arrays_and_tensors_are_reversed() -> None:
    bgr = np.ascontiguousarray(PIXELS[..., ::-1])
    np.testing.assert_array_equal(pixels_of(bgr, channels="BGR"), PIXELS)
    np.testing.assert_array_equal(pixels_of(torch.from_numpy(bgr).permute(2, 0, 1), channels="BGR"), PIXELS)
    bgra = np.dstack([bgr, PIXELS[..., :1]])
    np.testing.assert_array_equal(pixels_of(bgra, channels="BGR"), PIXELS)
    np.testing.assert_array_equal(pixels_of(PIXELS[..., 0], channels="BGR"), GREY)
    with pytest.raises(Exception, match="GBR"):  # by the check of types, if that is active
        pixels_of(bgr, channels="GBR")


def test_bands_of_arrays_are_selected() -> None:
    bands = np.dstack([PIXELS, PIXELS + 1])
    spec = ReadSpec(bands=(6, 2, 1))
    np.testing.assert_array_equal(pixels_of(bands, spec), bands[..., [5, 1, 0]])
    with pytest.raises(ImageError, match=r"image array: has 3 bands, but data\.read\.bands selects band 6"):
        pixels_of(PIXELS, spec)
    with pytest.raises(ValueError, match="BGR is of 3 or 4 channels, not 6"):
        pixels_of(bands, spec, channels="BGR")


def test_damaged_bytes_are_refused() -> None:
    content = content_of(Image.fromarray(PIXELS), "PNG")
    damaged = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    for bad in (damaged, content[:300], b"no image", b""):
        with pytest.raises(ImageError, match=r"^image bytes: cannot be read as an image"):
            pixels_of(bad)


def test_a_pillow_image_whose_file_is_closed_is_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        image = Image.open(file)
    with pytest.raises(
        ImageError, match=r"^Pillow image: cannot be read as an image \(I/O operation on closed"
    ):
        pixels_of(image)


def test_a_pillow_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="Pillow image: has 0x5 pixels"):
        pixels_of(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("bad", [None, 3, PIXELS.tolist(), io.BytesIO(), bytearray(3)])
def test_anything_else_is_refused_by_its_type(bad: Any) -> None:
    with pytest.raises(TypeError, match=f"an image must be a path, .* not {type(bad).__name__}"):
        inspect.unwrap(open_source)(bad, ReadSpec())  # without the checks of types that tests add


def test_pixels_that_are_masked_in_all_channels_are_black() -> None:
    mask = np.zeros(PIXELS.shape, dtype=bool)
    mask[3, 4] = mask[5, 6, 0] = True
    expected = PIXELS.copy()
    expected[3, 4] = 0
    np.testing.assert_array_equal(pixels_of(np.ma.masked_array(PIXELS, mask)), expected)


@pytest.mark.parametrize(
    "bad",
    [
        PIXELS.transpose(2, 0, 1),
        PIXELS[..., :2],
        PIXELS[None],
        PIXELS[0, 0],
        PIXELS > 100,
        PIXELS * 1j,
        np.array(["a"]),
    ],
)
def test_arrays_of_another_type_or_shape_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match=r"array must be uint8, .* of \(height, width\) or .*channels, not .* of \("
    ):
        pixels_of(bad)


@pytest.mark.parametrize("bad", [PIXELS[:0], PIXELS[:, :0], torch.zeros(3, 0, 5, dtype=torch.uint8)])
def test_images_without_pixels_are_refused(bad: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="an image must have pixels"):
        pixels_of(bad)


def test_tensors_without_values_in_memory_are_refused() -> None:
    pixels = torch.zeros(3, 4, 5, dtype=torch.uint8)
    for bad in (pixels.to("meta"), pixels.to_sparse()):
        with pytest.raises(ValueError, match="an image tensor must be dense and have values"):
            pixels_of(bad)


@pytest.mark.parametrize(
    "bad", [torch.zeros(4, 5, 3, 1), torch.zeros(5, 6, 3, dtype=torch.uint8), torch.zeros(3, 4, 5) > 0]
)
def test_tensors_of_another_type_or_shape_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"tensor must be uint8, .*\(channels, height, width\) .* not torch\."
    ):
        pixels_of(bad)
