"""DOTA, VisDrone and Open Images."""

from pathlib import Path

import pytest

from sniper.data.datasets import load_dataset
from sniper.errors import AnnotationError
from tests.data.datasets.layouts import boxes_by_file, only_boxes, write_files

HEADER = "imagesource:GoogleEarth\ngsd:0.146\n"
PLANE = "10 10 20 10 20 30 10 30 plane 0\n"
BOX = [10.0, 10.0, 20.0, 30.0]
COLUMNS = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsInside\n"
)
ROW = "a,verification,/m/1,1,0.1,0.2,0.2,0.6,0,0,{},0\n"


def test_dota_is_read_with_envelopes_and_difficult_objects_as_crowds(tmp_path: Path) -> None:
    lines = PLANE + PLANE.replace(" 0\n", " 1\n") + "15 10 20 20 15 30 10 20 ship\n"
    files = {
        "train/labelTxt/P1.txt": HEADER + lines,
        "train/images/P1.png": None,
        "val/labelTxt/P2.txt": HEADER + PLANE.replace("plane", "harbor"),
        "val/images/P2.png": None,
    }
    dataset = load_dataset(write_files(tmp_path, files))
    assert [category.name for category in dataset.categories] == ["harbor", "plane", "ship"]
    assert boxes_by_file(dataset) == {
        "train/images/P1.png": [("plane", BOX, False), ("plane", BOX, True), ("ship", BOX, False)]
    }
    assert (
        "1 line with oriented boxes, used as their envelopes (train/labelTxt/P1.txt, line 5)"
        in dataset.warnings[0]
    )
    assert load_dataset(tmp_path / "train").image_ids.tolist() == ["P1"]


@pytest.mark.parametrize("labels", ["labelTxt", "labelTxt-v1.5", "labelTxt/train"])
def test_folders_of_dota_are_found(tmp_path: Path, labels: str) -> None:
    folder = write_files(tmp_path, {f"{labels}/P1.txt": PLANE, "images/P1.png": None})
    assert only_boxes(load_dataset(folder)) == [BOX]


def test_images_that_are_not_there_are_named_with_the_suffix_of_the_others(tmp_path: Path) -> None:
    write_files(tmp_path, {f"labelTxt/P{number}.txt": PLANE for number in (1, 2)} | {"images/P1.tif": None})
    expected = tmp_path / "images" / "P2.tif"
    with pytest.raises(
        AnnotationError, match=f"\n  images/P2.tif does not exist, expected {expected}; the ann"
    ):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "10 10 20 10 20 30 10 plane\n",
            "has 8 values, expected 8 coordinates, a class, and whether it is difficult",
        ),
        ("10 10 20 x 20 30 10 30 plane 0\n", "'10 10 20 x 20 30 10 30 plane 0', expected 8 numbers"),
        ("10 10 20 10 20 30 10 30 plane hard\n", "expected 8 numbers, a class, and 0 or 1"),
    ],
)
def test_lines_that_are_no_box_of_dota_are_dropped(tmp_path: Path, line: str, problem: str) -> None:
    dataset = load_dataset(write_files(tmp_path, {"labelTxt/P1.txt": PLANE + line, "images/P1.png": None}))
    assert only_boxes(dataset) == [BOX]
    assert "labelTxt/P1.txt, line 2: " in dataset.warnings[0]
    assert problem in dataset.warnings[0]


def test_visdrone_is_read_with_ignored_regions_as_crowds(tmp_path: Path) -> None:
    lines = "10,10,10,20,1,4,0,0\n10,10,10,20,0,0,0,0,\r\n10,10,10,20,1,11,0,0\n\n"
    lines += "1,1,0,5,1,4,0,0\n1,1,5,5,1,12,0,0\n1,1\n"
    files = {"VisDrone2019-DET-train/annotations/a.txt": lines, "VisDrone2019-DET-train/images/a.jpg": None}
    write_files(tmp_path, files)
    for path in (tmp_path, tmp_path / "VisDrone2019-DET-train"):
        dataset = load_dataset(path)
        (boxes,) = boxes_by_file(dataset).values()
        assert boxes == [("car", BOX, False), ("pedestrian", BOX, True), ("pedestrian", BOX, True)]
        assert [category.category_id for category in dataset.categories] == list(range(1, 11))
        warnings = " ".join(dataset.warnings)
        assert "2 lines of regions to ignore or other objects, used as crowds" in warnings
        assert (
            "line 5: the box from x1, y1 to x2, y2 is [1.0, 1.0, 1.0, 6.0], expected width and height"
            in warnings
        )
        assert "line 6: the category is 12, expected 0 to 11" in warnings
        assert "line 7: has 2 values, expected x, y, width, height, score, category" in warnings


@pytest.mark.parametrize(
    ("labels", "line"), [("labelTxt", "0 0 9 0 9 9 0 9 dog 0"), ("annotations", "0,0,9,9,1,4,0,0")]
)
def test_images_without_a_label_file_are_counted(tmp_path: Path, labels: str, line: str) -> None:
    write_files(tmp_path, {f"{labels}/a.txt": line, "images/a.jpg": None, "images/b.jpg": None})
    dataset = load_dataset(tmp_path)
    assert dataset.image_ids.tolist() == ["a"]
    assert "1 image without a label file, not used (images/b.jpg)" in " ".join(dataset.warnings)


def test_open_images_are_read_with_groups_as_crowds(tmp_path: Path) -> None:
    files = {
        "validation-annotations-bbox.csv": COLUMNS
        + ROW.format(0)
        + ROW.format(1)
        + ROW.format(0).replace("a,", "b,", 1),
        "class-descriptions-boxable.csv": "/m/0,Cat\n/m/1,Dog\n",
        "validation/a.jpg": None,
    }
    write_files(tmp_path, files)
    dataset = load_dataset(tmp_path)
    assert boxes_by_file(dataset) == {"validation/a.jpg": [("Dog", BOX, False), ("Dog", BOX, True)]}
    assert [category.name for category in dataset.categories] == ["Cat", "Dog"]
    assert "1 image without a file, left out with their boxes (b)" in dataset.warnings[0]
    images = tmp_path / "validation"
    of_file = load_dataset(tmp_path / "validation-annotations-bbox.csv", image_root=images)
    assert only_boxes(of_file) == [BOX, BOX]


def test_groups_of_open_images_may_be_true_and_boxes_in_pixels_are_refused(tmp_path: Path) -> None:
    header = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n"
    rows = "".join(f"a,Dog,0.1,0.2,0.2,0.6,{flag}\n" for flag in ("True", "false", "1", "0", "-1"))
    write_files(tmp_path, {"labels.csv": header + rows, "a.jpg": None})
    assert load_dataset(tmp_path).is_crowd.tolist() == [True, False, True, False, False]
    write_files(tmp_path, {"labels.csv": header + "a,Dog,10,20,20,30,0\n"})
    with pytest.raises(AnnotationError, match=r"1 of 1 boxes have their centre beyond 1; .*look like pixels"):
        load_dataset(tmp_path)


def test_columns_of_open_images_have_any_order_and_labels_may_be_names(tmp_path: Path) -> None:
    text = "LabelName,XMin,YMin,XMax,YMax,ImageID\nDog,0.1,0.2,0.2,0.6,a.jpg\nCat,0.1,x,0.2,0.6,a\nCat,0.1\n"
    dataset = load_dataset(write_files(tmp_path, {"labels.csv": text, "a.jpg": None}))
    assert boxes_by_file(dataset) == {"a.jpg": [("Dog", BOX, False)]}
    warnings = " ".join(dataset.warnings)
    assert "labels.csv, line 3: the box is '0.1, 0.2, x, 0.6', expected 4 numbers" in warnings
    assert "labels.csv, line 4: has 2 values, expected 6" in warnings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column ImageID, LabelName, XMin, XMax, YMin, YMax"),
        (COLUMNS + ROW.format(0).replace("a,", "b,", 1), "none of the images is in"),
    ],
)
def test_a_csv_without_boxes_or_images_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write_files(tmp_path, {"train.csv": text})
    with pytest.raises(AnnotationError, match=message):
        load_dataset(tmp_path / "train.csv")
