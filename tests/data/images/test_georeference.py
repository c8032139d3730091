"""Where pixels are on the Earth, compared with rasterio; and images whose place cannot be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from rasterio.transform import Affine
from rasterio.warp import transform

from sniper.data.images import georeference as module
from sniper.data.images.files import load_image
from sniper.data.images.georeference import (
    Georeference,
    describe_crs,
    read_georeference,
    transform_points,
)
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides
from tests.data.geotiffs import NORTH_UP, UTM, compose, write_geotiff

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")

ROTATED = compose(NORTH_UP, Affine.rotation(30))
DEGREES = Affine(1e-5, 0, 15, 0, -1e-5, 48)
LAEA = "+proj=laea +lat_0=50 +lon_0=14 +datum=WGS84"
SITE = 'LOCAL_CS["site",UNIT["metre",1]]'
POINTS = np.array([[0.0, 0.0], [64.0, 0.0], [64.0, 48.0], [0.5, 47.25]])
RPCS = RPC(
    height_off=100, height_scale=500, lat_off=48, lat_scale=0.1, line_off=24, line_scale=24,
    line_den_coeff=[1.0] + [0.0] * 19, line_num_coeff=[0.0, 0.0, -1.0] + [0.0] * 17,
    long_off=15, long_scale=0.1, samp_off=32, samp_scale=32,
    samp_den_coeff=[1.0] + [0.0] * 19, samp_num_coeff=[0.0, 1.0] + [0.0] * 18,
)  # fmt: skip


def corners(*places: tuple[float, float]) -> list[GroundControlPoint]:
    """Return ground control points at the corners of 64x48 pixels, row by row."""
    pixels = [(0, 0), (0, 64), (48, 0), (48, 64)]
    return [GroundControlPoint(*pixel, *place) for pixel, place in zip(pixels, places, strict=False)]


KINDS: dict[str, dict[str, Any]] = {
    "north up": {},
    "rotated": {"transform": ROTATED},
    "sheared": {"transform": compose(NORTH_UP, Affine.shear(20, 5))},
    "south up": {"transform": Affine(0.5, 0, 500_000, 0, 0.5, 5_400_000)},
    "pixel is point": {"tags": {"AREA_OR_POINT": "Point"}},
    "geographic": {"crs": "EPSG:4326", "transform": DEGREES},
    "geographic in 3D": {"crs": "EPSG:4979", "transform": DEGREES},
    "with heights": {"crs": "EPSG:32633+5773"},
    "without a code": {"crs": LAEA, "transform": Affine(0.5, 0, 1000, 0, -0.5, -900)},
    "polar": {"crs": "EPSG:3031", "transform": Affine(10, 0, -320, 0, -10, 240)},
    "JPEG 2000": {"driver": "JP2OpenJPEG"},
    "PNG": {"driver": "PNG"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_where_rasterio_has_them(tmp_path: Path, kind: str) -> None:
    path = write_geotiff(tmp_path / "a.tif", **KINDS[kind])
    with rasterio.open(path) as file:
        xs, ys = rasterio.transform.xy(file.transform, POINTS[:, 1], POINTS[:, 0], offset="ul")
        expected = np.stack(transform(file.crs, "EPSG:4326", xs, ys), axis=1)
    georeference = read_georeference(path)
    assert georeference is not None
    np.testing.assert_allclose(georeference.to_crs(POINTS), np.stack([xs, ys], axis=1), rtol=1e-12)
    np.testing.assert_allclose(georeference.to_wgs84(POINTS), expected, rtol=1e-12)
    np.testing.assert_allclose(georeference.to_pixels(georeference.to_crs(POINTS)), POINTS, atol=1e-6)
    assert georeference.sides == (64, 48)


def test_ground_control_points_are_met(tmp_path: Path) -> None:
    """A trapezoid, which no affine transform has: the points are met, and their images again."""
    gcps = corners((10, 50), (11, 50.1), (10.2, 49), (10.9, 49.2))
    path = write_geotiff(tmp_path / "a.tif", crs="EPSG:4326", transform=None, gcps=gcps)
    georeference = read_georeference(path)
    assert georeference is not None
    pixels = np.array([[gcp.col, gcp.row] for gcp in gcps], dtype=np.float64)
    places = np.array([[gcp.x, gcp.y] for gcp in gcps])
    np.testing.assert_allclose(georeference.to_wgs84(pixels), places, atol=1e-9)
    np.testing.assert_allclose(georeference.to_pixels(places), pixels, atol=1e-6)
    assert np.isnan(georeference.to_pixels(np.array([[np.nan, 1.0]]))).all()


PLACES = {
    UTM: (500_000, 5_400_000, 0.5),
    "EPSG:32760": (640_000, 8_000_000, 10.0),  # at the antimeridian
    "EPSG:3857": (1_800_000, 6_000_000, 0.3),
    "EPSG:3031": (-20_000, 10_000, 100.0),  # around the south pole
    "EPSG:4326": (179.9999, 60, 1e-5),
    "EPSG:27700": (400_000, 300_000, 0.25),
    LAEA: (0, 0, 30.0),
}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(PLACES)),
    angle=st.floats(0, 360),
    is_mirrored=st.booleans(),
    orientation=st.integers(1, 8),
    x=st.floats(0, 3000),
    y=st.floats(0, 2000),
)
def test_pixels_are_the_same_after_a_way_to_wgs84_and_back(
    name: str, angle: float, is_mirrored: bool, orientation: int, x: float, y: float
) -> None:
    left, top, pixel = PLACES[name]
    scale = Affine.scale(pixel, pixel if is_mirrored else -pixel)
    affine = compose(Affine.translation(left, top), Affine.rotation(angle), scale)
    there = Georeference(
        crs=CRS.from_user_input(name),
        stored=Sides(3000, 2000),
        orientation=orientation,
        transform=tuple(affine)[:6],
    )
    places = there.to_wgs84(np.array([[x, y]]))
    back = there.to_pixels(transform_points(places, "EPSG:4326", there.crs))
    np.testing.assert_allclose(back, [[x, y]], atol=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_transform_is_that_of_the_pixels_as_stored(tmp_path: Path, orientation: int) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[1, 4] = 255
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = orientation
    tags[33550], tags[33922] = (0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 500_000.0, 5_400_000.0, 0.0)
    tags[34735] = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)
    tags.tagtype |= {33550: 12, 33922: 12, 34735: 3}
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo=tags)
    georeference = read_georeference(tmp_path / "a.tif")
    assert georeference is not None
    oriented = load_image(tmp_path / "a.tif")
    assert georeference.sides == (oriented.shape[1], oriented.shape[0])
    rows, columns = np.nonzero(oriented[..., 0])
    centre = np.stack([columns + 0.5, rows + 0.5], axis=1)
    np.testing.assert_allclose(georeference.to_crs(centre), [[500_002.25, 5_399_999.25]])
    np.testing.assert_allclose(georeference.to_pixels(georeference.to_crs(centre)), centre)
    as_stored = read_georeference(tmp_path / "a.tif", ReadSpec(exif_orientation="ignore"))
    assert as_stored is not None
    assert as_stored.orientation == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crs": None}, "has a geotransform, but no CRS: assign it with rio edit-info --crs EPSG:CODE FILE"),
        ({"transform": None}, r"has a CRS \(EPSG:32633\), but no geotransform"),
        ({"crs": None, "transform": None, "rpcs": RPCS}, "is located by RPCs.*gdalwarp -rpc"),
        ({"crs": SITE}, r"its CRS \(site\) has no transformation to WGS 84"),
        ({"transform": None, "crs": UTM, "gcps": corners((1, 2), (3, 4))}, "has 2 ground control points"),
        ({"transform": Affine(1, 2, 0, 1, 2, 0)}, "its geotransform maps all pixels to one line"),
        ({"transform": Affine(1e9, 0, 1e12, 0, 1e9, 1e12)}, r"its CRS \(EPSG:32633\) has no transformation"),
    ],
)
def test_an_incomplete_georeference_is_explained(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = write_geotiff(tmp_path / "a.tif", **options)
    with pytest.raises(ImageError, match=rf"a\.tif: {message}"):
        read_georeference(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_geotiff(path, crs=None, transform=None),
        lambda path: Image.new("RGB", (8, 8)).save(path, format="PNG"),
        lambda path: Image.new("RGB", (8, 8)).save(path, format="WEBP"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_images_without_a_georeference_have_none(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "a.tif")
    assert read_georeference(tmp_path / "a.tif") is None


def test_without_rasterio_only_geotiffs_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geotiff = write_geotiff(tmp_path / "a.tif")
    plain = write_geotiff(tmp_path / "b.tif", crs=None, transform=None)
    monkeypatch.setattr(module, "has_rasterio", lambda: False)
    with pytest.raises(ImageError, match=r"a\.tif: its georeference.*pip install 'sniper-det\[tiff\]'"):
        read_georeference(geotiff)
    assert read_georeference(plain) is None


def test_points_without_a_place_are_nan_and_others_are_not() -> None:
    points = np.array([[15.0, 48.0], [15.0, 95.0], [np.nan, 1.0], [15.0, 0.0]])
    moved = transform_points(points, "EPSG:4326", UTM)
    assert np.isnan(moved).all(axis=1).tolist() == [False, True, True, False]
    np.testing.assert_allclose(moved[3], [500_000, 0], atol=1e-6)
    assert transform_points(points[:0], "EPSG:4326", UTM).shape == (0, 2)


def test_a_crs_is_named_by_its_code_or_its_name() -> None:
    names = [describe_crs(CRS.from_user_input(each)) for each in (UTM, LAEA, SITE)]
    assert names == ["EPSG:32633", "unknown", "site"]
