"""Pascal VOC data sets: layouts, the origin of coordinates, and objects that cannot be used."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.data.datasets import load_dataset
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from sniper.geometry.boxes import Sides
from sniper.geometry.masks import rasterize
from tests.data.datasets.layouts import boxes_by_file, only_boxes, write_files


def element(*objects: str, name: str = "a.jpg", size: str = "<width>100</width><height>50</height>") -> str:
    """Return an XML file."""
    return f"<annotation><filename>{name}</filename><size>{size}<depth>3</depth></size>{''.join(objects)}</annotation>"


def item(*bounds: object, name: str = "dog", extra: str = "") -> str:
    """Return an object; without 4 bounds it has no bndbox."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, bounds, strict=False))
    return (
        f"<object><name>{name}</name>{extra}" + (f"<bndbox>{inner}</bndbox>" if bounds else "") + "</object>"
    )


DOG = item(11, 11, 20, 30)
BOX = [10.0, 10.0, 20.0, 30.0]


@pytest.mark.parametrize(
    "files",
    [
        {"Annotations/a.xml": element(DOG), "JPEGImages/a.jpg": None},
        {"annotations/a.xml": element(DOG, name="a"), "images/a.png": None},
        {"annotations/xmls/a.xml": element(DOG, name="C:\\work\\other.jpg"), "images/a.jpg": None},
        {"a.xml": element(DOG), "a.jpg": None},
        {"train/a.xml": element(DOG), "train/a.jpg": None, "valid/b.xml": element(DOG), "valid/b.jpg": None},
        {
            "Annotations/a.xml": element(DOG),
            "Annotations/b.xml": element(item(1, 1, 2, 2, name="cat")),
            "JPEGImages/a.jpg": None,
            "JPEGImages/b.jpg": None,
            "ImageSets/Main/train.txt": "a\n",
            "ImageSets/Main/val.txt": "b\n",
            "ImageSets/Main/dog_train.txt": "a  1\n",
        },
    ],
)
def test_the_usual_layouts_are_read(tmp_path: Path, files: dict[str, str | None]) -> None:
    dataset = load_dataset(write_files(tmp_path, files))
    (boxes,) = boxes_by_file(dataset).values()
    assert boxes == [("dog", BOX, False)]
    assert dataset.image_ids.tolist() == ["a"]
    assert not dataset.warnings


def test_all_splits_have_the_same_categories(tmp_path: Path) -> None:
    files = {
        "Annotations/a.xml": element(DOG),
        "Annotations/b.xml": element(item(1, 1, 2, 2, name="cat")),
        "JPEGImages/a.jpg": None,
        "JPEGImages/b.jpg": None,
        "ImageSets/Main/train.txt": "a\n",
        "ImageSets/Main/val.txt": "b\n",
        "ImageSets/Main/trainval.txt": "a\nb\n",
    }
    write_files(tmp_path, files)
    splits = {split: load_dataset(tmp_path, split=split) for split in ("train", "val", "trainval", "all")}
    assert {split: len(dataset) for split, dataset in splits.items()} == {
        "train": 1,
        "val": 1,
        "trainval": 2,
        "all": 2,
    }
    for dataset in splits.values():
        assert [(category.category_id, category.name) for category in dataset.categories] == [
            (1, "cat"),
            (2, "dog"),
        ]


def test_boxes_are_inclusive_pixels_from_1(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.xml": element(item(1, 1, 100, 50), item(5.5, 2, 9, 9)), "a.jpg": None})
    assert only_boxes(load_dataset(tmp_path)) == [[0, 0, 100, 50], [4.5, 1, 9, 9]]


def test_a_coordinate_of_0_anywhere_shows_that_they_start_at_0(tmp_path: Path) -> None:
    files = {
        "train/a.xml": element(item(10, 10, 20, 30)),
        "train/a.jpg": None,
        "val/b.xml": element(item(0, 3, 5, 6)),
        "val/b.jpg": None,
    }
    dataset = load_dataset(write_files(tmp_path, files))
    assert only_boxes(dataset) == [BOX]
    assert "xmin or ymin is below 1 in 1 of the boxes" in dataset.warnings[0]
    assert "(val/b.xml, object 1: [0.0, 3.0, 5.0, 6.0])" in dataset.warnings[0]


@pytest.mark.parametrize(
    ("text", "is_crowd"), [("1", True), ("True", True), ("0", False), ("Unspecified", False)]
)
def test_difficult_is_a_number_or_true(tmp_path: Path, text: str, is_crowd: bool) -> None:
    files = {"a.xml": element(item(11, 11, 20, 30, extra=f"<difficult>{text}</difficult>")), "a.jpg": None}
    assert load_dataset(write_files(tmp_path, files)).is_crowd.tolist() == [is_crowd]


def test_difficult_objects_are_crowds_and_parts_are_passed_over(tmp_path: Path) -> None:
    part = f"<part><name>head</name>{item(1, 1, 2, 2)}</part>"
    objects = item(11, 11, 20, 30, extra="<difficult>1</difficult>"), item(11, 11, 20, 30, extra=part)
    write_files(tmp_path, {"a.xml": element(*objects), "a.jpg": None})
    assert boxes_by_file(load_dataset(tmp_path))["a.jpg"] == [("dog", BOX, True), ("dog", BOX, False)]


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<width>0</width><height>0</height>",
        "<width>?</width><height>50</height>",
        "<width>1e30</width><height>50</height>",
    ],
)
def test_sides_that_are_missing_are_those_of_the_file(tmp_path: Path, size: str) -> None:
    write_files(tmp_path, {"a.xml": element(DOG, size=size), "a.jpg": None})
    record = load_dataset(tmp_path, has_images=False)[0]
    assert (record.width, record.height) == (100, 50)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (item(), "1 object without a box, dropped (a.xml, object 2: has no bndbox)"),
        (item(1, "ten", 5, 5), "object 2: ymin is 'ten', expected a number"),
        (item(1, 1, 5), "object 2: ymax is '', expected a number"),
        (item(1, 1, 5, 5, name=" "), "1 object without a name, dropped (a.xml, object 2: has no name)"),
        (item(20, 5, 10, 9), "1 box without width or height, dropped (a.xml, object 2: "),
        (item("nan", 5, 10, 9), "1 box with numbers that are not finite, dropped (a.xml, object 2: "),
    ],
)
def test_objects_that_are_no_box_are_dropped_or_refused(tmp_path: Path, wrong: str, problem: str) -> None:
    write_files(tmp_path, {"a.xml": element(DOG, wrong), "a.jpg": None})
    dataset = load_dataset(tmp_path)
    assert only_boxes(dataset) == [BOX]
    assert problem in " ".join(dataset.warnings)
    with pytest.raises(AnnotationError, match=r"1 problem\n  a\.xml, object 2: "):
        load_dataset(tmp_path, data=DataSpec(on_bad_box="refuse"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("<annotation><object>", "b.xml: is not XML (no element found"),
        ("", "b.xml: is not XML (no element found"),
        ("<other/>", "b.xml: the element is 'other', expected VOC's 'annotation'"),
        (
            '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>',
            "b.xml: declares XML entities",
        ),
        ('<?xml version="1.0" encoding="abacus"?><annotation/>', "b.xml: is not XML (unknown encoding"),
    ],
)
def test_files_that_are_not_xml_of_voc_are_refused_together(
    tmp_path: Path, content: str, problem: str
) -> None:
    write_files(tmp_path, {"a.xml": element(DOG), "a.jpg": None, "b.xml": content, "c.xml": content})
    with pytest.raises(AnnotationError, match="2 problems\n") as caught:
        load_dataset(tmp_path)
    assert problem in str(caught.value)


@pytest.mark.parametrize("encoding", ["gbk", "GB2312", "Shift_JIS", "big5", "utf-16", "iso-8859-1"])
def test_any_encoding_may_be_declared(tmp_path: Path, encoding: str) -> None:
    name = "dog" if encoding.startswith("iso") else "犬"
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + element(item(11, 11, 20, 30, name=name))
    write_files(tmp_path, {"Annotations/a.XML": text.encode(encoding), "JPEGImages/a.jpg": None})
    assert boxes_by_file(load_dataset(tmp_path)) == {"JPEGImages/a.jpg": [(name, BOX, False)]}


def test_a_list_may_have_suffixes_and_folders(tmp_path: Path) -> None:
    files = {"Annotations/a.xml": element(DOG), "JPEGImages/a.jpg": None}
    for line in ("a.jpg", "a.xml", "/home/me/JPEGImages/a.jpg", "C:\\data\\a.jpg"):
        write_files(tmp_path, {**files, "ImageSets/Main/train.txt": f"{line}\r\n"})
        dataset = load_dataset(tmp_path)
        assert only_boxes(dataset) == [BOX]
        assert not dataset.warnings


def test_images_without_xml_are_counted_where_no_list_names_them(tmp_path: Path) -> None:
    files = {"Annotations/a.xml": element(DOG), "JPEGImages/a.jpg": None, "JPEGImages/b.jpg": None}
    dataset = load_dataset(write_files(tmp_path, files))
    assert dataset.file_names.tolist() == ["JPEGImages/a.jpg"]
    assert "1 image without an XML file, not used (JPEGImages/b.jpg)" in dataset.warnings[0]
    write_files(tmp_path, {"ImageSets/Main/train.txt": "a\n"})
    assert not load_dataset(tmp_path).warnings


def test_a_file_name_does_not_leave_the_folders_of_images(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"")
    files = {"Annotations/b.xml": element(DOG, name="../../secret.jpg"), "JPEGImages/a.jpg": None}
    with pytest.raises(AnnotationError, match=r"JPEGImages/secret\.jpg does not exist"):
        load_dataset(write_files(tmp_path / "voc", files))


def test_images_of_a_list_without_xml_are_images_without_objects(tmp_path: Path) -> None:
    files = {
        "Annotations/a.xml": element(DOG),
        "JPEGImages/a.jpg": None,
        "JPEGImages/b.jpg": None,
        "ImageSets/Main/train.txt": "a\nb\nc\n",
    }
    dataset = load_dataset(write_files(tmp_path, files))
    assert boxes_by_file(dataset) == {"JPEGImages/a.jpg": [("dog", BOX, False)], "JPEGImages/b.jpg": []}
    assert [re.sub(r"^.*?: ", "", warning) for warning in dataset.warnings] == [
        "1 image without an XML file, taken as without objects (b)",
        "1 name of a split without XML file and image, left out (c)",
    ]


def test_the_xml_of_one_image_is_no_data_set(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.xml": element(DOG)})
    with pytest.raises(AnnotationError, match="is the XML of one image in Pascal VOC's format"):
        load_dataset(tmp_path / "a.xml")


def png_of(numbers: np.ndarray, mode: str = "P") -> bytes:
    image = Image.fromarray(numbers)
    image.putpalette(bytes(range(256)) * 3)
    file = io.BytesIO()
    image.convert(mode).save(file, "PNG")
    return file.getvalue()


def numbered_pixels() -> np.ndarray:
    """Return the numbers of two objects in an image of 100x50 pixels, with a border around the second."""
    numbers = np.zeros((50, 100), dtype=np.uint8)
    numbers[10:30, 10:20] = 1
    numbers[4:21, 39:62] = 255
    numbers[5:20, 40:50] = numbers[5:20, 55:61] = 2
    return numbers


OBJECTS = element(DOG, item(41, 6, 61, 20, name="cat"), item(1, 1, 9, 9))


def test_masks_are_the_pixels_of_the_number_of_an_object(tmp_path: Path) -> None:
    files = {
        "Annotations/a.xml": OBJECTS,
        "Annotations/b.xml": element(DOG, name="b.jpg"),
        "JPEGImages/a.jpg": None,
        "JPEGImages/b.jpg": None,
        "SegmentationObject/a.png": png_of(numbered_pixels()),
    }
    dataset = load_dataset(write_files(tmp_path, files))
    assert not dataset.warnings
    assert dataset.masks is not None
    assert dataset.masks.has_mask.tolist() == [True, True, False, False]
    region = np.array([[0.0, 0, 100, 50]] * 2)
    rasters = rasterize(dataset.masks, np.arange(2), region, sides=Sides(100, 50))
    assert (rasters[0] == (numbered_pixels() == 1)).all()
    assert (rasters[1] == (numbered_pixels() == 2)).all()  # in two parts, without their border
    assert load_dataset(tmp_path, data=DataSpec(masks="ignore")).masks is None


def test_numbers_are_those_of_the_file_although_objects_are_dropped(tmp_path: Path) -> None:
    files = {
        "Annotations/a.xml": element(item(name="no box"), item(41, 6, 61, 20)),
        "JPEGImages/a.jpg": None,
        "SegmentationObject/a.png": png_of(numbered_pixels()),
    }
    dataset = load_dataset(write_files(tmp_path, files))
    assert dataset.masks is not None
    assert dataset.masks.bounds().tolist() == [[40, 5, 61, 20]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of(numbered_pixels()[:40]), "a.png is of 100x40 pixels, the image of 100x50"),
        (png_of(numbered_pixels(), "RGB"), "a.png has pixels of the kind RGB, expected numbers of objects"),
        (png_of(numbered_pixels())[:60], "a.png cannot be read"),
        (b"no image", "a.png cannot be read"),
    ],
)
def test_files_of_masks_that_cannot_be_used_are_reported(
    tmp_path: Path, content: bytes, message: str
) -> None:
    files = {"Annotations/a.xml": OBJECTS, "JPEGImages/a.jpg": None, "SegmentationObject/a.png": content}
    dataset = load_dataset(write_files(tmp_path, files))
    assert dataset.masks is None
    assert len(dataset.boxes) == 3
    (warning,) = dataset.warnings
    assert f"1 file with masks, not used (SegmentationObject/{message}" in warning


def test_masks_of_objects_that_are_not_there_are_reported(tmp_path: Path) -> None:
    files = {
        "Annotations/a.xml": element(DOG),
        "JPEGImages/a.jpg": None,
        "SegmentationObject/a.png": png_of(numbered_pixels()),
    }
    dataset = load_dataset(write_files(tmp_path, files))
    (warning,) = dataset.warnings
    assert (
        "1 file with masks of objects that the XML file lacks, not used (SegmentationObject/a.png: 2 of 1 object)"
        in warning
    )
    assert dataset.masks is not None
    assert dataset.masks.bounds().tolist() == [[10, 10, 20, 30]]
