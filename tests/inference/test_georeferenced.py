"""GeoJSON and GeoPackage of georeferenced images: where boxes are, and files that are whole or absent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
from rasterio.transform import Affine
from rasterio.warp import transform

import sniper
from sniper.chips import LevelSpec
from sniper.data.images import tiff
from sniper.data.spec import ReadSpec
from sniper.errors import ConfigError, ImageError
from sniper.geometry import Detections
from sniper.geometry.detection_masks import DetectionMasks
from sniper.inference.georeferenced import (
    GeoreferencedImages,
    check_replaceable,
    remove_earlier,
    to_geojson,
    write_georeferenced,
)
from sniper.inference.results import ImageToSearch, search_to_file
from tests.data.geotiffs import NORTH_UP, UTM, compose, moved, write_geotiff
from tests.inference.blobs import blob_detector, draw_blobs

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")

OTHER = "EPSG:32760"
AT_ANTIMERIDIAN = Affine(100, 0, 813_500, 0, -100, 8_000_000)
SOUTH_POLE = Affine(100, 0, -3200, 0, -100, 2400)
CRACK = [10.0, 20.0, 30.0, 24.0]


def detections_of(*boxes: list[float], score: float = 0.87654321) -> Detections:
    return Detections(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        scores=np.full(len(boxes), score),
        labels=np.zeros(len(boxes), dtype=np.int64),
        class_names=("crack",),
    )


def signed_area(ring: list[list[float]]) -> float:
    xs, ys = np.array(ring).T
    return float((xs[:-1] * ys[1:] - xs[1:] * ys[:-1]).sum() / 2)


@pytest.mark.parametrize(
    "affine",
    [NORTH_UP, compose(NORTH_UP, Affine.rotation(30)), Affine(0.5, 0, 500_000, 0, 0.5, 5_400_000)],
    ids=["north up", "rotated", "south up"],
)
def test_a_detection_is_the_polygon_of_its_corners(tmp_path: Path, affine: Affine) -> None:
    path = write_geotiff(tmp_path / "a.tif", transform=affine)
    collection = sniper.to_geojson(detections_of(CRACK), path)
    (feature,) = json.loads(json.dumps(collection))["features"]
    assert feature["properties"] == {"class": "crack", "score": 0.87654, "image": str(path)}
    assert feature["geometry"]["type"] == "Polygon"
    (ring,) = feature["geometry"]["coordinates"]
    assert ring[0] == ring[-1]
    assert signed_area(ring) > 0  # anticlockwise
    x1, y1, x2, y2 = CRACK
    with rasterio.open(path) as file:
        xs, ys = rasterio.transform.xy(file.transform, [y1, y2, y2, y1], [x1, x1, x2, x2], offset="ul")
        expected = np.stack(transform(file.crs, "EPSG:4326", xs, ys), axis=1)
    order = [tuple(place) for place in expected.round(8).tolist()]
    assert {tuple(place) for place in ring} == set(order)
    start = order.index(tuple(ring[0]))
    turned = order[start:] + order[:start]
    assert [tuple(place) for place in ring[:-1]] in (turned, [turned[0], *turned[:0:-1]])


def test_a_detection_across_the_antimeridian_is_cut_there(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", crs=OTHER, transform=AT_ANTIMERIDIAN)
    (feature,) = to_geojson(detections_of([0, 0, 64, 48]), path)["features"]
    assert feature["geometry"]["type"] == "MultiPolygon"
    (west,), (east,) = feature["geometry"]["coordinates"]
    assert max(x for x, _ in west) == 180
    assert min(x for x, _ in east) == -180
    assert min(x for x, _ in west) > 179
    assert max(x for x, _ in east) < -179
    with rasterio.open(path) as file:
        longitudes, latitudes = transform(
            file.crs, "EPSG:4326", [813_500, 819_900] * 2, [8e6, 8e6, 7_995_200, 7_995_200]
        )
    unwrapped = np.array([[x % 360, y] for x, y in zip(longitudes, latitudes, strict=True)])[[0, 2, 3, 1, 0]]
    whole = signed_area(unwrapped.tolist())
    assert signed_area(west) > 0
    assert signed_area(east) > 0
    assert signed_area(west) + signed_area(east) == pytest.approx(whole, rel=1e-6)


def test_a_detection_around_a_pole_reaches_it(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", crs="EPSG:3031", transform=SOUTH_POLE)
    (feature,) = to_geojson(detections_of([22, 14, 42, 34]), path)["features"]
    rings = [polygon[0] for polygon in feature["geometry"]["coordinates"]]
    places = [place for ring in rings for place in ring]
    assert {y for _, y in places} == {-90, max(y for _, y in places)}
    assert sum(max(x for x, _ in ring) - min(x for x, _ in ring) for ring in rings) == pytest.approx(360)
    assert all(signed_area(ring) > 0 for ring in rings)


def test_an_image_without_a_georeference_is_refused(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.jpg", driver="PNG", crs=None, transform=None)
    with pytest.raises(ImageError, match=r"a\.jpg: has no georeference"):
        to_geojson(detections_of(CRACK), path)


def test_labels_stand_for_names_that_are_unknown(tmp_path: Path) -> None:
    nameless = Detections(boxes=np.array([CRACK]), scores=np.array([0.5]), labels=np.array([3]))
    (feature,) = to_geojson(nameless, write_geotiff(tmp_path / "a.tif"))["features"]
    assert feature["properties"]["class"] == "3"
    assert to_geojson(Detections.empty(), tmp_path / "a.tif")["features"] == []


def images_of(*paths: Path) -> list[ImageToSearch]:
    return [
        ImageToSearch(image_id=number, path=path, file_name=path.name)
        for number, path in enumerate(paths, start=1)
    ]


def write_all(
    images: list[ImageToSearch], folder: Path, detections: Callable[[int], Detections]
) -> tuple[GeoreferencedImages, tuple[str, ...]]:
    found = GeoreferencedImages.find(images, ReadSpec())
    warnings = write_georeferenced(
        found,
        images,
        detections,
        read=ReadSpec(),
        geojson=folder / "found.geojson",
        gpkg=folder / "found.gpkg",
    )
    return found, warnings


def test_files_have_the_detections_of_images_in_several_crs(tmp_path: Path) -> None:
    paths = [
        write_geotiff(tmp_path / "a.tif"),
        write_geotiff(tmp_path / "b.tif", crs=OTHER),
        write_geotiff(tmp_path / "c.tif", crs=None),
        write_geotiff(tmp_path / "d.tif", transform=moved(64)),
        tmp_path / "absent.tif",
        write_geotiff(tmp_path / "e.tif", crs=None, transform=None),
    ]
    boxes: list[list[list[float]]] = [[CRACK], [CRACK, [0, 0, 8, 8]], [CRACK], [], [], [CRACK]]
    found, warnings = write_all(images_of(*paths), tmp_path, lambda index: detections_of(*boxes[index]))
    assert not warnings
    assert found.indices == [0, 1, 3]
    assert "1 image has no usable georeference" in found.warnings[0]
    assert "c.tif: has a geotransform, but no CRS" in found.warnings[0]
    collection = json.loads((tmp_path / "found.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    assert [each["properties"]["image"] for each in collection["features"]] == ["a.tif", "b.tif", "b.tif"]
    layers = {"detections_epsg_32633": (UTM, 1), "detections_epsg_32760": (OTHER, 2)}
    assert set(pyogrio.list_layers(tmp_path / "found.gpkg")[:, 0]) == set(layers)
    for layer, (crs, count) in layers.items():
        info = pyogrio.read_info(tmp_path / "found.gpkg", layer=layer)
        assert (info["crs"], info["features"]) == (crs, count)
        assert info["fields"].tolist() == ["class", "score", "image"]
    assert pyogrio.read_info(tmp_path / "found.geojson")["features"] == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_geopackage_is_in_the_crs_of_its_images(tmp_path: Path) -> None:
    laea = "+proj=laea +lat_0=50 +lon_0=14 +datum=WGS84"
    path = write_geotiff(tmp_path / "a.tif", crs=laea, transform=Affine(2, 0, 1000, 0, -2, 900))
    write_all(images_of(path), tmp_path, lambda _: detections_of(CRACK))
    assert pyogrio.list_layers(tmp_path / "found.gpkg")[:, 0].tolist() == ["detections"]
    assert pyogrio.read_bounds(tmp_path / "found.gpkg")[1][:, 0].tolist() == [1020, 852, 1060, 860]
    assert "Lambert_Azimuthal_Equal_Area" in pyogrio.read_info(tmp_path / "found.gpkg")["crs"]


def test_many_detections_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sniper.inference.georeferenced._FEATURES_AT_ONCE", 3)
    paths = [write_geotiff(tmp_path / f"{number}.tif") for number in range(4)]
    write_all(images_of(*paths), tmp_path, lambda _: detections_of(CRACK, [0, 0, 8, 8]))
    assert pyogrio.read_info(tmp_path / "found.gpkg")["features"] == 8


def test_detections_off_the_earth_are_counted(tmp_path: Path) -> None:
    """A full disc of a geostationary satellite: its corners are in space."""
    crs = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84"
    path = write_geotiff(
        tmp_path / "a.tif", crs=crs, transform=Affine(170_000, 0, -5.44e6, 0, -226_000, 5.424e6)
    )
    _, warnings = write_all(
        images_of(path), tmp_path, lambda _: detections_of([30, 22, 34, 26], [0, 0, 8, 8])
    )
    assert "lacks detections without a place on the Earth" in warnings[0]
    assert "a.tif: 1 of 2 detections" in warnings[0]
    assert len(json.loads((tmp_path / "found.geojson").read_text())["features"]) == 1
    assert pyogrio.read_info(tmp_path / "found.gpkg")["features"] == 1


def test_files_of_others_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geojson, gpkg = tmp_path / "found.geojson", tmp_path / "found.gpkg"
    check_replaceable(geojson, gpkg)
    write_all(images_of(write_geotiff(tmp_path / "a.tif")), tmp_path, lambda _: detections_of(CRACK))
    check_replaceable(geojson, gpkg)
    (tmp_path / "not.gpkg").write_bytes(b"SQLite format 3\0")
    with pytest.raises(ConfigError, match=r"not\.gpkg: was not written by sniper predict"):
        check_replaceable(geojson, tmp_path / "not.gpkg")
    remove_earlier(geojson)
    assert not geojson.exists()
    geojson.write_text('{"type": "FeatureCollection", "features": []}')
    remove_earlier(geojson)
    with pytest.raises(
        ConfigError, match=r"found\.geojson: was not written by .* choose another name \(-o\)"
    ):
        check_replaceable(geojson, None)
    monkeypatch.setattr("sniper.inference.georeferenced.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--gpkg requires pyogrio: pip install 'sniper-det\[geo\]'"):
        check_replaceable(tmp_path / "new.geojson", gpkg)


def test_a_large_image_is_searched_in_windows_to_half_a_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each drawn rectangle is found, where rasterio has it; a search that is stopped and resumed writes the same."""
    monkeypatch.setattr(tiff, "WINDOWED_PIXELS", 1_000_000)
    pixels, drawn = draw_blobs(0, width=1400, height=1000, smallest=8, largest=60)
    affine = compose(Affine.translation(600_000, 8_000_000), Affine.rotation(12), Affine.scale(0.3, -0.3))
    path = write_geotiff(
        tmp_path / "large.tif", pixels, crs=OTHER, transform=affine, tiled=True, compress="deflate"
    )
    images = images_of(path)
    found = GeoreferencedImages.find(images, ReadSpec())

    def write(read: Callable[[int], Detections]) -> None:
        write_georeferenced(
            found,
            images,
            lambda index: read(index).confident(0.3),
            read=ReadSpec(),
            geojson=tmp_path / "large.geojson",
            gpkg=None,
        )

    def stop(read: Callable[[int], Detections]) -> None:
        read(0)
        raise KeyboardInterrupt

    options: dict[str, Any] = {"source": {}, "on_progress": lambda *_: None}
    detector = blob_detector(LevelSpec(factor=1.0), window=512)
    target = tmp_path / "large.json"
    with pytest.raises(KeyboardInterrupt):
        search_to_file(detector, images, target, existing="replace", on_results=stop, **options)
    assert not (tmp_path / "large.geojson").exists()
    report = search_to_file(detector, images, target, existing="resume", on_results=write, **options)
    features = json.loads((tmp_path / "large.geojson").read_text())["features"]
    assert len(features) == report.num_shown == len(drawn)
    boxes = []
    with rasterio.open(path) as file:
        for feature in features:
            xs, ys = transform(
                "EPSG:4326", file.crs, *zip(*feature["geometry"]["coordinates"][0], strict=True)
            )
            rows, columns = rasterio.transform.rowcol(file.transform, xs, ys, op=np.positive)
            boxes.append([np.min(columns), np.min(rows), np.max(columns), np.max(rows)])
    np.testing.assert_allclose(sorted(boxes), sorted(drawn.tolist()), atol=0.5)


def with_masks(*boxes: list[float]) -> Detections:
    """Return detections whose masks have a hole in the middle; the last has an empty mask."""
    grids = np.full((len(boxes), 28, 28), 255, dtype=np.uint8)
    grids[:, 10:18, 10:18] = 0
    grids[-1] = 0
    found = detections_of(*boxes)
    return found.with_masks(DetectionMasks.of(grids, found.boxes))


def test_a_mask_is_the_polygon_of_its_outline_with_holes(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif")
    masked, bare = to_geojson(with_masks([8, 8, 36, 36], CRACK), path)["features"]
    assert bare["geometry"] == to_geojson(detections_of(CRACK), path)["features"][0]["geometry"]
    assert masked["geometry"]["type"] == "Polygon"
    exterior, hole = masked["geometry"]["coordinates"]
    assert signed_area(exterior) > 0  # anticlockwise
    assert signed_area(hole) < 0
    (box,) = to_geojson(detections_of([8, 8, 36, 36]), path)["features"]
    whole = signed_area(box["geometry"]["coordinates"][0])
    assert signed_area(exterior) == pytest.approx(whole, rel=1e-3)
    assert signed_area(hole) == pytest.approx(-whole * 64 / 784, rel=0.06)


def test_a_mask_across_the_antimeridian_is_cut_with_its_hole(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "a.tif", crs=OTHER, transform=AT_ANTIMERIDIAN)
    masked, _ = to_geojson(with_masks([0, 0, 64, 48], CRACK), path)["features"]
    assert masked["geometry"]["type"] == "MultiPolygon"
    west, east = masked["geometry"]["coordinates"]
    assert len(west) + len(east) >= 3
    for exterior, *holes in (west, east):
        assert signed_area(exterior) > 0
        xs = [x for x, _ in exterior]
        assert all(min(xs) <= x <= max(xs) for hole in holes for x, _ in hole)


def test_a_geopackage_has_masks_as_polygons(tmp_path: Path) -> None:
    images = images_of(write_geotiff(tmp_path / "a.tif"))
    write_all(images, tmp_path, lambda _: with_masks([8, 8, 36, 36], CRACK))
    info = pyogrio.read_info(tmp_path / "found.gpkg")
    assert (info["geometry_type"], info["features"]) == ("MultiPolygon", 2)
    _, _, geometries, _ = pyogrio.raw.read(tmp_path / "found.gpkg")
    masked, bare = map(bytes, geometries)
    assert int.from_bytes(masked[14:18], "little") == 2  # rings of the first polygon
    assert int.from_bytes(bare[14:18], "little") == 1
