"""Transforms between the image frame and the chip frame."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import Chip, LevelSpec

LEVEL = LevelSpec(factor=1.667).at(width=333, height=201)


@given(st.integers(0, 400), st.integers(0, 300), st.integers(0, 1000))
def test_boxes_come_back_from_the_chip_frame(x: int, y: int, seed: int) -> None:
    boxes = np.random.default_rng(seed).uniform(0, 200, (3, 4))
    chip = Chip(level=LEVEL, x=x, y=y, width=64, height=64)
    np.testing.assert_allclose(chip.to_image(chip.to_chip(boxes)), boxes, atol=1e-9)


def test_a_chip_of_a_small_image_shows_the_image_and_padding() -> None:
    level = LevelSpec(factor=2.0).at(width=20, height=100)
    chip = Chip(level=level, x=0, y=136, width=64, height=64)
    assert chip.visible == (40, 64)
    assert chip.window.tolist() == [0, 136, 64, 200]


def test_clipping_leaves_nothing_outside_the_chip() -> None:
    chip = Chip(level=LEVEL, x=0, y=0, width=64, height=64)
    assert chip.clip(np.array([[-3.0, 5.0, 70.0, 99.0]])).tolist() == [[0.0, 5.0, 64.0, 64.0]]
    assert chip.clip(np.zeros((0, 4))).shape == (0, 4)


def test_a_chip_is_described_in_image_pixels() -> None:
    level = LevelSpec(factor=2.0).at(width=200, height=100, index=1)
    assert Chip(level=level, x=64, y=0, width=64, height=64).describe() == "×2, x 32 to 64, y 0 to 32"


@given(st.integers(0, 400), st.integers(0, 300), st.floats(0.5, 2.0))
def test_a_rescaled_chip_shows_the_same_centre_at_another_scale(x: int, y: int, factor: float) -> None:
    level = LevelSpec(factor=1.0).at(width=1000, height=800)
    chip = Chip(level=level, x=x, y=y, width=64, height=64)
    rescaled = chip.rescaled(factor)
    assert (rescaled.width, rescaled.height) == (64, 64)
    assert rescaled.level.valid_range == level.valid_range
    assert np.isclose(rescaled.level.scale, factor, rtol=2e-3)
    centre, rescaled_centre = (
        (c.to_image(np.array([[32.0, 32.0, 32.0, 32.0]])))[0] for c in (chip, rescaled)
    )
    is_at_border = rescaled.x == 0 or rescaled.y == 0
    assert is_at_border or np.abs(centre - rescaled_centre).max() <= 1.5


def test_a_rescaled_chip_stays_inside_its_level_image() -> None:
    level = LevelSpec(factor=1.0).at(width=100, height=80)
    corner = Chip(level=level, x=36, y=16, width=64, height=64)
    for factor in (0.8, 1.0, 1.5):
        rescaled = corner.rescaled(factor)
        assert 0 <= rescaled.x <= max(rescaled.level.width - 64, 0)
        assert 0 <= rescaled.y <= max(rescaled.level.height - 64, 0)
    assert corner.rescaled(0.8).x == 80 - 64
    assert corner.rescaled(1.0) == corner
    assert corner.rescaled(0.001).visible == (1, 1)
