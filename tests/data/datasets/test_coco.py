"""COCO files that are accepted, corrected with a warning, or refused, and the messages."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sniper.data.datasets import Dataset, load_dataset
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import AnnotationError
from tests.data.datasets.small import COCO, Change, box, category, changed, image, load


def refusal(folder: Path, content: Any, **options: Any) -> str:
    with pytest.raises(AnnotationError) as refused:
        load(folder, content, **options)
    return str(refused.value)


# Accepted


def test_images_and_their_boxes_keep_the_order_of_the_file(folder: Path) -> None:
    dataset = load(folder)
    assert [record.image_id for record in dataset] == [30, 10, 20]
    assert dataset[1].boxes.tolist() == [[1, 2, 11, 22], [0, 0, 20, 50]]
    assert dataset.offsets.tolist() == [0, 1, 3, 3]
    assert dataset.warnings == ()


def test_labels_count_the_categories_in_the_order_of_their_ids(folder: Path) -> None:
    dataset = load(folder)
    names = [(category.category_id, category.name) for category in dataset.categories]
    assert names == [(3, "cat"), (7, "dog"), (90, "unseen")]
    assert dataset[1].labels.tolist() == [1, 0]


def test_an_image_without_boxes_is_kept(folder: Path) -> None:
    record = load(folder)[2]
    assert record.boxes.shape == (0, 4)
    assert record.labels.shape == record.is_crowd.shape == (0,)


def test_the_area_is_that_of_the_file_or_else_of_the_box(folder: Path) -> None:
    assert load(folder).areas.tolist() == [39.5 * 30, 150.5, 20 * 50]


@pytest.mark.parametrize(
    ("change", "is_crowd"),
    [(box(iscrowd=value), bool(int(value or 0))) for value in (0, 1, False, True, 0.0, 1.0, "0", "1", None)],
)
def test_iscrowd_may_be_of_any_type(folder: Path, change: Change, is_crowd: bool) -> None:
    dataset = load(folder, changed(change))
    assert dataset[1].is_crowd.tolist() == [is_crowd, False]
    assert not any("iscrowd" in warning for warning in dataset.warnings)


@pytest.mark.parametrize(
    ("value", "is_reported"),
    [
        (1, True),
        (True, True),
        ("1", True),
        (1.0, True),
        (0, False),
        (None, False),
        ([], False),
        ("no", False),
    ],
)
@pytest.mark.parametrize("iscrowd", [0, 1])
def test_the_key_ignore_is_reported(folder: Path, value: Any, is_reported: bool, iscrowd: int) -> None:
    dataset = load(folder, changed(box(ignore=value, iscrowd=iscrowd)), has_images=False)
    reported = "1 box with ignore: 1, which is not read, used as objects (expected iscrowd: 1) (annotation "
    assert any(reported in warning for warning in dataset.warnings) == (is_reported and not iscrowd)
    assert dataset[1].is_crowd.tolist() == [bool(iscrowd), False]


@pytest.mark.parametrize("number", [8, 8.0, "8", "8.0"])
def test_sides_may_be_floats_or_digits(folder: Path, number: Any) -> None:
    dataset = load(folder, changed(image(width=number)))
    assert dataset[2].sides == (8, 6)
    assert dataset.warnings == ()


def test_numbers_of_a_box_may_be_text(folder: Path) -> None:
    dataset = load(folder, changed(box(bbox=["1", 2, "10.0", 20])))
    assert dataset.digest == load(folder).digest
    assert dataset.warnings == ()


def test_an_area_may_be_text_or_null(folder: Path) -> None:
    assert load(folder, changed(box(area="150.5"))).areas[1] == 150.5
    assert load(folder, changed(box(area=None))).areas[1] == 200
    assert load(folder, changed(box(area=None))).warnings == ()


@pytest.mark.parametrize("seed", range(5))
def test_values_of_all_types_are_read_alike(folder: Path, seed: int) -> None:
    """The usual types are decoded strictly, others loosely, and boxes of masks from plain JSON."""
    generator = np.random.default_rng(seed)
    content = changed(lambda coco: None)
    content["annotations"] = [
        {
            "id": index,
            "image_id": int(generator.choice([30, 10, 20])),
            "category_id": int(generator.choice([7, 3])),
            "bbox": [*generator.integers(-2, 6, 2).tolist(), *generator.uniform(0, 9, 2).tolist()],
            "iscrowd": int(generator.integers(0, 2)),
            "area": float(generator.uniform(-1, 9)),
        }
        for index in range(200)
    ]
    strict = load(folder, content)
    content["annotations"][-1]["iscrowd"] = str(content["annotations"][-1]["iscrowd"])
    loose = load(folder, content)
    content["annotations"][-1]["bbox"] = list(map(str, content["annotations"][-1]["bbox"]))
    plain = load(folder, content)
    for dataset in (loose, plain):
        assert dataset.digest == strict.digest
        np.testing.assert_array_equal(dataset.areas, strict.areas)
        assert dataset.warnings == strict.warnings


def test_a_file_with_a_byte_order_mark_is_read(folder: Path) -> None:
    path = folder / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(COCO).encode())
    assert load_dataset(path).digest == load(folder).digest


def test_a_file_with_empty_lists_is_an_empty_data_set(folder: Path) -> None:
    dataset = load(folder, {"images": [], "annotations": [], "categories": []})
    assert len(dataset) == 0
    assert dataset.boxes.shape == (0, 4)
    assert dataset.offsets.tolist() == [0]


def test_annotations_need_no_id_and_no_iscrowd(folder: Path) -> None:
    content = changed(lambda coco: [entry.pop("id") for entry in coco["annotations"]])
    assert load(folder, content).warnings == ()
    assert load(folder, content)[1].is_crowd.tolist() == [False, False]


@pytest.mark.parametrize("segmentation", [[[1, 2, 3]], {"counts": "x", "size": [1, 1]}, None, "?"])
def test_any_segmentation_is_ignored(folder: Path, segmentation: Any) -> None:
    assert load(folder, changed(lambda coco: coco["annotations"][0].update(segmentation=segmentation)))


def test_the_image_root_is_images_or_the_folder_of_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, has_images=False).image_root == tmp_path
    (tmp_path / "images").mkdir()
    assert load(tmp_path, has_images=False).image_root == tmp_path / "images"
    assert load(tmp_path, has_images=False, image_root=Path("else")).image_root == Path("else")


def test_an_image_may_be_a_link_inside_the_root(folder: Path) -> None:
    (folder / "images" / "b.png").rename(folder / "images" / "real.png")
    (folder / "images" / "b.png").symlink_to("real.png")
    assert len(load(folder)) == 3


def test_the_root_itself_may_be_a_link(folder: Path) -> None:
    (folder / "images").rename(folder / "elsewhere")
    (folder / "images").symlink_to(folder / "elsewhere")
    assert len(load(folder)) == 3


def test_image_files_are_not_checked_without_images(tmp_path: Path) -> None:
    assert len(load(tmp_path, has_images=False)) == 3


# Ids


def renumber(image_id: Callable[[int], Any], category_id: Callable[[int], Any]) -> Change:
    """Replace the ids of images and categories, and the references to them."""

    def change(coco: dict[str, Any]) -> None:
        for entry in coco["images"]:
            entry["id"] = image_id(entry["id"])
        for entry in coco["categories"]:
            entry["id"] = category_id(entry["id"])
        for entry in coco["annotations"]:
            entry.update(image_id=image_id(entry["image_id"]), category_id=category_id(entry["category_id"]))

    return change


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (lambda number: -number, lambda number: -number),
        (lambda number: number - 3, lambda number: number - 3),
        (lambda number: number - 2**63, lambda number: number - 2**63),
        (lambda number: number + 2**63 - 100, lambda number: number + 2**63 - 100),
        (float, int),
        (str, int),
        (lambda number: f"{number:08d}", int),
        (lambda number: number + 2**63, lambda number: str(number + 2**63)),
        (lambda number: f"frame-{number:02d}", lambda number: f"frame-{number:02d}"),
        (lambda number: f"\u732b\x1b[{number:02d}", lambda number: f"\u732b\x1b[{number:02d}"),
    ],
    ids=[
        "negative",
        "from 0",
        "lowest",
        "highest",
        "floats",
        "digits",
        "zeros",
        "unsigned",
        "text",
        "escapes",
    ],
)
def test_ids_of_any_kind_are_read(
    folder: Path, change: Callable[[int], Any], read: Callable[[int], Any]
) -> None:
    dataset = load(folder, changed(renumber(change, change)))
    assert dataset.warnings == ()
    assert [record.image_id for record in dataset] == [read(30), read(10), read(20)]
    assert {category.category_id: category.name for category in dataset.categories} == {
        read(3): "cat",
        read(7): "dog",
        read(90): "unseen",
    }
    assert [[dataset.categories[label].name for label in record.labels] for record in dataset] == [
        ["cat"],
        ["dog", "cat"],
        [],
    ]
    assert load(folder, dataset.to_coco()).digest == dataset.digest


def test_references_may_be_of_another_type_than_the_ids(folder: Path) -> None:
    content = changed(renumber(str, float))
    content["annotations"] = changed(lambda coco: None)["annotations"]
    assert load(folder, content).digest == load(folder).digest
    content = changed(
        lambda coco: [entry.update(image_id=f"{entry['image_id']}") for entry in coco["annotations"]]
    )
    assert load(folder, content).digest == load(folder).digest


def test_text_that_differs_in_zeros_alone_is_told_apart(folder: Path) -> None:
    ids = {30: "7", 10: "07", 20: "007"}
    dataset = load(folder, changed(renumber(lambda number: ids[number], lambda number: number)))
    assert dataset.image_ids.tolist() == ["7", "07", "007"]
    assert np.diff(dataset.offsets).tolist() == [1, 2, 0]


@pytest.mark.parametrize("annotation_id", ["one", 2.0, -1, 2**70, None, 3])
def test_annotations_have_any_id(folder: Path, annotation_id: Any) -> None:
    dataset = load(folder, changed(box(id=annotation_id)))
    assert len(dataset.boxes) == 3
    repeated = ["1 annotation with the id of another, all used (such as id 3)"] if annotation_id == 3 else []
    assert words(dataset) == repeated


# Corrected with a warning


@pytest.mark.parametrize(
    ("bbox", "clipped"),
    [
        ([-3.5, 2, 10, 20], [0, 2, 6.5, 22]),
        ([1, -2, 10, 20], [1, 0, 11, 18]),
        ([15, 2, 10, 20], [15, 2, 20, 22]),
        ([1, 40, 10, 20], [1, 40, 11, 50]),
        ([-1e308, 2, 1.5e308, 20], [0, 2, 20, 22]),
    ],
)
def test_a_box_over_the_border_is_clipped_with_a_warning(
    folder: Path, bbox: list[float], clipped: list[float]
) -> None:
    dataset = load(folder, changed(box(bbox=bbox)))
    assert dataset[1].boxes[0].tolist() == clipped
    (warning,) = dataset.warnings
    example = f"annotation 1 of image 10: bbox is {list(map(float, bbox))} in 20x50"
    assert warning == f"{folder / 'train.json'}: 1 box reaching over the border, clipped ({example})"


def test_a_rounding_error_over_the_border_is_clipped_silently(folder: Path) -> None:
    dataset = load(folder, changed(box(bbox=[10.1, 0, 9.9000001, 50])))
    assert dataset[1].boxes[0].tolist() == [10.1, 0, 20, 50]
    assert dataset.warnings == ()


@pytest.mark.parametrize(("side", "is_warned"), [(0.99, True), (1.0, False)])
def test_a_box_under_one_pixel_is_kept_with_a_warning(folder: Path, side: float, is_warned: bool) -> None:
    dataset = load(folder, changed(box(bbox=[4, 4, 10, side])))
    assert len(dataset[1].boxes) == 2
    assert [
        bool(re.search(f"1 box less than 1 pixel .*annotation 1 of image 10: .*{side}", warning))
        for warning in dataset.warnings
    ] == [True] * is_warned


def test_a_thin_crowd_is_fine(folder: Path) -> None:
    assert load(folder, changed(box(bbox=[4, 4, 10, 0.5], iscrowd=1))).warnings == ()


def test_a_box_that_clipping_makes_thin_has_both_warnings(folder: Path) -> None:
    first, second = load(folder, changed(box(bbox=[19.5, 4, 10, 10]))).warnings
    assert "clipped" in first
    assert "less than 1 pixel" in second


def test_warnings_of_one_kind_share_a_line(folder: Path) -> None:
    content = changed(
        lambda coco: coco.update(
            annotations=[{**coco["annotations"][0], "id": i, "bbox": [-i, 0, 9, 9]} for i in range(1, 9)]
        )
    )
    (warning,) = load(folder, content).warnings
    assert "8 boxes reaching over the border" in warning
    assert warning.count("of image 10") == 3
    assert warning.endswith("and 5 more)")


def words(dataset: Dataset) -> list[str]:
    """Return the warnings without the path."""
    return [warning.removeprefix(f"{dataset.path}: ") for warning in dataset.warnings]


def test_an_absent_list_of_annotations_is_reported(folder: Path) -> None:
    dataset = load(folder, changed(lambda coco: coco.pop("annotations")))
    assert len(dataset) == 3
    assert len(dataset.boxes) == 0
    assert words(dataset) == ["there is no list of annotations, so the images have no boxes"]
    assert load(folder, {"images": COCO["images"]}).categories == ()


def test_absent_categories_are_named_by_their_ids(folder: Path) -> None:
    dataset = load(folder, changed(lambda coco: coco.pop("categories")))
    assert [(category.category_id, category.name) for category in dataset.categories] == [(3, "3"), (7, "7")]
    assert words(dataset) == ["there is no list of categories; their ids are used as names"]


@pytest.mark.parametrize("name", ["", None])
def test_a_category_without_a_name_is_named_by_its_id(folder: Path, name: Any) -> None:
    dataset = load(folder, changed(category(name=name)))
    assert dataset.categories[2].name == "90"
    assert words(dataset) == ["1 category without a name, named by the id (category 90)"]


def test_categories_of_one_name_remain_two_classes(folder: Path) -> None:
    dataset = load(folder, changed(category(name="dog")))
    assert len(dataset.categories) == 3
    assert words(dataset) == ["2 categories have the name 'dog' and remain separate classes: ids 7, 90"]


@pytest.mark.parametrize("value", [None, 0, -1, "", "0"])
@pytest.mark.parametrize("has_images", [True, False])
def test_sides_that_are_absent_are_read_from_the_file(folder: Path, value: Any, has_images: bool) -> None:
    dataset = load(folder, changed(image(width=value)), has_images=has_images)
    assert dataset[2].sides == (8, 6)
    assert words(dataset) == [
        "1 image without width and height, which are read from their files (image 20: 8x6)"
    ]


def test_sides_that_are_absent_need_the_file(folder: Path) -> None:
    (folder / "images" / "b.png").unlink()
    message = refusal(folder, changed(image(width=None)), has_images=False)
    assert "image 20: width and height are missing, and b.png does not exist" in message


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([[1, 2, 11, 2, 11, 22, 1, 22]], [1, 2, 11, 22]),
        ([[5, 2, 11, 2, 11, 9], [1, 4, 4, 22, 2, 4]], [1, 2, 11, 22]),
        ({"counts": [2 + 50, 20] + [30, 20] * 9 + [28 + 50 * 9], "size": [50, 20]}, [1, 2, 11, 22]),
    ],
    ids=["polygon", "polygons", "run lengths"],
)
@pytest.mark.parametrize("bbox", [None, [], "absent"])
def test_an_absent_box_is_computed_from_the_mask(
    folder: Path, segmentation: Any, expected: list[float], bbox: Any
) -> None:
    content = changed(box(bbox=bbox, segmentation=segmentation))
    if bbox == "absent":
        del content["annotations"][0]["bbox"]
    dataset = load(folder, content)
    assert dataset[1].boxes[0].tolist() == expected
    (warning,) = words(dataset)
    assert warning.startswith(
        "1 box without bbox, computed from the mask (annotation 1 of image 10: [1.0, 2.0, 10.0"
    )


@pytest.mark.parametrize("area", [-1, "large", [1], float("nan"), True, 10**400])
def test_an_area_that_is_no_number_is_computed_from_the_box(folder: Path, area: Any) -> None:
    dataset = load(folder, changed(box(area=area)))
    assert dataset.areas[1] == 200
    (warning,) = words(dataset)
    assert warning.startswith(
        "1 box whose area is not a number of at least 0, computed from the box (annotation 1 of image 10: area is "
    )


def test_an_area_of_0_is_used_and_reported(folder: Path) -> None:
    dataset = load(folder, changed(box(area=0)))
    assert dataset.areas[1] == 0
    (warning,) = words(dataset)
    assert warning.startswith("1 box with an area of 0 in the file, scored as small objects (annotation 1 of")


@pytest.mark.parametrize(("key", "noun"), [("images", "image 20"), ("categories", "category 90")])
def test_an_entry_that_is_repeated_is_used_once(folder: Path, key: str, noun: str) -> None:
    dataset = load(folder, changed(lambda coco: coco[key].append(dict(coco[key][2]))))
    assert dataset.digest == load(folder).digest
    singular = noun.split(maxsplit=1)[0]
    assert words(dataset) == [f"1 {singular} listed twice ({noun})"]


def test_a_file_without_names_is_read_as_lvis(folder: Path) -> None:
    def change(coco: dict[str, Any]) -> None:
        for entry in coco["images"]:
            entry["coco_url"] = f"http://images.cocodataset.org/train2017/{entry.pop('file_name')[-5:]}"

    dataset = load(folder, changed(change), has_images=False)
    assert dataset.file_names.tolist() == ["train2017/c.png", "train2017/a.png", "train2017/b.png"]
    warning, correction = words(dataset)
    assert "the folder before it, corrected (train2017/c.png is c.png; " in correction
    assert warning.startswith(
        "3 images without file_name, named by the end of coco_url (image 30: train2017/c.png;"
    )


# Boxes that cannot be used


DROPPED: list[tuple[Change, str, str]] = [
    (
        lambda coco: coco["annotations"][0].pop("image_id"),
        "whose image is not listed",
        "annotation 1: image_id is missing",
    ),
    (box(image_id=99), "whose image is not listed", "annotation 1 of image 99: there is no image 99"),
    (box(image_id="x"), "whose image is not listed", "annotation 1 of image x: there is no image 'x'"),
    (
        box(image_id=10.5),
        "whose image is not listed",
        "annotation 1: image_id is 10.5, expected the id of the image",
    ),
    (
        box(image_id=True),
        "whose image is not listed",
        "annotation 1: image_id is True, expected the id of the image",
    ),
    (
        box(category_id=4),
        "whose category is not listed",
        "annotation 1 of image 10: there is no category 4",
    ),
    (
        box(category_id="dog"),
        "whose category is not listed",
        "annotation 1 of image 10: there is no category 'dog'",
    ),
    (
        box(category_id=[7]),
        "whose category is not listed",
        "category_id is [7], expected the id of the category",
    ),
    (
        box(bbox=None),
        "without 4 numbers",
        "annotation 1 of image 10: bbox is missing, and no mask to compute it",
    ),
    (
        box(bbox=[]),
        "without 4 numbers",
        "annotation 1 of image 10: bbox is [], expected a list of 4 numbers",
    ),
    (
        box(bbox=None, segmentation=[[]]),
        "without 4 numbers",
        "bbox is missing, and no mask to compute it from",
    ),
    (
        box(bbox=None, segmentation="?"),
        "without 4 numbers",
        "bbox is missing, and no mask to compute it from",
    ),
    (
        box(bbox=None, segmentation={"counts": "?", "size": []}),
        "without 4 numbers",
        "bbox is missing, and no mask",
    ),
    (box(bbox="1 2 3 4"), "without 4 numbers", "bbox is '1 2 3 4', expected a list of 4 numbers"),
    (box(bbox=[1, 2, 3]), "without 4 numbers", "bbox is [1, 2, 3], expected a list of 4 numbers"),
    (
        box(bbox=[1, 2, 3, 4, 5]),
        "without 4 numbers",
        "bbox is [1, 2, 3, 4, 5], expected a list of 4 numbers",
    ),
    (
        box(bbox=[1, 2, 3, "x"]),
        "without 4 numbers",
        "bbox is [1, 2, 3, 'x'], expected a list of 4 numbers",
    ),
    (
        box(bbox=[1, 2, 3, None]),
        "without 4 numbers",
        "bbox is [1, 2, 3, None], expected a list of 4 numbers",
    ),
    (
        box(bbox=[1, 2, 3, True]),
        "without 4 numbers",
        "bbox is [1, 2, 3, True], expected a list of 4 numbers",
    ),
    (box(bbox=[1, 2, 3, 10**400]), "without 4 numbers", ", expected a list of 4 numbers"),
    (box(bbox={"x": 1}), "without 4 numbers", "bbox is {'x': 1}, expected a list of 4 numbers"),
    (
        box(iscrowd=2),
        "whose iscrowd is not 0 or 1",
        "annotation 1 of image 10: iscrowd is 2, expected 0 or 1",
    ),
    (
        box(iscrowd=[1]),
        "whose iscrowd is not 0 or 1",
        "annotation 1 of image 10: iscrowd is [1], expected 0 or 1",
    ),
    (
        box(bbox=[1, 2, float("nan"), 4]),
        "with numbers that are not finite",
        "bbox is [1.0, 2.0, nan, 4.0], expected finite numbers",
    ),
    (
        box(bbox=[1, -float("inf"), 3, 4]),
        "with numbers that are not finite",
        "bbox is [1.0, -inf, 3.0, 4.0], expected finite",
    ),
    (
        box(bbox=[1e308, 2, 1e308, 4]),
        "with numbers that are not finite",
        "bbox is [1e+308, 2.0, 1e+308, 4.0], expected finite",
    ),
    (
        box(bbox=[1, 2, 0, 4]),
        "without width or height",
        "bbox is [1.0, 2.0, 0.0, 4.0], expected width and height above 0",
    ),
    (
        box(bbox=[1, 2, 3, -4]),
        "without width or height",
        "bbox is [1.0, 2.0, 3.0, -4.0], expected width and height above",
    ),
    (
        box(bbox=[20, 2, 3, 4]),
        "outside the image",
        "bbox is [20.0, 2.0, 3.0, 4.0], outside its image of 20x50 pixels",
    ),
    (
        box(bbox=[2, 50, 3, 4]),
        "outside the image",
        "bbox is [2.0, 50.0, 3.0, 4.0], outside its image of 20x50 pixels",
    ),
    (
        box(bbox=[-3, 2, 3, 4]),
        "outside the image",
        "bbox is [-3.0, 2.0, 3.0, 4.0], outside its image of 20x50",
    ),
    (
        box(bbox=[2, -5, 3, 4]),
        "outside the image",
        "bbox is [2.0, -5.0, 3.0, 4.0], outside its image of 20x50",
    ),
    (
        lambda coco: coco["annotations"].__setitem__(0, "x"),
        "not given as objects",
        "annotations[0]: is 'x', expected an object",
    ),
]


@pytest.mark.parametrize(("change", "kind", "line"), DROPPED, ids=[line for _, _, line in DROPPED])
def test_a_box_that_cannot_be_used_is_dropped_or_refused(
    folder: Path, change: Change, kind: str, line: str
) -> None:
    dataset = load(folder, changed(change))
    assert len(dataset.boxes) == 2
    assert dataset.num_dropped == 1
    (warning,) = words(dataset)
    assert warning.startswith(f"1 box {kind}, dropped (annotation")
    assert line in warning
    head, problem = refusal(folder, changed(change), data=DataSpec(on_bad_box="refuse")).splitlines()
    assert head.endswith(": 1 problem")
    assert line in problem


def test_many_dropped_boxes_are_counted(folder: Path) -> None:
    def change(coco: dict[str, Any]) -> None:
        coco["annotations"] += [{"image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 1]} for _ in range(33)]

    dataset = load(folder, changed(change))
    assert (len(dataset.boxes), dataset.num_dropped) == (3, 33)
    flat, total = words(dataset)
    assert flat.startswith(
        "33 boxes without width or height, dropped (annotations[3] of image 10: bbox is [0.0, "
    )
    assert flat.count("expected width and height above 0") == 3
    assert flat.endswith("and 30 more)")
    assert total == "33 of 36 boxes are dropped"


def test_other_boxes_are_not_affected_by_those_that_are_dropped(folder: Path) -> None:
    content = changed(box(bbox=[1, 2, 0, 0]))
    content["annotations"].insert(
        1, {"id": 9, "image_id": 10, "category_id": 7, "bbox": [-1, 2, 4, 4], "area": 9}
    )
    dataset = load(folder, content)
    assert dataset[1].boxes.tolist() == [[0, 2, 3, 6], [0, 0, 20, 50]]
    assert dataset.areas.tolist() == [39.5 * 30, 9, 1000]
    assert "annotation 9 of image 10: bbox is [-1.0, 2.0, 4.0, 4.0] in 20x50" in words(dataset)[1]


# Refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"images": [],\n  "annotations": }', r"is not JSON \(Expecting value in line 2, column 18\)"),
        (b"", "is not JSON, but empty"),
        (b"\xff\xfe\xfa", r"is not JSON \(.*decode"),
        (b"[" * 200_000, r"is not JSON \(maximum recursion depth"),
        (b"[1]", r"is \[1\], expected an object with images, annotations, categories"),
    ],
)
def test_a_file_that_is_not_a_coco_object_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=f"train.json: {expected}"):
        load_dataset(path)


def test_a_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        load_dataset(tmp_path / "none.json")


def without(key: str, table: str) -> Change:
    return lambda coco: coco[table][2].pop(key)


REFUSED: list[tuple[Change, str]] = [
    # The lists
    (lambda coco: coco.pop("images"), "images is missing, expected a list"),
    (lambda coco: coco.update(images=None), "images is missing, expected a list"),
    (lambda coco: coco.update(annotations={"a": 1}), "annotations is {'a': 1}, expected a list"),
    (lambda coco: coco.update(categories="dog"), "categories is 'dog', expected a list"),
    (lambda coco: coco["images"].append(None), "images[3]: is None, expected an object"),
    (lambda coco: coco["categories"].append(1), "categories[3]: is 1, expected an object"),
    # Keys
    (without("id", "images"), "images[2]: id is missing"),
    (without("file_name", "images"), "image 20: file_name is missing"),
    (without("id", "categories"), "categories[2]: id is missing"),
    # Types
    (image(id=True), "images[2]: id is True, expected a whole number or a text"),
    (image(id=2.5), "images[2]: id is 2.5, expected a whole number or a text"),
    (image(id=""), "images[2]: id is '', expected a whole number or a text"),
    (image(id="a\0"), r"images[2]: id is 'a\x00', expected a whole number or a text"),
    (image(id="a" * 300), "expected a whole number or a text"),
    (category(id=[1]), "categories[2]: id is [1], expected a whole number or a text"),
    (image(file_name=5), "image 20: file_name is 5, expected the name of a file"),
    (image(file_name=""), "image 20: file_name is '', expected the name of a file"),
    (image(file_name="a\0"), r"image 20: file_name is 'a\x00', expected the name of a file"),
    (image(file_name="\ud800"), r"image 20: file_name is '\ud800', expected the name of a file"),
    (image(file_name="a" * 200_000), "aaa', expected the name of a file"),
    (image(width=8.5), "image 20: width is 8.5, expected a whole number of pixels"),
    (image(width=1_000_001), "image 20: width is 1000001, expected at most 1,000,000 pixels"),
    (image(width=2**31), "image 20: width is 2147483648, expected at most 1,000,000 pixels"),
    (image(height="1e8"), "image 20: height is '1e8', expected at most 1,000,000 pixels"),
    (image(height=10**30), "0, expected at most 1,000,000 pixels"),
    (image(height=[6]), "image 20: height is [6], expected a whole number of pixels"),
    (image(height=True), "image 20: height is True, expected a whole number of pixels"),
    (category(name=["cat"]), "category 90: name is ['cat'], expected a string"),
    # Ids
    (image(id=10), "image 10: the id is used twice, here in images[2]"),
    (image(id=10.0), "image 10.0: the id is used twice, here in images[2]"),
    (image(id="10"), "image 10: the id is used twice, here in images[2]"),
    (category(id=7), "category 7: the id is used twice, here in categories[2]"),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED, ids=[text for _, text in REFUSED])
@pytest.mark.parametrize("has_images", [True, False])
def test_one_problem_is_one_line(folder: Path, change: Change, expected: str, has_images: bool) -> None:
    message = refusal(folder, changed(change), has_images=has_images)
    lines = message.splitlines()
    assert lines[0].startswith(f"{folder / 'train.json'}: ")
    assert lines[1].startswith("  ")
    assert expected in lines[1]
    assert lines[0].endswith(": 1 problem")
    assert len(lines) == 2


def change_nothing(coco: dict[str, Any]) -> None:
    pass


def write_text(folder: Path) -> None:
    (folder / "images" / "b.png").write_text("no image")


def link_outside(folder: Path) -> None:
    (folder / "images" / "b.png").rename(folder / "b.png")
    (folder / "images" / "b.png").symlink_to(folder / "b.png")


@pytest.mark.parametrize(
    ("change", "damage", "expected"),
    [
        (
            change_nothing,
            lambda folder: (folder / "images" / "b.png").unlink(),
            "image 20: b.png does not exist",
        ),
        (image(file_name="sub"), lambda folder: None, "image 20: sub is a folder, expected an image file"),
        (change_nothing, write_text, "image 20: b.png cannot be read as an image ("),
        (
            image(width=6, height=8),
            lambda folder: None,
            "image 20: b.png has 8x6 pixels, but the annotations say 6x8",
        ),
        (change_nothing, link_outside, "image 20: b.png is a link to "),
    ],
)
def test_a_problem_of_an_image_file_is_one_line(
    folder: Path, change: Change, damage: Callable[[Path], None], expected: str
) -> None:
    damage(folder)
    head, line = refusal(folder, changed(change)).splitlines()
    assert head.endswith(": 1 problem")
    assert line.startswith(f"  {expected}")
    assert len(load(folder, changed(change), has_images=False)) == 3


def test_an_image_root_that_is_not_a_folder_is_refused_once(folder: Path) -> None:
    _, line = refusal(folder, COCO, image_root=folder / "none").splitlines()
    assert line == f"  the image root {folder / 'none'} is not a folder"


def test_sides_are_compared_in_the_exif_orientation(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    Image.new("RGB", (40, 30)).save(folder / "images" / "b.jpg", exif=exif)
    upright = changed(image(file_name="b.jpg", width=30, height=40))
    assert load(folder, upright)[2].width == 30
    as_stored = changed(image(file_name="b.jpg", width=40, height=30))
    message = refusal(folder, as_stored)
    assert "b.jpg has 30x40 pixels, but the annotations say 40x30" in message
    assert ", which are its sides as stored, before its EXIF orientation is applied" in message
    ignoring = load_dataset(folder / "train.json", data=DataSpec(read=ReadSpec(exif_orientation="ignore")))
    assert ignoring[2].width == 40


def test_all_problems_of_a_file_are_listed_at_once(folder: Path) -> None:
    def change(coco: dict[str, Any]) -> None:
        coco["categories"][0]["name"] = [5]
        coco["images"][0]["width"] = "wide"
        coco["images"][2]["file_name"] = "absent.png"
        coco["annotations"][0].update(image_id=99)
        coco["annotations"][1].update(bbox=[1, 2, 3])
        coco["annotations"][2].update(bbox=[20, 0, 1, 1])

    message = refusal(folder, changed(change), data=DataSpec(on_bad_box="refuse"))
    lines = message.splitlines()
    assert lines[3].startswith(
        f"  image 20: absent.png does not exist, expected {folder / 'images' / 'absent.png'}; "
    )
    assert lines[:3] + lines[4:] == [
        f"{folder / 'train.json'}: 6 problems",
        "  category 7: name is [5], expected a string",
        "  image 30: width is 'wide', expected a whole number of pixels",
        "  annotation 1 of image 99: there is no image 99",
        "  annotation 2 of image 30: bbox is [1, 2, 3], expected a list of 4 numbers: x, y, width, height",
        "  annotation 3 of image 10: bbox is [20.0, 0.0, 1.0, 1.0], outside its image of 20x50 pixels",
    ]
    assert len(refusal(folder, changed(change)).splitlines()) == 4


def test_twenty_problems_are_listed_and_the_rest_counted(folder: Path) -> None:
    entries = [{"image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 1]} for _ in range(33)]
    lines = refusal(folder, {**COCO, "annotations": entries}, data=DataSpec(on_bad_box="refuse")).splitlines()
    assert lines[0].endswith(": 33 problems")
    assert lines[1].startswith("  annotations[0] of image 10: bbox")
    assert lines[20] == "  annotations[19] of image 10: likewise"
    assert lines[21:] == ["  and 13 more"]


def test_a_long_value_is_shortened(folder: Path) -> None:
    message = refusal(folder, changed(box(bbox=list(range(100_000)))), data=DataSpec(on_bad_box="refuse"))
    assert len(message) < 400
