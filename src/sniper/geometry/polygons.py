"""Clip polygons to half-planes and windows."""

import numpy as np
from jaxtyping import Float


def clip_polygon(
    points: Float[np.ndarray, "n 2"], *, axis: int, limit: float, keeps: int
) -> Float[np.ndarray, "m 2"]:
    """Clip a polygon to a half-plane (Sutherland and Hodgman 1974).

    Where a polygon that is not convex falls into several parts, these are connected along the limit: the box around
    them is that of the clipped polygon.

    Args:
        points: (n, 2) xy of the corners, without a repeated first one. May be empty.
        axis: 0 clips at an x, 1 at a y.
        limit: the coordinate at which the half-plane ends.
        keeps: 1 keeps what is at or above the limit, -1 what is at or below it.

    Returns:
        (m, 2) corners in the same order; empty where nothing is left.

    Example:
        >>> square = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]])
        >>> clip_polygon(square, axis=0, limit=3.0, keeps=1).tolist()
        [[3.0, 0.0], [4.0, 0.0], [4.0, 4.0], [3.0, 4.0]]
    """
    distances = keeps * (points[:, axis] - limit)
    kept: list[np.ndarray] = []
    for index in range(len(points)):
        start, end = points[index - 1], points[index]
        before, after = distances[index - 1], distances[index]
        if (before < 0) != (after < 0):
            crossing = start + (end - start) * (before / (before - after))
            crossing[axis] = limit
            kept.append(crossing)
        if after >= 0:
            kept.append(end)
    return np.array(kept, dtype=np.float64).reshape(-1, 2)


def clip_to_window(
    points: Float[np.ndarray, "n 2"], window: tuple[float, float, float, float]
) -> Float[np.ndarray, "m 2"]:
    """Clip a polygon to a window; see `clip_polygon`.

    Args:
        points: (n, 2) xy of the corners, without a repeated first one. May be empty.
        window: xyxy, same frame.

    Returns:
        (m, 2) corners in the same order; empty where nothing is left.

    Example:
        >>> triangle = np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
        >>> clip_to_window(triangle, (2.0, 2.0, 9.0, 9.0)).tolist()
        [[2.0, 2.0], [6.0, 2.0], [2.0, 6.0]]
        >>> len(clip_to_window(triangle, (7.0, 7.0, 9.0, 9.0)))
        0
    """
    x1, y1, x2, y2 = window
    for axis, limit, keeps in ((0, x1, 1), (1, y1, 1), (0, x2, -1), (1, y2, -1)):
        points = clip_polygon(points, axis=axis, limit=limit, keeps=keeps)
    return points
