"""Polygons in GeoJSON over georeferenced images."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rasterio.crs import CRS
from rasterio.transform import Affine

from sniper.data.datasets import geojson, load_dataset
from sniper.data.datasets.load import find_splits, load_splits
from sniper.data.images.georeference import read_georeference, transform_points
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from sniper.geometry import Detections
from sniper.inference.georeferenced import to_geojson
from tests.data.datasets.layouts import boxes_by_file, only_boxes, write_files
from tests.data.geotiffs import NORTH_UP, UTM, compose, moved, write_geotiff

CAR = [4.0, 5.0, 20.0, 15.0]
ONE = DataSpec(class_property="none")


def ring_of(box: Sequence[float]) -> list[list[float]]:
    x1, y1, x2, y2 = box
    return [[x1, y1], [x1, y2], [x2, y2], [x2, y1], [x1, y1]]


def to_crs(
    rings: list[list[list[float]]], *, crs: str = "EPSG:4326", pixels: Affine = NORTH_UP, source: str = UTM
) -> list[list[list[float]]]:
    """Return rings in pixels as rings in a CRS."""
    result = []
    for ring in rings:
        columns, rows = np.array(ring).T
        places = np.stack(
            [
                pixels.a * columns + pixels.b * rows + pixels.c,
                pixels.d * columns + pixels.e * rows + pixels.f,
            ],
            axis=1,
        )
        result.append(
            transform_points(places, CRS.from_user_input(source), CRS.from_user_input(crs)).tolist()
        )
    return result


def feature(
    box: Sequence[float] | None = CAR, properties: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Return a feature with a box, given in pixels of the image of `write_geotiff`."""
    geometry = None if box is None else {"type": "Polygon", "coordinates": to_crs([ring_of(box)], **options)}
    return {
        "type": "Feature",
        "properties": {"class": "car"} if properties is None else properties,
        "geometry": geometry,
    }


def collection(*features: dict[str, Any], **members: Any) -> str:
    return json.dumps({"type": "FeatureCollection", **members, "features": features})


def geometry(kind: str, coordinates: Any) -> dict[str, Any]:
    return {**feature(), "geometry": {"type": kind, "coordinates": coordinates}}


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("EPSG:4326", None),
        (UTM, {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}),
        ("EPSG:3857", {"type": "name", "properties": {"name": "EPSG:3857"}}),
        ("EPSG:4326", {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}),
    ],
)
@pytest.mark.parametrize("file", ["labels.geojson", "labels.json"])
def test_polygons_in_any_crs_become_boxes(tmp_path: Path, name: str, member: Any, file: str) -> None:
    write_geotiff(tmp_path / "a.tif")
    members = {} if member is None else {"crs": member}
    (tmp_path / file).write_text(collection(feature(crs=name), **members))
    dataset = load_dataset(tmp_path / file)
    assert dataset.file_names.tolist() == ["a.tif"]
    assert [each.name for each in dataset.categories] == ["car"]
    np.testing.assert_allclose(dataset.boxes, [CAR], atol=1e-4)
    assert not dataset.warnings


@pytest.mark.parametrize("angle", [0, 30])
def test_detections_that_are_written_are_read_as_annotations(tmp_path: Path, angle: float) -> None:
    path = write_geotiff(tmp_path / "images" / "a.tif", transform=compose(NORTH_UP, Affine.rotation(angle)))
    detections = Detections(
        boxes=np.array([CAR, [30.0, 20.0, 44.0, 41.0]]),
        scores=np.array([0.9, 0.4]),
        labels=np.array([1, 0]),
        class_names=("bus", "car"),
    )
    (tmp_path / "found.geojson").write_text(json.dumps(to_geojson(detections, path)))
    dataset = load_dataset(tmp_path / "found.geojson")
    np.testing.assert_allclose(dataset.boxes, detections.boxes, atol=0.01)
    assert [dataset.categories[label].name for label in dataset.labels] == ["car", "bus"]
    assert not dataset.warnings


def test_an_object_is_in_every_image_that_shows_it(tmp_path: Path) -> None:
    """Three tiles in a row: one object reaches from the first into the second, and by half a pixel into the third."""
    for number in range(3):
        write_geotiff(tmp_path / f"{number}.tif", transform=moved(64 * number))
    features = [feature([50, 10, 128.6, 20]), feature([1, 1, 9, 9]), feature([500, 1, 510, 9])]
    (tmp_path / "all.geojson").write_text(collection(*features))
    dataset = load_dataset(tmp_path)
    assert {name: [box for _, box, _ in boxes] for name, boxes in boxes_by_file(dataset).items()} == {
        "0.tif": [[50, 10, 64, 20], [1, 1, 9, 9]],
        "1.tif": [[0, 10, 64, 20]],
        "2.tif": [],
    }
    text = "\n".join(dataset.warnings)
    assert "2 features reaching over the border of an image, whose visible part is used (all.geojson" in text
    assert "1 image without objects, used as background (2.tif)" in text
    assert "1 feature in none of the images, not used (all.geojson, feature 3)" in text


def test_the_box_is_that_of_the_visible_part_of_a_polygon(tmp_path: Path) -> None:
    """A diagonal strip: the part inside is lower than its envelope cut at the border."""
    write_geotiff(tmp_path / "a.tif")
    strip = [[54.0, 10.0], [84.0, 40.0], [84.0, 42.0], [54.0, 12.0], [54.0, 10.0]]
    beside = [[60.0, -20.0], [90.0, 10.0], [90.0, -20.0], [60.0, -20.0]]
    features = [geometry("Polygon", to_crs([strip])), feature(), geometry("Polygon", to_crs([beside]))]
    (tmp_path / "a.geojson").write_text(collection(*features))
    dataset = load_dataset(tmp_path)
    np.testing.assert_allclose(dataset.boxes, [[54.0, 10.0, 64.0, 22.0], CAR], atol=1e-4)
    assert (
        "1 feature outside the image, dropped (a.geojson, feature 3: is outside a.tif)"
        in dataset.warnings[-1]
    )


def test_holes_heights_and_several_polygons_are_read(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "a.tif")
    outer, hole, other = to_crs([ring_of(CAR), ring_of([8, 8, 9, 9]), ring_of([30, 30, 40, 40])])
    raised = [[*place, 123.4] for place in outer]
    features = [
        geometry("Polygon", [raised, hole]),
        geometry("MultiPolygon", [[outer, hole], [other]]),
        {
            **feature(),
            "geometry": {
                "type": "GeometryCollection",
                "geometries": [
                    {"type": "Point", "coordinates": outer[0]},
                    {"type": "Polygon", "coordinates": [other]},
                ],
            },
        },
        feature(properties={"class": "car", "iscrowd": 1}),
    ]
    (tmp_path / "a.geojson").write_text(collection(*features))
    dataset = load_dataset(tmp_path)
    expected = [CAR, [4.0, 5.0, 40.0, 40.0], [30.0, 30.0, 40.0, 40.0], CAR]
    np.testing.assert_allclose(dataset.boxes, expected, atol=1e-4)
    assert dataset.is_crowd.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("bad", "warning"),
    [
        (feature(None), "1 feature without coordinates, not used (a.geojson, feature 2)"),
        (geometry("Polygon", []), "1 feature without coordinates, not used"),
        (geometry("Point", [15, 48]), "without a polygon, dropped (a.geojson, feature 2: is a Point, which has no"),
        (geometry("LineString", [[15, 48], [15, 49]]), "feature 2: is a LineString"),
        (geometry("Polygon", [[[15], [16]]]), "with coordinates that cannot be read, dropped"),
        (geometry("Polygon", [["a", "b"]]), "with coordinates that cannot be read, dropped"),
        (geometry("MultiPolygon", 5), "with coordinates that cannot be read, dropped"),
        (feature(properties={"class": None}), "without a class, dropped (a.geojson, feature 2: class is None"),
        (feature(properties={}), "without a class, dropped"),
        (feature([99, 99, 120, 120]), "outside the image, dropped"),
    ],
)  # fmt: skip
def test_features_that_are_no_objects_are_counted(tmp_path: Path, bad: dict[str, Any], warning: str) -> None:
    write_geotiff(tmp_path / "a.tif")
    (tmp_path / "a.geojson").write_text(collection(feature(), bad))
    dataset = load_dataset(tmp_path)
    np.testing.assert_allclose(dataset.boxes, [CAR], atol=1e-4)
    assert any(warning in line for line in dataset.warnings), dataset.warnings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (collection(geometry("Point", [15, 48])), "all 1 features with coordinates are points or lines, expected poly"),
        (collection(feature(crs=UTM)), "feature 1 is at 500002, 5.4e.06, which are no degrees.*member crs"),
        (collection(feature(pixels=moved(1e5))), "none of the 1 objects is in an image.*longitudes 15"),
        (collection(feature(), crs={"type": "name", "properties": {"name": "EPSG:1"}}), "crs is 'EPSG:1', which"),
        (collection(feature(), crs={"type": "link"}), "expected an object with properties.name"),
        (json.dumps(feature()), "is GeoJSON of type 'Feature', expected a FeatureCollection|expected a FeatureColl"),
        (collection({"type": "Feature", "properties": []}), r"features\[0\].properties"),
        ("{", "is not JSON"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_explained(tmp_path: Path, content: str, message: str) -> None:
    write_geotiff(tmp_path / "b.tif")
    (tmp_path / "a.geojson").write_text(content)
    with pytest.raises(AnnotationError, match=message):
        load_dataset(tmp_path / "a.geojson")


# Classes


@pytest.mark.parametrize(
    ("properties", "wanted", "classes"),
    [
        ([{"class": "b"}, {"class": "a"}], None, [(1, "a"), (2, "b")]),
        ([{"Label": " b "}, {"Label": "b"}], None, [(1, "b")]),
        ([{"type_id": 73}, {"type_id": 11.0}], None, [(11, "Plane"), (73, "73")]),
        ([{"type_id": 73}, {"type_id": "x"}], None, [(1, "73"), (2, "x")]),
        ([{"role": "Civil"}, {"role": "Civil"}], None, [(1, "Civil")]),
        ([{"class": "a", "make": "x"}, {"class": "a", "make": "y"}], "make", [(1, "x"), (2, "y")]),
        ([{"class": "a"}, {"class": "b"}], "none", [(1, "object")]),
        ([{}, {}], None, [(1, "object")]),
    ],
)
def test_the_property_of_the_classes_is_found(
    tmp_path: Path, properties: list[dict[str, Any]], wanted: str | None, classes: list[tuple[int, str]]
) -> None:
    write_geotiff(tmp_path / "a.tif")
    (tmp_path / "a.geojson").write_text(collection(*[feature(properties=each) for each in properties]))
    (tmp_path / "xview_class_labels.txt").write_text("11:Plane\n12:Other\n")
    dataset = load_dataset(tmp_path, data=DataSpec(class_property=wanted))
    assert [(each.category_id, each.name) for each in dataset.categories] == classes
    assert len(dataset.boxes) == 2


def test_a_property_that_is_not_clear_is_asked_for(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "a.tif")
    path = tmp_path / "a.geojson"
    path.write_text(collection(feature(properties={"OBJECTID": 7, "make": "Airbus", "when": None})))
    with pytest.raises(
        AnnotationError, match=r"expected one of class, .*OBJECTID .such as 7., make .such as 'Airbus'"
    ):
        load_dataset(path)
    with pytest.raises(AnnotationError, match=r"no feature has the property when \(data\.class_property\)"):
        load_dataset(path, data=DataSpec(class_property="when"))
    path.write_text(collection(feature(properties={"type": "x", "class": "y"})))
    (warning,) = load_dataset(path).warnings
    assert "the property class has the classes" in warning
    assert "another, such as type" in warning


# Which image


def test_files_and_images_are_paired_by_name(tmp_path: Path) -> None:
    """The layout of RarePlanes, with PNG files, and an image and a file without a partner."""
    for name in ("1", "2", "3"):
        write_geotiff(tmp_path / "PS-RGB_tiled" / f"{name}.png", driver="PNG")
    files = {
        "geojson_aircraft_tiled/1.geojson": collection(feature()),
        "geojson_aircraft_tiled/2.geojson": collection(),
        "geojson_aircraft_tiled/9.geojson": collection(feature()),
    }
    dataset = load_dataset(write_files(tmp_path, files))
    assert {name: len(boxes) for name, boxes in boxes_by_file(dataset).items()} == {
        "PS-RGB_tiled/1.png": 1,
        "PS-RGB_tiled/2.png": 0,
    }
    assert "1 label file without an image, not used (geojson_aircraft_tiled/9.geojson)" in dataset.warnings[0]
    assert "1 image without a label file, not used (PS-RGB_tiled/3.png)" in dataset.warnings[1]


def test_files_of_other_names_are_placed_by_position(tmp_path: Path) -> None:
    """The layout of SpaceNet, whose names have other prefixes, with two folders of images."""
    for number, folder in ((0, "RGB"), (1, "RGB"), (0, "MUL")):
        path = tmp_path / folder / f"{folder}_img{number}.tif"
        write_geotiff(path, transform=moved(64 * number))
    files = {
        f"geojson/buildings/buildings_img{number}.geojson": collection(
            feature([4 + 64 * number, 5, 20 + 64 * number, 15])
        )
        for number in range(2)
    }
    write_files(tmp_path, files)
    with pytest.raises(
        AnnotationError, match=r"may be those in .*MUL and .*RGB; name one of these folders \(--images\)"
    ):
        load_dataset(tmp_path)
    dataset = load_dataset(tmp_path, image_root=tmp_path / "RGB")
    np.testing.assert_allclose(dataset.boxes, [CAR, CAR], atol=1e-4)


def test_pixels_of_xview_are_taken_as_they_are(tmp_path: Path) -> None:
    def row(image: str, box: str) -> dict[str, Any]:
        return feature(properties={"image_id": image, "bounds_imcoords": box, "type_id": 73})

    (tmp_path / "train_images").mkdir()
    for name in ("104.tif", "105.tif"):
        Image.new("RGB", (100, 50)).save(tmp_path / "train_images" / name)
    features = [row("104.tif", "1,2,30,40"), row("1395.tif", "1,2,3,4"), row("104.tif", "1,2,3")]
    (tmp_path / "xView_train.geojson").write_text(collection(*features))
    assert find_splits(tmp_path) == ["train"]
    dataset = load_dataset(tmp_path)
    assert only_boxes(dataset) == [[1, 2, 30, 40]]
    assert dataset.image_ids.tolist() == [104]
    text = "\n".join(dataset.warnings)
    assert "1 image that no feature names, not used (train_images/105.tif)" in text
    assert (
        "of an image that is not there, dropped (xView_train.geojson, feature 2: image_id is '1395.tif'"
        in text
    )
    assert "without a box, dropped (xView_train.geojson, feature 3: bounds_imcoords is '1,2,3'" in text


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"train/labels/a.geojson": 0, "train/images/a.tif": 0, "val/l/b.geojson": 1, "val/images/b.tif": 1}, True),
        (
            {"labels/train/a.geojson": 0, "images/train/a.tif": 0,
             "labels/val/b.geojson": 1, "images/val/b.tif": 1},
            True,
        ),
        ({"train.geojson": 0, "val.geojson": 1, "images/a.tif": 0, "images/b.tif": 1}, True),
        ({"labels/all.geojson": 0, "images/a.tif": 0}, False),
        ({"all.geojson": 0, "images/a.tif": 0}, False),
    ],
)  # fmt: skip
def test_splits_are_found(tmp_path: Path, files: dict[str, int], splits: bool) -> None:
    for name, number in files.items():
        path = tmp_path / name
        if name.endswith(".tif"):
            write_geotiff(path, transform=moved(64 * number))
        else:
            box = [4 + 64 * number, 5, 20 + 64 * number, 15]
            write_files(tmp_path, {name: collection(feature(box, {"class": f"c{number}"}))})
    assert find_splits(tmp_path) == (["train", "val"] if splits else [])
    for dataset in load_splits(tmp_path).values():
        np.testing.assert_allclose(dataset.boxes, [CAR], atol=1e-4)
        assert [each.name for each in dataset.categories] == (["c0", "c1"] if splits else ["c0"])
    if not splits:
        assert len(load_dataset(next(tmp_path.rglob("*.geojson")))) == 1


def test_folders_of_geojson_that_are_no_splits_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, {"a/x.geojson": collection(feature()), "b/x.geojson": collection(feature())})
    with pytest.raises(AnnotationError, match=r"has GeoJSON in several folders, name one of .*a, .*b"):
        load_dataset(tmp_path)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_images_without_a_place_are_refused_or_left_out(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "a.tif")
    write_geotiff(tmp_path / "b.tif", crs=None)
    for name in ("a", "b"):
        (tmp_path / f"{name}.geojson").write_text(collection(feature()))
    with pytest.raises(AnnotationError, match=r"b\.tif: has a geotransform, but no CRS"):
        load_dataset(tmp_path)
    dataset = load_dataset(tmp_path, data=DataSpec(on_bad_image="skip"))
    assert dataset.file_names.tolist() == ["a.tif"]
    assert "b.tif: has a geotransform" in dataset.left_out[0]
    write_geotiff(tmp_path / "b.tif", crs=None, transform=None)
    with pytest.raises(AnnotationError, match=r"b\.tif: has no georeference"):
        load_dataset(tmp_path)


def test_files_without_images_or_rasterio_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(collection(feature()))
    with pytest.raises(AnnotationError, match=r"found no images beside it.*\(--images\)"):
        load_dataset(path)
    write_geotiff(tmp_path / "a.tif")
    monkeypatch.setattr(geojson, "has_rasterio", lambda: False)
    with pytest.raises(AnnotationError, match=r"pip install 'sniper-det\[tiff\]'"):
        load_dataset(path)
    (tmp_path / "a.gpkg").write_bytes(b"SQLite format 3\0")
    with pytest.raises(AnnotationError, match=r"ogr2ogr -f GeoJSON a\.geojson a\.gpkg converts it"):
        load_dataset(tmp_path / "a.gpkg")


def test_objects_on_both_sides_of_the_antimeridian_are_in_one_image(tmp_path: Path) -> None:
    """An image of longitudes beyond 180, and an object that is cut at the antimeridian as RFC 7946 has it."""
    degrees = Affine(0.01, 0, 179.7, 0, -0.01, 10.2)
    path = write_geotiff(tmp_path / "a.tif", crs="EPSG:4326", transform=degrees)
    georeference = read_georeference(path)
    assert georeference is not None
    detections = Detections(
        boxes=np.array([[20.0, 5.0, 50.0, 15.0]]), scores=np.ones(1), labels=np.zeros(1, dtype=np.int64)
    )
    content = to_geojson(detections, path)
    assert content["features"][0]["geometry"]["type"] == "MultiPolygon"
    for each in content["features"]:
        del each["properties"]["image"]
    (tmp_path / "all.geojson").write_text(json.dumps(content))
    np.testing.assert_allclose(load_dataset(tmp_path / "all.geojson").boxes, detections.boxes, atol=1e-4)
    moved = replace(georeference, transform=(0.01, 0, -180.3, 0, -0.01, 10.2))
    places = georeference.to_wgs84(detections.boxes[:, :2])
    np.testing.assert_allclose(moved.to_pixels(places), detections.boxes[:, :2], atol=1e-6)
