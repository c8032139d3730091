"""What a pyramid costs: counted chip by chip and box by box, against brute force and the paper's figures."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.cover import cover
from sniper.data.datasets import load_dataset
from sniper.data.epoch import to_image_boxes
from sniper.planning.cost import CostPlan, measure
from tests.chips.worlds import SMALL_PYRAMID, boxes_of, one_image, worlds

COCO = Path(__file__).parents[3] / "shared/data/annotations/coco_val2017.json"


def table_of(world: ImageBoxes, pyramid: PyramidSpec) -> ChipTable:
    return cover(pyramid, world, generator=np.random.default_rng(0))


def budget_of(world: ImageBoxes, pyramid: PyramidSpec = SMALL_PYRAMID) -> CostPlan:
    return measure(table_of(world, pyramid), world, pyramid=pyramid)


@given(worlds)
def test_chips_show_and_cut_what_brute_force_finds(world: ImageBoxes) -> None:
    table = table_of(world, SMALL_PYRAMID)
    budget = measure(table, world, pyramid=SMALL_PYRAMID)
    whole, cut, shown = set(), set(), []
    for index, image in enumerate(table.image_indices.tolist()):
        chip = table.chip(index)
        inside = chip.to_chip(boxes_of(world, image))
        clipped = chip.clip(inside)
        is_shown = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        is_whole = np.isclose(inside, clipped, atol=1e-7).all(axis=1) & is_shown
        shown.append(int(is_shown.sum()))
        place = (image, chip.level.index)
        whole |= {(*place, box) for box in np.flatnonzero(is_whole)}
        cut |= {(*place, box) for box in np.flatnonzero(is_shown)}
    assert budget.boxes_per_chip.tolist() == shown
    for index, level in enumerate(budget.levels):
        assert level.num_cropped == len({one for one in cut - whole if one[1] == index})
    assert budget.num_uncovered == 0
    assert sum(level.num_chips for level in budget.levels) == budget.num_chips == len(table)


@given(worlds)
def test_every_box_is_learnt_from_at_some_level(world: ImageBoxes) -> None:
    budget = budget_of(world)
    assert sum(level.num_covered for level in budget.levels) >= budget.num_wanted
    for level in budget.levels:
        assert level.num_covered <= level.num_valid + level.num_moved_here
        assert len(level.sizes) == level.num_covered


def test_a_chip_that_is_missing_leaves_its_box_uncovered() -> None:
    world = one_image(640, 480, np.array([[10.0, 10.0, 40.0, 40.0], [600.0, 440.0, 630.0, 470.0]]))
    table = table_of(world, PyramidSpec())
    assert len(table) == 2
    assert measure(table.select(np.array([0])), world, pyramid=PyramidSpec()).num_uncovered == 1


def test_pixels_are_counted_as_by_hand() -> None:
    world = one_image(640, 480, np.array([[10.0, 10.0, 40.0, 40.0]]))
    empty = one_image(5000, 5000, np.zeros((0, 4)))
    world = dataclasses.replace(
        world,
        widths=np.concatenate([world.widths, empty.widths]),
        heights=np.concatenate([world.heights, empty.heights]),
        offsets=np.array([0, 1, 1]),
    )
    budget = budget_of(world, PyramidSpec())
    assert (budget.num_images, budget.num_images_with_boxes, budget.num_chips) == (2, 1, 1)
    assert budget.megapixels.chips == 512 * 512 / 1e6
    assert budget.megapixels.single == 1067 * 800 / 1e6
    assert budget.megapixels.pyramid == pytest.approx((1920 * 1440 + 1067 * 800 + 512 * 384) / 1e6)
    assert budget.megapixels.grid == 2 * 512 * 512 / 1e6
    assert budget.megapixels.ratio_800x1333 == pytest.approx(512 * 512 / (1067 * 800))
    assert [budget.num_steps(size) for size in (1, 128)] == [1, 1]


@pytest.mark.parametrize(
    ("side", "share"),
    [
        (10.0, 0.0),
        (11.0, 1.0),
        (79.0, 1.0),
        (400.0, 1.0),
    ],  # ×3 makes 11 px 33; 400 px are 320 in the whole image
)
def test_a_box_is_useful_from_32_to_480_px_in_a_chip(side: float, share: float) -> None:
    assert budget_of(one_image(640, 480, np.array([[0, 0, side, side]])), PyramidSpec()).share_useful == share


def test_a_box_that_moved_is_useful_only_where_it_is_learnt() -> None:
    # Both are valid at ×3 and ×1.667. The first fits the latter's chips; the second fits the whole image alone.
    for box, share, moved in (([0, 0, 300, 4.0], 1.0, 0), ([0, 0, 500, 3.0], 0.0, 1)):
        budget = budget_of(one_image(640, 480, np.array([box])), PyramidSpec())
        assert math.sqrt(box[2] * box[3]) * 1.667 > 32
        assert (budget.share_useful, budget.num_moved) == (share, moved)


@pytest.mark.skipif(not COCO.is_file(), reason="the annotations of COCO val2017 are not at hand")
def test_coco_costs_what_the_authors_code_makes_it_cost_and_loses_no_box() -> None:
    budget = budget_of(to_image_boxes(load_dataset(COCO, has_images=False)), PyramidSpec())
    assert budget.mean_chips_per_image <= 3.95  # theirs: 3.918, and boxes lost
    per_level = [level.num_chips / budget.num_images_with_boxes for level in budget.levels]
    assert per_level == pytest.approx([1.702, 1.352, 0.865], abs=0.03)
    assert budget.megapixels.ratio_800x1333 == pytest.approx(1.15, abs=0.01)
    assert budget.num_uncovered == 0


def test_nothing_costs_nothing() -> None:
    budget = budget_of(one_image(640, 480, np.zeros((0, 4))))
    assert budget.num_chips == budget.num_steps(4) == 0
    assert budget.share_useful == 1.0
    assert budget.as_dict()["chips_per_image"] == budget.as_dict()["pixel_ratio_800x1333"] == 0.0
