"""Detection of formats, splits, and files that are no data set."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from sniper.data.datasets import load_dataset
from sniper.data.datasets.load import find_scored_split, load_splits
from sniper.errors import AnnotationError
from tests.data.datasets.layouts import write_files


def coco(
    name: str, *, image_id: int | str = 1, categories: tuple[tuple[int, str], ...] = ((1, "cat"),)
) -> str:
    """Return a COCO JSON file of one image with a box of each category."""
    content: dict[str, Any] = {
        "images": [{"id": image_id, "file_name": name, "width": 100, "height": 50}],
        "categories": [{"id": number, "name": label} for number, label in categories],
        "annotations": [
            {"id": index, "image_id": image_id, "category_id": number, "bbox": [1, 2, 3, 4]}
            for index, (number, _) in enumerate(categories)
        ],
    }
    return json.dumps(content)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (
            {
                "train/_annotations.coco.json": "a.jpg",
                "train/a.jpg": None,
                "valid/_annotations.coco.json": "b.jpg",
            },
            ["train", "val"],
        ),
        (
            {
                "annotations/instances_train2017.json": "a.jpg",
                "annotations/instances_val2017.json": "b.jpg",
                "annotations/captions_val2017.json": "c.jpg",
                "train2017/a.jpg": None,
            },
            ["train", "val"],
        ),
        ({"train.json": "a.jpg", "test.json": "b.jpg", "images/a.jpg": None}, ["train", "test"]),
        ({"result.json": "images/a.jpg", "images/a.jpg": None}, []),
        ({"any name.json": "a.jpg", "a.jpg": None}, []),
        ({"annotations/instances_default.json": "a.jpg", "images/a.jpg": None}, []),
    ],
)
def test_folders_of_coco_json_are_read(
    tmp_path: Path, files: dict[str, str | None], splits: list[str]
) -> None:
    write_files(tmp_path, {name: content and coco(content) for name, content in files.items()})
    dataset = load_dataset(tmp_path)
    assert dataset[0].path.is_file()
    assert not dataset.warnings
    assert find_scored_split(tmp_path) == (splits[1] if splits else None)
    assert list(load_splits(tmp_path, has_images=False)) == (splits or [""])


def test_splits_are_joined_by_category_names_and_ids_stay_distinct(tmp_path: Path) -> None:
    files = {
        "train.json": coco("a.jpg", categories=((1, "cat"), (2, "dog"))),
        "val.json": coco("b.jpg", categories=((1, "dog"), (2, "bird"))),
    }
    joined = load_dataset(write_files(tmp_path, files), split="all", has_images=False)
    assert [(category.category_id, category.name) for category in joined.categories] == [
        (1, "cat"),
        (2, "dog"),
        (3, "bird"),
    ]
    assert joined.image_ids.tolist() == ["train/1", "val/1"]
    assert joined.labels.tolist() == [0, 1, 1, 2]
    distinct = {"val.json": coco("b.jpg", image_id=9)}
    assert load_dataset(
        write_files(tmp_path, distinct), split="all", has_images=False
    ).image_ids.tolist() == [1, 9]


def test_problems_of_joined_splits_name_the_file(tmp_path: Path) -> None:
    wrong = coco("b.jpg").replace("[1, 2, 3, 4]", "[1, 2, 0, 4]")
    write_files(tmp_path, {"train.json": coco("a.jpg"), "val.json": wrong})
    dataset = load_dataset(tmp_path, split="all", has_images=False)
    assert "val.json: annotation 0 of image 1: bbox is [1.0, 2.0, 0.0, 4.0]" in dataset.warnings[0]


@pytest.mark.parametrize(
    ("split", "message"),
    [("night", "has no split night, expected one of train, val, or all"), ("test", "has no split test")],
)
def test_a_split_that_is_not_there_is_refused(tmp_path: Path, split: str, message: str) -> None:
    write_files(tmp_path, {"train.json": coco("a.jpg"), "val.json": coco("b.jpg")})
    with pytest.raises(AnnotationError, match=message):
        load_dataset(tmp_path, split=split)
    with pytest.raises(AnnotationError, match="has no splits, so there is no split val"):
        load_dataset(tmp_path / "train.json", split="val")


def test_an_unknown_folder_lists_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    write_files(tmp_path, {"notes.md": "", "inner/images/a.jpg": None, "inner/labels/a.txt": ""})
    with pytest.raises(AnnotationError, match="is no data set; looked for") as caught:
        load_dataset(tmp_path)
    message = str(caught.value)
    for part in ("YOLO: data.yaml", "DOTA: labelTxt", "in the folder: inner/, notes.md"):
        assert part in message
    assert message.endswith(f"did you mean {tmp_path / 'inner'}?")


@pytest.mark.parametrize("folder", ["images", "images/train", "labels/train"])
def test_for_a_folder_of_images_or_labels_the_data_set_around_it_is_suggested(
    folder: str, tmp_path: Path
) -> None:
    files: dict[str, str | None] = {"images/train/a.jpg": None, "labels/train/a.txt": "0 0.5 0.5 0.2 0.4\n"}
    write_files(tmp_path / "set", files)
    with pytest.raises(AnnotationError, match="is no data set; looked for") as caught:
        load_dataset(tmp_path / "set" / folder)
    assert str(caught.value).endswith(f"did you mean {tmp_path / 'set'}?")


def test_files_of_labelme_are_refused_with_their_converter(tmp_path: Path) -> None:
    polygon = {"label": "cat", "points": [[0, 0], [9, 0], [9, 9]], "shape_type": "polygon"}
    for name in ("a", "b"):
        content = {"version": "5.5.0", "flags": {}, "shapes": [polygon], "imagePath": f"{name}.jpg"}
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"imageHeight": 9, "imageWidth": 9}))
    message = (
        "is LabelMe's file of one image, which is not read; convert the folder to COCO JSON: labelme2coco "
    )
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(AnnotationError, match=rf"a\.json:? {re.escape(message + str(tmp_path))}"):
            load_dataset(path)


def test_the_notes_of_label_studio_beside_labels_of_yolo_are_no_coco_json(tmp_path: Path) -> None:
    notes = json.dumps({"categories": [{"id": 0, "name": "cat"}], "info": {"contributor": "Label Studio"}})
    files: dict[str, str | None] = {"images/a.jpg": None, "labels/a.txt": "0 0.5 0.5 0.2 0.4\n"}
    dataset = load_dataset(write_files(tmp_path, {**files, "classes.txt": "cat\n", "notes.json": notes}))
    assert not dataset.warnings
    assert [category.name for category in dataset.categories] == ["cat"]
    assert len(dataset.boxes) == 1


def test_a_large_coco_file_of_any_name_is_recognized_by_its_categories(tmp_path: Path) -> None:
    content = json.loads(coco("a.jpg"))
    large = {"categories": [{**content.pop("categories")[0], "description": "x" * 70_000}], **content}
    write_files(tmp_path, {"any name.json": json.dumps(large), "a.jpg": None})
    assert len(load_dataset(tmp_path).boxes) == 1


def test_a_folder_of_several_formats_is_read_with_a_warning(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"train.json": coco("a.jpg"), "images/a.jpg": None, "labels/a.txt": "", "classes.txt": "x"}
    )
    dataset = load_dataset(tmp_path)
    assert dataset.warnings == (f"{tmp_path}: is read as COCO JSON, but also looks like YOLO",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "a.jpg\n", "is a text file; expected the folder of the data set, or YOLO's data.yaml"),
        ("a.bin", "\0\1", "has no known format; expected COCO JSON, YOLO's data.yaml"),
        ("a.yaml", "", "expected the keys train, val and names"),
        ("a.xml", "", "is not XML"),
        ("a.csv", "", "has no column ImageID"),
        ("a.json", "", "is not JSON"),
    ],
)
def test_files_of_no_format_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_files(tmp_path, {name: content})
    with pytest.raises(AnnotationError, match=re.escape(message)):
        load_dataset(tmp_path / name)


@pytest.mark.parametrize("name", ["pipe", "pipe.json", "pipe.yaml", "pipe.csv", "pipe.xml"])
def test_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(AnnotationError, match="a pipe, not a regular file"):
        load_dataset(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["labels/a.txt", "classes.txt", "data.yaml", "annotations.xml", "Annotations/a.xml"]
)
def test_pipes_inside_a_data_set_are_passed_over_or_refused(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, {"images/a.jpg": None, "labels/b.txt": ""})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "labels/a.txt":
        with pytest.raises(AnnotationError, match="a pipe, not a regular file"):
            load_dataset(tmp_path)
    else:
        assert len(load_dataset(tmp_path)) == 1


def test_an_absent_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none: cannot be read \(No such file or directory\)"):
        load_dataset(tmp_path / "none")


@pytest.mark.parametrize("name", ["a\0b.json", "x" * 10_000, "\ud800.json"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(AnnotationError, match="cannot be read"):
        load_dataset(name)
