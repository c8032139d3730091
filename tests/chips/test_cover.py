"""Chips cover every box, by the same greed as brute force, and equal seeds give equal chips."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import Chip, LevelSpec, PyramidSpec
from sniper.chips.cover import Cover, cover
from sniper.chips.pyramid import Level
from sniper.geometry.boxes import is_inside
from tests.chips.worlds import SMALL_PYRAMID, World, build_world, worlds


def cover_world(world: World, *, pyramid: PyramidSpec = SMALL_PYRAMID, seed: int = 0) -> Cover:
    return cover(
        pyramid,
        widths=world.widths,
        heights=world.heights,
        offsets=world.offsets,
        boxes=world.boxes,
        is_wanted=np.ones(len(world.boxes), dtype=bool),
        generator=np.random.default_rng(seed),
    )


def chips_of(world: World, found: Cover, image: int, level: Level, size: int) -> list[Chip]:
    index = range(found.offsets[image], found.offsets[image + 1])
    return [
        Chip(level=level, x=int(found.x[i]), y=int(found.y[i]), size=size)
        for i in index
        if found.level[i] == level.index
    ]


def is_covered(boxes: np.ndarray, chip: Chip) -> np.ndarray:
    """Tell which boxes of the image frame lie wholly inside a chip, rounding of the last bit allowed."""
    inner = chip.level.to_level(boxes) + np.array([1e-9, 1e-9, -1e-9, -1e-9])
    return is_inside(inner, chip.window[None])[:, 0]


def coverage(boxes: np.ndarray, chips: list[Chip]) -> np.ndarray:
    """Tell which chips cover which boxes: (chips, boxes)."""
    return np.array([is_covered(boxes, chip) for chip in chips], dtype=bool).reshape(len(chips), len(boxes))


def windows_of(level: Level, pyramid: PyramidSpec) -> list[Chip]:
    """Every window of a level, told plainly: the stride grid, and flush with the right and bottom borders."""
    size, stride = pyramid.chip_size, pyramid.stride
    axes = [
        sorted({*range(0, side - size + 1, stride), side - size}) if side > size else [0]
        for side in (level.width, level.height)
    ]
    return [Chip(level=level, x=x, y=y, size=size) for x, y in itertools.product(*axes)]


@given(worlds)
def test_no_box_is_lost(world: World) -> None:
    found = cover_world(world)
    for image in range(len(world.widths)):
        levels = SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image]))
        boxes = world.boxes_of(image)
        covered = np.zeros(len(boxes), dtype=bool)
        for level in levels:
            for chip in chips_of(world, found, image, level, SMALL_PYRAMID.chip_size):
                covered |= is_covered(boxes, chip)
        assert covered.all()


@given(worlds)
def test_a_box_that_a_window_of_its_level_can_hold_is_covered_there(world: World) -> None:
    found = cover_world(world)
    for image in range(len(world.widths)):
        boxes = world.boxes_of(image)
        for level in SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image])):
            chosen = chips_of(world, found, image, level, SMALL_PYRAMID.chip_size)
            moved_here = found.moved_to[world.offsets[image] : world.offsets[image + 1]] == level.index
            members = boxes[level.valid_range.contains(boxes) | moved_here]
            holds = coverage(members, windows_of(level, SMALL_PYRAMID))
            covered = coverage(members, chosen)
            np.testing.assert_array_equal(covered.any(axis=0), holds.any(axis=0))


@given(worlds)
def test_every_chip_lies_on_the_grid_and_covers_something_new(world: World) -> None:
    found = cover_world(world)
    for image in range(len(world.widths)):
        boxes = world.boxes_of(image)
        moved_to = found.moved_to[world.offsets[image] : world.offsets[image + 1]]
        for level in SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image])):
            members = boxes[level.valid_range.contains(boxes) | (moved_to == level.index)]
            allowed = {(chip.x, chip.y) for chip in windows_of(level, SMALL_PYRAMID)}
            left = np.ones(len(members), dtype=bool)
            for chip in chips_of(world, found, image, level, SMALL_PYRAMID.chip_size):
                assert (chip.x, chip.y) in allowed
                gained = is_covered(members, chip) & left
                assert gained.any()
                left &= ~gained


@given(worlds)
def test_each_chip_is_among_the_best_that_greed_can_take(world: World) -> None:
    found = cover_world(world)
    for image in range(len(world.widths)):
        boxes = world.boxes_of(image)
        moved_to = found.moved_to[world.offsets[image] : world.offsets[image + 1]]
        for level in SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image])):
            members = boxes[level.valid_range.contains(boxes) | (moved_to == level.index)]
            left = np.ones(len(members), dtype=bool)
            every = coverage(members, windows_of(level, SMALL_PYRAMID))
            for chip in chips_of(world, found, image, level, SMALL_PYRAMID.chip_size):
                covered = is_covered(members, chip)
                assert (covered & left).sum() == (every & left).sum(axis=1).max()
                left &= ~covered


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
        every = coverage(members, windows_of(level, pyramid))
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
def test_equal_seeds_give_equal_chips(world: World, seed: int) -> None:
    one, other = cover_world(world, seed=seed), cover_world(world, seed=seed)
    for name in ("offsets", "level", "x", "y", "moved_to"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_ties_fall_on_every_window_alike() -> None:
    one = np.array([[100.0, 100.0, 110.0, 110.0]])
    world = World(widths=np.array([200]), heights=np.array([200]), offsets=np.array([0, 1]), boxes=one)
    places = [cover_world(world, seed=seed) for seed in range(400)]
    xs, counts = np.unique([found.x[found.level == 0][0] for found in places], return_counts=True)
    assert xs.tolist() == list(range(160, 201, 8))
    assert counts.min() > 400 / len(xs) / 2


@given(worlds)
def test_mirroring_the_world_mirrors_which_boxes_move(world: World) -> None:
    # The grid itself is not symmetric (it starts at the left), so only levels without a grid choice are compared.
    pyramid = PyramidSpec(
        chip_size=64, stride=1, levels=(LevelSpec(factor=2.0, below=40), LevelSpec(long_side=64, at_least=32))
    )
    widths = np.repeat(world.widths, np.diff(world.offsets))
    mirrored = world.boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = widths - world.boxes[:, 2], widths - world.boxes[:, 0]
    other = World(widths=world.widths, heights=world.heights, offsets=world.offsets, boxes=mirrored)
    one, two = cover_world(world, pyramid=pyramid), cover_world(other, pyramid=pyramid)
    np.testing.assert_array_equal(one.moved_to, two.moved_to)


@given(worlds)
def test_images_do_not_know_of_each_other(world: World) -> None:
    together = cover_world(world)
    first = World(
        widths=world.widths[:1],
        heights=world.heights[:1],
        offsets=world.offsets[:2],
        boxes=world.boxes[: world.offsets[1]],
    )
    alone = cover_world(first)
    count = together.offsets[1]
    for name in ("level", "x", "y"):
        np.testing.assert_array_equal(getattr(together, name)[:count], getattr(alone, name))


@given(worlds, st.integers(0, 20))
def test_a_shifted_grid_loses_no_box_either(world: World, seed: int) -> None:
    pyramid = PyramidSpec(chip_size=64, stride=8, random_offset=True, levels=SMALL_PYRAMID.levels)
    found = cover_world(world, pyramid=pyramid, seed=seed)
    for image in range(len(world.widths)):
        boxes = world.boxes_of(image)
        covered = np.zeros(len(boxes), dtype=bool)
        for level in pyramid.at(width=int(world.widths[image]), height=int(world.heights[image])):
            for chip in chips_of(world, found, image, level, pyramid.chip_size):
                assert 0 <= chip.x <= max(level.width - chip.size, 0)
                covered |= is_covered(boxes, chip)
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
    world = World(
        widths=np.array([width]), heights=np.array([height]), offsets=np.array([0, 1]), boxes=np.array([box])
    )
    found = cover_world(world, pyramid=PyramidSpec())
    assert found.level.tolist() == levels
    assert found.moved_to.tolist() == [moved_to]


def test_unwanted_boxes_get_no_chip() -> None:
    found = cover(
        PyramidSpec(),
        widths=np.array([640]),
        heights=np.array([480]),
        offsets=np.array([0, 1]),
        boxes=np.array([[10.0, 10.0, 40.0, 40.0]]),
        is_wanted=np.array([False]),
        generator=np.random.default_rng(0),
    )
    assert len(found.level) == 0


def test_no_image_gives_no_chip() -> None:
    none = np.zeros(0, dtype=np.int64)
    world = World(widths=none, heights=none, offsets=np.zeros(1, np.int64), boxes=np.zeros((0, 4)))
    found = cover_world(world)
    assert found.offsets.tolist() == [0]
    assert len(found.level) == 0


def test_five_thousand_boxes_in_a_huge_image_are_all_covered() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 29_000, (5000, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 900, (5000, 2))], axis=1)
    world = World(
        widths=np.array([30_000]), heights=np.array([30_000]), offsets=np.array([0, 5000]), boxes=boxes
    )
    found = cover_world(world, pyramid=PyramidSpec())
    covered = np.zeros(len(boxes), dtype=bool)
    for level in PyramidSpec().at(width=30_000, height=30_000):
        for chip in chips_of(world, found, 0, level, 512):
            covered |= is_covered(boxes, chip)
    assert covered.all()
