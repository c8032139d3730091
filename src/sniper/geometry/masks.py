"""Instance masks of many objects in flat arrays, and their rasters on any grid.

A mask is a set of points of the plane. That of polygons is the union of their interiors, by the even-odd rule for each
ring; that of a run-length encoding is the union of the squares of its pixels. A cell of a raster is set if its centre
is in the set. Thus rasters of a resized and cropped frame are crops of the resized raster, exactly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sniper.geometry.boxes import Sides, ragged_rows
from sniper.geometry.kernels import kernel

_INVALID = -1  # area of a run-length encoding that does not fill its sides


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskArrays:
    """The masks of n objects, without a Python object for any of them.

    An object has polygons, or a run-length encoding, or no mask. The rings of object `i` are
    `offsets[i]` up to `offsets[i + 1]`, the points of ring `j` are `points[ring_offsets[j]:ring_offsets[j + 1]]`, and
    its encoding is `codes[code_offsets[i]:code_offsets[i + 1]]`.

    Attributes:
        points: (p, 2) xy of the corners of all rings, pixels; a ring ends where it began, without a repeated point.
            float32 where that has the same values as float64.
        ring_offsets: (r + 1,) where the points of each ring begin; the last is p.
        offsets: (n + 1,) where the rings of each object begin; the last is r.
        codes: (c,) COCO's compressed counts of the pixels of runs, column by column, of all encodings.
        code_offsets: (n + 1,) where the encoding of each object begins; the last is c.
        sides: (n, 2) width and height of each encoding, pixels; 0 for other objects.
    """

    points: Float[np.ndarray, "p 2"]
    ring_offsets: Int[np.ndarray, " r_plus_1"]
    offsets: Int[np.ndarray, " n_plus_1"]
    codes: UInt8[np.ndarray, " c"]
    code_offsets: Int[np.ndarray, " n_plus_1"]
    sides: Int[np.ndarray, "n 2"]

    @classmethod
    def none(cls, count: int = 0) -> Self:
        """Return a number of objects without a mask."""
        return cls(
            points=np.zeros((0, 2), np.float32),
            ring_offsets=np.zeros(1, np.int64),
            offsets=np.zeros(count + 1, np.int64),
            codes=np.zeros(0, np.uint8),
            code_offsets=np.zeros(count + 1, np.int64),
            sides=np.zeros((count, 2), np.int32),
        )

    @classmethod
    def from_rings(cls, objects: Sequence[Sequence[Any]]) -> Self:
        """Return the masks of objects with polygons.

        Args:
            objects: the rings of each object, (k, 2) xy arrays or lists; none for an object without a mask.

        Example:
            >>> masks = MaskArrays.from_rings([[[[0, 0], [4, 0], [0, 3]]], []])
            >>> masks.has_mask.tolist(), masks.bounds()[0].tolist()
            ([True, False], [0.0, 0.0, 4.0, 3.0])
        """
        rings = [
            np.asarray(ring, dtype=np.float64).reshape(-1, 2) for of_object in objects for ring in of_object
        ]
        return cls.from_arrays(
            np.concatenate([np.zeros((0, 2)), *rings]),
            ring_lengths=np.array([len(ring) for ring in rings], dtype=np.int64),
            num_rings=np.array([len(of_object) for of_object in objects], dtype=np.int64),
        )

    @classmethod
    def from_arrays(
        cls,
        points: Float[np.ndarray, "p 2"],
        *,
        ring_lengths: Int[np.ndarray, " r"],
        num_rings: Int[np.ndarray, " n"],
    ) -> Self:
        """Return the masks of objects with polygons.

        Args:
            points: (p, 2) xy of the corners of all rings.
            ring_lengths: (r,) number of points of each ring.
            num_rings: (n,) of each object.
        """
        return replace(
            cls.none(len(num_rings)),
            points=narrowest(points),
            ring_offsets=_to_offsets(ring_lengths),
            offsets=_to_offsets(num_rings),
        )

    @classmethod
    def from_boxes(cls, boxes: Float[np.ndarray, "n 4"]) -> Self:
        """Return (n, 4) xyxy boxes as masks, a polygon of four corners each."""
        x1, y1, x2, y2 = boxes.T
        corners = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 2)
        count = len(boxes)
        return cls.from_arrays(
            corners, ring_lengths=np.full(count, 4), num_rings=np.ones(count, dtype=np.int64)
        )

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[np.ndarray, " c"],
        code_offsets: Int[np.ndarray, " n_plus_1"],
        sides: Int[np.ndarray, "n 2"],
    ) -> Self:
        """Return the masks of objects with run-length encodings; see `MaskArrays`."""
        return replace(
            cls.none(len(sides)), codes=codes, code_offsets=code_offsets, sides=sides.astype(np.int32)
        )

    @classmethod
    def concatenate(cls, masks: Sequence["MaskArrays"]) -> Self:
        """Return the objects of several masks in order."""
        masks = [cls.none(), *masks]
        return cls(
            points=np.concatenate([each.points for each in masks]),
            ring_offsets=_join_offsets([each.ring_offsets for each in masks]),
            offsets=_join_offsets([each.offsets for each in masks]),
            codes=np.concatenate([each.codes for each in masks]),
            code_offsets=_join_offsets([each.code_offsets for each in masks]),
            sides=np.concatenate([each.sides for each in masks]),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in vars(self).values())

    @property
    def has_mask(self) -> Bool[np.ndarray, " n"]:
        """(n,) whether each object has a mask."""
        return (np.diff(self.offsets) > 0) | self.is_encoded

    @property
    def is_encoded(self) -> Bool[np.ndarray, " n"]:
        """(n,) whether each object has a run-length encoding."""
        return np.diff(self.code_offsets) > 0

    def select(self, rows: slice | Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]) -> Self:
        """Return some of the objects; those of a slice share the memory of the points and codes."""
        if isinstance(rows, slice):
            first, stop, step = rows.indices(len(self))
            if step == 1:
                return self._slice(first, max(first, stop))
            rows = np.arange(first, stop, step)
        indices = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        offsets, rings = ragged_rows(self.offsets, indices)
        return replace(
            self,
            points=_gather(self.points, self.ring_offsets[self.offsets], indices),
            ring_offsets=_to_offsets(np.diff(self.ring_offsets)[rings]),
            offsets=offsets,
            codes=_gather(self.codes, self.code_offsets, indices),
            code_offsets=_to_offsets(np.diff(self.code_offsets)[indices]),
            sides=self.sides[indices],
        )

    def _slice(self, first: int, stop: int) -> Self:
        offsets, code_offsets = self.offsets[first : stop + 1], self.code_offsets[first : stop + 1]
        ring_offsets = self.ring_offsets[offsets[0] : offsets[-1] + 1]
        return replace(
            self,
            points=self.points[ring_offsets[0] : ring_offsets[-1]],
            ring_offsets=ring_offsets - ring_offsets[0],
            offsets=offsets - offsets[0],
            codes=self.codes[code_offsets[0] : code_offsets[-1]],
            code_offsets=code_offsets - code_offsets[0],
            sides=self.sides[first:stop],
        )

    def measure(self) -> "Measures":
        """Compute the boxes around the masks, and the areas of run-length encodings."""
        boxes = np.full((len(self), 4), np.nan)
        starts = self.ring_offsets[self.offsets]  # (n + 1,) of the points of each object
        has_points = np.diff(starts) > 0
        if has_points.any():
            first = starts[:-1][has_points]
            boxes[has_points, :2] = np.minimum.reduceat(self.points, first, axis=0)
            boxes[has_points, 2:] = np.maximum.reduceat(self.points, first, axis=0)
        areas = np.full(len(self), np.nan)
        rows = np.flatnonzero(self.is_encoded)
        _measure_codes(self.codes, self.code_offsets, self.sides, rows, boxes, areas)
        return Measures(
            boxes=np.where((areas == _INVALID)[:, None], np.nan, boxes),
            areas=np.where(areas == _INVALID, np.nan, areas),
            is_invalid=areas == _INVALID,
        )

    def bounds(self) -> Float[np.ndarray, "n 4"]:
        """Return (n, 4) xyxy boxes around the masks, in their frame; NaN without a mask, or with an empty one."""
        return self.measure().boxes

    def to_polygons(self) -> Self:
        """Return the same masks without run-length encodings: their runs become rectangles, one ring each."""
        rows = np.flatnonzero(self.is_encoded)
        if not len(rows):
            return self
        counts = _count_rectangles(self.codes, self.code_offsets, self.sides, rows)
        rectangles = np.empty((int(counts.sum()), 4, 2), dtype=np.float32)
        _write_rectangles(self.codes, self.code_offsets, self.sides, rows, rectangles)
        num_rings = np.diff(self.offsets)
        num_rings[rows] = counts
        offsets = _to_offsets(num_rings)
        is_rectangle = np.repeat(self.is_encoded, num_rings)
        lengths = np.full(len(is_rectangle), 4)
        lengths[~is_rectangle] = np.diff(self.ring_offsets)
        is_corner = np.repeat(is_rectangle, lengths)
        points = np.empty((len(is_corner), 2), dtype=self.points.dtype)
        points[is_corner] = rectangles.reshape(-1, 2)
        points[~is_corner] = self.points
        return replace(
            type(self).none(len(self)), points=points, ring_offsets=_to_offsets(lengths), offsets=offsets
        )

    def spread(self, is_given: Bool[np.ndarray, " m"]) -> Self:
        """Return m objects, of which those that are given, in order, are these; the others have no mask."""
        places = np.cumsum(is_given)
        return replace(
            self,
            offsets=self.offsets[np.append(0, places)],
            code_offsets=self.code_offsets[np.append(0, places)],
            sides=np.where(is_given[:, None], self.sides[np.maximum(places - 1, 0)], 0)
            if len(self)
            else np.zeros((len(is_given), 2), np.int32),
        )

    def rings_of(self, row: int) -> Iterator[Float[np.ndarray, "_ 2"]]:
        """Iterate over the rings of an object's polygons: (k, 2) float64 xy."""
        for ring in range(int(self.offsets[row]), int(self.offsets[row + 1])):
            first, stop = self.ring_offsets[ring : ring + 2]
            yield self.points[first:stop].astype(np.float64)

    def with_points(self, points: Float[np.ndarray, "p 2"]) -> Self:
        """Return the masks with other coordinates of the same points, such as in another frame.

        Raises:
            ValueError: if there are run-length encodings, which have no points.
        """
        if len(self.codes):
            raise ValueError("run-length encodings have no points; convert them with to_polygons")
        return replace(self, points=points)

    def to_coco(self) -> list[Any]:
        """Return COCO's `segmentation` of each object: a list of polygons, an encoding, or None."""
        found: list[Any] = []
        for row in range(len(self)):
            codes = self.codes[self.code_offsets[row] : self.code_offsets[row + 1]]
            rings = range(int(self.offsets[row]), int(self.offsets[row + 1]))
            if len(codes):
                width, height = self.sides[row].tolist()
                found.append({"size": [height, width], "counts": codes.tobytes().decode("ascii")})
            elif rings:
                bounds = [self.ring_offsets[ring : ring + 2] for ring in rings]
                found.append([self.points[first:stop].ravel().tolist() for first, stop in bounds])
            else:
                found.append(None)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """What masks span.

    Attributes:
        boxes: (n, 4) xyxy around each mask; NaN without a mask, or with an empty or invalid encoding.
        areas: (n,) number of pixels of each run-length encoding; NaN for other objects.
        is_invalid: (n,) whether each has an encoding that is broken, or whose counts do not add up to its pixels.
    """

    boxes: Float[np.ndarray, "n 4"]
    areas: Float[np.ndarray, " n"]
    is_invalid: Bool[np.ndarray, " n"]


def rasterize(
    masks: MaskArrays,
    rows: Int[np.ndarray, " k"],
    regions: Float[np.ndarray, "k 4"],
    *,
    sides: Sides,
) -> Bool[np.ndarray, "k h w"]:
    """Rasterise masks, each in a region of its own.

    The region is divided into equal cells; a cell is set if its centre is in the mask. A centre on the border belongs
    to the mask right of it or below it.

    Args:
        masks: of n objects.
        rows: (k,) which objects, in any order, also repeatedly.
        regions: (k, 4) xyxy, in the frame of the masks, with an area. With x1 > x2 the raster is mirrored left to
            right, with y1 > y2 top to bottom.
        sides: number of cells along x and y.

    Returns:
        (k, h, w) whether each cell is set; nothing is where an object has no mask.

    Example:
        >>> masks = MaskArrays.from_rings([[[[0, 0], [2, 0], [2, 1], [0, 1]]]])
        >>> region = np.array([[0.0, 0.0, 4.0, 2.0]])
        >>> rasterize(masks, np.array([0]), region, sides=Sides(4, 2)).astype(int).tolist()
        [[[1, 1, 0, 0], [0, 0, 0, 0]]]
    """
    used, inverse = np.unique(rows, return_inverse=True)
    polygons = masks.select(used).to_polygons()
    rings = np.stack([polygons.offsets[:-1], polygons.offsets[1:]], axis=1)[inverse]
    return rasterize_rings(polygons.points, polygons.ring_offsets, rings, regions, sides=sides)


def rasterize_rings(
    points: Float[np.ndarray, "p 2"],
    ring_offsets: Int[np.ndarray, " r_plus_1"],
    rings: Int[np.ndarray, "k 2"],
    regions: Float[np.ndarray, "k 4"],
    *,
    sides: Sides,
) -> Bool[np.ndarray, "k h w"]:
    """Rasterise polygons, each union of rings in a region of its own; see `rasterize`.

    Args:
        points: (p, 2) xy of the corners of all rings.
        ring_offsets: (r + 1,) where the points of each ring begin.
        rings: (k, 2) the first ring of each object, and the one after its last; equal where it has no mask.
        regions: (k, 4) xyxy, in the frame of the points, with an area.
        sides: number of cells along x and y.
    """
    rasters = np.zeros((len(rings), sides.height, sides.width), dtype=np.bool_)
    _fill(points, ring_offsets, rings, regions.astype(np.float64), rasters)
    return rasters


def narrowest(points: Float[np.ndarray, "p 2"]) -> Float[np.ndarray, "p 2"]:
    """Return float64 points as float32 if all their values are the same."""
    with np.errstate(over="ignore"):
        short = points.astype(np.float32)
    return short if np.array_equal(short, points, equal_nan=True) else points


def encode_counts(
    counts: Int[np.ndarray, " m"], offsets: Int[np.ndarray, " n_plus_1"]
) -> tuple[UInt8[np.ndarray, " c"], Int[np.ndarray, " n_plus_1"]]:
    """Compress the counts of run-length encodings, as COCO does.

    Args:
        counts: (m,) numbers of pixels of the runs of all encodings, the first of each outside the mask.
        offsets: (n + 1,) where the counts of each encoding begin.

    Returns:
        (c,) codes and (n + 1,) where those of each encoding begin.

    Example:
        >>> codes, _ = encode_counts(np.array([6, 1, 40, 4, 5]), np.array([0, 5]))
        >>> codes.tobytes()
        b'61X13mN'
    """
    codes = np.empty(13 * len(counts), dtype=np.uint8)
    code_offsets = np.zeros(len(offsets), dtype=np.int64)
    _compress(counts.astype(np.int64), offsets.astype(np.int64), codes, code_offsets)
    return codes[: code_offsets[-1]].copy(), code_offsets


def _gather(values: np.ndarray, offsets: Int[np.ndarray, " n_plus_1"], indices: np.ndarray) -> np.ndarray:
    """Return the values of some groups, without an index for each value, which would take more memory than they."""
    counts = np.diff(offsets)[indices]
    gathered = np.empty((int(counts.sum()), *values.shape[1:]), dtype=values.dtype)
    _copy_groups(values, offsets, indices.astype(np.int64), gathered)
    return gathered


def _to_offsets(counts: Any) -> Int[np.ndarray, " n_plus_1"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, dtype=np.int64))])


def _join_offsets(parts: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " n_plus_1"]:
    return _to_offsets(np.concatenate([np.diff(part) for part in parts]))


@kernel
def _copy_groups(values: np.ndarray, offsets: np.ndarray, indices: np.ndarray, target: np.ndarray) -> None:
    position = 0
    for index in indices:
        first, stop = offsets[index], offsets[index + 1]
        target[position : position + stop - first] = values[first:stop]
        position += stop - first


@kernel
def _read_count(codes: np.ndarray, position: int) -> tuple[int, int]:
    """Return the number that starts at a position, and the position after it; -1 for a broken code."""
    value, shift = 0, 0
    while position < len(codes) and shift < 60:
        code: Any = np.int64(codes[position]) - 48
        if code < 0 or code > 63:
            return 0, -1
        value |= (code & 31) << shift
        shift += 5
        position += 1
        if not code & 32:
            if code & 16:
                value |= -1 << shift
            return value, position
    return 0, -1


@kernel
def _measure_codes(
    codes: np.ndarray,
    code_offsets: np.ndarray,
    sides: np.ndarray,
    rows: np.ndarray,
    boxes: np.ndarray,
    areas: np.ndarray,
) -> None:
    for row in rows:
        of_row = codes[code_offsets[row] : code_offsets[row + 1]]
        height: Any = np.int64(sides[row, 1])
        num_pixels = np.int64(sides[row, 0]) * height
        area, total, index, position = 0, 0, 0, 0
        before, last = 0, 0
        x1, y1, x2, y2 = num_pixels, num_pixels, -1, -1
        while position < len(of_row):
            count, position = _read_count(of_row, position)
            if index > 2:
                count += before
            if position < 0 or count < 0 or total + count > num_pixels:
                total = -1
                break
            before, last = last, count
            if index % 2 == 1 and count > 0:
                area += count
                start, stop = total, total + count - 1
                x1, x2 = min(x1, start // height), max(x2, stop // height)
                if start // height == stop // height:
                    y1, y2 = min(y1, start % height), max(y2, stop % height)
                else:
                    y1, y2 = 0, height - 1
            total += count
            index += 1
        areas[row] = area if total == num_pixels else _INVALID
        if area > 0:
            boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3] = x1, y1, x2 + 1, y2 + 1


@kernel
def _count_rectangles(
    codes: np.ndarray, code_offsets: np.ndarray, sides: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    counts = np.zeros(len(rows), dtype=np.int64)
    unused = np.empty((0, 4, 2), dtype=np.float32)
    for k in range(len(rows)):
        row = rows[k]
        of_row = codes[code_offsets[row] : code_offsets[row + 1]]
        counts[k] = _cut_into_rectangles(of_row, np.int64(sides[row, 1]), unused, 0)
    return counts


@kernel
def _write_rectangles(
    codes: np.ndarray, code_offsets: np.ndarray, sides: np.ndarray, rows: np.ndarray, rectangles: np.ndarray
) -> None:
    first = 0
    for row in rows:
        of_row = codes[code_offsets[row] : code_offsets[row + 1]]
        first += _cut_into_rectangles(of_row, np.int64(sides[row, 1]), rectangles, first)


@kernel
def _cut_into_rectangles(codes: np.ndarray, height: int, rectangles: np.ndarray, first: int) -> int:
    """Cut the runs of one encoding at the ends of columns, and join equal ones of neighbouring columns.

    Rectangles are written from the index `first` on, if the array has space; their number is returned.
    """
    x1, x2, y1, y2 = -1, -1, -1, -1
    total, index, position = 0, 0, 0
    before, last, num = 0, 0, 0
    while position < len(codes):
        count, position = _read_count(codes, position)
        if index > 2:
            count += before
        before, last = last, count
        start, stop = total, total + count
        while index % 2 == 1 and start < stop:
            x, y = start // height, start % height
            if y == 0 and stop - start >= height:
                columns, end = (stop - start) // height, height
            else:
                columns, end = 1, min(height, y + stop - start)
            if x == x2 and y == y1 and end == y2:
                x2 += columns
            else:
                num += 1
                x1, x2, y1, y2 = x, x + columns, y, end
            if len(rectangles):
                corners = rectangles[first + num - 1]
                corners[0, 0], corners[0, 1], corners[1, 0], corners[1, 1] = x1, y1, x2, y1
                corners[2, 0], corners[2, 1], corners[3, 0], corners[3, 1] = x2, y2, x1, y2
            start += (columns - 1) * height + end - y
        total += count
        index += 1
    return num


@kernel
def _compress(counts: np.ndarray, offsets: np.ndarray, codes: np.ndarray, code_offsets: np.ndarray) -> None:
    position = 0
    for row in range(len(offsets) - 1):
        for index in range(offsets[row], offsets[row + 1]):
            value = counts[index]
            if index - offsets[row] > 2:
                value -= counts[index - 2]
            is_last = False
            while not is_last:
                code = value & 31
                value >>= 5
                is_last = value == (-1 if code & 16 else 0)
                codes[position] = (code if is_last else code | 32) + 48
                position += 1
        code_offsets[row + 1] = position


@kernel
def _fill(
    points: np.ndarray,
    ring_offsets: np.ndarray,
    rings: np.ndarray,
    regions: np.ndarray,
    rasters: np.ndarray,
) -> None:
    """Set the cells of each raster whose centre is in a ring: left of it is an odd number of edges."""
    height, width = rasters.shape[1:]
    flips = np.zeros((height, width), dtype=np.bool_)  # where the parity changes along a row
    for k in range(len(rings)):
        x0, y0 = regions[k, 0], regions[k, 1]
        step_x, step_y = (regions[k, 2] - x0) / width, (regions[k, 3] - y0) / height
        for ring in range(rings[k, 0], rings[k, 1]):
            first, stop = ring_offsets[ring], ring_offsets[ring + 1]
            top, bottom, left = height, 0, width
            for index in range(first, stop):
                after = index + 1 if index + 1 < stop else first
                # Cell centres have whole coordinates.
                ax, ay = (points[index, 0] - x0) / step_x - 0.5, (points[index, 1] - y0) / step_y - 0.5
                bx, by = (points[after, 0] - x0) / step_x - 0.5, (points[after, 1] - y0) / step_y - 0.5
                if ay > by:  # an edge and its reverse cross at equal numbers
                    ax, ay, bx, by = bx, by, ax, ay
                start_row = int(np.ceil(max(ay, 0.0)))
                stop_row = int(np.ceil(min(by, float(height))))
                for row in range(start_row, min(stop_row, height)):
                    crossing = ax + (row - ay) * ((bx - ax) / (by - ay))
                    if crossing <= width - 1:
                        column = int(np.ceil(max(crossing, 0.0)))
                        flips[row, column] = not flips[row, column]
                        left = min(left, column)
                top, bottom = min(top, start_row), max(bottom, stop_row)
            for row in range(top, min(bottom, height)):
                is_inside = False
                for column in range(left, width):
                    if flips[row, column]:
                        is_inside = not is_inside
                        flips[row, column] = False
                    if is_inside:
                        rasters[k, row, column] = True
