"""Masks as one ring for each object, as formats have them that write a polygon in a line."""

import cv2
import numpy as np
from jaxtyping import Bool, Float

from sniper.geometry.mask_frames import rasters_in_boxes
from sniper.geometry.masks import MaskArrays


def to_single_rings(masks: MaskArrays) -> MaskArrays:
    """Return each mask as a single ring: its parts and its holes are connected by bridges without a width.

    By the even-odd rule the ring encloses the same points, except those where two polygons of an object overlap, which
    it leaves out. Run-length encodings become the outlines of their pixels.

    Args:
        masks: of n objects.

    Example:
        >>> masks = MaskArrays.from_rings([[[[0, 0], [1, 0], [1, 1]], [[3, 0], [4, 0], [4, 1]]]])
        >>> to_single_rings(masks).to_coco()[0]
        [[0.0, 0.0, 1.0, 0.0, 3.0, 0.0, 4.0, 0.0, 4.0, 1.0, 3.0, 0.0, 1.0, 0.0, 1.0, 1.0]]
    """
    rows = np.flatnonzero(masks.is_encoded)
    encoded = masks.select(rows)
    traced = rasters_in_boxes(encoded.to_polygons(), encoded.sides)
    outlines = dict(zip(rows.tolist(), traced, strict=True))
    rings: list[list[np.ndarray]] = []
    for row in range(len(masks)):
        parts = _trace(*outlines.pop(row)) if row in outlines else list(masks.rings_of(row))
        rings.append([_connect(parts)] if parts else [])
    return MaskArrays.from_rings(rings)


def _trace(raster: Bool[np.ndarray, "h w"], x: int, y: int) -> list[Float[np.ndarray, "_ 2"]]:
    """Return the outlines of the pixels of a raster, holes among them, given the place of its corner."""
    if not raster.any():
        return []
    # Each pixel is four; the nearest corner of the pixel that a fourth lies at is a corner of the outline.
    fourths = np.repeat(np.repeat(raster.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, _ = cv2.findContours(fourths, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = []
    for contour in contours:
        corners = (contour[:, 0] + 1) // 2
        corners = corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]
        before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
        is_turn = (np.sign(before) != np.sign(after)).any(axis=1)
        rings.append(corners[is_turn] + np.array([float(x), float(y)]))
    return rings


def _connect(rings: list[Float[np.ndarray, "_ 2"]]) -> Float[np.ndarray, "q 2"]:
    """Join rings to one, each by a bridge there and back between corners that are near each other."""
    joined = rings[0]
    for ring in rings[1:]:
        j = _nearest(ring, joined[_nearest(joined, ring[0])])
        i = _nearest(joined, ring[j])
        joined = np.concatenate([joined[: i + 1], ring[j:], ring[: j + 1], joined[i:]])
    return joined


def _nearest(points: Float[np.ndarray, "p 2"], point: Float[np.ndarray, "2"]) -> int:
    return int(((points - point) ** 2).sum(axis=1).argmin())
