"""The arithmetic of boxes against torchvision, and its laws."""

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
def test_iou_is_torchvisions(ones: np.ndarray, others: np.ndarray) -> None:
    expected = box_iou(torch.from_numpy(ones), torch.from_numpy(others)).numpy()
    np.testing.assert_allclose(b.iou(ones, others), expected, atol=1e-12)


@given(boxes_of(st.integers(0, 8)))
def test_xywh_and_back_is_the_same(ones: np.ndarray) -> None:
    np.testing.assert_array_equal(b.from_xywh(b.to_xywh(ones)), ones)


@given(boxes_of(st.integers(0, 8)))
def test_clipping_twice_is_clipping_once_and_leaves_nothing_outside(ones: np.ndarray) -> None:
    clipped = b.clip(ones, width=30, height=20)
    np.testing.assert_array_equal(b.clip(clipped, width=30, height=20), clipped)
    assert b.is_inside(clipped, np.array([[0.0, 0.0, 30.0, 20.0]])).all()


@given(boxes_of(st.integers(1, 8)), boxes_of(st.integers(1, 8)))
def test_a_box_is_inside_where_it_shares_all_its_area(ones: np.ndarray, others: np.ndarray) -> None:
    shares_all = b.intersections(ones, others) == b.area(ones)[:, None]
    np.testing.assert_array_equal(b.is_inside(ones, others), shares_all)


def test_boxes_without_area_overlap_nothing() -> None:
    point = np.array([[5.0, 5.0, 5.0, 5.0]])
    assert b.iou(point, point).tolist() == [[0.0]]
    assert b.size(point).tolist() == [0.0]
