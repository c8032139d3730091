"""CVAT's XML of images: shapes, subsets and labels."""

import re
from pathlib import Path

import pytest

from sniper.data.datasets import load_dataset
from sniper.errors import AnnotationError
from tests.data.datasets.layouts import boxes_by_file, only_boxes, write_files

LABELS = "<meta><task><labels><label><name>bus</name></label><label><name>car</name></label></labels></task></meta>"
CAR = '<box label="car" xtl="10" ytl="10" xbr="20" ybr="30"/>'
BOX = [10.0, 10.0, 20.0, 30.0]


def export(*images: str, meta: str = LABELS) -> str:
    """Return an XML file."""
    content = f"<version>1.1</version>{meta}{''.join(images)}"
    return f'<?xml version="1.0" encoding="utf-8"?><annotations>{content}</annotations>'


def image(*shapes: str, number: int = 7, name: str = "a.jpg", subset: str = "") -> str:
    """Return an image of 100x50 pixels."""
    split = f' subset="{subset}"' if subset else ""
    return f'<image id="{number}" name="{name}" width="100" height="50"{split}>{"".join(shapes)}</image>'


@pytest.mark.parametrize("name", ["annotations.xml", "export 1.xml"])
def test_a_file_and_its_folder_are_read(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, {name: export(image(CAR)), "images/a.jpg": None})
    for path in (tmp_path, tmp_path / name):
        dataset = load_dataset(path)
        assert boxes_by_file(dataset) == {"a.jpg": [("car", BOX, False)]}
        assert [category.name for category in dataset.categories] == ["bus", "car"]
        assert dataset.image_ids.tolist() == [7]
        assert not dataset.warnings


def test_a_file_in_gbk_is_read(tmp_path: Path) -> None:
    labels = LABELS.replace("car", "车")
    content = export(image(CAR.replace("car", "车")), meta=labels).replace("utf-8", "gbk").encode("gbk")
    write_files(tmp_path, {"annotations.xml": content, "images/a.jpg": None})
    assert boxes_by_file(load_dataset(tmp_path)) == {"a.jpg": [("车", BOX, False)]}


def test_sides_beyond_64_bits_are_those_of_the_file(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"annotations.xml": export(image(CAR).replace('"100"', '"1e30"')), "images/a.jpg": None}
    )
    assert load_dataset(tmp_path)[0].width == 100


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg"])
def test_a_name_that_leaves_the_image_root_is_refused(tmp_path: Path, name: str) -> None:
    write_files(
        tmp_path, {"annotations.xml": export(image(CAR, name=name)), "a.jpg": None, "images/b.jpg": None}
    )
    with pytest.raises(AnnotationError, match=rf"image 7 \({name}\): leaves the image root"):
        load_dataset(tmp_path / "annotations.xml")


def test_subsets_are_splits(tmp_path: Path) -> None:
    images = image(CAR, subset="Train"), image(number=8, name="b.jpg", subset="Validation")
    write_files(
        tmp_path, {"annotations.xml": export(*images), "images/Train/a.jpg": None, "images/b.jpg": None}
    )
    assert boxes_by_file(load_dataset(tmp_path)) == {"Train/a.jpg": [("car", BOX, False)]}
    assert load_dataset(tmp_path, split="val").file_names.tolist() == ["b.jpg"]
    assert load_dataset(tmp_path, split="all").image_ids.tolist() == [7, 8]


def test_files_named_after_splits_are_splits(tmp_path: Path) -> None:
    files = {"train.xml": export(image(CAR)), "test.xml": export(image(name="b.jpg"))}
    write_files(tmp_path, {**files, "images/a.jpg": None, "images/b.jpg": None})
    assert load_dataset(tmp_path).image_ids.tolist() == [7]
    assert load_dataset(tmp_path, split="all").image_ids.tolist() == ["train/7", "test/7"]


@pytest.mark.parametrize(
    ("shape", "box", "warning"),
    [
        (CAR.replace("/>", ' rotation="90"/>'), [5, 15, 25, 25], "drawn as rotated boxes, used as their boxes"),
        (CAR.replace("/>", ' rotation="360.0"/>'), BOX, None),
        ('<polygon label="car" points="10,10;20,10;15,30"/>', BOX, None),
        ('<ellipse label="car" cx="15" cy="20" rx="5" ry="10"/>', BOX, "drawn as ellipses, used as their boxes"),
        ('<mask label="car" rle="1, 2" left="10" top="10" width="10" height="20"/>', BOX, "drawn as masks whose"),
        ('<polyline label="car" points="1,1;2,2"/>', None, "of the kind polyline, which has no box, not used"),
        ('<tag label="car"/>', None, "of the kind tag"),
        (CAR.replace("/>", ' outside="1"/>'), None, "marked as outside, not used"),
        (CAR.replace('"20"', '"x"'), None, 'dropped (image 7 (a.jpg), shape 1: is a box with label="car"'),
        ('<polygon label="car" points="10,10"/>', None, "with text in place of numbers, dropped"),
        (CAR.replace("car", "cab"), BOX, "of the label 'cab', which the list of labels lacks (image 7 (a.jpg)"),
    ],
)  # fmt: skip
def test_shapes_become_boxes_or_are_counted(
    tmp_path: Path, shape: str, box: list[float] | None, warning: str | None
) -> None:
    write_files(tmp_path, {"annotations.xml": export(image(shape)), "images/a.jpg": None})
    dataset = load_dataset(tmp_path)
    assert only_boxes(dataset) == ([] if box is None else [box])
    assert (warning is None and not dataset.warnings) or str(warning) in " ".join(dataset.warnings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (export(image(CAR))[:-30], "is not XML"),
        ("<xml/>", "the element is 'xml', expected CVAT's 'annotations'"),
        (export("<track id='0' label='car'/>"), "has tracks of a video; export it from CVAT as"),
        (export(image(CAR, name="")), "image 7 (): has no name"),
        (f'<!DOCTYPE x [<!ENTITY a "aa">]>{export()[38:]}', "declares XML entities"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, content: str, message: str) -> None:
    write_files(tmp_path, {"a.xml": content})
    with pytest.raises(AnnotationError, match=re.escape(message)):
        load_dataset(tmp_path / "a.xml")
