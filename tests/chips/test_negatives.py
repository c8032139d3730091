"""Negative chips: only where enough proposals are left over, and no more of them than are wanted."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import ChipTable, ImageBoxes
from sniper.chips.cover import cover
from sniper.chips.negatives import NegativeSpec, choose_negatives, draw_negatives, leftovers
from sniper.geometry.boxes import intersections
from tests.chips.test_cover import chips_of, coverage, windows_of
from tests.chips.worlds import SMALL_PYRAMID, boxes_of, build_world

SIZE = SMALL_PYRAMID.chip_size


@st.composite
def scenes(draw: st.DrawFn) -> tuple[ImageBoxes, ImageBoxes]:
    """Images with objects, and many proposals in the same images; some images have no object."""
    seed = draw(st.integers(0, 100_000))
    objects = build_world(seed, num_images=3, most_boxes=4, longest=200)
    rng = np.random.default_rng(seed + 1)
    counts = rng.integers(0, 60, 3)
    sides = np.stack([objects.widths, objects.heights], axis=1).repeat(counts, axis=0)
    extents = np.minimum(rng.uniform(2, 40, (counts.sum(), 2)), sides)
    low = rng.uniform(0, 1, extents.shape) * (sides - extents)
    return objects, dataclasses.replace(
        objects,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.concatenate([low, low + extents], axis=1),
        is_wanted=np.ones(counts.sum(), dtype=bool),
    )


def positives_of(objects: ImageBoxes) -> ChipTable:
    return cover(SMALL_PYRAMID, objects, generator=np.random.default_rng(0))


def negatives_of(
    positives: ChipTable, proposals: ImageBoxes, spec: NegativeSpec, *, seed: int = 0
) -> ChipTable:
    generator = np.random.default_rng(seed)
    return choose_negatives(positives, proposals, spec, pyramid=SMALL_PYRAMID, generator=generator)


@given(scenes(), st.sampled_from(["cover", "overlap"]), st.integers(1, 6))
def test_each_negative_chip_adds_enough_leftovers_until_no_window_does(
    scene: tuple[ImageBoxes, ImageBoxes], rule: str, least: int
) -> None:
    objects, proposals = scene
    positives = positives_of(objects)
    spec = NegativeSpec(min_proposals=(least, least + 1), rule=rule)  # type: ignore[arg-type]
    found = negatives_of(positives, proposals, spec)
    for image in range(len(objects)):
        boxes = boxes_of(proposals, image)
        for level in SMALL_PYRAMID.at(width=int(objects.widths[image]), height=int(objects.heights[image])):
            taken = chips_of(positives, image, level)
            if rule == "cover":
                is_taken = coverage(boxes, level, taken, SIZE).any(axis=0)
            else:
                windows = np.concatenate([taken, taken + SIZE], axis=1).astype(float)
                is_taken = (intersections(level.to_level(boxes), windows) > 0).any(axis=1)
            wanted = least if level.index == 0 else least + 1
            remaining = boxes[level.valid_range.contains(boxes) & ~is_taken]
            chosen = coverage(
                remaining, level, chips_of(found, image, level), SIZE
            )  # none lies in a positive chip
            before = np.cumsum(chosen, axis=0) - chosen
            assert ((chosen & (before == 0)).sum(axis=1) >= wanted).all()
            uncovered = remaining[~chosen.any(axis=0)]
            every = coverage(uncovered, level, windows_of(level, SMALL_PYRAMID), SIZE)
            assert every.sum(axis=1).max(initial=0) < wanted


@given(scenes())
def test_a_proposal_inside_a_positive_chip_is_no_leftover_there(scene: tuple[ImageBoxes, ImageBoxes]) -> None:
    objects, proposals = scene
    positives = positives_of(objects)
    is_left = leftovers(positives, proposals, rule="cover")
    for image in range(len(objects)):
        own = slice(proposals.offsets[image], proposals.offsets[image + 1])
        for level in SMALL_PYRAMID.at(width=int(objects.widths[image]), height=int(objects.heights[image])):
            inside = coverage(boxes_of(proposals, image), level, chips_of(positives, image, level), SIZE).any(
                axis=0
            )
            assert not (is_left[own, level.index] & inside).any()
    stricter = leftovers(positives, proposals, rule="overlap")
    assert not (stricter & ~is_left).any()


def test_an_image_without_objects_gives_negative_chips() -> None:
    objects, proposals = ImageBoxes(
        widths=np.array([200]),
        heights=np.array([200]),
        offsets=np.array([0, 0]),
        boxes=np.zeros((0, 4)),
        is_wanted=np.zeros(0, dtype=bool),
    ), ImageBoxes(
        widths=np.array([200]),
        heights=np.array([200]),
        offsets=np.array([0, 5]),
        boxes=np.array([[10.0, 10, 20, 20]]) + np.arange(5)[:, None],
        is_wanted=np.ones(5, dtype=bool),
    )  # fmt: skip
    positives = positives_of(objects)
    assert len(positives) == 0
    for least, count in ((5, 1), (6, 0)):
        found = negatives_of(positives, proposals, NegativeSpec(min_proposals=(least,)))
        assert len(found.level) == count


def test_pool_and_positive_chips_stand_image_after_image() -> None:
    objects = build_world(1, num_images=6)
    proposals = build_world(2, num_images=6, most_boxes=40)
    proposals = dataclasses.replace(
        proposals,
        widths=objects.widths,
        heights=objects.heights,
        boxes=np.minimum(
            proposals.boxes, np.stack([objects.widths, objects.heights] * 2, 1)[proposals.image_of_box]
        ),
    )
    positives = positives_of(objects)
    found = negatives_of(positives, proposals, NegativeSpec(min_proposals=(1,)))
    table = positives.merge(found)
    assert len(table) == len(positives) + len(found.level) > len(positives)
    for name, own in (("x", positives.x), ("y", positives.y), ("level", positives.level)):
        np.testing.assert_array_equal(getattr(table, name)[~table.is_negative], own)
    np.testing.assert_array_equal(table.image_indices[~table.is_negative], positives.image_indices)
    assert (np.diff(table.image_indices) >= 0).all()

    drawn = draw_negatives(table, per_image=2, generator=np.random.default_rng(0))
    assert np.isin(np.flatnonzero(~table.is_negative), drawn).all()
    pool = np.bincount(table.image_indices[table.is_negative], minlength=6)
    kept = drawn[table.is_negative[drawn]]
    np.testing.assert_array_equal(np.bincount(table.image_indices[kept], minlength=6), np.minimum(pool, 2))
    assert pool.max() > 2
    again = [draw_negatives(table, per_image=2, generator=np.random.default_rng(seed)) for seed in (0, 1)]
    np.testing.assert_array_equal(again[0], drawn)
    assert again[1].tolist() != drawn.tolist()
    assert not table.select(
        draw_negatives(table, per_image=0, generator=np.random.default_rng(0))
    ).is_negative.any()


def test_every_negative_chip_of_the_pool_is_drawn_alike() -> None:
    objects = build_world(1, num_images=1)
    positives = positives_of(objects)
    pool = dataclasses.replace(
        positives.select(np.zeros(8, dtype=np.int64)), x=np.arange(8), is_negative=np.ones(8, dtype=np.bool_)
    )
    table = positives.merge(pool)
    counts = np.zeros(8)
    for seed in range(800):
        drawn = draw_negatives(table, per_image=2, generator=np.random.default_rng(seed))
        counts[table.x[drawn[table.is_negative[drawn]]]] += 1
    assert counts.sum() == 1600
    assert counts.min() > 140


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_proposals": ()}, "min_proposals\n  Tuple should have at least 1 item"),
        ({"min_proposals": (0,)}, r"min_proposals\.0\n  Input should be greater than 0"),
        ({"per_image": -1}, "per_image\n  Input should be greater than or equal to 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NegativeSpec(**values)  # type: ignore[arg-type]
