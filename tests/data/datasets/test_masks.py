"""Masks of data sets: read as pycocotools reads them, checked, and kept in little memory."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import coco
from pycocotools import mask as reference

from sniper.data.datasets import load_dataset
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from sniper.geometry.boxes import Sides
from sniper.geometry.masks import rasterize
from tests.data.datasets.layouts import write_files
from tests.data.datasets.small import box, changed, load
from tests.data.datasets.test_cvat import export, image
from tests.data_folder import find_data

TRIANGLE = [[2.5, 3, 9, 3, 9, 20]]
RUNS = {"size": [50, 20], "counts": [110, 20, 30, 20, 820]}
COMPRESSED = reference.frPyObjects(RUNS, 50, 20)


def words(warnings: tuple[str, ...]) -> list[str]:
    return [warning.split(": ", 1)[1] for warning in warnings]


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        (TRIANGLE, TRIANGLE),
        ([TRIANGLE[0], [1, 2, 3, 4, 5, 9]], [TRIANGLE[0], [1, 2, 3, 4, 5, 9]]),
        (TRIANGLE[0], TRIANGLE),
        ([["2.5", "3", "9", "3", "9", "20"]], TRIANGLE),
        (RUNS, {**RUNS, "counts": COMPRESSED["counts"].decode()}),
        (
            {**RUNS, "counts": COMPRESSED["counts"].decode()},
            {**RUNS, "counts": COMPRESSED["counts"].decode()},
        ),
    ],
    ids=["polygon", "polygons", "without outer list", "text", "counts", "compressed counts"],
)
@pytest.mark.parametrize("is_usual", [True, False], ids=["usual types", "unusual types"])
def test_masks_are_read_with_their_boxes(
    tmp_path: Path, segmentation: Any, expected: Any, is_usual: bool
) -> None:
    content = changed(box(segmentation=segmentation, **({} if is_usual else {"bbox": ["1", 2, 10, 20]})))
    dataset = load(tmp_path, content, has_images=False)
    assert dataset.warnings == ()
    masks = dataset[1].masks
    assert masks is not None
    assert masks.to_coco() == [expected, None]
    assert dataset[0].masks is not None
    assert not dataset[0].masks.has_mask.any()


def test_masks_are_in_the_order_of_the_boxes(tmp_path: Path) -> None:
    def change(coco: dict[str, Any]) -> None:
        for number, annotation in enumerate(coco["annotations"]):
            annotation["segmentation"] = [[number, 3, 9, 3, 9, 20]]
        coco["annotations"].insert(1, {**coco["annotations"][0], "bbox": [0, 0, 0, 0]})  # dropped

    dataset = load(tmp_path, changed(change), has_images=False)
    assert dataset.masks is not None
    assert [rings[0][0] for rings in dataset.masks.to_coco()] == [1, 0, 2]


def test_masks_are_written_as_they_were_read(tmp_path: Path) -> None:
    content = changed(lambda coco: [coco["annotations"][0].update(segmentation=TRIANGLE)])
    content["annotations"][1]["segmentation"] = {"size": [30, 40], "counts": [40, 1000, 160]}
    dataset = load(tmp_path, content, has_images=False)
    again = load(tmp_path, dataset.to_coco(), has_images=False)
    assert dataset.masks is not None
    assert again.masks is not None
    assert again.masks.to_coco() == dataset.masks.to_coco()
    assert again.digest == dataset.digest


def test_a_data_set_without_masks_has_none(tmp_path: Path) -> None:
    assert load(tmp_path, has_images=False).masks is None
    content = changed(box(segmentation=TRIANGLE))
    assert load(tmp_path, content, has_images=False, data=DataSpec(masks="ignore")).masks is None
    assert load(tmp_path, changed(box(segmentation=[])), has_images=False).masks is None


BAD = [
    ("?", "that cannot be read, left out; expected lists of x, y", "segmentation is '\"?\"'"),
    ([[1, 2, 3, 4, 5]], "that cannot be read, left out", "[[1, 2, 3, 4, 5]]"),
    ([[1, 2, 3, 4, 5, None]], "that cannot be read, left out", "annotation 1 of image 10"),
    ({"size": [50], "counts": "0"}, "that cannot be read, left out", "annotation 1 of image 10"),
    ({"size": [0, 20], "counts": "0"}, "that cannot be read, left out", "annotation 1 of image 10"),
    ([[1, 2, 3, 4]], "with a polygon of fewer than 3 points, which is left out", "[[1, 2, 3, 4]]"),
    (
        {"size": [20, 50], "counts": [1000]},
        "of another size than the image, left out",
        "are of 50x20 pixels, the image of 20x50",
    ),
    (
        {"size": [50, 20], "counts": [900]},
        "whose run lengths do not fill their size, left out",
        "of 20x50 pixels",
    ),
    ({"size": [50, 20], "counts": "é"}, "that cannot be read, left out", "annotation 1 of image 10"),
    ({"size": [50, 20], "counts": [1000]}, "without a pixel, left out", "no pixel is set"),
    ([[1, 2, 3, 2, 9, 2]], "without width or height, left out", "the mask spans 1 2 9 2"),
    ([[21, 2, 30, 2, 30, 9]], "outside the image, left out", "outside its image of 20x50 pixels"),
    ([[12, 2, 18, 2, 18, 9]], "outside the box, left out", "outside its box of [1.0, 2.0, 11.0, 22.0]"),
    (
        [[-5, 2, 18, 2, 18, 9]],
        "with points outside the image, used inside it",
        "-5 2 18 9 (x1 y1 x2 y2) in 20x50",
    ),
]


@pytest.mark.parametrize(
    ("segmentation", "problem", "example"), BAD, ids=[f"{each[1]}-{each[2]}" for each in BAD]
)
def test_a_mask_that_cannot_be_used_is_left_out_or_refused(
    tmp_path: Path, segmentation: Any, problem: str, example: str
) -> None:
    content = changed(box(segmentation=segmentation))
    dataset = load(tmp_path, content, has_images=False)
    assert (len(dataset.boxes), dataset.num_dropped) == (3, 0)
    (warning,) = words(dataset.warnings)
    assert warning.startswith(f"1 mask {problem}")
    assert example in warning
    assert (dataset.masks is None) == ("used inside" not in problem)
    with pytest.raises(AnnotationError, match="1 problem"):
        load(tmp_path, content, has_images=False, data=DataSpec(on_bad_box="refuse"))


def test_the_other_polygons_of_an_object_remain(tmp_path: Path) -> None:
    dataset = load(tmp_path, changed(box(segmentation=[[1, 2, 3, 4], *TRIANGLE])), has_images=False)
    assert dataset.masks is not None
    assert dataset.masks.to_coco()[1] == TRIANGLE


def test_all_boxes_are_computed_from_masks_on_request(tmp_path: Path) -> None:
    content = changed(box(segmentation=TRIANGLE))
    computed = load(tmp_path, content, has_images=False, data=DataSpec(boxes_from_masks="all"))
    assert computed[1].boxes.tolist() == [[2.5, 3, 9, 20], [0, 0, 20, 50]]
    assert load(tmp_path, content, has_images=False)[1].boxes[0].tolist() == [1, 2, 11, 22]
    with pytest.raises(ValueError, match="boxes_from_masks must be missing with masks: ignore"):
        DataSpec(boxes_from_masks="all", masks="ignore")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
@pytest.mark.parametrize(("name", "most"), [("nuclei", 0.04), ("coco_masks", 0.01)])
def test_real_masks_are_those_of_pycocotools(name: str, most: float) -> None:
    path = find_data(f"data/{name}/test.json")
    dataset = load_dataset(path, has_images=False)
    assert dataset.masks is not None
    assert dataset.masks.has_mask.all()
    with contextlib.redirect_stdout(io.StringIO()):
        expected = coco.COCO(str(path))
    differing = pixels = 0
    for index in range(0, len(dataset), 9):
        record = dataset[index]
        annotations = expected.imgToAnns[record.image_id]
        rows = np.arange(len(annotations))
        region = np.tile([0.0, 0.0, record.width, record.height], (len(rows), 1))
        assert record.masks is not None
        rasters = rasterize(record.masks, rows, region, sides=Sides(record.width, record.height))
        for raster, annotation, is_encoded in zip(
            rasters, annotations, record.masks.is_encoded.tolist(), strict=True
        ):
            theirs = expected.annToMask(annotation).astype(bool)
            if is_encoded:
                assert np.array_equal(raster, theirs)
            # pycocotools rounds corners to a fifth of a pixel: pixels that the outline crosses differ.
            differing += int((raster != theirs).sum())
            pixels += int(theirs.sum())
    assert differing < most * pixels


@pytest.mark.parametrize("name", ["nuclei", "coco_masks"])
def test_masks_take_at_most_half_more_than_their_text(name: str) -> None:
    path = find_data(f"data/{name}/train.json")
    masks = load_dataset(path, has_images=False).masks
    texts = [
        json.dumps(each["segmentation"], separators=(",", ":"))
        for each in json.loads(path.read_text())["annotations"]
    ]
    assert masks is not None
    assert masks.nbytes < 1.5 * sum(map(len, texts))


def test_segments_of_yolo_are_masks(tmp_path: Path) -> None:
    lines = "0 0.1 0.2 0.5 0.2 0.5 0.6\n0 0.5 0.5 0.2 0.4\n0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n"
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": lines, "classes.txt": "cat"})
    dataset = load_dataset(tmp_path)
    assert dataset.masks is not None
    assert dataset.warnings == ()
    assert dataset.masks.to_coco() == [
        [[10, 10, 50, 10, 50, 30]],
        None,
        [[10, 5, 20, 5, 20, 10, 10, 10]],
    ]
    assert load_dataset(tmp_path, data=DataSpec(masks="ignore")).masks is None


def test_oriented_boxes_of_yolo_are_no_masks(tmp_path: Path) -> None:
    lines = "0 0.4 0.5 0.5 0.3 0.6 0.5 0.5 0.7\n" * 2
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": lines, "classes.txt": "cat"})
    assert load_dataset(tmp_path).masks is None


def test_polygons_and_masks_of_cvat_are_masks(tmp_path: Path) -> None:
    shapes = (
        '<polygon label="car" points="10,10;20.5,10;15,30"/>'
        '<box label="car" xtl="1" ytl="1" xbr="5" ybr="5"/>'
        '<mask label="car" rle="1, 3, 2, 2, 1" left="10" top="20" width="3" height="3"/>'
    )
    write_files(tmp_path, {"annotations.xml": export(image(shapes)), "images/a.jpg": None})
    dataset = load_dataset(tmp_path)
    assert dataset.warnings == ()
    assert dataset.masks is not None
    assert dataset.masks.to_coco()[:2] == [[[10, 10, 20.5, 10, 15, 30]], None]
    raster = rasterize(dataset.masks, np.array([2]), np.array([[10.0, 20.0, 13.0, 23.0]]), sides=Sides(3, 3))
    assert raster[0].astype(int).tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 0]]
