"""Selections of images with their boxes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips import ImageBoxes
from tests.chips.worlds import boxes_of, worlds


@given(worlds, st.lists(st.integers(0, 2), max_size=5))
def test_a_selection_has_the_boxes_of_its_images_in_order(world: ImageBoxes, indices: list[int]) -> None:
    selection = world.select(np.array(indices, dtype=np.int64))
    assert selection.widths.tolist() == world.widths[indices].tolist()
    for position, image in enumerate(indices):
        np.testing.assert_array_equal(boxes_of(selection, position), boxes_of(world, image))
    assert len(selection.boxes) == selection.offsets[-1]
