"""Arithmetic of boxes: formats, area, size, clipping and overlaps.

A box is `(x1, y1, x2, y2)`, continuous: its width is `x2 - x1`. Every function takes `(0, 4)` too.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Sides(NamedTuple):
    """Width and height of an image, a level or a window, in pixels of its frame.

    Everything outside torch uses this order; a pair that torch wants as (height, width) is named `hw`.
    """

    width: int
    height: int

    @property
    def hw(self) -> tuple[int, int]:
        """The sides in torch's order."""
        return self.height, self.width


def empty_boxes() -> Float[np.ndarray, "0 4"]:
    """Return an array of no boxes."""
    return np.zeros((0, 4), dtype=np.float64)


def from_xywh(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Convert COCO's xywh boxes to xyxy.

    Args:
        boxes: (n, 4) xywh, any frame. May be empty.

    Returns:
        (n, 4) xyxy, same frame.

    Example:
        >>> from_xywh(np.array([[10.0, 20.0, 30.0, 40.0]])).tolist()
        [[10.0, 20.0, 40.0, 60.0]]
    """
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def to_xywh(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Convert xyxy boxes to COCO's xywh.

    Args:
        boxes: (n, 4) xyxy, any frame. May be empty.

    Returns:
        (n, 4) xywh, same frame.

    Example:
        >>> to_xywh(np.array([[10.0, 20.0, 40.0, 60.0]])).tolist()
        [[10.0, 20.0, 30.0, 40.0]]
    """
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def area(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Compute the area of each box.

    Args:
        boxes: (n, 4) xyxy, any frame. May be empty.

    Returns:
        (n,) areas in square pixels of that frame.

    Example:
        >>> area(np.array([[0.0, 0.0, 2.0, 3.0]])).tolist()
        [6.0]
    """
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def size(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Compute the size of each box: the square root of its area (SNIPER §3.2).

    Args:
        boxes: (n, 4) xyxy, any frame. May be empty.

    Returns:
        (n,) sizes in pixels of that frame.

    Example:
        >>> size(np.array([[0.0, 0.0, 2.0, 8.0]])).tolist()
        [4.0]
    """
    return np.sqrt(np.maximum(area(boxes), 0.0))


def clip(boxes: Float[np.ndarray, "n 4"], *, width: float, height: float) -> Float[np.ndarray, "n 4"]:
    """Clip boxes to a frame from (0, 0) to (width, height).

    Args:
        boxes: (n, 4) xyxy, the frame's pixels. May be empty.
        width: of the frame, pixels.
        height: of the frame, pixels.

    Returns:
        (n, 4) xyxy; a box outside the frame ends up without area.

    Example:
        >>> clip(np.array([[-5.0, 2.0, 20.0, 30.0]]), width=10, height=10).tolist()
        [[0.0, 2.0, 10.0, 10.0]]
    """
    return np.clip(boxes, 0.0, np.array([width, height, width, height], dtype=boxes.dtype))


def intersections(
    boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n m"]:
    """Compute the intersection area of every pair of boxes.

    Args:
        boxes: (n, 4) xyxy. May be empty.
        others: (m, 4) xyxy, same frame. May be empty.

    Returns:
        (n, m) areas in square pixels.

    Example:
        >>> intersections(np.array([[0.0, 0.0, 4.0, 4.0]]), np.array([[2.0, 2.0, 9.0, 9.0]])).tolist()
        [[4.0]]
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])  # (n, m, 2)
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])  # (n, m, 2)
    sides = np.maximum(high - low, 0.0)
    return sides[..., 0] * sides[..., 1]


def iou(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Compute the intersection over union of every pair of boxes.

    Args:
        boxes: (n, 4) xyxy. May be empty.
        others: (m, 4) xyxy, same frame. May be empty.

    Returns:
        (n, m) values from 0 to 1; 0 where neither box has an area.

    Example:
        >>> iou(np.array([[0.0, 0.0, 2.0, 2.0]]), np.array([[0.0, 0.0, 2.0, 4.0]])).tolist()
        [[0.5]]
    """
    shared = intersections(boxes, others)
    union = area(boxes)[:, None] + area(others)[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def is_inside(boxes: Float[np.ndarray, "n 4"], windows: Float[np.ndarray, "m 4"]) -> Bool[np.ndarray, "n m"]:
    """Check which boxes lie wholly inside which windows; shared borders count as inside.

    Args:
        boxes: (n, 4) xyxy. May be empty.
        windows: (m, 4) xyxy, same frame. May be empty.

    Returns:
        (n, m) one flag for each pair.

    Example:
        >>> is_inside(np.array([[0.0, 0.0, 4.0, 4.0]]), np.array([[0.0, 0.0, 4.0, 9.0], [1.0, 0.0, 9.0, 9.0]])).tolist()
        [[True, False]]
    """
    low = (boxes[:, None, :2] >= windows[None, :, :2]).all(axis=2)
    high = (boxes[:, None, 2:] <= windows[None, :, 2:]).all(axis=2)
    return np.logical_and(low, high)


def ragged_rows(
    offsets: Int[np.ndarray, " m_plus_1"], indices: Int[np.ndarray, " k"]
) -> tuple[Int[np.ndarray, " k_plus_1"], Int[np.ndarray, " r"]]:
    """Return the rows of a flat array that belong to some of its groups.

    The rows of group `i`, such as the boxes of image `i`, are `offsets[i]` up to `offsets[i + 1]`.

    Args:
        offsets: (m + 1,) where the rows of each group begin.
        indices: (k,) the groups, in any order. May be empty.

    Returns:
        (k + 1,) offsets of the selected groups, and (r,) their rows.

    Example:
        >>> offsets, rows = ragged_rows(np.array([0, 2, 2, 5]), np.array([2, 0]))
        >>> offsets.tolist(), rows.tolist()
        ([0, 3, 5], [2, 3, 4, 0, 1])
    """
    counts = np.diff(offsets)[indices]
    selected = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.arange(selected[-1]) + np.repeat(offsets[indices] - selected[:-1], counts)
    return selected, rows
