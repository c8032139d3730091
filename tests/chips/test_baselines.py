"""Whole images and tiles, against looking at every pixel and every box."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import LevelSpec
from sniper.chips.baselines import TileSpec, WholeSpec, num_tiles, tiles, whole_images
from sniper.geometry.boxes import area, size
from tests.chips.worlds import boxes_of, build_world, one_image, worlds

SNIP = WholeSpec(
    levels=(
        LevelSpec(factor=2.0, below=24),
        LevelSpec(factor=1.0, at_least=16, below=40),
        LevelSpec(long_side=64, at_least=32),
    )
)


@given(
    st.integers(0, 10_000).map(build_world),
    st.integers(24, 90),
    st.floats(0, 0.8),
    st.sampled_from([0.5, 1.0, 1.7]),
)
def test_tiles_show_every_pixel_and_overlap_as_asked(
    world: Any, side: int, overlap: float, factor: float
) -> None:
    spec = TileSpec(side=side, overlap=overlap, factor=factor)
    table = tiles(spec, world)
    assert np.bincount(table.image_indices, minlength=len(world)).tolist() == num_tiles(spec, world).tolist()
    for image in range(len(world)):
        own = [table.chip(i) for i in np.flatnonzero(table.image_indices == image).tolist()]
        level = own[0].level
        for starts, length in (
            ({chip.x for chip in own}, level.width),
            ({chip.y for chip in own}, level.height),
        ):
            ordered = sorted(starts)
            assert ordered[0] == 0
            assert ordered[-1] == max(length - side, 0)
            assert all(0 < after - before <= spec.stride for before, after in itertools.pairwise(ordered))
        assert len({(chip.x, chip.y) for chip in own}) == len(own)


@given(worlds, st.integers(32, 90), st.floats(0, 0.9))
def test_tiles_are_dropped_where_no_box_has_enough_of_itself_left(
    world: Any, side: int, share: float
) -> None:
    kept = tiles(TileSpec(side=side, empty="drop", min_visibility=share), world)
    everything = tiles(TileSpec(side=side), world)
    wanted = []
    for i in range(len(everything)):
        image = int(everything.image_indices[i])
        boxes = boxes_of(world, image)
        window = everything.chip(i).window
        seen = np.maximum(np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2]), 0)
        left = seen.prod(axis=1)
        if ((left > 0) & (left >= share * area(boxes))).any():
            wanted.append((image, window[0], window[1]))
    assert [(i, x, y) for i, x, y in zip(kept.image_indices, kept.x, kept.y, strict=True)] == wanted


@given(worlds)
def test_an_image_is_learnt_from_at_the_levels_where_it_has_a_valid_box(world: Any) -> None:
    table = whole_images(SNIP, world)
    found = set(zip(table.image_indices.tolist(), table.level.tolist(), strict=True))
    wanted = {
        (image, index)
        for image in range(len(world))
        for index, level in enumerate(SNIP.levels)
        if (
            (size(boxes_of(world, image)) >= level.at_least) & (size(boxes_of(world, image)) < level.below)
        ).any()
    }
    assert found == wanted
    assert len(found) == len(table)
    for i in range(len(table)):
        chip = table.chip(i)
        assert (chip.x, chip.y, chip.width, chip.height) == (0, 0, chip.level.width, chip.level.height)


def test_crowds_alone_give_no_whole_image() -> None:
    world = one_image(100, 80, np.array([[10.0, 10.0, 30.0, 30.0]]))
    assert len(whole_images(WholeSpec(), world)) == 1
    crowd = type(world)(**{**vars(world), "is_wanted": np.array([False])})
    assert len(whole_images(WholeSpec(), crowd)) == 0


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (WholeSpec, {"levels": ()}, "levels\n  Tuple should have at least 1 item"),
        (WholeSpec, {"batch_megapixels": 0.0}, "batch_megapixels\n  Input should be greater than 0"),
        (WholeSpec, {"batch_megapixels": math.inf}, "batch_megapixels\n  Input should be a finite number"),
        (TileSpec, {"side": 0}, "side\n  Input should be greater than 0"),
        (TileSpec, {"overlap": 1.0}, "overlap\n  Input should be less than or equal to 0.9"),
        (
            WholeSpec,
            {"levels": (LevelSpec(factor=3.0, below=80),)},
            "no level learns from boxes of size 80 and above",
        ),
        (TileSpec, {"min_visibility": -0.1}, "min_visibility\n  Input should be greater than or equal to 0"),
        (TileSpec, {"factor": 0.0}, "factor\n  Input should be greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(kind: Any, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kind(**fields)
