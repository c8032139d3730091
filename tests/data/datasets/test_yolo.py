"""YOLO data sets: layouts, names, and the lines of label files."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from sniper.data.datasets import load_dataset
from sniper.data.datasets.load import load_splits
from sniper.data.images.files import read_image_sides
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import AnnotationError
from sniper.geometry.boxes import Sides
from tests.data.datasets.layouts import boxes_by_file, only_boxes, write_files

LINE = "1 0.5 0.5 0.2 0.4\n"
BOX = [40.0, 15.0, 60.0, 35.0]
NAMES = "names: [cat, dog]\n"
SPLITS: dict[str, str | bytes | None] = {
    "images/train/a.jpg": None,
    "images/val/b.png": None,
    "labels/train/a.txt": LINE,
    "labels/val/b.txt": LINE + LINE.replace("1 ", "0 ", 1),
}
ROBOFLOW: dict[str, str | bytes | None] = {
    "train/images/a.jpg": None,
    "train/labels/a.txt": LINE,
    "valid/images/b.jpg": None,
    "valid/labels/b.txt": LINE,
}


@pytest.mark.parametrize(
    ("files", "description"),
    [
        (SPLITS, "train: images/train\nval: images/val\n" + NAMES),
        (SPLITS, "path: .\ntrain: [images/train]\nval: images/val\nnc: 2\nnames: {0: cat, 1: dog}\n"),
        (SPLITS, "path: ../not/here\ntrain: images/train\nval: images/val\n" + NAMES),
        (SPLITS, "train: train.txt\nval: images/val\n" + NAMES),
        (SPLITS, "train: images/train/*.jpg\nval: images/val\n" + NAMES),
        (SPLITS, NAMES),
        (ROBOFLOW, "train: ../train/images\nval: ../valid/images\n" + NAMES),
        (ROBOFLOW, NAMES),
    ],
)
def test_a_description_names_the_images_of_each_split(
    tmp_path: Path, files: Mapping[str, str | bytes | None], description: str
) -> None:
    write_files(tmp_path, {**files, "data.yaml": description, "train.txt": "./images/train/a.jpg\n\n"})
    for path in (tmp_path, tmp_path / "data.yaml"):
        train = load_dataset(path)
        assert only_boxes(train) == [BOX]
        assert [category.name for category in train.categories] == ["cat", "dog"]
        assert train.image_ids.tolist() == ["a"]
        assert load_dataset(path, split="valid").image_ids.tolist() == ["b"]
        assert load_dataset(path, split="all").image_ids.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "files",
    [
        {"images/a.jpg": None, "labels/a.txt": LINE, "classes.txt": "cat\ndog\n"},
        {"images/x/a.jpg": None, "labels/x/a.txt": LINE, "labels/classes.txt": "cat\ndog\n"},
        {"a.JPG": None, "a.txt": LINE, "classes.txt": "cat\r\ndog\r\n"},
        {**SPLITS, "classes.txt": "cat\ndog\n"},
        {
            "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
            "obj.names": "cat\ndog\n",
            "train.txt": "data/obj_train_data/a.jpg\n",
            "obj_train_data/a.jpg": None,
            "obj_train_data/a.txt": LINE,
        },
    ],
)
def test_folders_without_a_description_are_read(tmp_path: Path, files: dict[str, str | None]) -> None:
    dataset = load_dataset(write_files(tmp_path, files))
    (boxes,) = boxes_by_file(dataset).values()
    assert boxes == [("dog", BOX, False)]


def test_classes_without_names_are_numbered_with_a_warning(tmp_path: Path) -> None:
    dataset = load_dataset(write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": LINE}))
    assert [category.name for category in dataset.categories] == ["class_0", "class_1"]
    assert "the 2 classes have no names" in dataset.warnings[0]


def test_class_names_stay_text(tmp_path: Path) -> None:
    write_files(tmp_path, {**SPLITS, "data.yaml": "train: images/train\nnames: {3: no, 1: 007}\n"})
    dataset = load_dataset(tmp_path)
    assert [(category.category_id, category.name) for category in dataset.categories] == [
        (1, "007"),
        (3, "no"),
    ]


@pytest.mark.parametrize(
    ("line", "box", "warning"),
    [
        ("1 0.5 0.5 0.2 0.4", BOX, None),
        ("1.0 5e-1 .5 +0.2 0.4", BOX, None),
        ("\t1  0.5 0.5 0.2 0.4  \r", BOX, None),
        ("1 0.5 0.5 0.2 0.4 0.93", BOX, "1 line with a confidence, which is not used (labels/a.txt, line 2)"),
        (
            "1 0.4 0.3 0.6 0.3 0.6 0.7",
            BOX,
            None,
        ),
        (
            "1 0.4 0.5 0.5 0.3 0.6 0.5 0.5 0.7",
            BOX,
            "1 line with 4 corners, taken for oriented boxes, used as their boxes (labels/a.txt, line 2)",
        ),
        (
            "1 0.95 0.5 0.3 0.4",
            [80.0, 15.0, 100.0, 35.0],
            "1 box reaching over the border, clipped (labels/a.txt, line 2",
        ),
    ],
)
def test_a_line_is_a_box_whatever_its_form(
    tmp_path: Path, line: str, box: list[float], warning: str | None
) -> None:
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": f"\n{line}\n\n", "classes.txt": "cat\ndog"})
    dataset = load_dataset(tmp_path)
    assert only_boxes(dataset) == [box]
    assert [warning is not None and warning in text for text in dataset.warnings] == [True] * (
        warning is not None
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_label_files_of_any_system_are_read(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["1 0.5 0.5 0.2 0.4", "", "0 0.5 0.5 0.2 0.4"]).encode(encoding)
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": text, "classes.txt": "cat\ndog"})
    assert only_boxes(load_dataset(tmp_path)) == [BOX, BOX]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "1 0.5 0.5 0.2",
            "without a box, dropped (labels/a.txt, line 2: has 4 numbers, expected a class and a box of 4",
        ),
        ("1 0.5 0.5 0.2 0.4 0.1 0.2 0.3", "has 8 numbers, expected a class and a box of 4"),
        (
            "dog 0.5 0.5 0.2 0.4",
            "with text in place of numbers, dropped (labels/a.txt, line 2: is 'dog 0.5 0.5 0.2 0.4', expected",
        ),
        ("2 0.5 0.5 0.2 0.4", "line 2: the class is 2, expected 0 to 1 as in classes.txt"),
        (
            "-1 0.5 0.5 0.2 0.4",
            "whose class is not listed, dropped (labels/a.txt, line 2: the class is -1",
        ),
        ("0.5 0.5 0.5 0.2 0.4", "the class is 0.5"),
        ("inf 0.5 0.5 0.2 0.4", "the class is inf"),
        ("1 nan 0.5 0.2 0.4", "with numbers that are not finite, dropped (labels/a.txt, line 2"),
        ("1 0.5 0.5 0 0.4", "without width or height, dropped (labels/a.txt, line 2"),
        ("1 0.5 1.5 0.2 0.4", "outside the image, dropped (labels/a.txt, line 2"),
    ],
)
def test_lines_that_are_no_box_are_dropped_or_refused(tmp_path: Path, line: str, problem: str) -> None:
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": LINE + line, "classes.txt": "cat\ndog"})
    dataset = load_dataset(tmp_path)
    assert only_boxes(dataset) == [BOX]
    assert dataset.num_dropped == 1
    assert problem in " ".join(dataset.warnings)
    with pytest.raises(AnnotationError, match=r"1 problem\n  labels/a.txt, line 2: "):
        load_dataset(tmp_path, data=DataSpec(on_bad_box="refuse"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"1 0.5 \xe9 ", "labels/a.txt: is not UTF-8 text (invalid continuation byte in byte 6)"),
        (b"\x00" * 9, "labels/a.txt: is not text, it has a zero byte"),
    ],
)
def test_label_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": content, "classes.txt": "cat"})
    with pytest.raises(AnnotationError, match=re.escape(problem)):
        load_dataset(tmp_path)


def test_boxes_in_pixels_are_refused(tmp_path: Path) -> None:
    text = "1 50 25 20 20\n1 60 30 20 20\n1 0.5 0.5 0.1 0.1\n"
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": text, "classes.txt": "cat\ndog"})
    with pytest.raises(
        AnnotationError, match=r"2 of 3 boxes have their centre beyond 1; .* these look like pixels"
    ):
        load_dataset(tmp_path)


def test_images_without_labels_and_labels_without_images_are_counted(tmp_path: Path) -> None:
    files: dict[str, str | None] = {f"images/{name}.jpg": None for name in "abc"}
    write_files(tmp_path, {**files, "labels/a.txt": "", "labels/d.txt": LINE, "classes.txt": "cat\ndog"})
    dataset = load_dataset(tmp_path)
    assert (len(dataset), len(dataset.boxes)) == (3, 0)
    assert [warning.removeprefix(f"{tmp_path}: ") for warning in dataset.warnings] == [
        "2 images without a label file, taken as without objects (no labels/b.txt; no labels/c.txt)",
        "1 label file without an image, not used (labels/d.txt)",
    ]


def test_label_files_are_counted_also_where_no_image_has_one(tmp_path: Path) -> None:
    dataset = load_dataset(write_files(tmp_path, {"images/a.jpg": None, "labels/b.txt": LINE}))
    assert "1 label file without an image, not used (labels/b.txt)" in dataset.warnings[-1]


def test_suffixes_may_be_in_upper_case(tmp_path: Path) -> None:
    write_files(tmp_path, {"images/A.JPG": None, "labels/A.TXT": LINE, "classes.txt": "cat\ndog"})
    assert only_boxes(load_dataset(tmp_path)) == [BOX]


@pytest.mark.parametrize("number", ["20000", "1e300", "inf", "nan"])
def test_class_numbers_without_names_are_bounded(tmp_path: Path, number: str) -> None:
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": LINE.replace("1", number, 1)})
    dataset = load_dataset(tmp_path)
    assert len(dataset.boxes) == len(dataset.categories) == 0
    assert f"the class is {number}, expected a whole number from 0 to 19999" in dataset.warnings[0]


def test_classes_without_a_name_or_of_one_name_are_reported(tmp_path: Path) -> None:
    write_files(tmp_path, {"images/a.jpg": None, "labels/a.txt": LINE, "classes.txt": "cat\n\ncat\n"})
    dataset = load_dataset(tmp_path)
    assert [category.name for category in dataset.categories] == ["cat", "1", "cat"]
    unnamed, repeated = dataset.warnings
    assert "1 class without a name, named by the number (1)" in unnamed
    assert "2 categories have the name 'cat' and remain separate classes: ids 0, 2" in repeated


def test_keypoints_are_not_used(tmp_path: Path) -> None:
    description = f"train: images/train\nkpt_shape: [2, 3]\n{NAMES}"
    line = LINE.strip() + " 0.1 0.2 2 0.3 0.4 1\n"
    write_files(tmp_path, {**SPLITS, "labels/train/a.txt": line, "data.yaml": description})
    dataset = load_dataset(tmp_path)
    assert only_boxes(dataset) == [BOX]
    assert "1 line with keypoints, which are not used" in dataset.warnings[0]


ENDLESS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("[1, 2]", "expected the keys train, val and names"),
        ("a: {", "is not YAML"),
        ("train: images/train\n", "names is None, expected a list of names, or names by class number"),
        ("train: images/train\nnames: {a: b}\n", "names is {'a': 'b'}, expected a list of names"),
        ("train: images/train\nnc: 3\n" + NAMES, "nc is 3, but names has 2 classes"),
        ("train: images/train\nnc: many\n", "nc is 'many', expected the number of classes"),
        ("train: {a: b}\n" + NAMES, "train is {'a': 'b'}, expected a folder"),
        ("train: images/none\n" + NAMES, "train: .*images/none is not there, expected a folder"),
        ("train: images/*.gif\n" + NAMES, "train: no image is in a pattern"),
        ("val: images/val\ntest: images/val\n" + NAMES, "has the splits val, test and no training split"),
        ("train: images/train\nkpt_shape: 3\n" + NAMES, "kpt_shape is '3', expected two numbers"),
        pytest.param(
            "names:\n" + "- a\n" * 1_000_000, "has 1,000,001 lines, expected at most 250,000", id="lines"
        ),
        ("train: images/train\nnc: 1000000000\n", "nc is '1000000000', expected at most 20,000 classes"),
        ("train: images/train\nnc: " + "9" * 5000, r"nc is '9+\.\.\.9+', expected at most 20,000 classes"),
        ("train: images/train\nnames: {0: a, 00: b}\n", "names has a class number twice"),
        ("train: images/train\nnames: {0: a, 0: b}\n", "is not YAML .the key '0' occurs twice"),
        ("train: images/train\nnames: {10000000000: a}\n", "expected a list of names"),
        (ENDLESS + "train: images/train\nnames: *k\n", r"names is \[\[.{,150}, expected a list of names"),
        (ENDLESS + "path: x\ntrain: *k\n" + NAMES, r"train is \[\[.{,150}, expected a folder"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused(tmp_path: Path, description: str, message: str) -> None:
    write_files(tmp_path, {**SPLITS, "data.yaml": description})
    with pytest.raises(AnnotationError, match=message):
        load_dataset(tmp_path / "data.yaml")


def test_a_split_that_is_not_there_is_refused_only_where_it_is_wanted(tmp_path: Path) -> None:
    description = "train: images/train\nval: images/none\ntest: ../test/images\n" + NAMES
    write_files(tmp_path, {**SPLITS, "data.yaml": description})
    assert not load_dataset(tmp_path).warnings
    everything = load_dataset(tmp_path, split="all")
    assert ["is not there, left out" in warning for warning in everything.warnings] == [True, True]
    assert load_splits(tmp_path)["train"].warnings == everything.warnings
    with pytest.raises(AnnotationError, match=r"val: .*images/none is not there"):
        load_dataset(tmp_path, split="valid")
    write_files(tmp_path, {"data.yaml": "train: images/none\nval: images/val\n" + NAMES})
    with pytest.raises(AnnotationError, match=r"train: .*images/none is not there"):
        load_dataset(tmp_path)


def test_images_that_cannot_be_read_are_refused_or_left_out(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {"images/a.jpg": None, "images/b.jpg": "no image", "labels/b.txt": LINE, "labels/a.txt": LINE},
    )
    with pytest.raises(AnnotationError, match=r"images/b.jpg: cannot be read as an image"):
        load_dataset(tmp_path)
    dataset = load_dataset(tmp_path, data=DataSpec(on_bad_image="skip"))
    assert dataset.file_names.tolist() == ["images/a.jpg"]
    assert any("1 image that cannot be read, left out with their boxes" in text for text in dataset.warnings)


@pytest.mark.parametrize(
    ("description", "named", "found"),
    [
        ("train: /home/me/set/images/train\nval: images/val\n", "/home/me/set/images/train", "images/train"),
        (
            "path: C:\\set\ntrain: x\\images\\train\nval: x/images/val\n",
            "C:/set/x/images/train",
            "images/train",
        ),
        (
            "path: /home/me/set\ntrain: ../x/train.txt\nval: /home/images/val\n",
            "/home/me/set/x/train.txt",
            "train.txt",
        ),
        ("path: ./set\ntrain: ../images/train\nval: ../images/val\n", "set/images/train", "images/train"),
    ],
)
def test_paths_of_another_machine_are_found_by_their_end_with_a_warning(
    tmp_path: Path, description: str, named: str, found: str
) -> None:
    files = {**SPLITS, "data.yaml": description + NAMES, "train.txt": "images/train/a.jpg\n"}
    dataset = load_dataset(write_files(tmp_path, files))
    assert boxes_by_file(dataset) == {"images/train/a.jpg": [("dog", BOX, False)]}
    (warning,) = dataset.warnings
    assert warning.endswith(f"{named} is not there, {tmp_path / found} is used")
    assert load_dataset(tmp_path, split="val").image_ids.tolist() == ["b"]


def test_images_of_a_list_from_another_machine_are_found_by_their_end(tmp_path: Path) -> None:
    content = "/content/set/images/train/a.jpg\nC:\\set\\images\\val\\b.png\n"
    write_files(tmp_path, {**SPLITS, "train.txt": content, "data.yaml": "train: train.txt\n" + NAMES})
    dataset = load_dataset(tmp_path)
    assert sorted(boxes_by_file(dataset)) == ["images/train/a.jpg", "images/val/b.png"]
    assert "2 images listed under a path that is not there (/content/set" in dataset.warnings[0]


def test_the_last_part_of_a_path_alone_is_not_taken_for_a_split(tmp_path: Path) -> None:
    files = {"images/a.jpg": None, "labels/a.txt": LINE}
    write_files(tmp_path, {**files, "data.yaml": "train: images\nval: /home/me/val/images\n" + NAMES})
    with pytest.raises(AnnotationError, match="val: /home/me/val/images is not there"):
        load_dataset(tmp_path, split="val")


def test_a_description_whose_splits_are_all_missing_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {**SPLITS, "data.yaml": "train: a/b\nval: c/d\n" + NAMES})
    message = (
        f"train: {tmp_path}/a/b is not there, .*\n  val: {tmp_path}/c/d is not there, .*\n  --images names"
    )
    with pytest.raises(AnnotationError, match=message):
        load_dataset(tmp_path, split="all")
    with pytest.raises(AnnotationError, match=r"train: .*a/b is not there, .*\n  --images names"):
        load_splits(tmp_path)


def test_each_image_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def read(path: Path, spec: ReadSpec) -> Sides:
        opened.append(path)
        return read_image_sides(path, spec)

    monkeypatch.setattr("sniper.data.datasets.collect.read_image_sides", read)
    monkeypatch.setattr("sniper.data.datasets.image_files.read_image_sides", read)
    load_dataset(write_files(tmp_path, SPLITS), split="all")
    assert sorted(path.name for path in opened) == ["a.jpg", "b.png"]


def test_a_linked_folder_of_images_is_read(tmp_path: Path) -> None:
    write_files(tmp_path, {"elsewhere/a.jpg": None, "x/labels/a.txt": LINE, "x/classes.txt": "cat\ndog\n"})
    (tmp_path / "x" / "images").symlink_to(tmp_path / "elsewhere")
    assert boxes_by_file(load_dataset(tmp_path / "x")) == {"a.jpg": [("dog", BOX, False)]}


def test_the_ids_of_images_are_their_names_and_numbers_where_all_are(tmp_path: Path) -> None:
    write_files(tmp_path, {"images/000139.jpg": None, "images/7.jpg": None})
    assert load_dataset(write_files(tmp_path, {"labels/7.txt": LINE})).image_ids.tolist() == [139, 7]
    write_files(tmp_path, {"images/x/7.jpg": None})
    assert load_dataset(tmp_path).image_ids.tolist() == ["images/000139", "images/7", "images/x/7"]


def test_many_label_files_are_read_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0.2, 0.4, (200, 4))
    files: dict[str, str | None] = {f"images/{i:04d}.jpg": None for i in range(200)}
    files |= {f"labels/{i:04d}.txt": "0 " + " ".join(f"{v:.8f}" for v in box) for i, box in enumerate(boxes)}
    dataset = load_dataset(write_files(tmp_path, files))
    centers, sides = boxes[:, :2], boxes[:, 2:]
    expected = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1) * [100, 50, 100, 50]
    np.testing.assert_allclose(dataset.boxes, expected, atol=1e-5)
