"""Masks as one ring each: the same points inside, by the even-odd rule."""

import numpy as np
from hypothesis import given, settings

from sniper.data.datasets.rings import to_single_rings
from sniper.geometry.boxes import Sides
from sniper.geometry.masks import MaskArrays, encode_counts
from tests.geometry.test_mask_frames import RASTERS, encoding_of, raster_of


@given(raster=RASTERS)
@settings(deadline=None)
def test_the_outline_of_pixels_is_one_ring_that_encloses_them(raster: np.ndarray) -> None:
    rings = to_single_rings(encoding_of(raster))
    height, width = raster.shape
    assert np.diff(rings.offsets).tolist() == [int(raster.any())]
    assert (raster_of(rings, Sides(width, height)) == raster).all()
    assert (rings.points == rings.points.round()).all()


def test_the_outline_of_a_rectangle_has_four_corners() -> None:
    raster = np.zeros((9, 9), dtype=np.bool_)
    raster[2:6, 1:8] = True
    (ring,) = to_single_rings(encoding_of(raster)).to_coco()[0]
    assert {tuple(point) for point in np.reshape(ring, (-1, 2)).tolist()} == {(1, 2), (8, 2), (8, 6), (1, 6)}
    assert len(ring) == 8


def test_polygons_that_lie_apart_are_joined_without_an_area() -> None:
    squares = [[[x, y], [x + 5, y], [x + 5, y + 5], [x, y + 5]] for x, y in ((0, 0), (20, 3), (9, 14))]
    masks = MaskArrays.from_rings([squares, [], squares[:1]])
    rings = to_single_rings(masks)
    assert np.diff(rings.offsets).tolist() == [1, 0, 1]
    assert (raster_of(rings, Sides(60, 60)) == raster_of(masks, Sides(60, 60))).all()
    assert rings.select(np.array([2])).to_coco() == masks.select(np.array([2])).to_coco()


def test_an_encoding_without_a_pixel_has_no_ring() -> None:
    codes, offsets = encode_counts(np.array([9]), np.array([0, 1]))
    empty = MaskArrays.from_codes(codes, offsets, np.array([[3, 3]]))
    assert not to_single_rings(empty).has_mask.any()
