"""TIFFs of any depth, number of bands and compression are read with rasterio, large ones in windows."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import ExifTags, Image
from rasterio.enums import ColorInterp, Resampling

from sniper.chips import Chip, LevelSpec
from sniper.data.images import files, tiff
from sniper.data.images.files import DecodedImageReader, load_image, open_image, read_image_sides
from sniper.data.images.regions import cut_chip
from sniper.data.images.tiff import TiffReader
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")

NOISE = np.random.default_rng(0).integers(0, 256, (131, 203, 3), dtype=np.uint8)
FULL_RANGE = ReadSpec(intensity_range=(0, 65535))
TO_4000 = ReadSpec(intensity_range=(0, 4000))

RAMP = (
    np.linspace(0, 4000, 64)[None, :, None] * np.array([1, 0.75, 0.5, 0.25, 0.6, 0.3]) * np.ones((48, 1, 1))
)
BYTES = (RAMP // 16).astype(np.uint8)


def write_tiff(path: Path, pixels: np.ndarray, **options: Any) -> None:
    height, width, bands = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=bands, dtype=pixels.dtype, **options
    ) as file:
        file.write(np.moveaxis(pixels, 2, 0))


LAYOUTS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "rgb": (RAMP[..., :3].astype(np.uint16), {"photometric": "RGB"}),
    "min is black": (RAMP[..., :3].astype(np.uint16), {}),
    "four": (RAMP[..., :4].astype(np.uint16), {}),
    "alpha": (RAMP[..., :4].astype(np.uint16), {"photometric": "RGB", "ALPHA": "YES"}),
    "grey": (RAMP[..., :1].astype(np.uint16), {}),
    "int16": (RAMP[..., :3].astype(np.int16), {}),
    "int32": (RAMP[..., :3].astype(np.int32), {}),
    "uint32": (RAMP[..., :1].astype(np.uint32), {}),
    "uint64": (RAMP[..., :3].astype(np.uint64), {}),
    "float32": (RAMP[..., :3].astype(np.float32), {}),
    "float64": (RAMP[..., :3], {}),
    "separate bands": (RAMP[..., :3].astype(np.uint16), {"interleave": "band"}),
    "tiles": (RAMP[..., :3].astype(np.uint16), {"tiled": True, "blockxsize": 16, "blockysize": 16}),
    "BigTIFF": (RAMP[..., :3].astype(np.uint16), {"BIGTIFF": "YES"}),
    "big-endian": (RAMP[..., :3].astype(np.uint16), {"ENDIANNESS": "BIG"}),
    "12 bits": (RAMP[..., :3].astype(np.uint16), {"NBITS": 12}),
    "deflate with predictor": (RAMP[..., :3].astype(np.float32), {"compress": "deflate", "predictor": 3}),
    "LERC": (RAMP[..., :3].astype(np.uint16), {"compress": "lerc"}),
    "ZSTD": (RAMP[..., :3].astype(np.uint16), {"compress": "zstd"}),
    "LZMA": (RAMP[..., :3].astype(np.uint16), {"compress": "lzma"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_tiffs_of_every_layout_are_read(tmp_path: Path, layout: str) -> None:
    pixels, options = LAYOUTS[layout]
    path = tmp_path / "deep.tif"
    write_tiff(path, pixels, **options)
    expected = np.rint(np.broadcast_to(pixels[..., :3], (48, 64, 3)).astype(np.float64) * 255 / 4000)
    np.testing.assert_array_equal(load_image(path, TO_4000), expected)
    assert read_image_sides(path, TO_4000) == (64, 48)
    for read in (load_image, read_image_sides):
        with pytest.raises(ImageError, match=r"deep\.tif: has more than 8 bits a channel .*intensity_range"):
            read(path)


@pytest.mark.parametrize(
    ("bands", "options"),
    [
        (3, {}),
        (4, {"photometric": "MINISBLACK"}),
        (4, {"photometric": "RGB", "ALPHA": "YES"}),
        (3, {"compress": "lerc"}),
        (3, {"compress": "zstd", "photometric": "RGB"}),
        (3, {"compress": "webp", "photometric": "RGB", "WEBP_LOSSLESS": "YES"}),
        (3, {"BIGTIFF": "YES"}),
        (1, {}),
        (2, {"ALPHA": "YES"}),
    ],
)
def test_tiffs_of_8_bits_are_read_whatever_pillow_makes_of_them(
    tmp_path: Path, bands: int, options: dict[str, Any]
) -> None:
    write_tiff(tmp_path / "a.tif", BYTES[..., :bands], **options)
    num_colors = 3 if bands > 2 else 1
    np.testing.assert_array_equal(
        load_image(tmp_path / "a.tif"), np.broadcast_to(BYTES[..., :num_colors], (48, 64, 3))
    )


def test_signed_bytes_need_an_intensity_range(tmp_path: Path) -> None:
    write_tiff(tmp_path / "signed.tif", (BYTES[..., :3] // 2).astype(np.int8))
    with pytest.raises(ImageError, match=r"signed\.tif: has signed values \(int8\)"):
        load_image(tmp_path / "signed.tif")
    levels = load_image(tmp_path / "signed.tif", ReadSpec(intensity_range=(0, 255)))
    np.testing.assert_array_equal(levels, BYTES[..., :3] // 2)


@pytest.mark.parametrize(("bands", "indices"), [((4, 3, 2), [3, 2, 1]), ((6,), [5, 5, 5])])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_configured_bands_are_read(
    tmp_path: Path, bands: tuple[int, ...], indices: list[int], dtype: type[np.generic]
) -> None:
    write_tiff(tmp_path / "six.tif", BYTES.astype(dtype))
    spec = ReadSpec(bands=bands, intensity_range=(0, 255))
    np.testing.assert_array_equal(load_image(tmp_path / "six.tif", spec), BYTES[..., indices])


def test_configured_bands_of_an_rgb_tiff_are_read(tmp_path: Path) -> None:
    for count in (3, 4):
        write_tiff(tmp_path / "rgb.tif", BYTES[..., :count], photometric="RGB")
        bands = (count, 2, 1)
        expected = BYTES[..., [band - 1 for band in bands]]
        np.testing.assert_array_equal(load_image(tmp_path / "rgb.tif", ReadSpec(bands=bands)), expected)


@pytest.mark.parametrize("count", [2, 5, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_other_numbers_of_bands_are_refused_without_a_selection(
    tmp_path: Path, count: int, dtype: type[np.generic]
) -> None:
    write_tiff(tmp_path / "bands.tif", BYTES[..., :count].astype(dtype))
    with rasterio.open(tmp_path / "bands.tif", "r+") as file:
        file.set_band_description(2, "near infrared")
    with pytest.raises(
        ImageError,
        match=rf"bands\.tif: has {count} bands \(2 near infrared\); select .*data\.read\.bands: \[",
    ):
        read_image_sides(tmp_path / "bands.tif", TO_4000)
    with pytest.raises(ImageError, match=rf"has {count} bands, but data\.read\.bands selects band 7"):
        load_image(tmp_path / "bands.tif", ReadSpec(bands=(7, 1, 1), intensity_range=(0, 1)))


def test_bands_that_the_file_marks_as_colours_are_read_as_these(tmp_path: Path) -> None:
    write_tiff(tmp_path / "bgr.tif", BYTES[..., :4])
    with rasterio.open(tmp_path / "bgr.tif", "r+") as file:
        file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    np.testing.assert_array_equal(load_image(tmp_path / "bgr.tif"), BYTES[..., [2, 1, 0]])


@pytest.mark.parametrize(
    ("nodata", "dtype"), [(255, np.uint8), (60_000, np.uint16), (-9999, np.int16), (np.nan, np.float32)]
)
def test_pixels_without_data_are_black(tmp_path: Path, nodata: float, dtype: type[np.generic]) -> None:
    pixels = BYTES[..., :3].astype(dtype)
    pixels[10:20, 5:9] = nodata
    write_tiff(tmp_path / "gaps.tif", pixels, photometric="RGB", nodata=nodata)
    levels = load_image(tmp_path / "gaps.tif", ReadSpec(intensity_range=(0, 250)))
    assert (levels[10:20, 5:9] == 0).all()
    assert (levels[:, 40:] > 0).all()


@pytest.mark.parametrize("options", [{"tiled": True, "blockxsize": 16, "blockysize": 16}, {}])
def test_blocks_that_are_not_stored_are_black(tmp_path: Path, options: dict[str, Any]) -> None:
    pixels = NOISE.copy()
    pixels[16:48, :64] = 0
    pixels[48:96] = 0
    write_tiff(tmp_path / "sparse.tif", pixels, SPARSE_OK=True, compress="deflate", **options)
    np.testing.assert_array_equal(load_image(tmp_path / "sparse.tif"), pixels)


def test_a_bigtiff_of_either_byte_order_is_read(tmp_path: Path) -> None:
    for order in ("BIG", "LITTLE"):
        write_tiff(tmp_path / f"{order}.tif", NOISE, BIGTIFF="YES", ENDIANNESS=order)
        np.testing.assert_array_equal(load_image(tmp_path / f"{order}.tif"), NOISE)


def test_complex_values_are_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "radar.tif", RAMP[..., :1].astype(np.complex64))
    with pytest.raises(ImageError, match=r"radar\.tif: has values of type complex64, expected integers"):
        load_image(tmp_path / "radar.tif", TO_4000)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_min_is_white_is_inverted(tmp_path: Path, dtype: type[np.generic]) -> None:
    write_tiff(tmp_path / "white.tif", BYTES[..., :1].astype(dtype), photometric="MINISWHITE")
    levels = load_image(tmp_path / "white.tif", ReadSpec(intensity_range=(0, 255)))
    np.testing.assert_array_equal(levels[..., 0], 255 - BYTES[..., 0])


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_palettes_are_read_as_their_colours(tmp_path: Path, compress: str) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (256, 3))
    path = tmp_path / "palette.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=203, height=131, count=1, dtype=np.uint8, compress=compress
    ) as file:
        file.write_colormap(1, {number: (*color, 255) for number, color in enumerate(colors.tolist())})
        file.write(NOISE[..., 0], 1)
    np.testing.assert_array_equal(load_image(path), colors[NOISE[..., 0]])
    path.write_bytes(path.read_bytes()[:-200])  # GDAL writes palettes last, and reads grey without
    with pytest.raises(ImageError, match=r"palette\.tif: cannot be read as an image"):
        load_image(path)


def test_a_tiff_that_needs_rasterio_says_so_where_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiff(tmp_path / "three.tif", RAMP[..., :3].astype(np.uint16))
    write_tiff(tmp_path / "lerc.tif", BYTES[..., :3], compress="lerc")
    write_tiff(tmp_path / "grey.tif", RAMP[..., :1].astype(np.uint16), photometric="MINISWHITE")
    with_rasterio = load_image(tmp_path / "grey.tif", TO_4000)
    monkeypatch.setattr(files, "has_rasterio", lambda: False)
    with pytest.raises(
        ImageError,
        match=r"three\.tif: is a TIFF of 3 bands of unsigned 16-bit values: pip install 'sniper-det\[tiff\]'",
    ):
        load_image(tmp_path / "three.tif", TO_4000)
    with pytest.raises(ImageError, match=r"lerc\.tif: is a TIFF of .* in LERC: pip install"):
        load_image(tmp_path / "lerc.tif")
    np.testing.assert_array_equal(load_image(tmp_path / "grey.tif", TO_4000), with_rasterio)


def test_a_raw_file_of_a_camera_is_not_read_as_its_preview(tmp_path: Path) -> None:
    tags = [(254, 4, 1, 1), (256, 4, 1, 8), (257, 4, 1, 8), (50706, 1, 4, 0x0401)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    (tmp_path / "a.dng").write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(64))
    with pytest.raises(ImageError, match=r"a\.dng: is raw camera data with a preview"):
        load_image(tmp_path / "a.dng")


def test_names_that_gdal_would_interpret_are_names_of_files(tmp_path: Path) -> None:
    write_tiff(tmp_path / "plain.tif", BYTES[..., :3], compress="lerc")
    content = (tmp_path / "plain.tif").read_bytes()
    for name in ("a#b?c.tif", "zip+x!y.tif", "s3:b.tif", "\udcff.tif"):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(load_image(tmp_path / name), BYTES[..., :3])


TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}


@pytest.fixture
def _every_tiff_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read every TIFF in windows."""
    monkeypatch.setattr(tiff, "WINDOWED_PIXELS", 100)


@pytest.mark.usefixtures("_every_tiff_is_large")
@pytest.mark.parametrize(
    "options", [TILED, {**TILED, "compress": "deflate"}, {}], ids=["tiles", "deflate", "strips"]
)
def test_a_chip_of_a_large_tiff_equals_that_of_the_decoded_image(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "large.tif"
    write_tiff(path, np.ascontiguousarray(np.tile(NOISE, (4, 3, 1))), photometric="rgb", **options)
    windowed, whole = open_image(path), DecodedImageReader(path, ReadSpec())
    assert isinstance(windowed, TiffReader)
    assert (windowed.width, windowed.height) == (609, 524)
    for factor in (2.0, 1.0, 0.7):
        level = LevelSpec(factor=factor).at(width=609, height=524)
        for x, y in ((0, 0), (100, 37), (level.width - 90, level.height - 90)):
            chip = Chip(level=level, x=x, y=y, width=96, height=96)
            np.testing.assert_array_equal(cut_chip(windowed, chip), cut_chip(whole, chip))


@pytest.mark.usefixtures("_every_tiff_is_large")
@pytest.mark.parametrize("has_overviews", [False, True])
def test_a_large_tiff_is_reduced_by_averaging(tmp_path: Path, has_overviews: bool) -> None:
    path = tmp_path / "large.tif"
    y, x = np.mgrid[:1201, :1603]
    pixels = np.stack([x * 255 / 1603, y * 255 / 1201, (x + y) * 255 / 2804], axis=2).astype(np.uint8)
    write_tiff(path, pixels, photometric="rgb", **TILED)
    if has_overviews:
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2, 4, 8], Resampling.average)
    image = open_image(path)
    read = image.read((0, 0, 1603, 1201), reduction=8)
    assert read.shape == (151, 201, 3)
    blocks = pixels[:1200, :1600].reshape(150, 8, 200, 8, 3).mean(axis=(1, 3))
    assert np.abs(read[:150, :200] - blocks).max() <= 2
    np.testing.assert_array_equal(read[150], read[149])
    level = LevelSpec(long_side=64).at(width=1603, height=1201)
    exact = Image.fromarray(pixels).resize((level.width, level.height), Image.Resampling.BILINEAR)
    shown = cut_chip(image, Chip(level=level, x=0, y=0, width=64, height=64))[: level.height]
    assert np.abs(shown.astype(np.int64) - np.asarray(exact)).max() <= 3


@pytest.mark.usefixtures("_every_tiff_is_large")
def test_a_large_tiff_may_be_grey(tmp_path: Path) -> None:
    write_tiff(tmp_path / "grey.tif", NOISE[..., :1], **TILED)
    read = open_image(tmp_path / "grey.tif").read((3, 5, 40, 50))
    np.testing.assert_array_equal(read, np.repeat(NOISE[5:50, 3:40, :1], 3, axis=2))


@pytest.mark.usefixtures("_every_tiff_is_large")
def test_a_large_tiff_of_16_bits_needs_an_intensity_range(tmp_path: Path) -> None:
    write_tiff(tmp_path / "deep.tif", NOISE[..., :1].astype(np.uint16) * 257, **TILED)
    with pytest.raises(ImageError, match=r"deep\.tif: has more than 8 bits.*intensity_range"):
        open_image(tmp_path / "deep.tif")
    read = open_image(tmp_path / "deep.tif", FULL_RANGE).read((3, 5, 40, 50))
    np.testing.assert_array_equal(read, np.repeat(NOISE[5:50, 3:40, :1], 3, axis=2))


@pytest.mark.usefixtures("_every_tiff_is_large")
def test_the_alpha_band_of_a_large_tiff_is_ignored(tmp_path: Path) -> None:
    alpha = np.dstack([NOISE, NOISE[..., :1]])
    write_tiff(tmp_path / "alpha.tif", alpha, photometric="rgb", **TILED)
    np.testing.assert_array_equal(open_image(tmp_path / "alpha.tif").read((0, 0, 203, 131)), NOISE)


@pytest.mark.usefixtures("_every_tiff_is_large")
def test_a_large_tiff_of_unexpected_sides_or_truncated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.tif"
    write_tiff(path, NOISE, photometric="rgb", **TILED)
    with pytest.raises(ImageError, match=r"cut\.tif: has 203x131 pixels, but the annotations say 203x130"):
        open_image(path, sides=Sides(203, 130))
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(ImageError, match=r"cut\.tif: cannot be read"):
        open_image(path).read((0, 0, 203, 131))


@pytest.mark.usefixtures("_every_tiff_is_large")
@pytest.mark.parametrize("options", [{"photometric": "miniswhite"}, {"nbits": 4}, {"photometric": "cmyk"}])
def test_large_tiffs_that_gdal_decodes_differently_are_as_pillow_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    pixels = np.dstack([NOISE, NOISE[..., :1]]) if "cmyk" in options.values() else NOISE[..., :1] // 16
    write_tiff(tmp_path / "odd.tif", pixels, **TILED, **options)
    image = open_image(tmp_path / "odd.tif")
    read = image.read((3, 5, 40, 50))
    monkeypatch.setattr(files, "has_rasterio", lambda: False)
    np.testing.assert_array_equal(read, load_image(tmp_path / "odd.tif")[5:50, 3:40])


@pytest.mark.usefixtures("_every_tiff_is_large")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_windows_of_a_large_tiff_are_oriented(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(NOISE).save(tmp_path / "turned.tif", exif=exif)
    image = open_image(tmp_path / "turned.tif")
    assert isinstance(image, TiffReader)
    whole = DecodedImageReader(tmp_path / "turned.tif", ReadSpec())
    with Image.open(tmp_path / "turned.tif") as opened:
        opened.load()
        expected = np.asarray(opened)
    assert (image.width, image.height) == (expected.shape[1], expected.shape[0]) == whole_sides(whole)
    for window in ((0, 0, image.width, image.height), (3, 40, 100, 120), (8, 16, image.width, image.height)):
        x1, y1, x2, y2 = window
        np.testing.assert_array_equal(image.read(window), expected[y1:y2, x1:x2])
    reduced = image.read((8, 16, image.width, image.height), reduction=8)
    height, width = (image.height - 16) // 8, (image.width - 8) // 8
    blocks = (
        expected[16 : 16 + height * 8, 8 : 8 + width * 8].reshape(height, 8, width, 8, 3).mean(axis=(1, 3))
    )
    assert np.abs(reduced[:height, :width] - blocks).max() <= 1


def whole_sides(image: DecodedImageReader) -> tuple[int, int]:
    return image.width, image.height


@pytest.mark.usefixtures("_every_tiff_is_large")
@pytest.mark.parametrize("count", [4, 6])
def test_windows_of_a_large_tiff_have_the_configured_bands(tmp_path: Path, count: int) -> None:
    write_tiff(tmp_path / "bands.tif", np.dstack([NOISE, NOISE // 2])[..., :count], **TILED)
    image = open_image(tmp_path / "bands.tif", ReadSpec(bands=(4, 2, 1)))
    expected = np.dstack([NOISE, NOISE // 2])[..., [3, 1, 0]]
    np.testing.assert_array_equal(image.read((0, 0, 203, 131)), expected)
