"""Tiles have the pixels of the image, and a large TIFF is read in windows, in bounded memory."""

import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.errors
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasterio.windows import Window

from sniper.browse import tiles
from sniper.browse.tiles import TILE, ImageTiles, Overview, list_zooms
from sniper.data.images import tiff
from sniper.data.images.files import ArrayImageReader, ImageReader, open_image
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides
from tests.browse.data import load, noise, write_coco


def one_image(folder: Path, name: str, width: int, height: int) -> ImageTiles:
    return ImageTiles(load(write_coco(folder, {name: (width, height)}, {name: [(1, 2, 2, 30, 30)]})))


def create_tiff(path: Path, *, width: int, height: int, **options: object) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(
            path, "w", driver="GTiff", width=width, height=height, count=3, dtype="uint8", photometric="RGB",
            tiled=True, blockxsize=256, blockysize=256, **options,
        )  # fmt: skip


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    with create_tiff(path, width=pixels.shape[1], height=pixels.shape[0]) as file:
        file.write(np.moveaxis(pixels, 2, 0))


def stitch(image: ImageTiles, zoom: int) -> np.ndarray:
    width, height = image.zooms(0)[zoom]
    rows = [
        np.concatenate([image.read(0, zoom=zoom, column=x, row=y) for x in range(-(-width // TILE))], axis=1)
        for y in range(-(-height // TILE))
    ]
    return np.concatenate(rows)


def reduced(pixels: np.ndarray, sides: Sides, zoom: int) -> np.ndarray:
    """Average squares of pixels to twice the sides of a zoom, and resize the result to them."""
    factor = 1 << (zoom - 1)
    height, width = pixels.shape[:2]
    averaged = Image.fromarray(pixels).reduce(factor)
    box = (0, 0, width / factor, height / factor)
    return np.asarray(averaged.resize(sides, Image.Resampling.BILINEAR, box=box)).astype(np.int64)


def build(image: ImageTiles) -> None:
    deadline = time.monotonic() + 120
    while image.build_overview(0) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a TIFF of a megapixel as a large one."""
    monkeypatch.setattr(tiff, "WINDOWED_PIXELS", 1_000_000)
    monkeypatch.setattr(tiles, "_STRIP", Sides(1024, 512))
    monkeypatch.setattr(tiles, "_OVERVIEW_BYTES", 300_000)


@given(st.integers(1, 1_000_000), st.integers(1, 1_000_000))
def test_each_zoom_is_half_of_the_one_before_and_the_last_is_one_tile(width: int, height: int) -> None:
    zooms = list_zooms(Sides(width, height))
    assert zooms[0] == (width, height)
    for zoom, sides in enumerate(zooms):
        assert sides == (width >> zoom, height >> zoom)
        assert min(sides) >= 1
    assert max(zooms[-1]) <= TILE or min(zooms[-1]) == 1


def test_tiles_of_the_full_size_are_crops_of_the_image(tmp_path: Path) -> None:
    pixels = noise(1300, 700)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = one_image(tmp_path, "a.png", 1300, 700)
    np.testing.assert_array_equal(stitch(image, 0), pixels)
    decoded = np.asarray(Image.open(tmp_path / "a.png").crop((1024, 512, 1300, 700)))
    assert image.read_png(0, zoom=0, column=2, row=1)[:4] == b"\x89PNG"
    np.testing.assert_array_equal(image.read(0, zoom=0, column=2, row=1), decoded)


def test_tiles_of_a_reduced_image_are_crops_of_it_resized(tmp_path: Path) -> None:
    pixels = np.asarray(Image.fromarray(noise(160, 90)).resize((1301, 703), Image.Resampling.BICUBIC))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = one_image(tmp_path, "a.png", 1301, 703)
    assert image.needs_overview(0) is None
    assert image.build_overview(0) == 1
    resized = Image.fromarray(pixels).resize((650, 351), Image.Resampling.BILINEAR)
    assert np.abs(stitch(image, 1).astype(int) - np.asarray(resized)).max() <= 1


@pytest.mark.usefixtures("small_limits")
def test_a_large_tiff_has_the_tiles_of_the_whole_image(tmp_path: Path) -> None:
    pixels = np.asarray(Image.fromarray(noise(90, 60)).resize((2201, 1503), Image.Resampling.BICUBIC))
    write_tiff(tmp_path / "a.tif", pixels)
    image = one_image(tmp_path, "a.tif", 2201, 1503)
    assert image.needs_overview(0) == 4
    np.testing.assert_array_equal(stitch(image, 0), pixels)
    with pytest.raises(IndexError):
        image.read(0, zoom=4, column=0, row=0)  # the last zoom is 3
    for zoom in (1, 2, 3):
        assert np.abs(stitch(image, zoom) - reduced(pixels, image.zooms(0)[zoom], zoom)).max() <= 2


@pytest.mark.usefixtures("small_limits")
def test_far_zooms_wait_for_the_overview_and_then_equal_the_whole_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_OVERVIEW_BYTES", 3_000_000)
    pixels = np.asarray(Image.fromarray(noise(90, 60)).resize((2201, 1503), Image.Resampling.BICUBIC))
    write_tiff(tmp_path / "a.tif", pixels)
    image = one_image(tmp_path, "a.tif", 2201, 1503)
    assert image.needs_overview(0) == 2
    with pytest.raises(ImageError, match=r"a\.tif: its overview is not complete"):
        image.read(0, zoom=2, column=0, row=0)
    build(image)
    for zoom in (2, 3):
        assert np.abs(stitch(image, zoom) - reduced(pixels, image.zooms(0)[zoom], zoom)).max() <= 2


class CountingReader(ArrayImageReader):
    """An image that records how many pixels are read at once, and waits for a signal."""

    def __init__(self, pixels: np.ndarray, *, go_on: threading.Event) -> None:
        super().__init__(pixels)
        self.go_on, self.read_pixels = go_on, [0]

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> np.ndarray:
        self.go_on.wait(30)
        x1, y1, x2, y2 = window
        self.read_pixels.append((x2 - x1) * (y2 - y1))
        return np.asarray(Image.fromarray(super().read(window)).reduce(reduction))


def overview_of(reader: ImageReader) -> Overview:
    return Overview(reader, name="a", max_bytes=100_000)


def test_an_overview_is_read_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_STRIP", Sides(256, 64))
    go_on = threading.Event()
    go_on.set()
    pixels = noise(701, 403)
    reader = CountingReader(pixels, go_on=go_on)
    overview = overview_of(reader)
    assert overview.reduction == 4
    while overview.build() < 1:
        time.sleep(0.005)
    assert max(reader.read_pixels) == 256 * 64
    assert sum(reader.read_pixels) == 701 * 403
    reduced = overview.read((0, 0, 701, 403), reduction=4)
    np.testing.assert_array_equal(reduced, np.asarray(Image.fromarray(pixels).reduce(4)))
    np.testing.assert_array_equal(
        overview.read((16, 32, 701, 403), reduction=16),
        np.asarray(Image.fromarray(reduced[8:, 4:]).reduce(4)),
    )


def test_an_overview_that_is_no_longer_asked_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_STRIP", Sides(256, 64))
    monkeypatch.setattr(tiles, "_ABANDONED", 0.05)
    go_on = threading.Event()
    reader = CountingReader(noise(701, 403), go_on=go_on)
    overview = overview_of(reader)
    assert overview.build() == 0
    time.sleep(0.2)
    go_on.set()
    while any(thread.name == "overview" for thread in threading.enumerate()):
        time.sleep(0.005)
    assert len(reader.read_pixels) <= 2
    monkeypatch.setattr(tiles, "_ABANDONED", 60.0)
    while overview.build() < 1:  # it starts again when it is asked for again
        time.sleep(0.005)
    assert sum(reader.read_pixels[-20:]) > 0


def test_a_damaged_tiff_is_reported_by_its_overview(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_limits: None
) -> None:
    monkeypatch.setattr(tiles, "_OVERVIEW_BYTES", 3_000_000)
    write_tiff(tmp_path / "a.tif", noise(2201, 1503))
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) // 2])
    image = one_image(tmp_path, "a.tif", 2201, 1503)
    with pytest.raises(ImageError, match=r"a\.tif: cannot be read"):
        build(image)


def test_an_image_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "MAX_DECODED", 1_000_000)
    Image.fromarray(noise(700, 600)).save(tmp_path / "a.png")
    image = one_image(tmp_path, "a.png", 700, 600)
    with pytest.raises(ImageError, match=r"a\.png: has 700x600 pixels, which take 0\.0 GB .* only a TIFF"):
        image.needs_overview(0)


def test_images_are_kept_up_to_a_limit_of_memory(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(4)]
    for name in names:
        Image.fromarray(noise(100, 100)).save(tmp_path / name)
    path = write_coco(tmp_path, dict.fromkeys(names, (100, 100)), {})
    image = ImageTiles(load(path), kept_bytes=90_000)
    opened = []
    for index in (0, 1, 2, 0, 3, 0):
        opened.append(image._open(index))
    assert opened[3] is not opened[0]  # 0 was dropped, as two images of 40,000 bytes fit
    assert opened[5] is opened[3]
    assert list(image._images) == [3, 0]


@pytest.mark.slow
def test_a_tiff_of_30000_pixels_takes_little_memory(tmp_path: Path) -> None:
    side, path = 30_000, tmp_path / "a.tif"
    block = noise(side, 512)
    with create_tiff(path, width=side, height=side, sparse_ok=True) as file:
        for y in (0, 15_360):  # the other tiles are not stored, and black
            file.write(np.moveaxis(block, 2, 0), window=Window(0, y, side, 512))
    image = one_image(tmp_path, path.name, side, side)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of earlier tests
    before = _peak_memory()
    np.testing.assert_array_equal(image.read(0, zoom=0, column=7, row=30), block[:, 7 * TILE : 8 * TILE])
    build(image)
    far = stitch(image, 4)
    assert abs(float(far[2:30].mean()) - 127.5) < 3
    assert far[100:900].max() == 0
    assert _peak_memory() - before < 900_000_000  # the whole image has 2.7 GB


def _peak_memory() -> int:
    """Return the most memory that the process has held, bytes."""
    status = Path("/proc/self/status").read_text()
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(peak)


def test_a_tile_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    Image.fromarray(noise(600, 300)).save(tmp_path / "a.png")
    image = one_image(tmp_path, "a.png", 600, 300)
    for zoom, column, row in ((2, 0, 0), (0, 2, 0), (0, 0, 1)):
        with pytest.raises(IndexError):
            image.read(0, zoom=zoom, column=column, row=row)
    with pytest.raises(IndexError):
        image.zooms(1)


def test_tiles_are_those_of_the_reader_that_training_uses(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(300, 200)).save(tmp_path / "a.png", exif=exif)
    image = one_image(tmp_path, "a.png", 200, 300)
    whole = open_image(tmp_path / "a.png").read((0, 0, 200, 300))
    np.testing.assert_array_equal(image.read(0, zoom=0, column=0, row=0), whole)
