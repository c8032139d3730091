"""Chips cover every box, as brute-force greed does, and equal seeds give equal chips."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import ChipTable, ImageBoxes, LevelSpec, PyramidSpec
from sniper.chips.cover import count_chips, cover, cover_dense, is_coverable
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.pyramid import Level
from sniper.chips.visibility import Visibility, chip_visibility
from sniper.geometry.boxes import is_inside
from tests.chips.worlds import SMALL_PYRAMID, boxes_of, build_world, one_image, worlds

alarm_seeds = st.integers(0, 1000)


def cover_world(world: ImageBoxes, *, pyramid: PyramidSpec = SMALL_PYRAMID, seed: int = 0) -> ChipTable:
    return cover(pyramid, world, generator=np.random.default_rng(seed))


def test_boxes_far_apart_in_the_largest_image_are_covered_one_by_one() -> None:
    side = 1_000_000
    low = np.array([[1.0 * x, 1.0 * y] for x in range(0, side, 50_000) for y in range(0, side, 60_000)])
    table = cover_world(one_image(side, side, np.concatenate([low, low + 30], axis=1)), pyramid=PyramidSpec())
    assert table.chips_per_level.tolist() == [len(low), 0, 0]
    assert (table.moved_to == -1).all()


def test_a_chain_of_boxes_through_a_large_image_is_covered() -> None:
    starts = 130.0 * np.arange(1000)  # windows of neighbours overlap, so that all are one group
    low = np.stack([starts, starts], axis=1)
    world = one_image(200_000, 200_000, np.concatenate([low, low + 30], axis=1))
    table = cover_world(world, pyramid=PyramidSpec())
    visibility, _ = chip_visibility(table, world)
    assert (visibility[:, 0] == Visibility.WHOLE).all()
    assert 500 <= len(table) <= 600  # two boxes to a chip, but for the ends of its parts


def chips_of(table: ChipTable, image: int, level: Level) -> np.ndarray:
    """Return the corners of the chips of one level, (k, 2), in the order in which they were chosen."""
    chips = slice(table.offsets[image], table.offsets[image + 1])
    is_here = table.level[chips] == level.index
    return np.stack([table.x[chips][is_here], table.y[chips][is_here]], axis=1)


def coverage(boxes: np.ndarray, level: Level, corners: np.ndarray, size: int) -> np.ndarray:
    """Check which windows cover which boxes of the image frame, (windows, boxes), with a tolerance for rounding."""
    inner = level.to_level(boxes) + np.array([2e-6, 2e-6, -2e-6, -2e-6])
    return is_inside(inner, np.concatenate([corners, corners + size], axis=1).astype(float)).T


def windows_of(level: Level, pyramid: PyramidSpec) -> np.ndarray:
    """Return the corners of every window of a level: on the grid, and flush with the right and bottom borders."""
    size, stride = pyramid.chip_size, pyramid.stride
    axes = [
        sorted({*range(0, side - size + 1, stride), side - size}) if side > size else [0]
        for side in (level.width, level.height)
    ]
    return np.array(list(itertools.product(*axes)))


def levels_of(
    world: ImageBoxes, table: ChipTable, pyramid: PyramidSpec = SMALL_PYRAMID
) -> Iterator[tuple[Level, np.ndarray, np.ndarray, np.ndarray]]:
    """Iterate over all images at all levels.

    Yields:
        The level; the boxes that belong there, by size or because they moved; which of them each window could cover;
        and which of them each chip covers.
    """
    for image in range(len(world)):
        boxes = boxes_of(world, image)
        moved_to = table.moved_to[world.offsets[image] : world.offsets[image + 1]]
        for level in pyramid.at(width=int(world.widths[image]), height=int(world.heights[image])):
            members = boxes[level.valid_range.contains(boxes) | (moved_to == level.index)]
            could_cover = coverage(members, level, windows_of(level, pyramid), pyramid.chip_size)
            covers = coverage(members, level, chips_of(table, image, level), pyramid.chip_size)
            yield level, members, could_cover, covers


def is_covered(world: ImageBoxes, table: ChipTable, pyramid: PyramidSpec = SMALL_PYRAMID) -> np.ndarray:
    """Check which boxes some chip covers."""
    flags = np.zeros(len(world.boxes), dtype=bool)
    for image in range(len(world)):
        rows = slice(world.offsets[image], world.offsets[image + 1])
        for level in pyramid.at(width=int(world.widths[image]), height=int(world.heights[image])):
            corners = chips_of(table, image, level)
            flags[rows] |= coverage(world.boxes[rows], level, corners, pyramid.chip_size).any(axis=0)
    return flags


@given(worlds)
def test_no_box_is_lost(world: ImageBoxes) -> None:
    assert is_covered(world, cover_world(world)).all()


@given(worlds, st.integers(0, 20))
def test_a_shifted_grid_loses_no_box(world: ImageBoxes, seed: int) -> None:
    pyramid = dataclasses.replace(SMALL_PYRAMID, random_offset=True)
    table = cover_world(world, pyramid=pyramid, seed=seed)
    assert is_covered(world, table, pyramid).all()
    for chip in map(table.chip, range(len(table))):
        assert 0 <= chip.x <= max(chip.level.width - pyramid.chip_size, 0)
        assert 0 <= chip.y <= max(chip.level.height - pyramid.chip_size, 0)


@given(worlds)
def test_a_box_is_covered_at_each_level_where_a_window_can(world: ImageBoxes) -> None:
    for _, _, could_cover, covers in levels_of(world, cover_world(world)):
        np.testing.assert_array_equal(covers.any(axis=0), could_cover.any(axis=0))


@given(worlds)
def test_the_coverable_boxes_are_those_that_some_window_can_cover(world: ImageBoxes) -> None:
    grid = {"chip_size": SMALL_PYRAMID.chip_size, "stride": SMALL_PYRAMID.stride}
    flags = np.stack([is_coverable(level, world, **grid) for level in SMALL_PYRAMID.levels], axis=1)
    for image in range(len(world)):
        rows = slice(world.offsets[image], world.offsets[image + 1])
        for level in SMALL_PYRAMID.at(width=int(world.widths[image]), height=int(world.heights[image])):
            windows = windows_of(level, SMALL_PYRAMID)
            expected = coverage(world.boxes[rows], level, windows, SMALL_PYRAMID.chip_size).any(axis=0)
            np.testing.assert_array_equal(flags[rows, level.index], expected)


@given(worlds)
def test_the_chips_of_one_level_are_counted_as_they_are_chosen(world: ImageBoxes) -> None:
    # All sizes at one level; the last level covers only what no window of the first can.
    below = 1000.0
    levels = (LevelSpec(factor=0.5, below=below), LevelSpec(long_side=64, at_least=below))
    pyramid = dataclasses.replace(SMALL_PYRAMID, levels=levels)
    count = count_chips(levels[0], world, chip_size=pyramid.chip_size, stride=pyramid.stride)
    chosen = [int(cover_world(world, pyramid=pyramid, seed=seed).chips_per_level[0]) for seed in range(20)]
    assert min(chosen) <= count <= max(chosen)


@given(worlds)
def test_every_chip_is_on_the_grid(world: ImageBoxes) -> None:
    table = cover_world(world)
    for index in range(len(table)):
        chip = table.chip(index)
        assert [chip.x, chip.y] in windows_of(chip.level, SMALL_PYRAMID).tolist()


@given(worlds)
def test_every_chip_covers_a_box_that_earlier_chips_do_not(world: ImageBoxes) -> None:
    for _, _, _, covers in levels_of(world, cover_world(world)):
        before = np.cumsum(covers, axis=0) - covers
        assert (covers & (before == 0)).any(axis=1).all()


def assert_greedy(world: ImageBoxes, table: ChipTable) -> None:
    """Compare with brute force: each chip covers as many remaining boxes as the best window.

    Groups of boxes that share no window are covered one after the other, so chips are compared in the order of the
    number of boxes that each adds.
    """
    for _, members, could_cover, covers in levels_of(world, table):
        before = np.cumsum(covers, axis=0) - covers
        gains = (covers & (before == 0)).sum(axis=1)
        remaining = np.ones(len(members), dtype=bool)
        for covered in covers[np.argsort(-gains, kind="stable")]:
            assert (covered & remaining).sum() == (could_cover & remaining).sum(axis=1).max()
            remaining &= ~covered
        assert not (could_cover & remaining).any()


@given(worlds)
def test_chips_are_chosen_as_by_brute_force_greed(world: ImageBoxes) -> None:
    assert_greedy(world, cover_world(world))


@given(worlds)
def test_a_mirrored_world_has_mirrored_solutions(world: ImageBoxes) -> None:
    # If all sides are multiples of the stride, the grid is its own mirror image; only ties may differ.
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
    table = cover_world(dataclasses.replace(world, boxes=flipped))

    widths = np.array([level.resized(world.widths, world.heights)[0] for level in SMALL_PYRAMID.levels])
    last = np.maximum(widths[table.level, table.image_indices] - SMALL_PYRAMID.chip_size, 0)
    assert_greedy(world, dataclasses.replace(table, x=last - table.x))


@given(worlds)
def test_mirroring_changes_no_move_to_another_level(world: ImageBoxes) -> None:
    pyramid = PyramidSpec(  # the grid starts at the left; with stride 1 it has no preferred side
        chip_size=64, stride=1, levels=(LevelSpec(factor=2.0, below=40), LevelSpec(long_side=64, at_least=32))
    )
    widths = np.repeat(world.widths, np.diff(world.offsets))
    mirrored = world.boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = widths - world.boxes[:, 2], widths - world.boxes[:, 0]
    other = dataclasses.replace(world, boxes=mirrored)
    table, mirrored_table = cover_world(world, pyramid=pyramid), cover_world(other, pyramid=pyramid)
    np.testing.assert_array_equal(table.moved_to, mirrored_table.moved_to)


@given(st.integers(0, 100_000), st.integers(0, 20), st.integers(0, 20))
def test_moving_the_boxes_by_whole_strides_moves_the_chips(seed: int, right: int, down: int) -> None:
    world = build_world(seed, num_images=1, longest=150)
    pyramid = PyramidSpec(
        chip_size=64, stride=8, levels=(LevelSpec(factor=1.0, below=60), LevelSpec(long_side=64, at_least=32))
    )
    start = np.full(4, 64.0)  # away from the borders, where windows cannot follow
    shift = 8 * np.array([right, down, right, down], dtype=np.float64)
    table, moved = (
        cover_world(one_image(500, 500, world.boxes + offset), pyramid=pyramid)
        for offset in (start, start + shift)
    )
    is_fine = table.level == 0
    np.testing.assert_array_equal(is_fine, moved.level == 0)
    np.testing.assert_array_equal(table.x[is_fine] + 8 * right, moved.x[is_fine])
    np.testing.assert_array_equal(table.y[is_fine] + 8 * down, moved.y[is_fine])


def fewest_windows(could_cover: np.ndarray) -> int:
    """Count the fewest windows that cover all coverable boxes, by trying all combinations."""
    could_cover = could_cover[:, could_cover.any(axis=0)]
    useful = np.unique(could_cover, axis=0)
    return next(
        count
        for count in range(len(useful) + 1)
        for chosen in itertools.combinations(useful, count)
        if np.array(chosen, dtype=bool).reshape(count, could_cover.shape[1]).any(axis=0).all()
    )


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
        table = cover_world(world, pyramid=pyramid)
        _, _, could_cover, covers = next(levels_of(world, table, pyramid))
        fewest = fewest_windows(could_cover)
        assert len(covers) >= fewest
        greedy, exact = greedy + len(covers), exact + fewest
    record_property("greedy_over_exact", greedy / exact)
    assert exact <= greedy <= 1.05 * exact


@given(worlds, st.integers(0, 5))
def test_equal_seeds_give_equal_chips(world: ImageBoxes, seed: int) -> None:
    table, again = cover_world(world, seed=seed), cover_world(world, seed=seed)
    for name in ("offsets", "level", "x", "y", "moved_to"):
        np.testing.assert_array_equal(getattr(table, name), getattr(again, name))


def test_ties_are_broken_uniformly() -> None:
    world = one_image(200, 200, np.array([[100.0, 100.0, 110.0, 110.0]]))
    tables = [cover_world(world, seed=seed) for seed in range(400)]
    xs, counts = np.unique([table.x[table.level == 0][0] for table in tables], return_counts=True)
    assert xs.tolist() == list(range(160, 201, 8))
    assert counts.min() > 400 / len(xs) / 2


@given(worlds)
def test_the_chips_of_an_image_do_not_depend_on_other_images(world: ImageBoxes) -> None:
    together = cover_world(world)
    alone = cover_world(world.select(np.array([0])))
    first = together.of_images(range(1))
    for name in ("level", "x", "y"):
        np.testing.assert_array_equal(getattr(first, name), getattr(alone, name))


@given(worlds, st.integers(1, 3))
def test_dense_windows_are_chosen_while_one_adds_enough_boxes(world: ImageBoxes, min_boxes: int) -> None:
    table, masses = cover_dense(
        SMALL_PYRAMID,
        world,
        is_excluded=np.zeros((len(world.boxes), 3), dtype=bool),
        min_boxes=np.full(3, min_boxes),
        generator=np.random.default_rng(0),
    )
    assert not masses.any()
    assert (table.moved_to == -1).all()
    for _, _, could_cover, covers in levels_of(world, table):
        before = np.cumsum(covers, axis=0) - covers
        assert ((covers & (before == 0)).sum(axis=1) >= min_boxes).all()
        assert (could_cover & ~covers.any(axis=0)).sum(axis=1).max(initial=0) < min_boxes


def alarms_in(world: ImageBoxes, seed: int) -> ScoredBoxes:
    """Draw up to 20 boxes of all sizes with scores in each image."""
    boxes = build_world(seed, num_images=len(world), most_boxes=20)
    sides = np.stack([world.widths, world.heights], axis=1)[boxes.image_of_box]
    others = np.stack([boxes.widths, boxes.heights], axis=1)[boxes.image_of_box]
    images = dataclasses.replace(
        boxes, widths=world.widths, heights=world.heights, boxes=boxes.boxes * np.tile(sides / others, 2)
    )
    return ScoredBoxes(images=images, scores=np.random.default_rng(seed).uniform(0.1, 1, len(boxes.boxes)))


def shown_mass(table: ChipTable, alarms: ScoredBoxes) -> float:
    """Sum the scores of the alarms that a chip of each of their levels covers."""
    visibility, _ = chip_visibility(table, alarms.images)
    in_range = np.stack(
        [level.valid_range.contains(alarms.images.boxes) for level in SMALL_PYRAMID.levels], axis=1
    )
    return float(((visibility == Visibility.WHOLE) & in_range).sum(axis=1) @ alarms.scores)


@given(worlds, alarm_seeds)
def test_chips_on_false_alarms_are_chosen_by_the_same_greed(world: ImageBoxes, seed: int) -> None:
    table = cover(SMALL_PYRAMID, world, generator=np.random.default_rng(seed), alarms=alarms_in(world, seed))
    assert_greedy(world, table)


@given(worlds, st.integers(0, 5))
def test_no_false_alarms_change_no_chip(world: ImageBoxes, seed: int) -> None:
    nothing = ScoredBoxes.none(world)
    table = cover(SMALL_PYRAMID, world, generator=np.random.default_rng(seed), alarms=nothing)
    expected = cover_world(world, seed=seed)
    for name in ("image_indices", "level", "x", "y"):
        np.testing.assert_array_equal(getattr(table, name), getattr(expected, name))


def test_chips_on_false_alarms_show_more_of_them_and_differ_between_epochs() -> None:
    world = build_world(3, num_images=40)
    alarms = alarms_in(world, 4)
    tables = [
        [
            cover(SMALL_PYRAMID, world, generator=np.random.default_rng(seed), alarms=placed_on)
            for seed in range(4)
        ]
        for placed_on in (None, alarms)
    ]
    plain, placed = ([shown_mass(table, alarms) for table in row] for row in tables)
    assert min(placed) > 1.1 * max(plain)
    assert [len(table) for table in tables[1]] == pytest.approx([len(tables[0][0])] * 4, rel=0.02)
    assert len({table.x.tobytes() + table.y.tobytes() for table in tables[1]}) == 4


@given(worlds, alarm_seeds)
def test_the_mass_of_a_dense_window_is_that_of_the_boxes_that_it_adds(world: ImageBoxes, seed: int) -> None:
    alarms = alarms_in(world, seed)
    is_excluded = np.random.default_rng(seed).random((len(alarms.scores), 3)) < 0.2
    table, masses = cover_dense(
        SMALL_PYRAMID,
        alarms.images,
        is_excluded=is_excluded,
        min_boxes=np.ones(3, dtype=np.int64),
        generator=np.random.default_rng(seed),
        scores=alarms.scores,
    )
    assert (masses > 0).all()
    for image in range(len(world)):
        rows = slice(alarms.images.offsets[image], alarms.images.offsets[image + 1])
        boxes, scores = alarms.images.boxes[rows], alarms.scores[rows]
        chips = np.arange(table.offsets[image], table.offsets[image + 1])
        sides = {"width": int(world.widths[image]), "height": int(world.heights[image])}
        for level in SMALL_PYRAMID.at(**sides):
            counts = level.valid_range.contains(boxes) & ~is_excluded[rows, level.index]
            covers = coverage(boxes[counts], level, chips_of(table, image, level), SMALL_PYRAMID.chip_size)
            adds = covers & (np.cumsum(covers, axis=0) - covers == 0)
            here = masses[chips[table.level[chips] == level.index]]
            np.testing.assert_allclose(here, adds @ scores[counts], atol=1e-9)


@pytest.mark.parametrize(
    ("box", "width", "height", "levels", "moved_to"),
    [
        ([10.0, 10.0, 40.0, 40.0], 640, 480, [0], -1),  # small: the finest level
        ([0.0, 0.0, 60.0, 60.0], 640, 480, [0, 1], -1),  # where ranges overlap: both
        ([170.0, 20.0, 470.0, 50.0], 640, 480, [2], 2),  # too long for every window of its level
        ([0.0, 0.0, 640.0, 480.0], 640, 480, [2], -1),  # the whole image
        ([0.0, 0.0, 1.0, 1.0], 1, 1, [0], -1),  # the smallest image
    ],
)
def test_a_box_has_chips_at_these_levels_of_the_papers_pyramid(
    box: list[float], width: int, height: int, levels: list[int], moved_to: int
) -> None:
    table = cover_world(one_image(width, height, np.array([box])), pyramid=PyramidSpec())
    assert table.level.tolist() == levels
    assert table.moved_to.tolist() == [moved_to]


def test_boxes_that_are_not_required_get_no_chip() -> None:
    world = one_image(640, 480, np.array([[10.0, 10.0, 40.0, 40.0]]))
    world = dataclasses.replace(world, is_required=np.array([False]))
    assert len(cover_world(world, pyramid=PyramidSpec())) == 0


def test_no_images_give_an_empty_table() -> None:
    table = cover_world(build_world(0).select(np.zeros(0, dtype=np.int64)))
    assert table.offsets.tolist() == [0]
    assert len(table) == 0


def test_thousands_of_boxes_in_a_huge_image_are_all_covered() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 29_000, (5000, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 900, (5000, 2))], axis=1)
    world = one_image(30_000, 30_000, boxes)
    assert is_covered(world, cover_world(world, pyramid=PyramidSpec()), PyramidSpec()).all()
