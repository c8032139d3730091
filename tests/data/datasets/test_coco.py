"""COCO files that are accepted, corrected with a warning, or refused, and the messages."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sniper.data.datasets import load_dataset
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
    expected = f"1 box reaching over the border, clipped (annotation 1 of image 10: {list(map(float, bbox))} in 20x50)"
    assert warning == f"{folder / 'train.json'}: {expected}"


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


# Refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"images": [],\n  "annotations": }', r"is not JSON \(Expecting value in line 2, column 18\)"),
        (b"", r"is not JSON \(Expecting value in line 1, column 1\)"),
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


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"cannot be read \(Is a directory\)"):
        load_dataset(tmp_path)


def without(key: str, table: str) -> Change:
    return lambda coco: coco[table][0 if table == "annotations" else 2].pop(key)


REFUSED: list[tuple[Change, str]] = [
    # The lists
    (lambda coco: coco.pop("images"), "images is missing, expected a list"),
    (lambda coco: coco.pop("annotations"), "annotations is missing, expected a list"),
    (lambda coco: coco.pop("categories"), "categories is missing, expected a list"),
    (lambda coco: coco.update(annotations={"a": 1}), "annotations is {'a': 1}, expected a list"),
    (lambda coco: coco["annotations"].append("x"), "annotations[3]: is 'x', expected an object"),
    (lambda coco: coco["images"].append(None), "images[3]: is None, expected an object"),
    # Keys
    (without("id", "images"), "images[2]: id is missing"),
    (without("file_name", "images"), "image 20: file_name is missing"),
    (without("width", "images"), "image 20: width is missing"),
    (without("height", "images"), "image 20: height is missing"),
    (without("image_id", "annotations"), "annotation 1: image_id is missing"),
    (without("category_id", "annotations"), "annotation 1 of image 10: category_id is missing"),
    (without("bbox", "annotations"), "annotation 1 of image 10: bbox is missing"),
    (without("id", "categories"), "categories[2]: id is missing"),
    (without("name", "categories"), "category 90: name is missing"),
    # Types
    (image(id="20"), "images[2]: id is '20', expected an integer of at most 64 bits"),
    (image(id=True), "images[2]: id is True, expected an integer"),
    (
        image(id=2**63),
        "image 9223372036854775808: id is 9223372036854775808, expected an integer of at most 64",
    ),
    (image(file_name=5), "image 20: file_name is 5, expected the name of a file"),
    (image(file_name=""), "image 20: file_name is '', expected the name of a file"),
    (image(file_name="a\0"), r"image 20: file_name is 'a\x00', expected the name of a file"),
    (image(file_name="\ud800"), r"image 20: file_name is '\ud800', expected the name of a file"),
    (image(width=40.0), "image 20: width is 40.0, expected an integer above 0, in pixels"),
    (image(height=None), "image 20: height is None, expected an integer above 0, in pixels"),
    (box(id="one"), "annotations[0] of image 10: id is 'one', expected an integer"),
    (box(image_id=10.0), "annotation 1: image_id is 10.0, expected an integer"),
    (box(category_id="dog"), "annotation 1 of image 10: category_id is 'dog', expected an integer"),
    (box(bbox="1 2 3 4"), "annotation 1 of image 10: bbox is '1 2 3 4', expected a list of 4 numbers"),
    (box(bbox=[1, 2, 3]), "annotation 1 of image 10: bbox is [1, 2, 3], expected a list of 4 numbers"),
    (box(bbox=[1, 2, 3, 4, 5]), "bbox is [1, 2, 3, 4, 5], expected a list of 4 numbers"),
    (box(bbox=[1, 2, 3, "4"]), "bbox is [1, 2, 3, '4'], expected a list of 4 numbers"),
    (box(bbox=[1, 2, 3, True]), "bbox is [1, 2, 3, True], expected a list of 4 numbers"),
    (box(bbox=[1, 2, 3, 10**400]), ", expected a list of 4 numbers"),
    (category(name=None), "category 90: name is None, expected a string"),
    # Ids
    (image(id=10), "image 10: the id is used twice, here in images[2]"),
    (box(id=3), "annotation 3 of image 10: the id is used twice, here in annotations[2]"),
    (category(id=7), "category 7: the id is used twice, here in categories[2]"),
    (box(category_id=4), "annotation 1 of image 10: there is no category 4"),
    (box(image_id=99), "annotation 1 of image 99: there is no such image"),
    # Numbers
    (box(bbox=[1, 2, float("nan"), 4]), "bbox is [1.0, 2.0, nan, 4.0], expected finite numbers"),
    (box(bbox=[1, -float("inf"), 3, 4]), "bbox is [1.0, -inf, 3.0, 4.0], expected finite numbers"),
    (box(bbox=[1, 2, 0, 4]), "bbox is [1.0, 2.0, 0.0, 4.0], expected width and height above 0"),
    (box(bbox=[1, 2, 3, -4]), "bbox is [1.0, 2.0, 3.0, -4.0], expected width and height above 0"),
    (image(width=0), "image 20: width is 0, expected an integer above 0, in pixels"),
    (image(height=-30), "image 20: height is -30, expected an integer above 0, in pixels"),
    (image(width=2**31), "image 20: width is 2147483648, expected an integer above 0, in pixels"),
    (box(bbox=[20, 2, 3, 4]), "bbox is [20.0, 2.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(bbox=[2, 50, 3, 4]), "bbox is [2.0, 50.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(bbox=[-3, 2, 3, 4]), "bbox is [-3.0, 2.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(bbox=[2, -5, 3, 4]), "bbox is [2.0, -5.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(iscrowd=2), "annotation 1 of image 10: iscrowd is 2, expected 0 or 1"),
    (box(iscrowd=None), "annotation 1 of image 10: iscrowd is None, expected 0 or 1"),
    (box(area=-1), "annotation 1 of image 10: area is -1, expected a finite number of at least 0"),
    # Paths
    (image(file_name="/etc/passwd"), "image 20: file_name is '/etc/passwd', which leaves the image root"),
    (image(file_name="../b.png"), "image 20: file_name is '../b.png', which leaves the image root"),
    (
        image(file_name="sub/../../b.png"),
        "image 20: file_name is 'sub/../../b.png', which leaves the image root",
    ),
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
        (image(file_name="sub"), lambda folder: None, "image 20: sub does not exist"),
        (change_nothing, write_text, "image 20: b.png cannot be read as an image (cannot identify"),
        (
            image(width=6, height=8),
            lambda folder: None,
            "image 20: b.png has 8x6 pixels, but the annotations say 6x8",
        ),
        (change_nothing, link_outside, "image 20: b.png is a link that leaves the image root, to "),
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
    assert "b.jpg has 30x40 pixels, but the annotations say 40x30, which are its sides with " in message
    assert message.endswith("data.read.exif_orientation: ignore")
    ignoring = load_dataset(folder / "train.json", data=DataSpec(read=ReadSpec(exif_orientation="ignore")))
    assert ignoring[2].width == 40


def test_all_problems_of_a_file_are_listed_at_once(folder: Path) -> None:
    def change(coco: dict[str, Any]) -> None:
        coco["categories"][0]["name"] = 5
        coco["images"][0].pop("width")
        coco["images"][2]["file_name"] = "absent.png"
        coco["annotations"][0].update(image_id=99, category_id=98, bbox=[1, 2, -3, 4], iscrowd="no")
        coco["annotations"][1].update(bbox=[1, 2, 3])
        coco["annotations"][2].update(bbox=[20, 0, 1, 1])

    message = refusal(folder, changed(change))
    assert message.splitlines() == [
        f"{folder / 'train.json'}: 9 problems",
        "  category 7: name is 5, expected a string",
        "  image 30: width is missing",
        f"  image 20: absent.png does not exist, expected {folder / 'images' / 'absent.png'}",
        "  annotation 1 of image 99: there is no such image",
        "  annotation 1 of image 99: there is no category 98",
        "  annotation 2 of image 30: bbox is [1, 2, 3], expected a list of 4 numbers: x, y, width, height",
        "  annotation 1 of image 99: bbox is [1.0, 2.0, -3.0, 4.0], expected width and height above 0",
        "  annotation 3 of image 10: bbox is [20.0, 0.0, 1.0, 1.0], outside its image of 20x50 pixels",
        "  annotation 1 of image 99: iscrowd is 'no', expected 0 or 1",
    ]


def test_twenty_problems_are_listed_and_the_rest_counted(folder: Path) -> None:
    entries = [{"image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 1]} for _ in range(33)]
    lines = refusal(folder, {**COCO, "annotations": entries}).splitlines()
    assert lines[0].endswith(": 33 problems")
    assert lines[20].startswith("  annotations[19] of image 10: bbox")
    assert lines[21:] == ["  and 13 more"]


def test_a_long_value_is_shortened(folder: Path) -> None:
    message = refusal(folder, changed(box(bbox=list(range(100_000)))))
    assert len(message) < 400
