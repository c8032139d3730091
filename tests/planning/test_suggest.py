"""Suggested pyramids reach their goal on all boxes, with few levels and few pixels."""

import itertools

import numpy as np
import pytest

from sniper.chips import ImageBoxes, LevelSpec, PyramidSpec
from sniper.chips.cover import count_chips
from sniper.data.datasets import load_dataset
from sniper.data.epoch import to_image_boxes
from sniper.errors import ConfigError
from sniper.planning import suggest
from sniper.planning.suggest import CHIP_SIZES, Suggestion, suggest_pyramid
from tests.chips.worlds import build_world, one_image
from tests.data_folder import find_data

NO_IMAGES = np.zeros(0, dtype=np.int64)
KINDS = ("drone", "mixed")


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
def mixed() -> ImageBoxes:
    """Objects of all sizes in images of usual sides."""
    return build_world(0, num_images=60, longest=900)


@pytest.fixture(scope="module")
def images(request: pytest.FixtureRequest) -> ImageBoxes:
    world: ImageBoxes = request.getfixturevalue(request.param)
    return world


@pytest.fixture(scope="module")
def suggestion(images: ImageBoxes) -> Suggestion:
    suggested = suggest_pyramid(images, base=PyramidSpec(stride=16))
    assert suggested is not None
    return suggested


pyramids = pytest.mark.parametrize("images", KINDS, indirect=True)


@pyramids
def test_a_suggestion_reaches_its_goal_and_loses_no_box(suggestion: Suggestion) -> None:
    assert suggestion.cost.share_useful >= suggestion.goal
    assert suggestion.cost.num_uncovered == 0
    assert len(suggestion.table) == suggestion.cost.num_chips


@pyramids
def test_every_finer_level_of_a_suggestion_learns_from_boxes(suggestion: Suggestion) -> None:
    for level in suggestion.cost.levels[:-1]:
        assert level.num_covered >= 0.01 * suggestion.cost.num_required


@pyramids
def test_fewer_levels_cost_more_than_5_percent(suggestion: Suggestion) -> None:
    chosen = suggestion.cost.megapixels
    for other in suggestion.alternatives:
        if other.goal == suggestion.goal:
            assert len(other.pyramid.levels) < len(suggestion.pyramid.levels)
            assert other.objective > chosen.chips + 0.01 * chosen.pyramid


@pyramids
def test_other_goals_are_reached_and_lower_ones_are_cheaper(suggestion: Suggestion) -> None:
    chosen = suggestion.cost.megapixels.chips + 0.01 * suggestion.cost.megapixels.pyramid
    for other in suggestion.alternatives:
        assert other.share_useful >= other.goal
        if other.goal < suggestion.goal:
            assert other.objective < chosen


@pyramids
def test_more_chip_sizes_never_cost_more(images: ImageBoxes, suggestion: Suggestion) -> None:
    large = suggest_pyramid(images, base=PyramidSpec(stride=16), chip_sizes=(512,), share=suggestion.goal)
    all_sizes = suggest_pyramid(images, base=PyramidSpec(stride=16), share=suggestion.goal)
    assert large is not None
    assert all_sizes is not None
    assert large.pyramid.chip_size == 512
    assert all_sizes.pyramid.chip_size in CHIP_SIZES
    assert all_sizes.cost.megapixels.chips <= 1.06 * large.cost.megapixels.chips


@pyramids
def test_neighbouring_ranges_overlap_about_as_in_the_paper(suggestion: Suggestion) -> None:
    for pyramid in (suggestion.pyramid, *(other.pyramid for other in suggestion.alternatives)):
        overlaps = (0.4,) * (len(pyramid.levels) - 2) + (0.8,)
        for (finer, coarser), overlap in zip(itertools.pairwise(pyramid.levels), overlaps, strict=True):
            assert coarser.at_least / finer.below == pytest.approx(overlap, rel=0.2)  # both are round


@pyramids
def test_the_base_gives_stride_and_offset(suggestion: Suggestion) -> None:
    for pyramid in (suggestion.pyramid, *(other.pyramid for other in suggestion.alternatives)):
        assert (pyramid.stride, pyramid.random_offset) == (16, False)


@pytest.mark.parametrize("images", KINDS[:1], indirect=True)
def test_equal_boxes_get_equal_suggestions(images: ImageBoxes, suggestion: Suggestion) -> None:
    again = suggest_pyramid(images, base=PyramidSpec(stride=16))
    assert again is not None
    assert (again.pyramid, again.reason, again.alternatives) == (
        suggestion.pyramid,
        suggestion.reason,
        suggestion.alternatives,
    )


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_a_number_of_levels_can_be_asked_for(mixed: ImageBoxes, num_levels: int) -> None:
    suggestion = suggest_pyramid(mixed, num_levels=num_levels, share=0.6)
    assert suggestion is not None
    assert len(suggestion.pyramid.levels) == num_levels


def test_other_useful_sizes_need_other_scales(drone: ImageBoxes) -> None:
    small, large = (suggest_pyramid(drone, useful_sizes=sizes) for sizes in ((16.0, 480.0), (64.0, 480.0)))
    assert small is not None
    assert large is not None
    assert small.cost.useful_sizes == (16.0, 480.0)
    assert small.pyramid.levels[0].factor < large.pyramid.levels[0].factor  # type: ignore[operator]
    assert "64 to 480 px" in large.reason


def test_long_and_thin_boxes_count_only_where_a_chip_covers_them() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1500, (60, 2))
    sides = np.where(np.arange(60)[:, None] % 2, [[390.0, 65.0]], [[16.0, 16.0]])
    poles = one_image(2000, 2000, np.concatenate([low, low + sides], axis=1))
    suggestion = suggest_pyramid(poles)
    assert suggestion is not None
    assert suggestion.cost.share_useful >= suggestion.goal >= 0.95


@pytest.mark.parametrize(
    ("num_tiny", "side", "share", "goal"),
    [
        (0, 20.0, None, 0.99),  # all boxes have one size
        (0, 24.0, 1.0, 1.0),
        (7, 20.0, None, 0.9),  # boxes of 2 px need a factor above the largest
        (7, 20.0, 0.8, 0.8),
        (100, 2.0, None, 0.0),
    ],
)
def test_a_share_that_no_pyramid_reaches_is_lowered(
    num_tiny: int, side: float, share: float | None, goal: float
) -> None:
    low = np.random.default_rng(0).uniform(0, 900, (100, 2))
    sides = np.where(np.arange(100)[:, None] < num_tiny, 2.0, side)
    image = one_image(1280, 960, np.concatenate([low, low + sides], axis=1))
    suggestion = suggest_pyramid(image, share=share, useful_sizes=(32.0, 480.0))
    assert suggestion is not None
    assert suggestion.goal == goal
    assert suggestion.cost.share_useful == (100 - num_tiny) / 100
    assert ("No pyramid reaches" in suggestion.reason) == (goal < (share or 0.95))


def test_large_objects_need_only_the_whole_image() -> None:
    suggestion = suggest_pyramid(one_image(512, 512, np.array([[10.0, 10.0, 400.0, 400.0]])))
    assert suggestion is not None
    (level,) = suggestion.pyramid.levels
    assert level.long_side == suggestion.pyramid.chip_size == CHIP_SIZES[0]


def test_a_crowded_image_is_searched_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []

    def count(level: LevelSpec, images: ImageBoxes, *, chip_size: int, stride: int) -> int:
        numbers.append(len(images.boxes))
        return count_chips(level, images, chip_size=chip_size, stride=stride)

    monkeypatch.setattr(suggest, "count_chips", count)
    monkeypatch.setattr(suggest, "_CHECK_BOXES", 2_000)
    low = np.random.default_rng(0).uniform(0, 4000, (6_000, 2))
    crowd = one_image(4100, 4100, np.concatenate([low, low + 30], axis=1))
    suggestion = suggest_pyramid(crowd)
    assert suggestion is not None
    assert set(numbers) == {1_500, 2_000}
    assert suggestion.cost.share_useful >= suggestion.goal
    estimates = [other for other in suggestion.alternatives if other.pyramid.chip_size == 256]
    assert all(other.chips_per_image > 200 for other in estimates)  # of the whole image, not of the part


def test_there_is_no_suggestion_without_boxes() -> None:
    assert suggest_pyramid(build_world(0).select(NO_IMAGES)) is None


def test_deeppcb_costs_a_third_of_a_single_pass() -> None:
    dataset = load_dataset(find_data("data/deeppcb/train.json"), has_images=False)
    suggestion = suggest_pyramid(to_image_boxes(dataset))
    assert suggestion is not None
    assert suggestion.cost.share_useful >= suggestion.goal
    assert suggestion.cost.megapixels.ratio_800x1333 < 1 / 3


@pytest.mark.parametrize("num_levels", [0, 9, 10**9])
def test_a_number_of_levels_beyond_the_bounds_is_refused(drone: ImageBoxes, num_levels: int) -> None:
    with pytest.raises(ConfigError, match=f"expected 1 to 8 levels, not {num_levels}"):
        suggest_pyramid(drone, num_levels=num_levels)
