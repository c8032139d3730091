"""A suggested pyramid keeps what it promises, on all boxes, at fewer pixels than what it is compared with."""

import itertools

import numpy as np
import pytest

from sniper.chips import ImageBoxes, PyramidSpec
from sniper.chips.cover import cover
from sniper.planning.cost import measure
from sniper.planning.suggest import suggest_pyramid, suggest_pyramids
from tests.chips.worlds import build_world, one_image


@pytest.fixture(scope="module")
def drone() -> ImageBoxes:
    """Large images with small objects."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.normal(np.log(16), 0.7, (400, 1)))
    low = rng.uniform(0, [1000, 700], (400, 2))
    boxes = np.concatenate([low, np.minimum(low + sides, [1280, 960])], axis=1)
    return ImageBoxes(
        widths=np.full(40, 1280),
        heights=np.full(40, 960),
        offsets=np.arange(41) * 10,
        boxes=boxes,
        is_required=np.ones(400, dtype=bool),
    )


def megapixels(pyramid: PyramidSpec, images: ImageBoxes) -> float:
    table = cover(pyramid, images, generator=np.random.default_rng(0))
    return measure(table, images, pyramid=pyramid).megapixels.chips


def test_offers_keep_their_promise_and_come_cheapest_first(drone: ImageBoxes) -> None:
    found = suggest_pyramids(drone, like=PyramidSpec(), num_levels=(1, 2, 3), share=0.97)
    assert {offer.goal for offer in found} == {0.97, 0.95, 0.9}
    assert all(offer.budget.share_useful >= offer.goal for offer in found)
    assert all(offer.budget.num_uncovered == 0 for offer in found)
    costs = [offer.budget.megapixels.chips for offer in found if offer.goal == 0.97]
    assert costs == sorted(costs)
    assert len({len(offer.budget.pyramid.levels) for offer in found if offer.goal == 0.97}) == len(costs)


def test_a_suggestion_is_cheaper_than_the_whole_image_at_its_finest_scale(drone: ImageBoxes) -> None:
    found = suggest_pyramid(drone, num_levels=3, share=0.97)
    assert found is not None
    finest = found.levels[0].factor
    assert finest is not None
    assert megapixels(found, drone) < 1280 * 960 / 1e6 * finest**2
    assert len(found.levels) == 3


def test_neighbouring_ranges_overlap_as_in_the_paper(drone: ImageBoxes) -> None:
    found = suggest_pyramid(drone, num_levels=4, share=0.9)
    assert found is not None
    pairs = list(itertools.pairwise(found.levels))
    shares = [coarser.at_least / finer.below for finer, coarser in pairs]
    for share, finer, wanted in zip(shares, found.levels, (0.4, 0.4, 0.8), strict=False):
        assert share == pytest.approx(wanted, abs=0.51 / finer.below)  # bounds are whole pixels


def test_every_suggested_level_learns_from_something(drone: ImageBoxes) -> None:
    for number in (2, 3):
        found = suggest_pyramid(drone, num_levels=number, share=0.9)
        assert found is not None
        table = cover(found, drone, generator=np.random.default_rng(0))
        assert all(level.num_covered > 0 for level in measure(table, drone, pyramid=found).levels[:-1])


def test_long_and_thin_objects_are_promised_only_where_a_chip_holds_them() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 3000, (200, 2))
    sides = np.where(np.arange(200)[:, None] % 2, [[390.0, 65.0]], [[16.0, 16.0]])
    poles = one_image(4000, 4000, np.concatenate([low, low + sides], axis=1))
    found = suggest_pyramids(poles, like=PyramidSpec(), num_levels=(2, 3), share=0.95)
    assert found
    assert all(offer.budget.share_useful >= offer.goal for offer in found)


@pytest.mark.parametrize(("side", "share"), [(20.0, 0.99), (24.0, 1.0)])
def test_objects_of_one_size_have_a_suggestion(side: float, share: float) -> None:
    low = np.random.default_rng(0).uniform(0, 900, (50, 2))
    found = suggest_pyramids(
        one_image(1280, 960, np.concatenate([low, low + side], 1)),
        like=PyramidSpec(),
        num_levels=(2,),
        share=share,
    )
    assert found[0].budget.share_useful == 1.0


def test_a_lower_share_is_offered_where_the_wanted_one_cannot_be_had() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 900, (100, 2))
    sides = np.where(np.arange(100)[:, None] < 7, 2.0, 20.0)
    found = suggest_pyramids(
        one_image(1280, 960, np.concatenate([low, low + sides], 1)),
        like=PyramidSpec(),
        num_levels=(2,),
        share=0.99,
    )
    assert [offer.goal for offer in found] == [0.9]


def test_equal_boxes_get_equal_suggestions(drone: ImageBoxes) -> None:
    assert suggest_pyramid(drone, num_levels=2, share=0.9) == suggest_pyramid(drone, num_levels=2, share=0.9)


def test_large_objects_need_no_level_but_the_whole_image() -> None:
    found = suggest_pyramid(one_image(512, 512, np.array([[10.0, 10.0, 400.0, 400.0]])), num_levels=1)
    assert found is not None
    assert found.levels[0].long_side == found.chip_size == 512


def test_what_cannot_be_had_is_not_offered() -> None:
    specks = one_image(4000, 4000, np.array([[10.0, 10.0, 11.0, 11.0], [50.0, 50.0, 52.0, 52.0]]))
    assert suggest_pyramid(specks, num_levels=2) is None
    assert suggest_pyramids(specks, like=PyramidSpec(), num_levels=(1, 2), share=0.99) == []
    assert suggest_pyramid(build_world(0).select(np.zeros(0, dtype=np.int64)), num_levels=2) is None
