"""Masks that are moved, cropped, encoded and traced, against rasters of the whole frame."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as reference

from sniper.geometry.boxes import Sides
from sniper.geometry.mask_frames import encode_masks, move_masks
from sniper.geometry.masks import MaskArrays, rasterize

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

RASTERS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12))


def encoding_of(raster: np.ndarray) -> MaskArrays:
    """Return the encoding of one mask, by pycocotools."""
    codes = reference.encode(np.asfortranarray(raster.astype(np.uint8)))["counts"]
    height, width = raster.shape
    offsets = np.array([0, len(codes)])
    return MaskArrays.from_codes(np.frombuffer(codes, np.uint8), offsets, np.array([[width, height]]))


def raster_of(masks: MaskArrays, sides: Sides, row: int = 0) -> np.ndarray:
    region = np.array([[0.0, 0.0, sides.width, sides.height]])
    return rasterize(masks, np.array([row]), region, sides=sides)[0]


def random_polygons(seed: int) -> MaskArrays:
    """Draw three objects of one or two polygons, which may cross themselves and reach beyond 40x30 pixels."""
    rng = np.random.default_rng(seed)
    return MaskArrays.from_rings(
        [
            [rng.uniform([-20, -20], [60, 50], (rng.integers(3, 8), 2)) for _ in range(count)]
            for count in (1, 2, 1)
        ]
    )


@given(raster=RASTERS)
@settings(deadline=None)
def test_an_encoding_of_polygons_is_that_of_pycocotools(raster: np.ndarray) -> None:
    encoded = encoding_of(raster)
    height, width = raster.shape
    again = encode_masks(encoded.to_polygons(), np.array([[width, height]]))
    if raster.any():
        assert again.to_coco() == encoded.to_coco()
    else:
        assert not again.has_mask.any()  # no rectangle is left of an empty mask


@pytest.mark.parametrize("seed", range(4))
def test_a_pixel_of_an_encoding_is_set_if_its_centre_is_in_the_polygons(seed: int) -> None:
    sides = Sides(40, 30)
    masks = random_polygons(seed)
    encoded = encode_masks(masks, np.array([sides] * 3))
    for row, mask in enumerate(encoded.to_coco()):
        decoded = reference.decode({**mask, "counts": mask["counts"].encode()})
        assert (decoded == raster_of(masks, sides, row)).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_moved_mask_is_the_crop_of_the_moved_raster(seed: int) -> None:
    """The frame shows 20x16 pixels of another of twice the scale, from its pixel (13, 9) on."""
    whole, shown = Sides(80, 60), Sides(20, 16)
    polygons = random_polygons(seed)
    rng = np.random.default_rng(seed)
    encodings = [encoding_of(rng.random((30, 40)) < 0.5) for _ in range(2)]
    masks = MaskArrays.concatenate([encodings[0], polygons, encodings[1]])
    moved = move_masks(masks, lambda boxes: 2 * boxes - [13, 9, 13, 9], sides=shown)
    assert moved.is_encoded.tolist() == [True, False, False, False, True]
    assert moved.sides[[0, 4]].tolist() == [[20, 16]] * 2
    doubled = masks.to_polygons()
    doubled = doubled.with_points(2 * doubled.points)
    for row in range(len(masks)):
        expected = raster_of(doubled, whole, row)[9:25, 13:33]
        assert (raster_of(moved, shown, row) == expected).all()
    bounds = moved.bounds()[moved.has_mask]
    assert (bounds[:, :2] >= 0).all()
    assert (bounds[:, 2:] <= [20, 16]).all()


def test_a_mask_that_the_frame_does_not_show_is_none() -> None:
    raster = np.zeros((8, 8), dtype=np.bool_)
    raster[:, 7] = True
    away = [[[100.0, 0], [120, 0], [120, 9]]]
    masks = MaskArrays.concatenate([encoding_of(raster), MaskArrays.from_rings([away, []])])
    assert not move_masks(masks, lambda boxes: boxes, sides=Sides(7, 8)).has_mask.any()


def test_encodings_of_nothing_are_none() -> None:
    assert len(encode_masks(MaskArrays.none(), np.zeros((0, 2), np.int64))) == 0
    assert not encode_masks(MaskArrays.none(2), np.array([[3, 3]] * 2)).has_mask.any()
