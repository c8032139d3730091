"""Box arithmetic against torchvision, and its invariants."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.ops import box_iou

from sniper.geometry import boxes as b


def boxes_of(count: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    """Draw (n, 4) xyxy boxes with whole corners from 0 to 100 and sides of at least 1."""

    def build(corners: np.ndarray) -> np.ndarray:
        low, sides = corners[:, :2], corners[:, 2:] % 40 + 1
        return np.concatenate([low, low + sides], axis=1).astype(np.float64)

    shape = count.map(lambda n: (n, 4))
    return shape.flatmap(lambda s: hnp.arrays(np.int64, s, elements=st.integers(0, 60))).map(build)


@given(boxes_of(st.integers(0, 8)), boxes_of(st.integers(0, 8)))
def test_iou_is_torchvisions(boxes: np.ndarray, others: np.ndarray) -> None:
    expected = box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy()
    np.testing.assert_allclose(b.iou(boxes, others), expected, atol=1e-12)


@given(boxes_of(st.integers(0, 8)))
def test_xywh_and_back_is_the_same(boxes: np.ndarray) -> None:
    np.testing.assert_array_equal(b.from_xywh(b.to_xywh(boxes)), boxes)


@given(boxes_of(st.integers(0, 8)))
def test_clipped_boxes_are_inside_and_clip_to_themselves(boxes: np.ndarray) -> None:
    clipped = b.clip(boxes, width=30, height=20)
    np.testing.assert_array_equal(b.clip(clipped, width=30, height=20), clipped)
    assert b.is_inside(clipped, np.array([[0.0, 0.0, 30.0, 20.0]])).all()


@given(boxes_of(st.integers(1, 8)), boxes_of(st.integers(1, 8)))
def test_a_box_is_inside_where_the_intersection_is_all_of_it(boxes: np.ndarray, others: np.ndarray) -> None:
    is_whole = b.intersections(boxes, others) == b.area(boxes)[:, None]
    np.testing.assert_array_equal(b.is_inside(boxes, others), is_whole)


def test_boxes_without_area_overlap_nothing() -> None:
    point = np.array([[5.0, 5.0, 5.0, 5.0]])
    assert b.iou(point, point).tolist() == [[0.0]]
    assert b.size(point).tolist() == [0.0]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
def test_ragged_rows_are_those_of_each_group(counts: list[int], data: st.DataObject) -> None:
    offsets = np.concatenate([[0], np.cumsum(counts)])
    groups = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=6))
    selected, rows = b.ragged_rows(offsets, np.array(groups, dtype=np.int64))
    expected = [list(range(offsets[group], offsets[group + 1])) for group in groups]
    assert np.diff(selected).tolist() == [len(group) for group in expected]
    assert rows.tolist() == [row for group in expected for row in group]


def test_sides_are_width_first_and_reversed_for_torch() -> None:
    sides = b.Sides(width=40, height=30)
    assert sides == (40, 30)
    assert sides.hw == (30, 40)
