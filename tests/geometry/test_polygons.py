"""Clipped polygons, compared with OpenCV's intersections of convex ones."""

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.geometry.polygons import clip_to_window

WINDOW = (0.0, 0.0, 40.0, 30.0)
CORNERS = np.array([[0, 0], [40, 0], [40, 30], [0, 30]], dtype=np.float32)


@settings(deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(-30, 70), st.integers(-30, 60)), min_size=3, max_size=8),
    is_reversed=st.booleans(),
)
def test_convex_polygons_are_clipped_as_by_opencv(points: list[tuple[int, int]], is_reversed: bool) -> None:
    hull = cv2.convexHull(np.array(points, dtype=np.float32))[:, 0]
    polygon = hull[::-1] if is_reversed else hull
    clipped = clip_to_window(polygon.astype(np.float64), WINDOW)
    expected = 0.0 if len(hull) < 3 else cv2.intersectConvexConvex(hull, CORNERS)[0]
    area = cv2.contourArea(clipped.astype(np.float32)) if len(clipped) else 0.0
    np.testing.assert_allclose(area, expected, atol=0.01)


def test_the_parts_of_a_polygon_keep_their_envelope() -> None:
    """A U whose base is above the window: the envelope is that of its two legs."""
    u = np.array([[5, -9], [35, -9], [35, 20], [30, 20], [30, -5], [10, -5], [10, 10], [5, 10]], dtype=float)
    clipped = clip_to_window(u, WINDOW)
    assert [*clipped.min(axis=0), *clipped.max(axis=0)] == [5, 0, 35, 20]


def test_a_polygon_beside_the_window_has_nothing_left() -> None:
    assert clip_to_window(np.array([[-9.0, 31.0], [41.0, 31.0], [41.0, 50.0]]), WINDOW).shape == (0, 2)
    assert clip_to_window(np.zeros((0, 2)), WINDOW).shape == (0, 2)
