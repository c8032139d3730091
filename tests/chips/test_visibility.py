"""Which boxes chips show, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings

from sniper.chips import ChipTable, ImageBoxes
from sniper.chips.baselines import TileSpec, tiles
from sniper.chips.cover import cover
from sniper.chips.visibility import Visibility, chip_visibility
from tests.chips.worlds import SMALL_PYRAMID, boxes_of, one_image, worlds


def assert_as_brute_force(table: ChipTable, world: ImageBoxes) -> None:
    expected = np.zeros((len(world.boxes), len(table.levels)), dtype=np.int64)
    shown = []
    for index, image in enumerate(table.image_indices.tolist()):
        chip = table.chip(index)
        boxes = chip.to_chip(boxes_of(world, image))
        clipped = chip.clip(boxes)
        is_shown = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        is_whole = (np.abs(boxes - clipped) <= 2e-6).all(axis=1) & is_shown
        shown.append(int(is_shown.sum()))
        rows = expected[world.offsets[image] : world.offsets[image + 1], chip.level.index]
        np.maximum(rows, is_shown.astype(int) + is_whole, out=rows)
    visibility, num_boxes = chip_visibility(table, world)
    np.testing.assert_array_equal(visibility, expected)
    assert num_boxes.tolist() == shown


@given(worlds)
def test_chips_show_the_boxes_that_brute_force_finds(world: ImageBoxes) -> None:
    assert_as_brute_force(cover(SMALL_PYRAMID, world, generator=np.random.default_rng(0)), world)


@settings(max_examples=30)
@given(worlds)
def test_tiles_show_the_boxes_that_brute_force_finds(world: ImageBoxes) -> None:
    assert_as_brute_force(tiles(TileSpec(side=50, factor=1.5), world), world)


@pytest.mark.parametrize(
    ("box", "visibility", "num_shown"),
    [
        ([10.0, 10.0, 20.0, 20.0], Visibility.WHOLE, 1),
        ([0.0, 0.0, 50.0, 50.0], Visibility.WHOLE, 1),  # shared borders
        ([40.0, 10.0, 60.0, 20.0], Visibility.PARTIAL, 2),
        ([50.0, 10.0, 60.0, 20.0], Visibility.WHOLE, 1),  # touches the first tile without area
    ],
)
def test_a_box_across_the_border_of_tiles_is_partial(
    box: list[float], visibility: Visibility, num_shown: int
) -> None:
    world = one_image(100, 50, np.array([box]))
    values, num_boxes = chip_visibility(tiles(TileSpec(side=50, overlap=0.0), world), world)
    assert values.tolist() == [[visibility]]
    assert num_boxes.sum() == num_shown
