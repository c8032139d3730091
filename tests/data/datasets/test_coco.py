"""COCO files that are used, used with a warning, or refused, and what is said of them."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sniper.data.datasets import Category, Dataset, load_dataset
from sniper.data.spec import ReadSpec
from sniper.errors import AnnotationError

COCO: dict[str, Any] = {
    "images": [
        {"id": 30, "file_name": "c.png", "width": 40, "height": 30},
        {"id": 10, "file_name": "sub/a.png", "width": 20, "height": 50},
        {"id": 20, "file_name": "b.png", "width": 8, "height": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [1, 2, 10, 20], "iscrowd": 0, "area": 150.5},
        {"id": 2, "image_id": 30, "category_id": 3, "bbox": [0.5, 0, 39.5, 30], "iscrowd": 1},
        {"id": 3, "image_id": 10, "category_id": 3, "bbox": [0, 0, 20, 50]},
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "unseen"}],
}

Spoil = Callable[[dict[str, Any]], None]


def written(folder: Path, content: Any) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(content))
    return path


def spoilt(spoil: Spoil) -> dict[str, Any]:
    content = copy.deepcopy(COCO)
    spoil(content)
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `images/` and the three files of COCO in it."""
    for image in COCO["images"]:
        path = tmp_path / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(path)
    return tmp_path


def loaded(folder: Path, content: Any = COCO, **options: Any) -> Dataset:
    return load_dataset(written(folder, content), **options)


def refusal(folder: Path, content: Any, **options: Any) -> str:
    with pytest.raises(AnnotationError) as refused:
        loaded(folder, content, **options)
    return str(refused.value)


# What is fine


def test_images_and_their_boxes_keep_the_order_of_the_file(folder: Path) -> None:
    annotations = loaded(folder)
    assert [record.image_id for record in annotations] == [30, 10, 20]
    assert annotations[1].boxes.tolist() == [[1, 2, 11, 22], [0, 0, 20, 50]]
    assert annotations.offsets.tolist() == [0, 1, 3, 3]
    assert annotations.warnings == ()


def test_labels_count_the_categories_in_the_order_of_their_ids(folder: Path) -> None:
    annotations = loaded(folder)
    names = [(category.category_id, category.name) for category in annotations.categories]
    assert names == [(3, "cat"), (7, "dog"), (90, "unseen")]
    assert annotations[1].labels.tolist() == [1, 0]


def test_a_record_tells_all_of_its_image(folder: Path) -> None:
    record = loaded(folder)[0]
    assert (record.image_id, record.file_name, record.width, record.height) == (30, "c.png", 40, 30)
    assert record.path == folder / "images" / "c.png"
    assert record.is_crowd.tolist() == [True]
    assert record.boxes.dtype == np.float64


def test_an_image_without_boxes_is_kept(folder: Path) -> None:
    record = loaded(folder)[2]
    assert record.boxes.shape == (0, 4)
    assert record.labels.shape == record.is_crowd.shape == (0,)


def test_the_area_is_that_of_the_file_or_else_of_the_box(folder: Path) -> None:
    assert loaded(folder).areas.tolist() == [39.5 * 30, 150.5, 20 * 50]


def test_a_file_with_empty_lists_is_an_empty_data_set(folder: Path) -> None:
    annotations = loaded(folder, {"images": [], "annotations": [], "categories": []})
    assert len(annotations) == 0
    assert annotations.boxes.shape == (0, 4)
    assert annotations.offsets.tolist() == [0]


def test_annotations_need_no_id_and_no_iscrowd(folder: Path) -> None:
    content = spoilt(lambda coco: [entry.pop("id") for entry in coco["annotations"]])
    assert loaded(folder, content).warnings == ()
    assert loaded(folder, content)[1].is_crowd.tolist() == [False, False]


@pytest.mark.parametrize("segmentation", [[[1, 2, 3]], {"counts": "x", "size": [1, 1]}, None, "?"])
def test_a_segmentation_is_not_looked_at(folder: Path, segmentation: Any) -> None:
    assert loaded(folder, spoilt(lambda coco: coco["annotations"][0].update(segmentation=segmentation)))


def test_images_lie_in_a_folder_of_that_name_or_else_beside_the_file(tmp_path: Path) -> None:
    assert loaded(tmp_path, has_images=False).image_root == tmp_path
    (tmp_path / "images").mkdir()
    assert loaded(tmp_path, has_images=False).image_root == tmp_path / "images"
    assert loaded(tmp_path, has_images=False, image_root=Path("else")).image_root == Path("else")


def test_an_image_may_be_a_link_inside_the_root(folder: Path) -> None:
    (folder / "images" / "b.png").rename(folder / "images" / "real.png")
    (folder / "images" / "b.png").symlink_to("real.png")
    assert len(loaded(folder)) == 3


def test_the_root_itself_may_be_a_link(folder: Path) -> None:
    (folder / "images").rename(folder / "elsewhere")
    (folder / "images").symlink_to(folder / "elsewhere")
    assert len(loaded(folder)) == 3


def test_images_are_not_looked_for_if_there_are_none(tmp_path: Path) -> None:
    assert len(loaded(tmp_path, has_images=False)) == 3


# What is used with a warning


def with_box(bbox: list[float], **more: Any) -> dict[str, Any]:
    """COCO whose first annotation, in an image of 20x50 pixels, has this box."""
    return spoilt(lambda coco: coco["annotations"][0].update(bbox=bbox, **more))


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
    annotations = loaded(folder, with_box(bbox))
    assert annotations[1].boxes[0].tolist() == clipped
    (warning,) = annotations.warnings
    told = f"1 box reaching over the border, clipped (annotation 1 of image 10: {list(map(float, bbox))} in 20x50)"
    assert warning == f"{folder / 'train.json'}: {told}"


def test_what_rounding_leaves_over_the_border_is_clipped_silently(folder: Path) -> None:
    annotations = loaded(folder, with_box([10.1, 0, 9.9000001, 50]))
    assert annotations[1].boxes[0].tolist() == [10.1, 0, 20, 50]
    assert annotations.warnings == ()


@pytest.mark.parametrize(("side", "is_told"), [(0.99, True), (1.0, False)])
def test_a_box_under_one_pixel_is_kept_with_a_warning(folder: Path, side: float, is_told: bool) -> None:
    annotations = loaded(folder, with_box([4, 4, 10, side]))
    assert len(annotations[1].boxes) == 2
    assert [
        bool(re.search(f"1 box less than 1 pixel .*annotation 1 of image 10: .*{side}", w))
        for w in annotations.warnings
    ] == [True] * is_told


def test_a_thin_crowd_is_fine(folder: Path) -> None:
    assert loaded(folder, with_box([4, 4, 10, 0.5], iscrowd=1)).warnings == ()


def test_a_box_that_clipping_makes_thin_is_told_for_both(folder: Path) -> None:
    first, second = loaded(folder, with_box([19.5, 4, 10, 10])).warnings
    assert "clipped" in first
    assert "less than 1 pixel" in second


def test_warnings_of_one_kind_share_a_line(folder: Path) -> None:
    content = spoilt(
        lambda coco: coco.update(
            annotations=[{**coco["annotations"][0], "id": i, "bbox": [-i, 0, 9, 9]} for i in range(1, 9)]
        )
    )
    (warning,) = loaded(folder, content).warnings
    assert "8 boxes reaching over the border" in warning
    assert warning.count("of image 10") == 3
    assert warning.endswith("and 5 more)")


# What is refused


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"images": [],\n  "annotations": }', r"is not JSON \(Expecting value in line 2, column 18\)"),
        (b"", r"is not JSON \(Expecting value in line 1, column 1\)"),
        (b"\xff\xfe\xfa", r"is not JSON \(.*decode"),
        (b"[" * 200_000, r"is not JSON \(maximum recursion depth"),
        (b"[1]", r"is \[1\], wanted an object with images, annotations, categories"),
    ],
)
def test_a_file_that_is_no_coco_object_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=f"train.json: {told}"):
        load_dataset(path)


def test_a_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        load_dataset(tmp_path / "none.json")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"cannot be read \(Is a directory\)"):
        load_dataset(tmp_path)


def image(**change: Any) -> Spoil:
    return lambda coco: coco["images"][2].update(change)


def box(**change: Any) -> Spoil:
    return lambda coco: coco["annotations"][0].update(change)


def category(**change: Any) -> Spoil:
    return lambda coco: coco["categories"][2].update(change)


def without(key: str, part: str) -> Spoil:
    return lambda coco: coco[part][0 if part == "annotations" else 2].pop(key)


REFUSED: list[tuple[Spoil, str]] = [
    # The lists
    (lambda coco: coco.pop("images"), "images is missing, wanted a list"),
    (lambda coco: coco.pop("annotations"), "annotations is missing, wanted a list"),
    (lambda coco: coco.pop("categories"), "categories is missing, wanted a list"),
    (lambda coco: coco.update(annotations={"a": 1}), "annotations is {'a': 1}, wanted a list"),
    (lambda coco: coco["annotations"].append("x"), "annotations[3]: is 'x', wanted an object"),
    (lambda coco: coco["images"].append(None), "images[3]: is None, wanted an object"),
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
    (image(id="20"), "images[2]: id is '20', wanted a whole number of at most 64 bits"),
    (image(id=True), "images[2]: id is True, wanted a whole number"),
    (
        image(id=2**63),
        "image 9223372036854775808: id is 9223372036854775808, wanted a whole number of at most 64",
    ),
    (image(file_name=5), "image 20: file_name is 5, wanted the name of a file"),
    (image(file_name=""), "image 20: file_name is '', wanted the name of a file"),
    (image(file_name="a\0"), r"image 20: file_name is 'a\x00', wanted the name of a file"),
    (image(file_name="\ud800"), r"image 20: file_name is '\ud800', wanted the name of a file"),
    (image(width=40.0), "image 20: width is 40.0, wanted a whole number of pixels above 0"),
    (image(height=None), "image 20: height is None, wanted a whole number of pixels above 0"),
    (box(id="one"), "annotations[0] of image 10: id is 'one', wanted a whole number"),
    (box(image_id=10.0), "annotation 1: image_id is 10.0, wanted a whole number"),
    (box(category_id="dog"), "annotation 1 of image 10: category_id is 'dog', wanted a whole number"),
    (box(bbox="1 2 3 4"), "annotation 1 of image 10: bbox is '1 2 3 4', wanted a list of 4 numbers"),
    (box(bbox=[1, 2, 3]), "annotation 1 of image 10: bbox is [1, 2, 3], wanted a list of 4 numbers"),
    (box(bbox=[1, 2, 3, 4, 5]), "bbox is [1, 2, 3, 4, 5], wanted a list of 4 numbers"),
    (box(bbox=[1, 2, 3, "4"]), "bbox is [1, 2, 3, '4'], wanted a list of 4 numbers"),
    (box(bbox=[1, 2, 3, True]), "bbox is [1, 2, 3, True], wanted a list of 4 numbers"),
    (box(bbox=[1, 2, 3, 10**400]), ", wanted a list of 4 numbers"),
    (category(name=None), "category 90: name is None, wanted a text"),
    # Ids
    (image(id=10), "image 10: the id is used twice, here in images[2]"),
    (box(id=3), "annotation 3 of image 10: the id is used twice, here in annotations[2]"),
    (category(id=7), "category 7: the id is used twice, here in categories[2]"),
    (box(category_id=4), "annotation 1 of image 10: there is no category 4"),
    (box(image_id=99), "annotation 1 of image 99: there is no such image"),
    # Numbers
    (box(bbox=[1, 2, float("nan"), 4]), "bbox is [1.0, 2.0, nan, 4.0], wanted finite numbers"),
    (box(bbox=[1, -float("inf"), 3, 4]), "bbox is [1.0, -inf, 3.0, 4.0], wanted finite numbers"),
    (box(bbox=[1, 2, 0, 4]), "bbox is [1.0, 2.0, 0.0, 4.0], wanted width and height above 0"),
    (box(bbox=[1, 2, 3, -4]), "bbox is [1.0, 2.0, 3.0, -4.0], wanted width and height above 0"),
    (image(width=0), "image 20: width is 0, wanted a whole number of pixels above 0"),
    (image(height=-30), "image 20: height is -30, wanted a whole number of pixels above 0"),
    (image(width=2**31), "image 20: width is 2147483648, wanted a whole number of pixels above 0"),
    (box(bbox=[20, 2, 3, 4]), "bbox is [20.0, 2.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(bbox=[2, 50, 3, 4]), "bbox is [2.0, 50.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(bbox=[-3, 2, 3, 4]), "bbox is [-3.0, 2.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(bbox=[2, -5, 3, 4]), "bbox is [2.0, -5.0, 3.0, 4.0], outside its image of 20x50 pixels"),
    (box(iscrowd=2), "annotation 1 of image 10: iscrowd is 2, wanted 0 or 1"),
    (box(iscrowd=None), "annotation 1 of image 10: iscrowd is None, wanted 0 or 1"),
    (box(area=-1), "annotation 1 of image 10: area is -1, wanted a finite number of at least 0"),
    # Paths
    (image(file_name="/etc/passwd"), "image 20: file_name is '/etc/passwd', which leaves the image root"),
    (image(file_name="../b.png"), "image 20: file_name is '../b.png', which leaves the image root"),
    (
        image(file_name="sub/../../b.png"),
        "image 20: file_name is 'sub/../../b.png', which leaves the image root",
    ),
]


@pytest.mark.parametrize(("spoil", "told"), REFUSED, ids=[told for _, told in REFUSED])
@pytest.mark.parametrize("has_images", [True, False])
def test_one_fault_is_told_in_one_line(folder: Path, spoil: Spoil, told: str, has_images: bool) -> None:
    message = refusal(folder, spoilt(spoil), has_images=has_images)
    lines = message.splitlines()
    assert lines[0].startswith(f"{folder / 'train.json'}: ")
    assert lines[1].startswith("  ")
    assert told in lines[1]
    assert lines[0].endswith(": 1 problem")
    assert len(lines) == 2


def spoil_nothing(coco: dict[str, Any]) -> None:
    pass


def put_text(folder: Path) -> None:
    (folder / "images" / "b.png").write_text("no image")


def put_link(folder: Path) -> None:
    (folder / "images" / "b.png").rename(folder / "b.png")
    (folder / "images" / "b.png").symlink_to(folder / "b.png")


@pytest.mark.parametrize(
    ("spoil", "touch", "told"),
    [
        (
            spoil_nothing,
            lambda folder: (folder / "images" / "b.png").unlink(),
            "image 20: b.png is not there",
        ),
        (image(file_name="sub"), lambda folder: None, "image 20: sub is not there"),
        (spoil_nothing, put_text, "image 20: b.png cannot be read as an image (cannot identify"),
        (
            image(width=6, height=8),
            lambda folder: None,
            "image 20: b.png has 8x6 pixels, but the annotations say 6x8",
        ),
        (spoil_nothing, put_link, "image 20: b.png is a link that leaves the image root, to "),
    ],
)
def test_a_fault_of_an_image_file_is_told_in_one_line(
    folder: Path, spoil: Spoil, touch: Callable[[Path], None], told: str
) -> None:
    touch(folder)
    head, line = refusal(folder, spoilt(spoil)).splitlines()
    assert head.endswith(": 1 problem")
    assert line.startswith(f"  {told}")
    assert len(loaded(folder, spoilt(spoil), has_images=False)) == 3


def test_an_image_root_that_is_no_folder_is_refused_once(folder: Path) -> None:
    _, line = refusal(folder, COCO, image_root=folder / "none").splitlines()
    assert line == f"  the image root {folder / 'none'} is not a folder"


def test_an_image_is_compared_turned_as_exif_says(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter when shown
    Image.new("RGB", (40, 30)).save(folder / "images" / "b.jpg", exif=exif)
    upright = spoilt(image(file_name="b.jpg", width=30, height=40))
    assert loaded(folder, upright)[2].width == 30
    as_stored = spoilt(image(file_name="b.jpg", width=40, height=30))
    message = refusal(folder, as_stored)
    assert "b.jpg has 30x40 pixels, but the annotations say 40x30, which are its sides with " in message
    assert message.endswith("data.read.exif_orientation: ignore")
    taken = load_dataset(folder / "train.json", read=ReadSpec(exif_orientation="ignore"))
    assert taken[2].width == 40


def test_all_problems_of_a_file_are_told_at_once(folder: Path) -> None:
    def spoil(coco: dict[str, Any]) -> None:
        coco["categories"][0]["name"] = 5
        coco["images"][0].pop("width")
        coco["images"][2]["file_name"] = "absent.png"
        coco["annotations"][0].update(image_id=99, category_id=98, bbox=[1, 2, -3, 4], iscrowd="no")
        coco["annotations"][1].update(bbox=[1, 2, 3])
        coco["annotations"][2].update(bbox=[20, 0, 1, 1])

    message = refusal(folder, spoilt(spoil))
    assert message.splitlines() == [
        f"{folder / 'train.json'}: 9 problems",
        "  category 7: name is 5, wanted a text",
        "  image 30: width is missing",
        f"  image 20: absent.png is not there, wanted {folder / 'images' / 'absent.png'}",
        "  annotation 1 of image 99: there is no such image",
        "  annotation 1 of image 99: there is no category 98",
        "  annotation 2 of image 30: bbox is [1, 2, 3], wanted a list of 4 numbers: x, y, width, height",
        "  annotation 1 of image 99: bbox is [1.0, 2.0, -3.0, 4.0], wanted width and height above 0",
        "  annotation 3 of image 10: bbox is [20.0, 0.0, 1.0, 1.0], outside its image of 20x50 pixels",
        "  annotation 1 of image 99: iscrowd is 'no', wanted 0 or 1",
    ]


def test_the_first_twenty_problems_are_told_and_the_rest_counted(folder: Path) -> None:
    entries = [{"image_id": 10, "category_id": 3, "bbox": [0, 0, 0, 1]} for _ in range(33)]
    lines = refusal(folder, {**COCO, "annotations": entries}).splitlines()
    assert lines[0].endswith(": 33 problems")
    assert lines[20].startswith("  annotations[19] of image 10: bbox")
    assert lines[21:] == ["  and 13 more"]


def test_a_long_value_is_shortened(folder: Path) -> None:
    message = refusal(folder, spoilt(box(bbox=list(range(100_000)))))
    assert len(message) < 400


# What can be done with them


def test_an_index_outside_the_data_set_is_refused(folder: Path) -> None:
    annotations = loaded(folder)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            annotations[index]


@given(st.lists(st.integers(0, 2), max_size=6))
def test_a_selection_holds_the_records_asked_for(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int]
) -> None:
    annotations = loaded(tmp_path_factory.mktemp("coco"), has_images=False)
    selected = annotations.select(np.array(indices, dtype=np.int64))
    assert len(selected) == len(indices)
    for record, index in zip(selected, indices, strict=True):
        wanted = annotations[index]
        assert record.path == wanted.path
        assert (record.image_id, record.width, record.height) == (
            wanted.image_id,
            wanted.width,
            wanted.height,
        )
        np.testing.assert_array_equal(record.boxes, wanted.boxes)
        np.testing.assert_array_equal(record.labels, wanted.labels)
        np.testing.assert_array_equal(record.is_crowd, wanted.is_crowd)


def test_the_digest_is_that_of_the_contents(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    digest = loaded(folder).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert loaded(tmp_path_factory.mktemp("other"), has_images=False).digest == digest
    assert loaded(folder).select(np.arange(3)).digest == digest
    changes = [
        box(bbox=[1, 2, 10, 21]),
        box(iscrowd=1),
        box(category_id=90),
        box(image_id=30),
        image(width=9),
        image(id=21),
        image(file_name="d.png"),
        category(id=91),
        lambda coco: coco["annotations"].reverse(),
    ]
    for change in changes:
        assert loaded(folder, spoilt(change), has_images=False).digest != digest


def test_a_data_set_written_as_coco_is_read_the_same(folder: Path) -> None:
    annotations = loaded(folder)
    again = loaded(folder, annotations.to_coco())
    assert again.digest == annotations.digest
    assert again.categories == annotations.categories
    np.testing.assert_array_equal(again.areas, annotations.areas)


def test_annotations_travel_to_other_processes(folder: Path) -> None:
    annotations = loaded(folder)
    again = pickle.loads(pickle.dumps(annotations))
    assert again.digest == annotations.digest
    assert again.categories[0] == Category(category_id=3, name="cat")
