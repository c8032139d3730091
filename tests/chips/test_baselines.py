"""Whole images and tiles, against brute force."""

import dataclasses
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
def test_tiles_show_every_pixel_and_overlap_as_specified(
    world: Any, side: int, overlap: float, factor: float
) -> None:
    spec = TileSpec(side=side, overlap=overlap, factor=factor)
    table = tiles(spec, world)
    assert np.bincount(table.image_indices, minlength=len(world)).tolist() == num_tiles(spec, world).tolist()
    for image in range(len(world)):
        indices = np.flatnonzero(table.image_indices == image)
        level = table.chip(int(indices[0])).level
        corners = set(zip(table.x[indices].tolist(), table.y[indices].tolist(), strict=True))
        xs, ys = (sorted(set(starts)) for starts in zip(*corners, strict=True))
        for starts, length in ((xs, level.width), (ys, level.height)):
            assert starts[0] == 0
            assert starts[-1] == max(length - side, 0)
            assert all(after - before <= spec.stride for before, after in itertools.pairwise(starts))
        assert len(corners) == len(indices) == len(xs) * len(ys)


@given(worlds, st.integers(32, 90), st.floats(0, 0.9))
def test_tiles_that_show_too_little_of_every_box_are_dropped(world: Any, side: int, share: float) -> None:
    kept = tiles(TileSpec(side=side, empty="drop", min_visibility=share), world)
    every = tiles(TileSpec(side=side), world)
    expected = []
    for i in range(len(every)):
        image = int(every.image_indices[i])
        boxes = boxes_of(world, image)
        window = every.chip(i).window
        sides = np.maximum(np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2]), 0)
        shown = sides.prod(axis=1)
        if ((shown > 0) & (shown >= share * area(boxes))).any():
            expected.append((image, window[0], window[1]))
    assert [(i, x, y) for i, x, y in zip(kept.image_indices, kept.x, kept.y, strict=True)] == expected


@given(worlds)
def test_an_image_is_used_at_levels_where_it_has_valid_boxes(world: Any) -> None:
    table = whole_images(SNIP, world)
    sizes = [size(boxes_of(world, image)) for image in range(len(world))]
    assert list(zip(table.level.tolist(), table.image_indices.tolist(), strict=True)) == [
        (index, image)
        for index, level in enumerate(SNIP.levels)
        for image in range(len(world))
        if ((sizes[image] >= level.at_least) & (sizes[image] < level.below)).any()
    ]
    for i in range(len(table)):
        chip = table.chip(i)
        assert (chip.x, chip.y, chip.width, chip.height) == (0, 0, chip.level.width, chip.level.height)


def test_an_image_with_only_crowds_is_not_used() -> None:
    world = one_image(100, 80, np.array([[10.0, 10.0, 30.0, 30.0]]))
    assert len(whole_images(WholeSpec(), world)) == 1
    crowd = dataclasses.replace(world, is_required=np.array([False]))
    assert len(whole_images(WholeSpec(), crowd)) == 0


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (WholeSpec, {"levels": ()}, "levels\n  Tuple should have at least 1 item"),
        (WholeSpec, {"batch_megapixels": 0.0}, "batch_megapixels\n  Input should be greater than 0"),
        (WholeSpec, {"batch_megapixels": math.inf}, "batch_megapixels\n  Input should be a finite number"),
        (TileSpec, {"side": 0}, "side\n  Input should be greater than 0"),
        (TileSpec, {"overlap": 1.0}, "overlap\n  Input should be less than or equal to 0.9"),
        (
            WholeSpec,
            {"levels": (LevelSpec(factor=3.0, below=80),)},
            "boxes of size 80 and above are in no level",
        ),
        (TileSpec, {"min_visibility": -0.1}, "min_visibility\n  Input should be greater than or equal to 0"),
        (TileSpec, {"factor": 0.0}, "factor\n  Input should be greater than 0"),
    ],
)
def test_an_invalid_spec_is_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)
