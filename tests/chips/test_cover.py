"""Chips cover every box, by the same greed as brute force, and equal seeds give equal chips."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import ChipTable, ImageBoxes, LevelSpec, PyramidSpec
from sniper.chips.cover import cover
from sniper.chips.pyramid import Level
from sniper.geometry.boxes import is_inside
from tests.chips.worlds import SMALL_PYRAMID, boxes_of, build_world, one_image, worlds


def cover_world(world: ImageBoxes, *, pyramid: PyramidSpec = SMALL_PYRAMID, seed: int = 0) -> ChipTable:
    return cover(pyramid, world, generator=np.random.default_rng(seed))


def chips_of(found: ChipTable, image: int, level: Level) -> np.ndarray:
    """Give the corners of the chips of one level, (k, 2), in the order in which they were taken."""
    own = slice(found.offsets[image], found.offsets[image + 1])
    is_here = found.level[own] == level.index
    return np.stack([found.x[own][is_here], found.y[own][is_here]], axis=1)


def coverage(boxes: np.ndarray, level: Level, corners: np.ndarray, size: int) -> np.ndarray:
    """Tell which windows cover which boxes of the image frame: (windows, boxes); rounding of the last bit allowed."""
    inner = level.to_level(boxes) + np.array([2e-6, 2e-6, -2e-6, -2e-6])
    return is_inside(inner, np.concatenate([corners, corners + size], axis=1).astype(float)).T


def windows_of(level: Level, pyramid: PyramidSpec) -> np.ndarray:
    """Every window of a level, told plainly: the stride grid, and flush with the right and bottom borders."""
    size, stride = pyramid.chip_size, pyramid.stride
    axes = [
        sorted({*range(0, side - size + 1, stride), side - size}) if side > size else [0]
        for side in (level.width, level.height)
    ]
    return np.array(list(itertools.product(*axes)))


@given(worlds)
def test_no_box_is_lost(world: ImageBoxes) -> None:
    found = cover_world(world)
    for image in range(len(world.widths)):
        levels = SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image]))
        boxes = boxes_of(world, image)
        covered = np.zeros(len(boxes), dtype=bool)
        for level in levels:
            corners = chips_of(found, image, level)
            covered |= coverage(boxes, level, corners, SMALL_PYRAMID.chip_size).any(axis=0)
        assert covered.all()


@given(worlds)
def test_a_box_that_a_window_of_its_level_can_hold_is_covered_there(world: ImageBoxes) -> None:
    found = cover_world(world)
    for image in range(len(world.widths)):
        boxes = boxes_of(world, image)
        for level in SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image])):
            moved_here = found.moved_to[world.offsets[image] : world.offsets[image + 1]] == level.index
            members = boxes[level.valid_range.contains(boxes) | moved_here]
            holds = coverage(members, level, windows_of(level, SMALL_PYRAMID), SMALL_PYRAMID.chip_size)
            covered = coverage(members, level, chips_of(found, image, level), SMALL_PYRAMID.chip_size)
            np.testing.assert_array_equal(covered.any(axis=0), holds.any(axis=0))


@given(worlds)
def test_every_chip_lies_on_the_grid_and_covers_something_new(world: ImageBoxes) -> None:
    found = cover_world(world)
    for image in range(len(world.widths)):
        boxes = boxes_of(world, image)
        moved_to = found.moved_to[world.offsets[image] : world.offsets[image + 1]]
        for level in SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image])):
            members = boxes[level.valid_range.contains(boxes) | (moved_to == level.index)]
            corners = chips_of(found, image, level)
            assert set(map(tuple, corners)) <= set(map(tuple, windows_of(level, SMALL_PYRAMID)))
            left = np.ones(len(members), dtype=bool)
            for covered in coverage(members, level, corners, SMALL_PYRAMID.chip_size):
                gained = covered & left
                assert gained.any()
                left &= ~gained


def assert_greedy(world: ImageBoxes, found: ChipTable) -> None:
    """Compare with brute force: each chip covers as many boxes that were still left as any window could.

    Boxes far from each other are covered apart, so the chips stand in the order of the groups; greed would take them by
    the number of boxes that each adds.
    """
    for image in range(len(world)):
        boxes = boxes_of(world, image)
        moved_to = found.moved_to[world.offsets[image] : world.offsets[image + 1]]
        for level in SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image])):
            members = boxes[level.valid_range.contains(boxes) | (moved_to == level.index)]
            every = coverage(members, level, windows_of(level, SMALL_PYRAMID), SMALL_PYRAMID.chip_size)
            chosen = coverage(members, level, chips_of(found, image, level), SMALL_PYRAMID.chip_size)
            before = np.cumsum(chosen, axis=0) - chosen
            gains = (chosen & (before == 0)).sum(axis=1)
            left = np.ones(len(members), dtype=bool)
            for covered in chosen[np.argsort(-gains, kind="stable")]:
                assert (covered & left).sum() == (every & left).sum(axis=1).max()
                left &= ~covered
            assert not (every & left).any()


@given(worlds)
def test_each_chip_is_among_the_best_that_greed_can_take(world: ImageBoxes) -> None:
    assert_greedy(world, cover_world(world))


@given(worlds)
def test_a_mirrored_world_has_the_mirrored_answers(world: ImageBoxes) -> None:
    # On sides of whole strides the grid is its own mirror image; only the ties may fall otherwise.
    def rounded(values: np.ndarray) -> np.ndarray:
        return np.maximum(np.ceil(values / 8) * 8, 8).astype(np.int64)

    low, high = np.floor(world.boxes[:, :2]), np.floor(world.boxes[:, 2:]) + 1
    world = dataclasses.replace(
        world,
        widths=rounded(world.widths),
        heights=rounded(world.heights),
        boxes=np.concatenate([low, np.maximum(high, low + 1)], axis=1),
    )
    limits = np.stack([world.widths, world.heights] * 2, axis=1)[world.image_of_box]
    world = dataclasses.replace(world, boxes=np.minimum(world.boxes, limits))
    flipped = world.boxes[:, [2, 1, 0, 3]].copy()
    flipped[:, [0, 2]] = limits[:, :1] - flipped[:, [0, 2]]
    found = cover_world(dataclasses.replace(world, boxes=flipped))

    sides = np.array([level.resized(world.widths, world.heights)[0] for level in SMALL_PYRAMID.levels])
    images = np.repeat(np.arange(len(world)), np.diff(found.offsets))
    room = np.maximum(sides[found.level, images] - SMALL_PYRAMID.chip_size, 0)
    assert_greedy(world, dataclasses.replace(found, x=room - found.x))


@given(st.integers(0, 100_000), st.integers(0, 20), st.integers(0, 20))
def test_moving_the_boxes_by_whole_strides_moves_the_chips(seed: int, right: int, down: int) -> None:
    world = build_world(seed, num_images=1, longest=150)
    pyramid = PyramidSpec(
        chip_size=64, stride=8, levels=(LevelSpec(factor=1.0, below=60), LevelSpec(long_side=64, at_least=32))
    )
    margin = 64  # away from the borders, where windows cannot follow
    start = np.array([margin, margin, margin, margin], dtype=np.float64)
    shift = 8 * np.array([right, down, right, down], dtype=np.float64)
    one, two = (
        cover_world(one_image(500, 500, world.boxes + place), pyramid=pyramid)
        for place in (start, start + shift)
    )
    is_fine = one.level == 0
    np.testing.assert_array_equal(is_fine, two.level == 0)
    np.testing.assert_array_equal(one.x[is_fine] + 8 * right, two.x[is_fine])
    np.testing.assert_array_equal(one.y[is_fine] + 8 * down, two.y[is_fine])


def test_greed_takes_few_more_windows_than_the_exact_minimum(
    record_property: Callable[[str, object], None],
) -> None:
    pyramid = PyramidSpec(
        chip_size=64,
        stride=16,
        levels=(LevelSpec(factor=1.0, below=40), LevelSpec(long_side=64, at_least=32)),
    )
    greedy = exact = 0
    for seed in range(60):
        world = build_world(seed, num_images=1, most_boxes=6, longest=160)
        found = cover_world(world, pyramid=pyramid)
        level = pyramid.at(width=int(world.widths[0]), height=int(world.heights[0]))[0]
        members = world.boxes[level.valid_range.contains(world.boxes)]
        every = coverage(members, level, windows_of(level, pyramid), pyramid.chip_size)
        every = every[:, every.any(axis=0)]
        useful = np.unique(every, axis=0)
        taken = int((found.level == 0).sum())
        fewest = next(
            count
            for count in range(len(useful) + 1)
            for chosen in itertools.combinations(useful, count)
            if np.array(chosen, dtype=bool).reshape(count, every.shape[1]).any(axis=0).all()
        )
        assert taken == 0 or taken >= fewest
        greedy, exact = greedy + taken, exact + fewest
    record_property("greedy_over_exact", greedy / exact)
    assert exact <= greedy <= 1.05 * exact


@given(worlds, st.integers(0, 5))
def test_equal_seeds_give_equal_chips(world: ImageBoxes, seed: int) -> None:
    one, other = cover_world(world, seed=seed), cover_world(world, seed=seed)
    for name in ("offsets", "level", "x", "y", "moved_to"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_ties_fall_on_every_window_alike() -> None:
    world = one_image(200, 200, np.array([[100.0, 100.0, 110.0, 110.0]]))
    places = [cover_world(world, seed=seed) for seed in range(400)]
    xs, counts = np.unique([found.x[found.level == 0][0] for found in places], return_counts=True)
    assert xs.tolist() == list(range(160, 201, 8))
    assert counts.min() > 400 / len(xs) / 2


@given(worlds)
def test_mirroring_the_world_mirrors_which_boxes_move(world: ImageBoxes) -> None:
    # The grid itself is not symmetric (it starts at the left), so only levels without a grid choice are compared.
    pyramid = PyramidSpec(
        chip_size=64, stride=1, levels=(LevelSpec(factor=2.0, below=40), LevelSpec(long_side=64, at_least=32))
    )
    widths = np.repeat(world.widths, np.diff(world.offsets))
    mirrored = world.boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = widths - world.boxes[:, 2], widths - world.boxes[:, 0]
    other = dataclasses.replace(world, boxes=mirrored)
    one, two = cover_world(world, pyramid=pyramid), cover_world(other, pyramid=pyramid)
    np.testing.assert_array_equal(one.moved_to, two.moved_to)


@given(worlds)
def test_images_do_not_know_of_each_other(world: ImageBoxes) -> None:
    together = cover_world(world)
    first = world.select(np.array([0]))
    alone = cover_world(first)
    count = together.offsets[1]
    for name in ("level", "x", "y"):
        np.testing.assert_array_equal(getattr(together, name)[:count], getattr(alone, name))


@given(worlds, st.integers(0, 20))
def test_a_shifted_grid_loses_no_box_either(world: ImageBoxes, seed: int) -> None:
    pyramid = PyramidSpec(chip_size=64, stride=8, random_offset=True, levels=SMALL_PYRAMID.levels)
    found = cover_world(world, pyramid=pyramid, seed=seed)
    for image in range(len(world.widths)):
        boxes = boxes_of(world, image)
        covered = np.zeros(len(boxes), dtype=bool)
        for level in pyramid.at(width=int(world.widths[image]), height=int(world.heights[image])):
            corners = chips_of(found, image, level)
            assert (corners >= 0).all()
            assert (
                corners <= np.maximum([level.width - pyramid.chip_size, level.height - pyramid.chip_size], 0)
            ).all()
            covered |= coverage(boxes, level, corners, pyramid.chip_size).any(axis=0)
        assert covered.all()


@pytest.mark.parametrize(
    ("box", "width", "height", "levels", "moved_to"),
    [
        ([10.0, 10.0, 40.0, 40.0], 640, 480, [0], -1),  # small: the finest level
        ([0.0, 0.0, 60.0, 60.0], 640, 480, [0, 1], -1),  # where ranges overlap: both
        ([170.0, 20.0, 470.0, 50.0], 640, 480, [2], 2),  # too long for a window of its level, however placed
        ([0.0, 0.0, 640.0, 480.0], 640, 480, [2], -1),  # the whole image
        ([0.0, 0.0, 1.0, 1.0], 1, 1, [0], -1),  # the smallest image there is
    ],
)
def test_a_box_of_the_papers_pyramid_goes_here(
    box: list[float], width: int, height: int, levels: list[int], moved_to: int
) -> None:
    found = cover_world(one_image(width, height, np.array([box])), pyramid=PyramidSpec())
    assert found.level.tolist() == levels
    assert found.moved_to.tolist() == [moved_to]


def test_unwanted_boxes_get_no_chip() -> None:
    world = one_image(640, 480, np.array([[10.0, 10.0, 40.0, 40.0]]))
    found = cover_world(dataclasses.replace(world, is_required=np.array([False])), pyramid=PyramidSpec())
    assert len(found.level) == 0


def test_no_image_gives_no_chip() -> None:
    found = cover_world(build_world(0).select(np.zeros(0, dtype=np.int64)))
    assert found.offsets.tolist() == [0]
    assert len(found.level) == 0


def test_five_thousand_boxes_in_a_huge_image_are_all_covered() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 29_000, (5000, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 900, (5000, 2))], axis=1)
    world = one_image(30_000, 30_000, boxes)
    found = cover_world(world, pyramid=PyramidSpec())
    covered = np.zeros(len(boxes), dtype=bool)
    for level in PyramidSpec().at(width=30_000, height=30_000):
        covered |= coverage(boxes, level, chips_of(found, 0, level), 512).any(axis=0)
    assert covered.all()
