"""The masks of detections: a small grid of probabilities in a box each, pasted into the image where it is needed.

A grid takes 784 bytes, whatever the size of its object. A pixel is in the mask if the probability at its centre is at
least a half, interpolated between the centres of the cells. Beyond the outer centres, up to the edge of the box, it is
that of the nearest cell; outside the box there is no mask. This agrees with the targets of the mask head, whose cells
are set where their centre is in the object.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sniper.geometry.boxes import Sides
from sniper.geometry.kernels import kernel
from sniper.geometry.masks import MaskArrays, encode_counts, rasterize

_THRESHOLD = 127.5  # of grids
_OUTSIDE = 1e-6  # cells; how far beyond the box its outlines are closed


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionMasks:
    """The masks of n detections.

    Attributes:
        grids: (n, s, s) probabilities of the cells of each box, times 255.
        boxes: (n, 4) xyxy, the boxes that the grids fill, in the frame of the detections. Merging may change the box of
            a detection, but not that of its mask.
        sides: (n, 2) width and height of the image of each, pixels; 0 where they are not known yet.

    Example:
        >>> boxes = np.array([[1.0, 0.0, 3.0, 2.0]])
        >>> masks = DetectionMasks.of(np.full((1, 28, 28), 255, np.uint8), boxes).in_image(Sides(4, 3))
        >>> masks.to_rle().to_coco()
        [{'size': [3, 4], 'counts': '32103'}]
    """

    grids: UInt8[np.ndarray, "n s s"]
    boxes: Float[np.ndarray, "n 4"]
    sides: Int[np.ndarray, "n 2"]

    @classmethod
    def of(cls, grids: UInt8[np.ndarray, "n s s"], boxes: Float[np.ndarray, "n 4"]) -> Self:
        """Return masks in a frame whose sides are not known."""
        return cls(grids=grids, boxes=boxes, sides=np.zeros((len(grids), 2), dtype=np.int32))

    @classmethod
    def from_arrays(
        cls, masks: MaskArrays, *, side: int = 56, window: Float[np.ndarray, "4"] | None = None
    ) -> Self:
        """Return masks of polygons or run-length encodings as grids in the boxes around them, such as for outlines.

        Args:
            masks: of n objects; one without a mask, or with an empty one, has an empty grid.
            side: of the grids, cells.
            window: xyxy, in the frame of the masks, that they are clipped to; None for all of them.
        """
        boxes = np.nan_to_num(masks.bounds())
        if window is not None:
            boxes = boxes.clip(np.tile(window[:2], 2), np.tile(window[2:], 2))
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        grids = np.zeros((len(masks), side, side), dtype=np.uint8)
        rows = np.flatnonzero(has_area)
        grids[rows] = 255 * rasterize(masks, rows, boxes[rows], sides=Sides(side, side)).astype(np.uint8)
        return cls.of(grids, boxes)

    @classmethod
    def empty(cls, side: int = 28) -> Self:
        """Return the masks of an image without detections."""
        return cls.of(np.zeros((0, side, side), dtype=np.uint8), np.zeros((0, 4)))

    @classmethod
    def join(cls, masks: Sequence["DetectionMasks"]) -> Self:
        """Concatenate masks whose grids have the same sides."""
        return cls(
            grids=np.concatenate([each.grids for each in masks]),
            boxes=np.concatenate([each.boxes for each in masks]),
            sides=np.concatenate([each.sides for each in masks]),
        )

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, rows: slice | Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]) -> Self:
        return replace(self, grids=self.grids[rows], boxes=self.boxes[rows], sides=self.sides[rows])

    def with_boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Self:
        """Return the masks with their boxes in another frame."""
        return replace(self, boxes=boxes)

    def in_image(self, sides: Sides) -> Self:
        """Return the masks with the sides of their image."""
        return replace(self, sides=np.tile(np.array(sides, dtype=np.int32), (len(self), 1)))

    def to_rle(self) -> MaskArrays:
        """Encode the masks at the size of their images, without an array of that size.

        Returns:
            Run-length encodings, as COCO has them.

        Raises:
            ValueError: if the sides of an image are not known.
        """
        if (self.sides <= 0).any():
            raise ValueError("masks are encoded at the size of their image, which is not known")
        counts, offsets = _encode(self.grids, self.boxes.astype(np.float64), self.sides.astype(np.int64))
        codes, code_offsets = encode_counts(counts, offsets)
        return MaskArrays.from_codes(codes, code_offsets, self.sides)

    def to_arrays(self) -> Bool[np.ndarray, "n h w"]:
        """Return the masks of one image as arrays of its size.

        Raises:
            ValueError: if the masks are of images of several sizes, or the size is not known.
        """
        if not len(self):
            return np.zeros((0, 0, 0), dtype=np.bool_)
        if (self.sides <= 0).any() or (self.sides != self.sides[0]).any():
            raise ValueError("masks become arrays at the size of their image, which is not known")
        width, height = self.sides[0].tolist()
        arrays = np.zeros((len(self), height, width), dtype=np.bool_)
        _paste(self.grids, self.boxes.astype(np.float64), arrays)
        return arrays

    def outlines(self, row: int) -> list[list[Float[np.ndarray, "p 2"]]]:
        """Return the outlines of a mask as polygons, in the frame of the boxes, without a raster of it.

        Args:
            row: of the mask.

        Returns:
            For each connected part its outer ring and its holes, (p, 2) xy each; the last point equals the first.
        """
        import contourpy

        side = self.grids.shape[1]
        padded = np.pad(np.pad(self.grids[row].astype(np.float64), 1, mode="edge"), 1)
        cells = np.array([-0.5 - _OUTSIDE, -0.5, *range(side), side - 0.5, side - 0.5 + _OUTSIDE])
        x1, y1, x2, y2 = self.boxes[row].tolist()
        x = x1 + (cells + 0.5) * ((x2 - x1) / side)
        y = y1 + (cells + 0.5) * ((y2 - y1) / side)
        generator = contourpy.contour_generator(
            x.clip(x1, x2), y.clip(y1, y2), padded, fill_type=contourpy.FillType.OuterOffset
        )
        points, offsets = cast(Any, generator.filled(_THRESHOLD, np.inf))  # of this type of fill, two lists
        return [
            [of_part[start:stop] for start, stop in itertools.pairwise(ends.tolist())]
            for of_part, ends in zip(points, offsets, strict=True)
            if of_part is not None and ends is not None
        ]


@kernel
def _first_pixel(edge: float, length: int) -> int:
    """Return the first pixel whose centre is at or beyond an edge, within the image."""
    return int(min(max(np.ceil(edge - 0.5), 0.0), float(length)))


@kernel
def _place(pixel: int, low: float, high: float, side: int) -> tuple[int, float]:
    """Return the cell whose centre is before that of a pixel, and the share of the next cell."""
    position = (pixel + 0.5 - low) / (high - low) * side - 0.5
    position = min(max(position, 0.0), side - 1.0)
    cell = min(int(position), side - 2)
    return cell, position - cell


@kernel
def _column(grid: np.ndarray, cell: int, share: float, values: np.ndarray) -> None:
    """Interpolate a column of a grid between two of its cells."""
    for row in range(len(values)):
        values[row] = (1.0 - share) * grid[row, cell] + share * grid[row, cell + 1]


@kernel
def _encode(grids: np.ndarray, boxes: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts of the runs of each mask, column by column, and where those of each mask begin."""
    side = grids.shape[1]
    values = np.empty(side, dtype=np.float64)
    counts = np.empty(1024, dtype=np.int64)
    offsets = np.zeros(len(grids) + 1, dtype=np.int64)
    size = 0
    for k in range(len(grids)):
        width, height = sides[k, 0], sides[k, 1]
        x1, y1, x2, y2 = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        first, last = _first_pixel(y1, height), _first_pixel(y2, height)
        is_inside, start = False, 0  # of the present run
        for x in range(_first_pixel(x1, width), _first_pixel(x2, width)):
            cell, share = _place(x, x1, x2, side)
            _column(grids[k], cell, share, values)
            if size + 2 * (last - first) + 4 > len(counts):
                grown = np.empty(2 * len(counts) + 2 * (last - first) + 4, dtype=np.int64)
                grown[:size] = counts[:size]
                counts = grown
            if is_inside and first > 0:  # a run up to the end of the column before, which does not go on here
                counts[size] = x * height - start
                size += 1
                is_inside, start = False, x * height
            for y in range(first, last):
                row, part = _place(y, y1, y2, side)
                is_set = (1.0 - part) * values[row] + part * values[row + 1] >= 127.5
                if is_set != is_inside:
                    counts[size] = x * height + y - start
                    size += 1
                    is_inside, start = is_set, x * height + y
            if is_inside and last < height:
                counts[size] = x * height + last - start
                size += 1
                is_inside, start = False, x * height + last
        if size + 2 > len(counts):
            grown = np.empty(2 * len(counts) + 2, dtype=np.int64)
            grown[:size] = counts[:size]
            counts = grown
        end = width * height
        stop = _first_pixel(x2, width) * height
        if is_inside and stop < end:
            counts[size] = stop - start
            size += 1
            start = stop
        counts[size] = end - start
        size += 1
        offsets[k + 1] = size
    return counts[:size].copy(), offsets


@kernel
def _paste(grids: np.ndarray, boxes: np.ndarray, arrays: np.ndarray) -> None:
    """Set the pixels of each mask in an array of its own."""
    side = grids.shape[1]
    height, width = arrays.shape[1], arrays.shape[2]
    values = np.empty(side, dtype=np.float64)
    for k in range(len(grids)):
        x1, y1, x2, y2 = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        first, last = _first_pixel(y1, height), _first_pixel(y2, height)
        for x in range(_first_pixel(x1, width), _first_pixel(x2, width)):
            cell, share = _place(x, x1, x2, side)
            _column(grids[k], cell, share, values)
            for y in range(first, last):
                row, part = _place(y, y1, y2, side)
                arrays[k, y, x] = (1.0 - part) * values[row] + part * values[row + 1] >= 127.5
