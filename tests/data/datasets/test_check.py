"""Boxes that are recognised as a whole: other formats, crowds, repeats; and data sets without a box to learn from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.chips.pyramid import PyramidSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import order_chips, order_tiles, order_whole_images
from sniper.data.spec import DataSpec
from sniper.errors import AnnotationError
from tests.data.datasets.small import Change, category, changed, load
from tests.data_folder import find_data

WIDTH, HEIGHT = 640, 480


def coco(boxes: list[list[float]], **values: Any) -> dict[str, Any]:
    """Return a data set of two images with these boxes, in turn."""
    return {
        "images": [
            {"id": index, "file_name": f"{index}.jpg", "width": WIDTH, "height": HEIGHT} for index in (1, 2)
        ],
        "annotations": [
            {"id": index, "image_id": 1 + index % 2, "category_id": 1, "bbox": box, **values}
            for index, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


def draw_boxes(count: int, seed: int = 0) -> np.ndarray:
    """Draw xyxy boxes of all sizes inside an image."""
    generator = np.random.default_rng(seed)
    x, y = (np.sort(generator.uniform(0, side, (2, count)), axis=0) for side in (WIDTH, HEIGHT))
    return np.stack([x[0], y[0], x[1], y[1]], axis=1)


def load_boxes(folder: Path, boxes: Any, **values: Any) -> Dataset:
    return load(folder, coco(np.asarray(boxes, dtype=float).tolist(), **values), has_images=False)


def words(dataset: Dataset) -> list[str]:
    return [warning.removeprefix(f"{dataset.path}: ") for warning in dataset.warnings]


# Boxes in another format


@settings(max_examples=20)
@given(st.integers(12, 60), st.integers(0, 99))
def test_corners_instead_of_sides_are_refused(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("corners")
    with pytest.raises(AnnotationError) as refused:
        load_boxes(folder, draw_boxes(count, seed))
    head, line = str(refused.value).splitlines()
    assert head.endswith(": 1 problem")
    assert line.startswith("  the boxes look like corners (x1, y1, x2, y2), expected x, y, width, height: ")
    assert (
        f" of {count} boxes reach far over the border of their image, and as corners they are inside" in line
    )
    assert "(annotation " in line


@pytest.mark.parametrize(
    "bad",
    [
        [-5.0, -5.0, 20.0, 20.0],  # beside the image
        [-3.0, 5.0, WIDTH + 3.0, 20.0],
        [10.0, 10.0, 10.0, 10.0],
        [50.0, 50.0, 20.0, 20.0],
    ],
)
def test_corners_are_recognised_among_some_bad_boxes(folder: Path, bad: list[float]) -> None:
    corners = [*draw_boxes(57).tolist(), *([bad] * 3)]
    with pytest.raises(AnnotationError, match="look like corners"):
        load_boxes(folder, corners)


def test_fractions_are_recognised_among_some_boxes_in_pixels(folder: Path) -> None:
    fractions = draw_boxes(57) / (WIDTH, HEIGHT, WIDTH, HEIGHT)
    with pytest.raises(AnnotationError, match="no number is above 1 in 57 of 60 boxes"):
        load_boxes(folder, [*fractions.tolist(), *[[10.0, 10.0, 20.0, 20.0]] * 3])


@pytest.mark.parametrize(
    ("name", "other", "is_reported"),
    [("a.jpg", "./a.jpg", True), ("sub/a.jpg", "sub/x/../a.jpg", True), ("a.jpg", "sub/a.jpg", False)],
)
def test_one_file_under_two_names_is_reported(folder: Path, name: str, other: str, is_reported: bool) -> None:
    content = coco([[1, 2, 3, 4]])
    content["images"][0]["file_name"], content["images"][1]["file_name"] = name, other
    dataset = load(folder, content, has_images=False)
    reported = f"1 image with the file of an earlier image (image 2: {other})"
    assert words(dataset) == ([reported] if is_reported else [])


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(0, 99))
def test_boxes_with_sides_are_accepted(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int
) -> None:
    corners = draw_boxes(count, seed)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    assert len(load_boxes(tmp_path_factory.mktemp("sides"), boxes).boxes) == count


@pytest.mark.parametrize(
    "boxes",
    [
        [[1, 1, WIDTH, HEIGHT]] * 9,  # whole images, counted from 1
        [[0, 0, 2 * WIDTH, HEIGHT]] * 9,  # not inside as corners either
        [[100, 100, 700, 90]] * 9,
        [[300, 200, 500, 400]] * 2,  # too few to judge
    ],
)
def test_other_boxes_over_the_border_are_clipped(folder: Path, boxes: list[list[float]]) -> None:
    dataset = load_boxes(folder, boxes)
    assert len(dataset.boxes) == len(boxes)
    assert any("reaching over the border, clipped" in warning for warning in dataset.warnings)


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("are_corners", [False, True])
def test_fractions_of_the_image_are_refused(folder: Path, count: int, are_corners: bool) -> None:
    boxes = draw_boxes(count) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    if not are_corners:
        boxes[:, 2:] -= boxes[:, :2]
    with pytest.raises(
        AnnotationError,
        match=rf"fractions of their image, expected pixels: no number is above 1 in {count} of {count} box",
    ):
        load_boxes(folder, boxes)


@pytest.mark.parametrize(
    "name",
    [
        "annotations/coco_val2017",
        "annotations/visdrone_val",
        *[
            f"{folder}/{split}"
            for folder in ("coco_mini", "coco_person", "hit_uav", "deeppcb", "nuclei", "coco_masks")
            for split in ("train", "test")
        ],
    ],
)
def test_no_real_data_set_is_close_to_another_format(name: str) -> None:
    dataset = load_dataset(find_data(f"data/{name}.json"), has_images=False)
    of_box = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    frames = np.stack([dataset.widths, dataset.heights], axis=1)[of_box]
    sides = dataset.boxes[:, 2:] - dataset.boxes[:, :2]
    are_corners = ((sides > dataset.boxes[:, :2]) & (sides <= frames + 1)).all(axis=1)
    assert are_corners.mean() < 0.5
    assert (sides > 1).any(axis=1).mean() > 0.99


# Crowds


@pytest.mark.parametrize(
    ("num_crowds", "is_reported"), [(0, False), (2, False), (10, False), (11, True), (50, True), (100, True)]
)
def test_many_crowds_are_reported_with_their_share(folder: Path, num_crowds: int, is_reported: bool) -> None:
    content = coco([[10, 10, 20 + index, 20] for index in range(100)])
    for entry in content["annotations"][:num_crowds]:
        entry["iscrowd"] = 1
    expected = (
        f"{num_crowds} of 100 boxes ({num_crowds}%) are crowds or regions to ignore, neither trained nor scored "
        "on; data.crowds: objects takes them for objects (--crowds objects, to score or convert)"
    )
    assert words(load(folder, content, has_images=False)) == [expected] * is_reported
    dataset = load(folder, content, has_images=False, data=DataSpec(crowds="objects"))
    assert not dataset.is_crowd.any()
    assert dataset.warnings == ()


# Repeats


def test_equal_boxes_are_counted_and_used(folder: Path) -> None:
    boxes = np.array(
        [[1, 2, 30, 40]] * 3 + [[1, 2, 30, 41]] * 2 + [[-0.0, 2, 30, 40]] + [[0.0, 2, 30, 40]] * 2
    )
    content = coco(boxes.tolist())
    for entry in content["annotations"]:
        entry["image_id"] = 1
    content["annotations"][1]["image_id"] = 2
    dataset = load(folder, content, has_images=False)
    assert len(dataset.boxes) == 8
    (warning,) = words(dataset)
    assert warning.startswith(
        "4 boxes equal to an earlier box of the same image and category, all used (annotation 2 of image 1: bbox is "
    )
    assert [f"annotation {index} " in warning for index in (4, 6)] == [True, True]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3), st.integers(1, 3)), max_size=30))
def test_repeats_are_those_that_a_set_finds(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]]
) -> None:
    content = coco([[x, 2, 30, y] for _, x, y in rows])
    for entry, (image, _, _) in zip(content["annotations"], rows, strict=True):
        entry["image_id"] = 1 + image
    dataset = load(tmp_path_factory.mktemp("repeats"), content, has_images=False)
    num_repeats = len(rows) - len(set(rows))
    assert [int(warning.split()[0]) for warning in words(dataset)] == [num_repeats] * (num_repeats > 0)


def test_a_file_of_two_images_is_reported(folder: Path) -> None:
    content = coco([[1, 2, 30, 40]])
    content["images"][1]["file_name"] = "1.jpg"
    dataset = load(folder, content, has_images=False)
    assert words(dataset) == ["1 image with the file of an earlier image (image 2: 1.jpg)"]


# No box to learn from


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (coco([]), "it has 2 images without annotations"),
        ({**coco([]), "images": []}, "it has no images"),
        (
            coco([[1, 1, 20, 20], [2, 2, 9, 9]], iscrowd=1),
            "of 2 boxes: 2 crowds or regions to ignore (data.crowds: objects takes them for objects)",
        ),
        (coco([[1, 1, 0.5, 20]]), "of 1 box: 1 less than 1 pixel wide or high"),
        (
            coco([[1, 1, 0, 20], [700, 2, 9, 9], [3, 3, 9, 0.5]]),
            "of 3 boxes: 1 less than 1 pixel wide or high, 2 dropped as unusable",
        ),
    ],
)
def test_a_data_set_without_a_box_to_learn_from_has_a_reason(
    folder: Path, content: dict[str, Any], reason: str
) -> None:
    dataset = load(folder, content, has_images=False)
    options: dict[str, Any] = {"batch_size": 2, "flip": 0.5, "seed": 0, "epoch": 0}
    orders: list[Callable[[], object]] = [
        lambda: order_chips(dataset, PyramidSpec(), **options),
        lambda: order_tiles(dataset, TileSpec(side=64, empty="drop"), **options),
        lambda: order_whole_images(dataset, WholeSpec(), chip_size=512, **options),
    ]
    for order in orders:
        with pytest.raises(AnnotationError) as refused:
            order()
        assert str(refused.value) == f"{dataset.path}: has no box to learn from; {reason}"


def set_categories(count: int) -> Change:
    """Add categories up to a number."""

    def change(coco: dict[str, Any]) -> None:
        added = range(count - len(coco["categories"]))
        coco["categories"] += [{"id": 1000 + number, "name": f"class {number}"} for number in added]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_categories(20_001), "there are 20,001 categories, expected at most 20,000"),
        (category(name="a" * 1025), "has 1,025 characters, expected at most 1,024"),
    ],
)
def test_categories_beyond_the_bounds_are_refused(folder: Path, change: Change, message: str) -> None:
    with pytest.raises(AnnotationError) as raised:
        load(folder, changed(change))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400


def test_categories_at_the_bounds_are_accepted(folder: Path) -> None:
    content = changed(category(name="a" * 1024))
    set_categories(20_000)(content)
    assert len(load(folder, content).categories) == 20_000


@pytest.mark.parametrize("side", [1_000_001, 100_000_000])
def test_sides_beyond_the_bound_are_refused_in_other_formats(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.xml").write_text(
        f"<annotation><filename>a.jpg</filename><size><width>{side}</width><height>5</height></size>"
        "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object>"
        "</annotation>"
    )
    with pytest.raises(
        AnnotationError, match=f"width and height are {side} and 5, expected at most 1,000,000 pixels"
    ):
        load_dataset(tmp_path, has_images=False)
