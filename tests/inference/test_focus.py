"""Focus: fine levels are searched where coarser ones suspect objects, and find there what they find anywhere."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sniper.chips import LevelSpec
from sniper.config.experiment import FocusSpec
from sniper.data.images.files import load_image
from sniper.data.spec import ReadSpec
from sniper.errors import ConfigError
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.inference.detector import Detector
from sniper.inference.focus import choose_windows, focused_levels
from sniper.inference.windows import FreeWindow, TilingWindow
from tests.inference.blobs import blob_detector, draw_blobs, find_blob_cells

FINE, COARSE = LevelSpec(factor=2.0, below=30), LevelSpec(factor=1.0, at_least=24)
FOCUS = FocusSpec(min_score=0.4, window=256)
BY_HEAD = FocusSpec(min_score=0.4, window=256, cues="head")
Cues = Literal["detections", "head"]


def focused(detector: Detector, focus: FocusSpec | None = FOCUS) -> Detector:
    return dataclasses.replace(detector, spec=dataclasses.replace(detector.spec, focus=focus))


def in_order(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.T)]


def num_pixels(detector: Detector, image: np.ndarray) -> int:
    (result,) = detector.search([image])
    assert result is not None
    return result.num_pixels


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([256, 320, 512]),
    st.sampled_from([1, 8, 40]),
    st.sampled_from(["detections", "head"]),
)
def test_every_object_that_a_coarser_level_sees_is_found_once_and_whole(
    seed: int, window: int, count: int, cues: Cues
) -> None:
    image, boxes = draw_blobs(seed, width=1100, height=900, smallest=6, largest=60, count=count)
    detector = focused(
        blob_detector(FINE, COARSE, merge="hard", has_head=True),
        FocusSpec(min_score=0.4, window=window, cues=cues),
    )
    np.testing.assert_array_equal(in_order(detector.predict(image).boxes), in_order(boxes))


def test_windows_with_too_little_are_not_searched() -> None:
    image = np.zeros((2000, 2000, 3), dtype=np.uint8)
    image[100:110, 100:110] = image[1700:1710, 1000:1010] = image[1720:1730, 1020:1030] = 255
    detector = blob_detector(FINE, COARSE)  # each of these scores 0.504
    assert len(focused(detector).predict(image)) == 3
    pair = focused(detector, FocusSpec(min_score=0.9, window=256)).predict(image)
    np.testing.assert_array_equal(in_order(pair.boxes), [[1000, 1700, 1010, 1710], [1020, 1720, 1030, 1730]])
    assert len(focused(detector, FocusSpec(min_score=1.5, window=256)).predict(image)) == 0


def test_an_empty_image_costs_the_coarsest_level_alone() -> None:
    detector = focused(blob_detector(FINE, COARSE))
    assert num_pixels(detector, np.zeros((640, 1280, 3), dtype=np.uint8)) == 640 * 1280


@pytest.mark.parametrize("count", [4, 400])
def test_a_full_image_costs_no_more_than_the_whole_search(count: int) -> None:
    image, _ = draw_blobs(0, width=1280, height=960, smallest=6, largest=20, count=count)
    detector = blob_detector(FINE, COARSE)
    whole, part = num_pixels(detector, image), num_pixels(focused(detector), image)
    assert part <= whole
    assert (part == whole) == (count == 400)


def test_a_level_that_no_coarser_one_can_stand_for_is_searched_as_a_whole() -> None:
    image, boxes = draw_blobs(1, width=1200, height=1200, smallest=6, largest=20, count=3)
    detector = focused(blob_detector(LevelSpec(factor=1.0, below=60), LevelSpec(long_side=256, at_least=60)))
    assert num_pixels(detector, image) < 1.1 * (1200 + 48) ** 2  # a ratio of 4.7; 60 pixels are 13 there
    np.testing.assert_array_equal(in_order(detector.predict(image).boxes), in_order(boxes))


@pytest.mark.parametrize(
    ("finer", "ratio", "is_shown"),
    [
        (LevelSpec(factor=2.0), 4.0, True),  # 64 pixels become 16
        (LevelSpec(factor=2.0), 4.1, False),
        (LevelSpec(factor=2.0, below=48), 6.0, True),  # 96 pixels become 16
        (LevelSpec(factor=2.0, below=48), 6.1, False),
        (LevelSpec(factor=2.0, below=20), 4.0, True),  # objects of 64 pixels whatever the range
    ],
)
def test_a_level_has_a_focus_if_the_coarser_one_shows_its_largest_objects(
    finer: LevelSpec, ratio: float, is_shown: bool
) -> None:
    sides = Sides(1200, 1200)
    coarser = LevelSpec(factor=2.0 / ratio)
    assert (len(focused_levels([coarser, finer], sides)) == 1) is is_shown


def test_a_jpeg_is_decoded_in_full_only_where_a_fine_level_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def load(data: Path, spec: ReadSpec, *, reduction: int, sides: Sides) -> np.ndarray:
        decoded.append(reduction)
        return load_image(data, spec, reduction=reduction, sides=sides)

    monkeypatch.setattr("sniper.data.images.files.load_image", load)
    levels = LevelSpec(factor=0.5, below=150), LevelSpec(long_side=256, at_least=120)
    for count, reductions in ((0, [4]), (2, [4, 1])):
        image, _ = draw_blobs(3, width=2200, height=1600, smallest=80, largest=90, count=count)
        Image.fromarray(image).save(tmp_path / f"{count}.jpg", quality=95, subsampling=0)
        decoded.clear()
        assert len(focused(blob_detector(*levels)).predict(tmp_path / f"{count}.jpg")) == count
        assert decoded == reductions


def test_detections_do_not_depend_on_other_images() -> None:
    images = [
        draw_blobs(i, width=600 + 90 * i, height=500, smallest=6, largest=50, count=9)[0] for i in range(4)
    ]
    detector = focused(blob_detector(FINE, COARSE, LevelSpec(long_side=200, at_least=40)))
    together = list(detector.predict_many(images))
    for image, detections in zip(images, together, strict=True):
        assert detections is not None
        np.testing.assert_array_equal(detector.predict(image).boxes, detections.boxes)


@pytest.mark.parametrize("focus", [FOCUS, BY_HEAD], ids=lambda focus: focus.cues)
def test_masks_are_those_of_the_whole_search(focus: FocusSpec) -> None:
    image, _ = draw_blobs(2, width=1100, height=900, smallest=6, largest=60, count=6)
    detector = blob_detector(FINE, COARSE, merge="hard", has_masks=True, has_head=True)
    whole, part = detector.predict(image), focused(detector, focus).predict(image)
    assert part.masks is not None
    assert whole.masks is not None
    order, other = np.lexsort(whole.boxes.T), np.lexsort(part.boxes.T)
    np.testing.assert_array_equal(part.masks.to_arrays()[other], whole.masks.to_arrays()[order])


def test_windows_lie_on_the_grid_and_in_the_level() -> None:
    image, _ = draw_blobs(5, width=1111, height=777, smallest=6, largest=20, count=12)
    (result,) = blob_detector(COARSE).search([image], keeps_all_sizes=True)
    assert result is not None
    level = FINE.at(width=1111, height=777)
    windows = choose_windows(level, result.by_level, focus=FOCUS, limit=4096)
    assert len(windows) > 1
    for window in windows:
        assert isinstance(window, FreeWindow)
        x1, y1, x2, y2 = window.corners
        assert x1 % 64 == y1 % 64 == 0
        assert 0 <= x1 < x2 <= level.width
        assert 0 <= y1 < y2 <= level.height
    (found,) = result.by_level
    distant = dataclasses.replace(found, level=LevelSpec(factor=0.2).at(width=1111, height=777))
    (whole,) = choose_windows(level, [distant], focus=FOCUS, limit=4096)
    assert isinstance(whole, TilingWindow)


def test_a_head_says_where_to_search_without_any_detection() -> None:
    image, boxes = draw_blobs(3, width=1200, height=1000, smallest=8, largest=11, count=5)
    blind = dataclasses.replace(
        blob_detector(FINE, COARSE, has_head=True),
        detect_focused=lambda images, select: (
            [Detections.empty() for _ in images],
            find_blob_cells(images, select)[1],
        ),
    )
    np.testing.assert_array_equal(in_order(focused(blind, BY_HEAD).predict(image).boxes), in_order(boxes))
    assert num_pixels(focused(blind, BY_HEAD), image) < 0.6 * num_pixels(blind, image)


def test_cells_of_three_levels_lead_from_each_to_the_next() -> None:
    levels = (LevelSpec(factor=4.0, below=12), LevelSpec(factor=2.0, at_least=10, below=30), COARSE)
    image = np.zeros((640, 640, 3), dtype=np.uint8)
    image[100:108, 100:108] = image[500:520, 400:420] = 255
    detector = blob_detector(*levels, has_head=True)
    (result,) = focused(detector, BY_HEAD).search([image])
    assert result is not None
    searched = [[of_level.level.scale, len(of_level.windows)] for of_level in result.by_level]
    assert searched == [[1.0, 1], [2.0, 2], [4.0, 2]]
    assert result.by_level[-1].cells is None  # not computed: there is no finer level
    assert len(focused(detector, BY_HEAD).predict(image)) == 2


def test_an_empty_image_costs_the_coarsest_level_alone_by_the_head_too() -> None:
    detector = focused(blob_detector(FINE, COARSE, has_head=True), BY_HEAD)
    assert num_pixels(detector, np.zeros((640, 1280, 3), dtype=np.uint8)) == 640 * 1280


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"predict\.focus\.cues: head needs .* \(model\.focus\), or is exported"
    ):
        focused(blob_detector(FINE, COARSE), BY_HEAD).predict(np.zeros((64, 64, 3), dtype=np.uint8))
