"""Masks in other frames: moved and cropped, and as run lengths of a size."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.geometry.boxes import Sides
from sniper.geometry.masks import MaskArrays, encode_counts, rasterize_rings
from sniper.geometry.polygons import clip_to_window

MoveBoxes = Callable[[Float[np.ndarray, "n 4"]], Float[np.ndarray, "n 4"]]
"""Transforms (n, 4) xyxy boxes to another frame, along each axis by itself."""


def move_masks(masks: MaskArrays, move: MoveBoxes, *, sides: Sides) -> MaskArrays:
    """Transform masks to another frame, and crop them to it.

    Polygons remain polygons. Where the border cuts one into several parts, these are connected along the border.
    Run-length encodings become encodings of the size of the frame: a pixel is set if its centre is in the mask.

    Args:
        masks: of n objects, in any one frame.
        move: transforms boxes of that frame, such as `Chip.to_chip`.
        sides: of the new frame, pixels.

    Returns:
        The masks of the n objects; one that is not in the frame is none.

    Example:
        >>> masks = MaskArrays.from_rings([[[[0, 0], [4, 0], [4, 2], [0, 2]]], [[[8, 0], [9, 0], [9, 1]]]])
        >>> moved = move_masks(masks, lambda boxes: 2 * boxes, sides=Sides(5, 8))
        >>> moved.bounds()[0].tolist(), moved.has_mask.tolist()
        ([0.0, 0.0, 5.0, 4.0], [True, False])
    """
    is_encoded = masks.is_encoded
    polygons = masks.to_polygons()
    points = move(np.tile(polygons.points.astype(np.float64), 2))[:, :2]
    polygons = polygons.with_points(points)
    encoded = encode_masks(polygons.select(is_encoded), np.tile(np.array(sides), (int(is_encoded.sum()), 1)))
    is_empty = encoded.measure().areas == 0
    encoded = encoded.select(~is_empty).spread(~is_empty)
    cropped = _crop(polygons.select(~is_encoded), sides)
    places = np.empty(len(masks), dtype=np.int64)
    places[np.append(np.flatnonzero(is_encoded), np.flatnonzero(~is_encoded))] = np.arange(len(masks))
    return MaskArrays.concatenate([encoded, cropped]).select(places)


def _crop(polygons: MaskArrays, sides: Sides) -> MaskArrays:
    """Crop polygons to a frame; rings without an area are left out."""
    window = (0.0, 0.0, float(sides.width), float(sides.height))
    bounds = polygons.bounds()
    with np.errstate(invalid="ignore"):
        reaches_out = ((bounds[:, :2] < 0) | (bounds[:, 2:] > window[2:])).any(axis=1)
    objects = [list(polygons.rings_of(row)) for row in range(len(polygons))]
    for row in np.flatnonzero(reaches_out).tolist():
        objects[row] = [clip_to_window(ring, window) for ring in objects[row]]
    return MaskArrays.from_rings(
        [[ring for ring in rings if len(ring) > 2 and np.ptp(ring, axis=0).all()] for rings in objects]
    )


def encode_masks(masks: MaskArrays, sides: Int[np.ndarray, "n 2"]) -> MaskArrays:
    """Encode masks as run lengths at the size of their frame, without an array of that size.

    A pixel is set if its centre is in the mask.

    Args:
        masks: of n objects.
        sides: (n, 2) width and height of the frame of each, pixels.

    Returns:
        An encoding for each object with a mask, perhaps without a pixel.

    Example:
        >>> square = MaskArrays.from_rings([[[[1, 0], [3, 0], [3, 2], [1, 2]]], []])
        >>> encode_masks(square, np.array([[4, 3]] * 2)).to_coco()
        [{'size': [3, 4], 'counts': '32103'}, None]
    """
    polygons = masks.to_polygons()
    counts = [
        _count_runs(raster, x=x, y=y, sides=Sides(*of_row)) if has_mask else np.zeros(0, dtype=np.int64)
        for (raster, x, y), has_mask, of_row in zip(
            rasters_in_boxes(polygons, sides), masks.has_mask.tolist(), sides.tolist(), strict=True
        )
    ]
    offsets = np.cumsum([0, *map(len, counts)])
    codes, code_offsets = encode_counts(np.concatenate([np.zeros(0, np.int64), *counts]), offsets)
    return MaskArrays.from_codes(codes, code_offsets, np.where(masks.has_mask[:, None], sides, 0))


def rasters_in_boxes(
    polygons: MaskArrays, sides: Int[np.ndarray, "n 2"]
) -> Iterator[tuple[Bool[np.ndarray, "h w"], int, int]]:
    """Iterate over the rasters of polygons, each in the box around it, and the x and y of its corner in pixels.

    Args:
        polygons: of n objects.
        sides: (n, 2) width and height of the frame of each, pixels; what is beyond is left out.
    """
    bounds = np.nan_to_num(polygons.bounds())
    low = np.floor(bounds[:, :2]).clip(0, sides).astype(np.int64)
    high = np.ceil(bounds[:, 2:]).clip(0, sides).astype(np.int64)
    rings = np.stack([polygons.offsets[:-1], polygons.offsets[1:]], axis=1)
    for row, ((x1, y1), (x2, y2)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if x1 >= x2 or y1 >= y2:
            yield np.zeros((0, 0), dtype=np.bool_), 0, 0
            continue
        (raster,) = rasterize_rings(
            polygons.points,
            polygons.ring_offsets,
            rings[row : row + 1],
            np.array([[x1, y1, x2, y2]], dtype=np.float64),
            sides=Sides(x2 - x1, y2 - y1),
        )
        yield raster, x1, y1


def _count_runs(raster: Bool[np.ndarray, "h w"], *, x: int, y: int, sides: Sides) -> Int[np.ndarray, " m"]:
    """Return the lengths of the runs of a mask in its frame, column by column, the first outside the mask."""
    columns = np.pad(raster.T, ((0, 0), (1, 1))).astype(np.int8)
    column, row = np.nonzero(np.diff(columns, axis=1))
    edges = (x + column) * sides.height + y + row
    meets_next = edges[1:] == edges[:-1]  # a run at the end of a column goes on in the next
    is_edge = ~(np.append(meets_next, False) | np.append(False, meets_next)) if len(edges) else meets_next
    ends = np.concatenate([[0], edges[is_edge], [sides.width * sides.height]])
    counts = np.diff(ends)
    return counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts
