"""Levels, valid ranges, and refused pyramids."""

import math
from typing import Any

import numpy as np
import pytest

from sniper.chips import LevelSpec, PyramidSpec, ValidRange
from sniper.errors import ConfigError

SQUARE = np.array([0.0, 0.0, 1.0, 1.0])


def test_a_level_image_that_is_too_long_is_refused() -> None:
    message = "short_side: 800 makes an image of 1000000x3 pixels 266,666,667 pixels long, expected at most 16,777,216"
    with pytest.raises(ConfigError, match=message):
        LevelSpec(short_side=800).resized(np.array([10, 1_000_000]), np.array([10, 3]))
    widths, _ = LevelSpec(short_side=800, max_long_side=2000).resized(np.array([1_000_000]), np.array([3]))
    assert widths.tolist() == [2000]


@pytest.mark.parametrize(("side", "valid"), [(31.9, False), (32.0, True), (149.9, True), (150.0, False)])
def test_a_range_contains_its_lower_bound_only(side: float, valid: bool) -> None:
    assert ValidRange(at_least=32, below=150).contains(side * SQUARE[None]).tolist() == [valid]


@pytest.mark.parametrize(
    ("level", "width", "height", "resized"),
    [
        (LevelSpec(factor=3.0), 640, 480, (1920, 1440)),
        (LevelSpec(long_side=512), 640, 480, (512, 384)),
        (LevelSpec(long_side=512), 100, 400, (128, 512)),
        (LevelSpec(short_side=800, max_long_side=1280), 640, 480, (1067, 800)),
        (LevelSpec(short_side=800, max_long_side=1280), 2000, 100, (1280, 64)),
        (LevelSpec(short_side=800), 2000, 100, (16000, 800)),
        (LevelSpec(long_side=512), 30_000, 1, (512, 1)),
    ],
)
def test_a_level_has_the_sides_of_its_resize_rule(
    level: LevelSpec, width: int, height: int, resized: tuple[int, int]
) -> None:
    bound = level.at(width=width, height=height)
    assert (bound.width, bound.height) == resized


def test_boxes_come_back_from_the_level_frame() -> None:
    level = LevelSpec(factor=1.667).at(width=333, height=77)
    boxes = np.array([[1.5, 2.0, 30.25, 44.0], [0.0, 0.0, 333.0, 77.0]])
    np.testing.assert_allclose(level.to_image(level.to_level(boxes)), boxes, rtol=1e-14)
    np.testing.assert_allclose(level.to_level(boxes)[1], [0, 0, level.width, level.height])


def test_valid_sizes_are_in_level_pixels() -> None:
    level = LevelSpec(factor=2.0, at_least=32).at(width=100, height=100)
    assert level.valid_sizes == (64.0, math.inf)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of factor, long_side, short_side; got none"),
        ({"factor": 2.0, "long_side": 512}, r"got \['factor', 'long_side'\]"),
        ({"factor": 0.0}, "factor\n  Input should be greater than 0"),
        ({"factor": math.inf}, "factor\n  Input should be a finite number"),
        ({"factor": 1.0, "at_least": -1.0}, "at_least\n  Input should be greater than or equal to 0"),
        ({"factor": 1.0, "below": math.nan}, "no size lies in the range"),
        ({"short_side": 8, "max_long_side": 0}, "max_long_side\n  Input should be greater than 0"),
        ({"long_side": 512, "max_long_side": 600}, "goes with short_side only"),
        ({"factor": 1.0, "at_least": 50, "below": 50}, r"no size lies in the range \[50, 50\)"),
    ],
)
def test_an_invalid_level_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LevelSpec(**fields)


WHOLE = LevelSpec(long_side=512)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ()}, "levels\n  Tuple should have at least 1 item"),
        ({"levels": (LevelSpec(factor=1.0),)}, "fit every image into one chip"),
        ({"levels": (LevelSpec(long_side=600),)}, "long_side of at most 512"),
        ({"levels": (LevelSpec(long_side=512, at_least=9),)}, "boxes of size 0 to 9 are in no level"),
        (
            {"levels": (LevelSpec(factor=2.0, below=30), LevelSpec(long_side=512, at_least=40))},
            "boxes of size 30 to 40",
        ),
        ({"levels": (LevelSpec(long_side=512, below=99),)}, "boxes of size 99 and above"),
        ({"levels": (LevelSpec(factor=2.0, at_least=30), WHOLE)}, r"\[30, inf\) comes before \[0, inf\)"),
        ({"stride": 0}, "stride\n  Input should be greater than 0"),
        ({"stride": 513}, r"stride must be at most chip_size \(512\), not 513"),
        ({"chip_size": 0}, "chip_size\n  Input should be greater than 0"),
    ],
)
def test_a_pyramid_that_would_lose_boxes_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidSpec(**fields)  # type: ignore[arg-type]
