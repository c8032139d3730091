"""The cost of a pyramid, against brute force and the paper's figures."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given

from sniper.chips import ImageBoxes, PyramidSpec
from sniper.chips.cover import cover
from sniper.chips.negatives import NegativeSpec
from sniper.data.datasets import load_dataset
from sniper.data.epoch import to_image_boxes
from sniper.planning.cost import CostPlan, compute_cost
from tests.chips.worlds import SMALL_PYRAMID, one_image, worlds
from tests.data_folder import find_data


def cost_of(world: ImageBoxes, pyramid: PyramidSpec = SMALL_PYRAMID) -> CostPlan:
    table = cover(pyramid, world, generator=np.random.default_rng(0))
    return compute_cost(table, world, pyramid=pyramid, useful_sizes=(32.0, 480.0))


@given(worlds)
def test_every_box_is_covered_at_some_level(world: ImageBoxes) -> None:
    cost = cost_of(world)
    assert cost.num_uncovered == 0
    assert sum(level.num_covered for level in cost.levels) >= cost.num_required
    assert sum(level.num_chips for level in cost.levels) == cost.num_chips
    for level in cost.levels:
        assert level.num_covered <= level.num_valid + level.num_moved_here
        assert len(level.sizes) == level.num_covered


def test_a_missing_chip_leaves_its_box_uncovered() -> None:
    world = one_image(640, 480, np.array([[10.0, 10.0, 40.0, 40.0], [600.0, 440.0, 630.0, 470.0]]))
    table = cover(PyramidSpec(), world, generator=np.random.default_rng(0))
    assert len(table) == 2
    assert compute_cost(table.select(np.array([0])), world, pyramid=PyramidSpec()).num_uncovered == 1


def test_a_box_shown_in_part_is_counted_as_cropped() -> None:
    # Far apart, so two chips; the third box is too large for the level and lies across the border of the first chip.
    boxes = [[0.0, 0.0, 20.0, 20.0], [120.0, 0.0, 140.0, 20.0], [4.0, 4.0, 60.0, 24.0]]
    cost = cost_of(one_image(200, 32, np.array(boxes)))
    assert [level.num_cropped for level in cost.levels] == [1, 0, 0]


def test_pixels_are_counted_as_by_hand() -> None:
    world = one_image(640, 480, np.array([[10.0, 10.0, 40.0, 40.0]]))
    empty = one_image(5000, 5000, np.zeros((0, 4)))
    world = dataclasses.replace(
        world,
        widths=np.concatenate([world.widths, empty.widths]),
        heights=np.concatenate([world.heights, empty.heights]),
        offsets=np.array([0, 1, 1]),
    )
    cost = cost_of(world, PyramidSpec())
    assert (cost.num_images, cost.num_images_with_boxes, cost.num_chips) == (2, 1, 1)
    assert cost.megapixels.chips == 512 * 512 / 1e6
    assert cost.megapixels.single == 1067 * 800 / 1e6
    assert cost.megapixels.pyramid == pytest.approx((1920 * 1440 + 1067 * 800 + 512 * 384) / 1e6)
    assert cost.megapixels.grid == 2 * 512 * 512 / 1e6
    assert cost.megapixels.ratio_800x1333 == pytest.approx(512 * 512 / (1067 * 800))


def test_negative_chips_count_only_in_the_steps() -> None:
    world = one_image(640, 480, np.array([[10.0, 10.0, 40.0, 40.0]]))
    positives = cover(PyramidSpec(), world, generator=np.random.default_rng(0))
    negatives = dataclasses.replace(
        positives.select(np.zeros(5, dtype=np.int64)), is_negative=np.ones(5, dtype=bool)
    )
    table = positives.merge(negatives)
    cost = compute_cost(table, world, pyramid=PyramidSpec(), negatives=NegativeSpec(per_image=3, dose=None))
    assert (cost.num_chips, cost.num_negatives, cost.num_negatives_per_epoch) == (1, 5, 3)
    assert cost.megapixels.chips == 512 * 512 / 1e6
    assert [cost.num_steps(batch_size) for batch_size in (1, 3, 128)] == [4, 2, 1]


@pytest.mark.parametrize(
    ("side", "share"),
    [
        (10.0, 0.0),
        (11.0, 1.0),
        (79.0, 1.0),
        (400.0, 1.0),
    ],  # 3 × 11 px are 33; 400 px are 320 in the whole image
)
def test_a_box_is_useful_from_32_to_480_px_in_a_chip(side: float, share: float) -> None:
    assert cost_of(one_image(640, 480, np.array([[0, 0, side, side]])), PyramidSpec()).share_useful == share


@pytest.mark.parametrize(
    ("width", "height", "share", "num_moved"),
    [
        (300, 4.0, 1.0, 0),  # fits a chip at ×1.667
        (500, 3.0, 0.0, 1),  # fits only the whole image
    ],
)
def test_a_moved_box_is_useful_only_where_it_moved_to(
    width: float, height: float, share: float, num_moved: int
) -> None:
    cost = cost_of(one_image(640, 480, np.array([[0, 0, width, height]])), PyramidSpec())
    assert math.sqrt(width * height) * 1.667 > 32  # so both are valid at a useful size at ×1.667
    assert (cost.share_useful, cost.num_moved) == (share, num_moved)


def test_coco_costs_as_much_as_with_the_authors_code() -> None:
    dataset = load_dataset(find_data("data/annotations/coco_val2017.json"), has_images=False)
    cost = cost_of(to_image_boxes(dataset), PyramidSpec())
    assert cost.mean_chips_per_image <= 3.95  # the authors' code: 3.918, with uncovered boxes
    per_level = [level.num_chips / cost.num_images_with_boxes for level in cost.levels]
    assert per_level == pytest.approx([1.702, 1.352, 0.865], abs=0.03)
    assert cost.megapixels.ratio_800x1333 == pytest.approx(1.15, abs=0.01)
    assert cost.num_uncovered == 0


def test_an_image_without_boxes_costs_nothing() -> None:
    cost = cost_of(one_image(640, 480, np.zeros((0, 4))))
    assert cost.num_chips == cost.num_steps(4) == 0
    assert cost.share_useful == 1.0
    assert cost.as_dict()["chips_per_image"] == cost.as_dict()["pixel_ratio_800x1333"] == 0.0
