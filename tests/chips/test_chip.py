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
    assert Chip(level=level, x=64, y=0, width=64, height=64).describe() == "level 1, x 32 to 64, y 0 to 32"
