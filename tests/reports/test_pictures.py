"""Pictures show what they should, where they should."""

from pathlib import Path

import numpy as np
from PIL import Image

from sniper.data.batches import ChipDataset
from sniper.data.datasets import Category, load_dataset
from sniper.data.epoch import order_chips
from sniper.data.images.files import ArrayImageReader
from sniper.geometry import Detections
from sniper.reports.pictures import Truth, draw_chips, draw_detections
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset

CATEGORIES = (Category(category_id=1, name="dark"), Category(category_id=2, name="bright"))


def test_a_sheet_holds_as_many_chips_as_there_are(tmp_path: Path) -> None:
    annotations = load_dataset(write_dataset(tmp_path, sides=((160, 120),), boxes_per_image=1))
    plan = order_chips(annotations, SMALL_PYRAMID, batch_size=1, flip=0.0, seed=0, epoch=0)
    draw_chips(ChipDataset(plan), tmp_path / "chips.png", side=100)
    with Image.open(tmp_path / "chips.png") as sheet:
        colors = {color for _, color in sheet.getcolors(maxcolors=1_000_000) or []}
        assert sheet.width == len(plan.table) * 108 + 8
    assert (0x56, 0xB4, 0xE9) in colors  # the frame of a valid box


def test_only_detections_with_a_good_score_are_drawn(tmp_path: Path) -> None:
    image = ArrayImageReader(np.zeros((100, 200, 3), dtype=np.uint8))
    found = Detections(
        boxes=np.array([[20.0, 40.0, 60.0, 80.0], [120.0, 40.0, 160.0, 80.0]]),
        scores=np.array([0.9, 0.1]),
        labels=np.array([0, 1]),
    )
    draw_detections(image, found, tmp_path / "found.png", categories=CATEGORIES)
    with Image.open(tmp_path / "found.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (600, 1200, 3)  # enlarged six times
    assert pixels[360, 120].tolist() == [0xE6, 0x9F, 0x00]
    assert pixels[:, 700:].sum() == 0


def test_a_box_at_the_upper_border_has_its_name_inside(tmp_path: Path) -> None:
    found = Detections(boxes=np.array([[0.0, 0.0, 90.0, 90.0]]), scores=np.array([0.9]), labels=np.array([0]))
    draw_detections(
        ArrayImageReader(np.zeros((100, 100, 3), dtype=np.uint8)),
        found,
        tmp_path / "found.png",
        categories=CATEGORIES,
    )
    with Image.open(tmp_path / "found.png") as picture:
        assert (np.asarray(picture)[6:16, 4:60] == [0xE6, 0x9F, 0x00]).all(axis=2).any()


def test_hits_false_alarms_misses_and_crowds_have_colours_of_their_own(tmp_path: Path) -> None:
    image = ArrayImageReader(np.zeros((600, 1200, 3), dtype=np.uint8))
    truth = Truth(
        boxes=np.array([[100.0, 100, 200, 200], [400, 100, 500, 200], [700, 100, 1100, 500]]),
        labels=np.array([0, 0, 0]),
        is_crowd=np.array([False, False, True]),
    )
    found = Detections(
        boxes=np.array([[102.0, 100, 200, 200], [100, 300, 200, 400], [800, 200, 900, 300]]),
        scores=np.array([0.9, 0.8, 0.7]),
        labels=np.array([0, 0, 0]),
    )
    draw_detections(image, found, tmp_path / "found.png", categories=CATEGORIES, truth=truth)
    with Image.open(tmp_path / "found.png") as picture:
        colors = {
            name: "#{:02X}{:02X}{:02X}".format(*picture.getpixel(place))
            for name, place in {
                "hit": (102, 150),
                "false alarm": (100, 350),
                "miss": (400, 150),
                "in crowd": (800, 250),
                "crowd": (700, 300),
            }.items()
        }
    assert colors == {
        "hit": "#56B4E9",
        "false alarm": "#E69F00",
        "miss": "#CC79A7",
        "in crowd": "#BBBBBB",
        "crowd": "#BBBBBB",
    }


def test_a_very_large_image_makes_a_picture_that_can_be_opened(tmp_path: Path) -> None:
    image = ArrayImageReader(np.zeros((500, 12_000, 3), dtype=np.uint8))
    found = Detections(boxes=np.array([[0.0, 0, 6000, 500]]), scores=np.array([0.9]), labels=np.array([0]))
    draw_detections(image, found, tmp_path / "found.png", categories=CATEGORIES)
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size == (6000, 250)
        assert picture.getpixel((3000, 125)) != (0, 0, 0)  # the right edge of the box
