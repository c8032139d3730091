"""Negative chips: only where enough proposals are uncovered, and no more of them than specified."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.chips import ChipTable, ImageBoxes
from sniper.chips.cover import cover, is_coverable
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.negatives import (
    NegativeSpec,
    choose_background,
    choose_negatives,
    choose_on_alarms,
    draw_negatives,
    is_uncovered,
)
from sniper.chips.visibility import Visibility, chip_visibility
from sniper.geometry.boxes import intersections
from tests.chips.test_cover import chips_of, coverage, windows_of
from tests.chips.worlds import SMALL_PYRAMID, boxes_of, build_world, one_image

SIZE = SMALL_PYRAMID.chip_size
Rule = Literal["cover", "overlap"]
rules: st.SearchStrategy[Rule] = st.sampled_from(["cover", "overlap"])


def build_proposals(objects: ImageBoxes, seed: int) -> ImageBoxes:
    """Draw up to 60 proposals in each image."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 60, len(objects))
    sides = np.stack([objects.widths, objects.heights], axis=1).repeat(counts, axis=0)
    extents = np.minimum(rng.uniform(2, 40, (counts.sum(), 2)), sides)
    low = rng.uniform(0, 1, extents.shape) * (sides - extents)
    return dataclasses.replace(
        objects,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.concatenate([low, low + extents], axis=1),
        is_required=np.ones(counts.sum(), dtype=bool),
    )


@st.composite
def scenes(draw: st.DrawFn) -> tuple[ImageBoxes, ImageBoxes]:
    """Draw images with objects, and many proposals in the same images; some images have no object."""
    seed = draw(st.integers(0, 100_000))
    objects = build_world(seed, num_images=3, most_boxes=4, longest=200)
    return objects, build_proposals(objects, seed + 1)


def positives_of(objects: ImageBoxes) -> ChipTable:
    return cover(SMALL_PYRAMID, objects, generator=np.random.default_rng(0))


def negatives_of(positives: ChipTable, proposals: ImageBoxes, spec: NegativeSpec) -> ChipTable:
    generator = np.random.default_rng(0)
    return choose_negatives(positives, proposals, spec, pyramid=SMALL_PYRAMID, generator=generator)


def uncovered_by_brute_force(proposals: ImageBoxes, positives: ChipTable, rule: Rule) -> np.ndarray:
    flags = np.ones((len(proposals.boxes), len(SMALL_PYRAMID.levels)), dtype=bool)
    for image in range(len(proposals)):
        rows = slice(proposals.offsets[image], proposals.offsets[image + 1])
        boxes = proposals.boxes[rows]
        sides = {"width": int(proposals.widths[image]), "height": int(proposals.heights[image])}
        for level in SMALL_PYRAMID.at(**sides):
            corners = chips_of(positives, image, level)
            if rule == "cover":
                is_excluded = coverage(boxes, level, corners, SIZE).any(axis=0)
            else:
                windows = np.concatenate([corners, corners + SIZE], axis=1).astype(float)
                is_excluded = (intersections(level.to_level(boxes), windows) > 0).any(axis=1)
            flags[rows, level.index] = ~is_excluded
    return flags


@given(scenes(), rules)
def test_uncovered_proposals_are_those_of_brute_force(
    scene: tuple[ImageBoxes, ImageBoxes], rule: Rule
) -> None:
    objects, proposals = scene
    positives = positives_of(objects)
    expected = uncovered_by_brute_force(proposals, positives, rule)
    np.testing.assert_array_equal(is_uncovered(proposals, positives, rule=rule), expected)


@given(scenes(), rules, st.integers(1, 6))
def test_each_negative_chip_adds_enough_uncovered_proposals_until_no_window_does(
    scene: tuple[ImageBoxes, ImageBoxes], rule: Rule, least: int
) -> None:
    objects, proposals = scene
    positives = positives_of(objects)
    negatives = negatives_of(positives, proposals, NegativeSpec(min_proposals=(least, least + 1), rule=rule))
    assert negatives.is_negative.all()
    flags = is_uncovered(proposals, positives, rule=rule)
    for image in range(len(objects)):
        boxes = boxes_of(proposals, image)
        uncovered = flags[proposals.offsets[image] : proposals.offsets[image + 1]]
        for level in SMALL_PYRAMID.at(width=int(objects.widths[image]), height=int(objects.heights[image])):
            min_proposals = least if level.index == 0 else least + 1
            remaining = boxes[level.valid_range.contains(boxes) & uncovered[:, level.index]]
            covers = coverage(remaining, level, chips_of(negatives, image, level), SIZE)
            before = np.cumsum(covers, axis=0) - covers
            assert ((covers & (before == 0)).sum(axis=1) >= min_proposals).all()
            rest = remaining[~covers.any(axis=0)]
            could_cover = coverage(rest, level, windows_of(level, SMALL_PYRAMID), SIZE)
            assert could_cover.sum(axis=1).max(initial=0) < min_proposals


@pytest.mark.parametrize(("min_proposals", "num_chips"), [(5, 1), (6, 0)])
def test_an_image_without_objects_has_negative_chips(min_proposals: int, num_chips: int) -> None:
    proposals = one_image(200, 200, np.array([[10.0, 10, 20, 20]]) + np.arange(5)[:, None])
    positives = positives_of(one_image(200, 200, np.zeros((0, 4))))
    assert len(positives) == 0
    negatives = negatives_of(positives, proposals, NegativeSpec(min_proposals=(min_proposals,)))
    assert len(negatives) == num_chips


@pytest.fixture(scope="module")
def mixed() -> ChipTable:
    """Positive and negative chips of six images."""
    objects = build_world(1, num_images=6)
    positives = positives_of(objects)
    negatives = negatives_of(positives, build_proposals(objects, 2), NegativeSpec(min_proposals=(1,)))
    assert min(len(positives), len(negatives)) > 0
    return positives.merge(negatives)


def draw(
    table: ChipTable,
    *,
    per_image: int | None = 2,
    dose: float | None = None,
    masses: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return draw_negatives(table, per_image=per_image, dose=dose, masses=masses, generator=generator)


def one_positive_and(num_negatives: int) -> ChipTable:
    """Return a table of one image, whose negative chips are told apart by their left edges."""
    positives = positives_of(build_world(1, num_images=1)).select(np.array([0]))
    pool = dataclasses.replace(
        positives.select(np.zeros(num_negatives, dtype=np.int64)),
        x=np.arange(num_negatives),
        is_negative=np.ones(num_negatives, dtype=np.bool_),
    )
    return positives.merge(pool)


@pytest.mark.parametrize("per_image", [0, 1, 2, 100])
def test_all_positive_and_some_negative_chips_of_each_image_are_drawn(
    mixed: ChipTable, per_image: int
) -> None:
    drawn = draw(mixed, per_image=per_image)
    assert (np.diff(drawn) > 0).all()
    assert np.isin(np.flatnonzero(~mixed.is_negative), drawn).all()
    pool = np.bincount(mixed.image_indices[mixed.is_negative], minlength=6)
    assert pool.max() > 2
    negatives = drawn[mixed.is_negative[drawn]]
    num_drawn = np.bincount(mixed.image_indices[negatives], minlength=6)
    np.testing.assert_array_equal(num_drawn, np.minimum(pool, per_image))


def test_equal_seeds_draw_equal_negative_chips(mixed: ChipTable) -> None:
    np.testing.assert_array_equal(draw(mixed), draw(mixed))
    assert draw(mixed, seed=1).tolist() != draw(mixed).tolist()


def test_negative_chips_are_drawn_uniformly() -> None:
    table = one_positive_and(8)
    counts = np.zeros(8)
    for seed in range(800):
        drawn = draw(table, seed=seed)
        counts[table.x[drawn[table.is_negative[drawn]]]] += 1
    assert counts.sum() == 1600
    assert counts.min() > 140


@pytest.mark.parametrize(
    ("dose", "per_image", "num_drawn"),
    [(None, None, 100), (None, 3, 3), (0.0, None, 0), (0.99, None, 0), (2.5, None, 2), (9.0, 4, 4)],
)
def test_the_dose_is_a_share_of_the_positive_chips(
    dose: float | None, per_image: int | None, num_drawn: int
) -> None:
    drawn = draw(one_positive_and(100), dose=dose, per_image=per_image)
    assert len(drawn) == 1 + num_drawn
    assert len(np.unique(drawn)) == len(drawn)


def test_negative_chips_are_drawn_in_proportion_to_their_mass() -> None:
    table = one_positive_and(3)
    masses = np.array([0.0, 1.0, 2.0, 5.0])  # the first is of the positive chip
    counts = np.zeros(4)
    for seed in range(4000):
        counts += np.bincount(draw(table, dose=1.0, masses=masses, seed=seed), minlength=4)
    assert counts[0] == 4000
    assert draw(table, dose=2.0, masses=np.array([0, 0, 3.0, 0])).tolist()[1:] in ([1, 2], [2, 3])
    np.testing.assert_allclose(counts[1:] / 4000, masses[1:] / 8, atol=0.03)


@given(scenes(), rules)
def test_every_false_alarm_is_covered_by_a_chip_or_excluded(
    scene: tuple[ImageBoxes, ImageBoxes], rule: Rule
) -> None:
    objects, boxes = scene
    positives = positives_of(objects)
    alarms = ScoredBoxes(images=boxes, scores=np.full(len(boxes.boxes), 0.5))
    negatives, masses = choose_on_alarms(
        positives,
        alarms,
        NegativeSpec(source="self", rule=rule),
        pyramid=SMALL_PYRAMID,
        generator=np.random.default_rng(0),
    )
    assert negatives.is_negative.all()
    flags = is_uncovered(boxes, positives, rule=rule)
    visibility, _ = chip_visibility(negatives, boxes)
    for index, level in enumerate(SMALL_PYRAMID.levels):
        is_left = flags[:, index] & level.valid_range.contains(boxes.boxes)
        could = is_coverable(level, boxes, chip_size=SIZE, stride=SMALL_PYRAMID.stride)
        assert (visibility[is_left & could, index] == Visibility.WHOLE).all()
        assert masses[negatives.level == index].sum() == pytest.approx(0.5 * (is_left & could).sum())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dose": -0.1}, "dose"),
        ({"dose": "some"}, "dose"),
        ({"source": "mined"}, "source\n  Input should be 'none', 'self' or 'rpn'"),
        ({"min_proposals": ()}, "min_proposals\n  Tuple should have at least 1 item"),
        ({"min_proposals": (0,)}, r"min_proposals\.0\n  Input should be greater than 0"),
        ({"per_image": -1}, "per_image\n  Input should be greater than or equal to 0"),
    ],
)
def test_an_invalid_spec_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NegativeSpec(**values)  # type: ignore[arg-type]


def background_of(positives: ChipTable, objects: ImageBoxes, count: int) -> ChipTable:
    generator = np.random.default_rng(0)
    return choose_background(positives, objects, pyramid=SMALL_PYRAMID, count=count, generator=generator)


@given(scenes(), st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_background_shows_no_box_and_is_drawn_once(scene: tuple[ImageBoxes, ImageBoxes], count: int) -> None:
    objects, _ = scene
    positives = positives_of(objects)
    chosen, again = background_of(positives, objects, count), background_of(positives, objects, count)
    assert len(chosen) <= count
    assert chosen.is_negative.all()
    _, num_boxes = chip_visibility(chosen, objects)
    assert not num_boxes.any()
    columns = [chosen.image_indices, chosen.level, chosen.x, chosen.y]
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(set(rows)) == len(rows)
    assert (np.diff(chosen.image_indices) >= 0).all()
    assert (again.x == chosen.x).all()
    for index in range(len(chosen)):
        chip = chosen.chip(index)
        assert min(chip.visible) > 0
        assert min(chip.x, chip.y) >= 0


def test_background_comes_from_images_without_objects_too() -> None:
    images = ImageBoxes(
        widths=np.array([300, 300]),
        heights=np.array([300, 300]),
        offsets=np.array([0, 1, 1]),
        boxes=np.array([[10.0, 10.0, 30.0, 30.0]]),
        is_required=np.array([True]),
    )
    chosen = background_of(positives_of(images), images, 20)
    assert len(chosen) == 20
    assert 1 in chosen.image_indices
    assert len(background_of(positives_of(images), images, 0)) == 0
    empty = boxes_of_none(images)
    assert len(background_of(positives_of(empty), empty, 5)) == 0


def boxes_of_none(images: ImageBoxes) -> ImageBoxes:
    return dataclasses.replace(
        images, offsets=np.zeros(3, dtype=int), boxes=np.zeros((0, 4)), is_required=np.zeros(0, dtype=bool)
    )
