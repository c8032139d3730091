"""Pictures of chips and detections: their sizes, colours and places."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.data.batches import ChipDataset
from sniper.data.datasets import Category, ImageRecord, load_dataset
from sniper.data.epoch import order_chips
from sniper.data.images.files import ArrayImageReader
from sniper.geometry import Detections
from sniper.geometry.masks import MaskArrays
from sniper.reports.pictures import draw_chips, draw_detections, draw_focus
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset

CATEGORIES = (Category(category_id=1, name="dark"), Category(category_id=2, name="bright"))


def pixel_at(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return tuple(map(int, pixel))


@pytest.mark.parametrize(
    ("side", "width"), [(600, 616), (100, 156)]
)  # a line of the legend is wider than a small chip
def test_a_sheet_shows_all_chips_and_the_whole_legend(tmp_path: Path, side: int, width: int) -> None:
    dataset = load_dataset(write_dataset(tmp_path, sides=((160, 120),), boxes_per_image=1))
    order = order_chips(dataset, SMALL_PYRAMID, batch_size=1, flip=0.0, seed=0, epoch=0)
    assert len(order.table) == 1
    draw_chips(ChipDataset(order), tmp_path / "chips.png", side=side)
    with Image.open(tmp_path / "chips.png") as sheet:
        pixels = np.asarray(sheet)
        assert sheet.width == width
    assert (pixels == [0x56, 0xB4, 0xE9]).all(axis=2).any()  # the frame of a valid box
    assert (pixels[-40:] == [0xBB, 0xBB, 0xBB]).all(axis=2).any()  # the last entry of the legend


def picture_of(tmp_path: Path, *names: str) -> np.ndarray:
    """Draw a box of each class on black."""
    detections = Detections(
        boxes=np.array(
            [[20.0, 40.0 + 150 * index, 220.0, 140.0 + 150 * index] for index in range(len(names))]
        ),
        scores=np.full(len(names), 0.9),
        labels=np.arange(len(names)),
    )
    categories = [Category(category_id=index + 1, name=name) for index, name in enumerate(names)]
    image = ArrayImageReader(np.zeros((1200, 600, 3), dtype=np.uint8))
    draw_detections(image, detections, tmp_path / "names.png", categories=categories)
    with Image.open(tmp_path / "names.png") as picture:
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("name", "other"), [("машина", "дом"), ("σκύλος", "σκύλας"), ("čas", "cas"), ("[b]a[/]", "a")]
)
def test_names_beyond_ascii_are_drawn(tmp_path: Path, name: str, other: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (picture_of(tmp_path, name) != picture_of(tmp_path, other)).any()


def test_a_name_that_no_font_has_is_drawn_as_its_id_with_a_warning(tmp_path: Path) -> None:
    missing = "\U000f0000"  # for private use
    with pytest.warns(UserWarning, match=r"no font on this machine has the characters of 2 class names"):
        picture = picture_of(tmp_path, "car", missing, missing * 2)
    np.testing.assert_array_equal(picture, picture_of(tmp_path, "car", "class 2", "class 3"))


def test_control_characters_and_long_names_are_drawn_as_one_short_line(tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        picture_of(tmp_path, "a\n b\x1b", "x" * 10_000), picture_of(tmp_path, "a b\\x1b", "x" * 59 + "…")
    )


def test_detections_below_the_score_are_not_drawn(tmp_path: Path) -> None:
    image = ArrayImageReader(np.zeros((100, 200, 3), dtype=np.uint8))
    detections = Detections(
        boxes=np.array([[20.0, 40.0, 60.0, 80.0], [120.0, 40.0, 160.0, 80.0]]),
        scores=np.array([0.9, 0.1]),
        labels=np.array([0, 1]),
    )
    draw_detections(image, detections, tmp_path / "detections.png", categories=CATEGORIES)
    with Image.open(tmp_path / "detections.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[:2] == (600 + 42, 1200)  # enlarged six times, and the legend
    assert pixels[360, 119].tolist() == [0xE6, 0x9F, 0x00]
    assert pixels[:600, 700:].sum() == 0


def record_of(
    boxes: np.ndarray, *, is_crowd: np.ndarray, width: int, masks: MaskArrays | None = None
) -> ImageRecord:
    """Return an image with objects of the first class."""
    return ImageRecord(
        image_id=1,
        file_name="a.png",
        path=Path("a.png"),
        image_root=Path(),
        width=width,
        height=600,
        boxes=boxes,
        labels=np.zeros(len(boxes), dtype=np.int64),
        is_crowd=is_crowd,
        masks=masks,
    )


def test_matches_and_crowds_are_coloured(tmp_path: Path) -> None:
    image = ArrayImageReader(np.zeros((600, 1200, 3), dtype=np.uint8))
    ground_truth = record_of(
        np.array([[100.0, 100, 200, 200], [400, 100, 500, 200], [700, 100, 1100, 500]]),
        is_crowd=np.array([False, False, True]),
        width=1200,
    )
    detections = Detections(
        boxes=np.array([[102.0, 100, 200, 200], [100, 300, 200, 400], [800, 200, 900, 300]]),
        scores=np.array([0.9, 0.8, 0.7]),
        labels=np.array([0, 0, 0]),
    )
    draw_detections(
        image, detections, tmp_path / "detections.png", categories=CATEGORIES, ground_truth=ground_truth
    )
    with Image.open(tmp_path / "detections.png") as picture:
        colors = {
            name: "#{:02X}{:02X}{:02X}".format(*pixel_at(picture, x, y))
            for name, (x, y) in {
                "true positive": (101, 150),
                "false positive": (99, 350),
                "false negative": (399, 150),
                "in crowd": (799, 250),
                "crowd": (699, 300),
            }.items()
        }
        legend = np.asarray(picture)[600:]
    assert all(count_of(legend, color) > 100 for color in colors.values())
    assert colors == {
        "true positive": "#56B4E9",
        "false positive": "#E69F00",
        "false negative": "#CC79A7",
        "in crowd": "#BBBBBB",
        "crowd": "#BBBBBB",
    }


def test_a_very_large_image_makes_a_picture_that_can_be_opened(tmp_path: Path) -> None:
    image = ArrayImageReader(np.zeros((500, 12_000, 3), dtype=np.uint8))
    detections = Detections(
        boxes=np.array([[0.0, 0, 6000, 500]]), scores=np.array([0.9]), labels=np.array([0])
    )
    draw_detections(image, detections, tmp_path / "detections.png", categories=CATEGORIES)
    with Image.open(tmp_path / "detections.png") as picture:
        assert picture.size == (6000, 250 + 215)  # with the legend
        assert pixel_at(picture, 3001, 125) != (0, 0, 0)  # the right edge of the box


def count_of(pixels: np.ndarray, color: str) -> int:
    """Count the pixels of a colour."""
    return int((pixels == [int(color[start : start + 2], 16) for start in (1, 3, 5)]).all(axis=-1).sum())


def draw(path: Path, detections: Detections, *, sides: tuple[int, int] = (600, 1200)) -> np.ndarray:
    image = ArrayImageReader(np.zeros((*sides, 3), dtype=np.uint8))
    draw_detections(image, detections, path, categories=CATEGORIES)
    with Image.open(path) as picture:
        return np.asarray(picture)


def squares(side: float, *, labels: list[int]) -> Detections:
    """Return squares in a row."""
    low = np.stack([100.0 + 2.5 * side * np.arange(len(labels)), np.full(len(labels), 200.0)], axis=1)
    return Detections(
        boxes=np.concatenate([low, low + side], axis=1),
        scores=np.linspace(0.9, 0.5, len(labels)),
        labels=np.array(labels, dtype=np.int64),
    )


@pytest.mark.parametrize(("side", "line"), [(10, 1), (60, 2), (180, 4)])
def test_lines_suit_the_objects_and_are_around_them(tmp_path: Path, side: int, line: int) -> None:
    pixels = draw(tmp_path / "a.png", squares(side, labels=[0, 0, 1]))
    row = pixels[200 + side // 2, 90 : 100 + side]
    assert [count_of(row[:10], "#E69F00"), count_of(row[10:], "#E69F00")] == [line, 0]


@pytest.mark.parametrize("sides", [(600, 1200), (2400, 4800)])
def test_labels_have_the_size_of_the_objects_in_images_of_all_sizes(
    tmp_path: Path, sides: tuple[int, int]
) -> None:
    pixels = draw(tmp_path / "a.png", squares(20, labels=[0]), sides=sides)
    rows = np.flatnonzero((pixels[: sides[0], :, 0] > 0).any(axis=1))
    assert len(rows) == 23 + 14  # the box with its lines, and the label


def test_the_legend_has_the_colours_of_the_classes_that_are_there(tmp_path: Path) -> None:
    for labels, colors in (([0, 0, 1], ["#E69F00", "#56B4E9"]), ([1], ["#56B4E9"]), ([], [])):
        legend = draw(tmp_path / "a.png", squares(60, labels=labels))[600:]
        assert [color for color in ("#E69F00", "#56B4E9") if count_of(legend, color) > 100] == colors
        assert count_of(legend, "#FFFFFF") > 20  # its text


def test_duplicates_are_not_drawn(tmp_path: Path) -> None:
    single = squares(60, labels=[0])
    double = Detections(
        boxes=np.concatenate([single.boxes, single.boxes + 5]),
        scores=np.array([0.9, 0.8]),
        labels=np.array([0, 0]),
    )
    np.testing.assert_array_equal(draw(tmp_path / "a.png", double), draw(tmp_path / "b.png", single))


def test_a_jpeg_is_small_and_its_lines_have_their_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = ArrayImageReader(rng.integers(0, 60, (600, 1200, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png"):
        draw_detections(image, squares(200, labels=[0]), tmp_path / name, categories=CATEGORIES)
    assert (tmp_path / "a.jpg").stat().st_size < (tmp_path / "a.png").stat().st_size / 2
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.array(pixel_at(picture, 98, 300)) - [0xE6, 0x9F, 0x00]).max() < 40


def test_what_was_not_searched_is_darker_and_objects_are_coloured_by_what_became_of_them(
    tmp_path: Path,
) -> None:
    image = ArrayImageReader(np.full((600, 1200, 3), 200, dtype=np.uint8))
    ground_truth = record_of(
        np.array([[100.0, 100, 200, 200], [300, 100, 400, 200], [700, 100, 800, 200], [900, 100, 990, 190]]),
        is_crowd=np.array([False, False, False, True]),
        width=1200,
    )
    detections = Detections(
        boxes=np.array([[102.0, 100, 200, 200]]), scores=np.array([0.9]), labels=np.array([0])
    )
    draw_focus(
        image,
        detections,
        tmp_path / "focus.png",
        ground_truth=ground_truth,
        searched=np.array([[0.0, 0, 512, 512]]),
        is_shown=np.array([True, True, False, False]),
    )
    with Image.open(tmp_path / "focus.png") as picture:
        colors = [
            "#{:02X}{:02X}{:02X}".format(*pixel_at(picture, x, y))
            for x, y in ((99, 150), (299, 150), (699, 150), (899, 150), (250, 400), (600, 400), (250, 512))
        ]
    assert colors == ["#56B4E9", "#CC79A7", "#E69F00", "#464646", "#C8C8C8", "#464646", "#BBBBBB"]


def test_missed_objects_and_crowds_with_a_mask_are_outlined(tmp_path: Path) -> None:
    """A triangle that is missed fills half of its box, whose other corner stays empty."""
    image = ArrayImageReader(np.zeros((600, 600, 3), dtype=np.uint8))
    rings = [[[[100, 100], [300, 100], [300, 300]]], [[[400, 400], [500, 400], [500, 500]]]]
    record = record_of(
        np.array([[100.0, 100, 300, 300], [400.0, 400, 500, 500]]),
        is_crowd=np.array([False, True]),
        width=600,
        masks=MaskArrays.from_rings(rings),
    )
    draw_detections(
        image, Detections.empty(), tmp_path / "missed.png", categories=CATEGORIES, ground_truth=record
    )
    with Image.open(tmp_path / "missed.png") as picture:
        pixels = np.asarray(picture)[:1200]
    assert not pixels[400:600, 195:290].any()  # the picture is twice as large
    assert not pixels[900:1010, 790:880].any()
    assert pixels[195:205, 250:550].any(axis=(0, 2)).all()
    assert pixels[795:805, 850:950].any(axis=(0, 2)).all()
