"""Suggested pyramids reach their goal on all boxes, at fewer pixels than the alternatives."""

import dataclasses
import itertools

import numpy as np
import pytest

from sniper.chips import ImageBoxes, PyramidSpec
from sniper.planning.suggest import Suggestion, suggest_pyramid, suggest_pyramids
from tests.chips.worlds import build_world, one_image

SHARE = 0.97
NO_IMAGES = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def drone() -> ImageBoxes:
    """Large images with small objects."""
    rng = np.random.default_rng(0)
    sides = np.maximum(np.exp(rng.normal(np.log(16), 0.7, (160, 1))), 5)
    low = rng.uniform(0, [1000, 700], (160, 2))
    boxes = np.concatenate([low, np.minimum(low + sides, [1280, 960])], axis=1)
    return ImageBoxes(
        widths=np.full(20, 1280),
        heights=np.full(20, 960),
        offsets=np.arange(21) * 8,
        boxes=boxes,
        is_required=np.ones(160, dtype=bool),
    )


@pytest.fixture(scope="module")
def suggestions(drone: ImageBoxes) -> list[Suggestion]:
    return suggest_pyramids(drone, base=PyramidSpec(stride=16), num_levels=(1, 2, 3), share=SHARE)


def test_suggestions_reach_their_goals_and_lose_no_box(suggestions: list[Suggestion]) -> None:
    assert [suggestion.goal for suggestion in suggestions][-2:] == [0.95, 0.9]
    for suggestion in suggestions:
        assert suggestion.cost.share_useful >= suggestion.goal
        assert suggestion.cost.num_uncovered == 0


def test_the_cheapest_pyramid_of_each_number_of_levels_comes_first(suggestions: list[Suggestion]) -> None:
    costs = [suggestion.cost for suggestion in suggestions if suggestion.goal == SHARE]
    megapixels = [cost.megapixels.chips for cost in costs]
    assert len(costs) > 1
    assert megapixels == sorted(megapixels)
    assert len({len(cost.pyramid.levels) for cost in costs}) == len(costs)


def test_a_lower_share_costs_less(suggestions: list[Suggestion]) -> None:
    cheapest, *_, lower, lowest = (suggestion.cost.megapixels.chips for suggestion in suggestions)
    assert lowest <= lower <= cheapest


def test_a_suggestion_is_cheaper_than_whole_images_at_its_finest_scale(
    suggestions: list[Suggestion],
) -> None:
    for suggestion in suggestions:
        finest = suggestion.cost.pyramid.levels[0].factor
        assert finest is not None
        assert suggestion.cost.megapixels.chips < 1280 * 960 / 1e6 * finest**2


def test_neighbouring_ranges_overlap_as_in_the_paper(suggestions: list[Suggestion]) -> None:
    for suggestion in suggestions:
        levels = suggestion.cost.pyramid.levels
        overlaps = (0.4,) * (len(levels) - 2) + (0.8,)
        for (finer, coarser), overlap in zip(itertools.pairwise(levels), overlaps, strict=True):
            assert coarser.at_least / finer.below == pytest.approx(
                overlap, abs=0.51 / finer.below
            )  # whole px


def test_every_finer_level_of_a_suggestion_learns_from_boxes(suggestions: list[Suggestion]) -> None:
    for suggestion in suggestions:
        assert all(level.num_covered > 0 for level in suggestion.cost.levels[:-1])


def test_the_base_gives_stride_and_offset(suggestions: list[Suggestion]) -> None:
    assert {suggestion.cost.pyramid.stride for suggestion in suggestions} == {16}
    assert {suggestion.cost.pyramid.random_offset for suggestion in suggestions} == {False}


def test_equal_boxes_get_equal_suggestions(drone: ImageBoxes, suggestions: list[Suggestion]) -> None:
    (expected,) = (
        suggestion.cost.pyramid
        for suggestion in suggestions
        if suggestion.goal == SHARE and len(suggestion.cost.pyramid.levels) == 2
    )
    again = suggest_pyramid(drone, num_levels=2, share=SHARE)
    assert again is not None
    assert dataclasses.replace(again, stride=16) == expected


def test_long_and_thin_boxes_count_only_where_a_chip_covers_them() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1500, (60, 2))
    sides = np.where(np.arange(60)[:, None] % 2, [[390.0, 65.0]], [[16.0, 16.0]])
    poles = one_image(2000, 2000, np.concatenate([low, low + sides], axis=1))
    suggestions = suggest_pyramids(poles, base=PyramidSpec(), num_levels=(2,), share=0.95)
    assert suggestions
    assert all(suggestion.cost.share_useful >= suggestion.goal for suggestion in suggestions)


@pytest.mark.parametrize(
    ("num_tiny", "side", "share", "goals"),
    [
        (0, 20.0, 0.99, [0.99, 0.95, 0.9]),
        (0, 24.0, 1.0, [1.0, 0.95, 0.9]),
        (7, 20.0, 0.99, [0.9]),  # boxes of 2 px need a factor above the largest
    ],
)
def test_boxes_of_one_size_have_a_suggestion_where_it_is_possible(
    num_tiny: int, side: float, share: float, goals: list[float]
) -> None:
    low = np.random.default_rng(0).uniform(0, 900, (100, 2))
    sides = np.where(np.arange(100)[:, None] < num_tiny, 2.0, side)
    image = one_image(1280, 960, np.concatenate([low, low + sides], axis=1))
    suggestions = suggest_pyramids(image, base=PyramidSpec(), num_levels=(2,), share=share)
    assert [suggestion.goal for suggestion in suggestions] == goals
    assert {suggestion.cost.share_useful for suggestion in suggestions} == {(100 - num_tiny) / 100}


def test_large_objects_need_only_the_whole_image() -> None:
    pyramid = suggest_pyramid(one_image(512, 512, np.array([[10.0, 10.0, 400.0, 400.0]])), num_levels=1)
    assert pyramid is not None
    assert pyramid.levels[0].long_side == pyramid.chip_size == 512


@pytest.mark.parametrize(
    "images",
    [
        one_image(4000, 4000, np.array([[10.0, 10.0, 11.0, 11.0], [50.0, 50.0, 52.0, 52.0]])),
        build_world(0).select(NO_IMAGES),
    ],
    ids=["specks", "no images"],
)
def test_there_is_no_suggestion_where_no_pyramid_reaches_the_share(images: ImageBoxes) -> None:
    assert suggest_pyramid(images, num_levels=2) is None
    assert suggest_pyramids(images, base=PyramidSpec(), num_levels=(1, 2), share=0.99) == []
