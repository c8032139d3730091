"""Flat arrays of masks, their rasters and their encodings, against pycocotools and brute force."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Bool
from pycocotools import mask as reference

from sniper.geometry.boxes import Sides
from sniper.geometry.masks import MaskArrays, encode_counts, rasterize

SQUARE = [[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]]


def encoded(raster: Bool[np.ndarray, "h w"]) -> MaskArrays:
    """Return one object with the run-length encoding of a raster, by our encoder."""
    pixels = np.concatenate([[False], raster.T.ravel(), [False]])
    changes = np.flatnonzero(np.diff(pixels))
    counts = np.diff(np.unique([0, *changes, raster.size]))
    counts = np.concatenate([np.zeros(int(pixels[1]), np.int64), counts])
    codes, offsets = encode_counts(counts, np.array([0, len(counts)]))
    height, width = raster.shape
    return MaskArrays.from_codes(codes, offsets, np.array([[width, height]]))


def whole(raster: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """Return the arguments that rasterise one object at the sides of a raster."""
    height, width = raster.shape
    return {
        "rows": np.array([0]),
        "regions": np.array([[0.0, 0.0, width, height]]),
        "sides": Sides(width, height),
    }


@st.composite
def rasters(draw: st.DrawFn) -> Bool[np.ndarray, "h w"]:
    """Draw a raster of up to 12 x 12, with many or few cells set."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    set_cells: Bool[np.ndarray, "h w"] = generator.random((height, width)) < draw(
        st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
    )
    return set_cells


@st.composite
def polygons(draw: st.DrawFn) -> list[np.ndarray]:
    """Draw the rings of one object, which may cross themselves and each other, and reach out of 20 x 20."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = draw(st.lists(st.integers(3, 8), min_size=1, max_size=3))
    return [generator.uniform(-5, 25, (count, 2)) for count in counts]


@given(rasters())
def test_encodings_equal_those_of_pycocotools(raster: Bool[np.ndarray, "h w"]) -> None:
    expected = reference.encode(np.asfortranarray(raster.astype(np.uint8)))
    assert encoded(raster).codes.tobytes() == expected["counts"]


@given(rasters())
def test_an_encoding_is_decoded_to_its_raster(raster: Bool[np.ndarray, "h w"]) -> None:
    assert np.array_equal(rasterize(encoded(raster), **whole(raster))[0], raster)


@given(rasters())
def test_measures_of_encodings_equal_those_of_pycocotools(raster: Bool[np.ndarray, "h w"]) -> None:
    measures = encoded(raster).measure()
    expected = reference.encode(np.asfortranarray(raster.astype(np.uint8)))
    assert measures.areas.tolist() == [reference.area(expected)]
    assert not measures.is_invalid.any()
    if raster.any():
        x, y, width, height = reference.toBbox(expected).tolist()
        assert measures.boxes.tolist() == [[x, y, x + width, y + height]]
    else:
        assert np.isnan(measures.boxes).all()


def test_large_counts_are_encoded_as_by_pycocotools() -> None:
    counts = np.array([0, 3, 900_000, 70_000, 2, 1_000_000, 30_000 * 900 - 1_970_005])
    codes, _ = encode_counts(counts, np.array([0, len(counts)]))
    whole_image = {"size": [900, 30_000], "counts": counts.tolist()}
    assert codes.tobytes() == reference.frPyObjects(whole_image, 900, 30_000)["counts"]


@pytest.mark.parametrize(
    ("codes", "sides"),
    [
        (b"42", (3, 3)),  # 6 pixels of 9
        (b"4i2", (3, 3)),  # 86 pixels of 9
        (b"4r", (3, 3)),  # the last number has no end
        (b"4 5", (3, 3)),  # a blank
        (b"45O", (3, 3)),  # -1 pixels
        (b"0" + b"o" * 40, (3, 3)),  # a number without end
    ],
)
def test_broken_encodings_are_recognised(codes: bytes, sides: tuple[int, int]) -> None:
    masks = MaskArrays.from_codes(
        np.frombuffer(codes, np.uint8), np.array([0, len(codes)]), np.array([sides])
    )
    assert masks.measure().is_invalid.tolist() == [True]


def is_inside(rings: list[np.ndarray], x: float, y: float) -> bool:
    """Check whether a point is in the union of rings, by the even-odd rule: brute force."""

    def crosses(a: np.ndarray, b: np.ndarray) -> bool:
        if (a[1] > y) == (b[1] > y):
            return False
        return bool(x > a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1]))

    return any(sum(crosses(ring[i - 1], ring[i]) for i in range(len(ring))) % 2 == 1 for ring in rings)


@given(polygons(), st.floats(0.3, 3), st.booleans(), st.booleans())
def test_a_cell_is_set_if_its_centre_is_in_the_polygons(
    rings: list[np.ndarray], scale: float, is_mirrored: bool, is_upside_down: bool
) -> None:
    x1, x2 = (17.3, 2.1) if is_mirrored else (2.1, 17.3)
    y1, y2 = (19.9, -1.2) if is_upside_down else (-1.2, 19.9)
    sides = Sides(math.ceil(5 * scale), math.ceil(7 * scale))
    masks = MaskArrays.from_rings([[[[1, 1], [2, 2], [2, 1]]], rings])
    raster = rasterize(masks, np.array([1]), np.array([[x1, y1, x2, y2]]), sides=sides)[0]
    expected = [
        [
            is_inside(
                rings,
                x1 + (column + 0.5) * (x2 - x1) / sides.width,
                y1 + (row + 0.5) * (y2 - y1) / sides.height,
            )
            for column in range(sides.width)
        ]
        for row in range(sides.height)
    ]
    assert raster.tolist() == expected


@given(polygons(), rasters())
def test_a_raster_of_a_window_is_a_crop_of_the_whole(
    rings: list[np.ndarray], raster: Bool[np.ndarray, "h w"]
) -> None:
    masks = MaskArrays.concatenate([MaskArrays.from_rings([rings]), encoded(raster)])
    rows = np.array([0, 1])
    level = rasterize(masks, rows, np.array([[0.0, 0.0, 20.0, 20.0]] * 2), sides=Sides(64, 48))
    window = np.array([10 / 3.2, 6 / 2.4, 42 / 3.2, 40 / 2.4])
    crop = rasterize(masks, rows, np.tile(window, (2, 1)), sides=Sides(32, 34))
    assert np.array_equal(crop, level[:, 6:40, 10:42])


def test_overlapping_rings_of_an_object_are_united() -> None:
    masks = MaskArrays.from_rings([[SQUARE, SQUARE]])
    raster = rasterize(masks, np.array([0]), np.array([[0.0, 0.0, 4.0, 4.0]]), sides=Sides(4, 4))
    assert raster.all()


def test_objects_without_a_mask_have_empty_rasters_and_no_bounds() -> None:
    masks = MaskArrays.concatenate([MaskArrays.none(1), MaskArrays.from_rings([[SQUARE], []])])
    region = np.array([[0.0, 0.0, 4.0, 4.0]])
    rows = np.array([0, 1, 2, 1])
    raster = rasterize(masks, rows, region.repeat(4, axis=0), sides=Sides(2, 2))
    assert raster.all(axis=(1, 2)).tolist() == [False, True, False, True]
    assert not raster[[0, 2]].any()
    assert np.isnan(masks.bounds()).all(axis=1).tolist() == [True, False, True]
    assert masks.has_mask.tolist() == [False, True, False]


@given(st.data())
def test_selecting_keeps_each_object(data: st.DataObject) -> None:
    objects = data.draw(st.lists(st.one_of(st.none(), polygons(), rasters()), max_size=5))
    masks = MaskArrays.concatenate(
        [
            MaskArrays.none(1)
            if each is None
            else encoded(each)
            if isinstance(each, np.ndarray)
            else MaskArrays.from_rings([each])
            for each in objects
        ]
    )
    every = masks.to_coco()
    assert len(masks) == len(objects) == len(every)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5))))
    assert masks.select(slice(start, stop)).to_coco() == every[start:stop]
    assert masks.select(slice(None, None, 2)).to_coco() == every[::2]
    rows = data.draw(st.lists(st.integers(0, len(every) - 1), max_size=6)) if every else []
    assert masks.select(np.array(rows, dtype=np.int64)).to_coco() == [every[row] for row in rows]


@given(rasters())
def test_the_rectangles_of_an_encoding_cover_its_pixels_once(raster: Bool[np.ndarray, "h w"]) -> None:
    masks = encoded(raster)
    rectangles = masks.to_polygons()
    assert not rectangles.is_encoded.any()
    corners = rectangles.points.reshape(-1, 4, 2)
    sides = corners[:, 2] - corners[:, 0]
    assert sides.prod(axis=1).sum() == raster.sum()
    assert np.array_equal(rasterize(rectangles, **whole(raster))[0], raster)


def test_points_are_stored_as_float32_where_that_is_exact() -> None:
    short = MaskArrays.from_rings([[[[0.5, 0.25], [7.0, 3.0], [1.0, 9.0]]]])
    long = MaskArrays.from_rings([[[[0.1, 0.25], [7.0, 3.0], [1.0, 9.0]]]])
    assert short.points.dtype == np.float32
    assert long.points.dtype == np.float64
    assert long.points[0, 0] == 0.1


def test_encodings_have_no_points_to_move() -> None:
    masks = encoded(np.ones((2, 2), dtype=np.bool_))
    with pytest.raises(ValueError, match="to_polygons"):
        masks.with_points(masks.points)
