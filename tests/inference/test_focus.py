"""Focus: fine levels are searched where coarser ones suspect objects, and find there what they find anywhere."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.chips import LevelSpec
from sniper.config.experiment import FocusSpec
from sniper.inference.detector import Detector
from sniper.inference.focus import choose_windows
from sniper.inference.windows import FreeWindow, TilingWindow, WindowDetections
from tests.inference.blobs import blob_detector, draw_blobs

FINE, COARSE = LevelSpec(factor=2.0, below=30), LevelSpec(factor=1.0, at_least=24)
FOCUS = FocusSpec(min_score=0.4, window=256)


def focused(detector: Detector, focus: FocusSpec | None = FOCUS) -> Detector:
    return dataclasses.replace(detector, spec=dataclasses.replace(detector.spec, focus=focus))


def in_order(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.T)]


def num_pixels(detector: Detector, image: np.ndarray) -> int:
    (result,) = detector.search([image])
    assert result is not None
    return result.num_pixels


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([256, 320, 512]), st.sampled_from([1, 8, 40]))
def test_every_object_that_a_coarser_level_sees_is_found_once_and_whole(
    seed: int, window: int, count: int
) -> None:
    image, boxes = draw_blobs(seed, width=1100, height=900, smallest=6, largest=60, count=count)
    detector = focused(blob_detector(FINE, COARSE, merge="hard"), FocusSpec(min_score=0.4, window=window))
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
    assert num_pixels(detector, image) < 1.1 * (1200 + 48) ** 2  # a ratio of 4.7
    np.testing.assert_array_equal(in_order(detector.predict(image).boxes), in_order(boxes))


def test_detections_do_not_depend_on_other_images() -> None:
    images = [
        draw_blobs(i, width=600 + 90 * i, height=500, smallest=6, largest=50, count=9)[0] for i in range(4)
    ]
    detector = focused(blob_detector(FINE, COARSE, LevelSpec(long_side=200, at_least=40)))
    together = list(detector.predict_many(images))
    for image, detections in zip(images, together, strict=True):
        assert detections is not None
        np.testing.assert_array_equal(detector.predict(image).boxes, detections.boxes)


def test_masks_are_those_of_the_whole_search() -> None:
    image, _ = draw_blobs(2, width=1100, height=900, smallest=6, largest=60, count=6)
    detector = blob_detector(FINE, COARSE, merge="hard", has_masks=True)
    whole, part = detector.predict(image), focused(detector).predict(image)
    assert part.masks is not None
    assert whole.masks is not None
    order, other = np.lexsort(whole.boxes.T), np.lexsort(part.boxes.T)
    np.testing.assert_array_equal(part.masks.to_arrays()[other], whole.masks.to_arrays()[order])


def test_windows_lie_on_the_grid_and_in_the_level() -> None:
    image, _ = draw_blobs(5, width=1111, height=777, smallest=6, largest=20, count=12)
    (result,) = blob_detector(COARSE).search([image], keeps_all_sizes=True)
    assert result is not None
    level = FINE.at(width=1111, height=777)
    coarser: list[WindowDetections] = [found for of_level in result.by_level for found in of_level]
    windows = choose_windows(level, coarser, [1.0], focus=FOCUS, limit=4096)
    assert len(windows) > 1
    for window in windows:
        assert isinstance(window, FreeWindow)
        x1, y1, x2, y2 = window.corners
        assert x1 % 64 == y1 % 64 == 0
        assert 0 <= x1 < x2 <= level.width
        assert 0 <= y1 < y2 <= level.height
    (whole,) = choose_windows(level, coarser, [0.2], focus=FOCUS, limit=4096)
    assert isinstance(whole, TilingWindow)
