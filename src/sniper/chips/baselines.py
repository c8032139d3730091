"""What else a detector is fed with, to be compared with chips: whole images, at one level or more, and blind tiles."""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le, MinLen
from jaxtyping import Bool, Int
from pydantic import PositiveFloat, PositiveInt

from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import LevelSpec, check_ranges
from sniper.chips.table import ChipTable
from sniper.geometry.boxes import area, intersections
from sniper.specs import Fraction, spec_dataclass


@spec_dataclass
class WholeSpec:
    """Learn from whole images.

    One level without a range is how most detectors are trained. Several are multi-scale training; with valid ranges
    that is SNIP (Singh and Davis 2018), which SNIPER is to equal at less cost.

    Attributes:
        levels: to which images are resized, each in its turn. An image is learnt from where one of its boxes is valid.
        batch_megapixels: images of like shape fill a batch until it has this many million pixels, padding included, or
            as many images as a batch has chips. An image that has more pixels is a batch of its own. None takes as many
            pixels as a batch of chips has.
    """

    levels: Annotated[tuple[LevelSpec, ...], MinLen(1)] = (LevelSpec(short_side=800, max_long_side=1333),)
    batch_megapixels: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_ranges(self.levels)


@spec_dataclass
class TileSpec:
    """Learn from a grid of tiles laid over each image, wherever its objects are.

    Attributes:
        side: of a tile, pixels.
        overlap: share of a tile that the next one repeats, up to 0.9.
        factor: by which images are resized before.
        empty: tiles that show no box are kept, or dropped.
        min_visibility: a box that has less of its area left in a tile is not there, as far as the tile can tell.
    """

    side: PositiveInt = 512
    overlap: Annotated[float, Ge(0), Le(0.9)] = 0.2
    factor: PositiveFloat = 1.0
    empty: Literal["keep", "drop"] = "keep"
    min_visibility: Fraction = 0.1

    @property
    def stride(self) -> int:
        """How far one tile is from the next, pixels."""
        return max(round(self.side * (1 - self.overlap)), 1)


def whole_images(spec: WholeSpec, images: ImageBoxes) -> ChipTable:
    """Give every image at every level at which one of the boxes to be learnt is valid.

    As in SNIP, an image teaches nothing at a level where it has no valid box. Without ranges that leaves out the images
    without boxes alone.

    Example:
        >>> one = ImageBoxes(
        ...     widths=np.array([640]),
        ...     heights=np.array([480]),
        ...     offsets=np.array([0, 1]),
        ...     boxes=np.array([[10.0, 10.0, 40.0, 40.0]]),
        ...     is_wanted=np.array([True]),
        ... )
        >>> table = whole_images(WholeSpec(), one)
        >>> table.widths.tolist(), table.heights.tolist()
        ([1067], [800])
    """
    parts = []
    for index, level in enumerate(spec.levels):
        is_valid = level.valid_range.contains(images.boxes) & images.is_wanted
        own = np.unique(images.image_of_box[is_valid])
        widths, heights = level.resized(images.widths[own], images.heights[own])
        parts.append((own, np.full(len(own), index), widths, heights))
    image_indices, levels, widths, heights = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ChipTable(
        levels=spec.levels,
        image_widths=images.widths,
        image_heights=images.heights,
        image_indices=image_indices,
        level=levels,
        x=np.zeros(len(levels), dtype=np.int64),
        y=np.zeros(len(levels), dtype=np.int64),
        widths=widths,
        heights=heights,
        is_negative=np.zeros(len(levels), dtype=np.bool_),
        moved_to=np.full(len(images.boxes), -1, dtype=np.int8),
    )


def tiles(spec: TileSpec, images: ImageBoxes) -> ChipTable:
    """Lay the grid over every image; its last row and column end at the borders.

    Example:
        >>> one = ImageBoxes(
        ...     widths=np.array([1000]),
        ...     heights=np.array([400]),
        ...     offsets=np.array([0, 0]),
        ...     boxes=np.zeros((0, 4)),
        ...     is_wanted=np.zeros(0, dtype=bool),
        ... )
        >>> tiles(TileSpec(), one).x.tolist()
        [0, 410, 488]
    """
    level = LevelSpec(factor=spec.factor)
    level_widths, level_heights = level.resized(images.widths, images.heights)
    columns, rows = (_num_along(sides, spec) for sides in (level_widths, level_heights))
    counts = columns * rows
    image_indices = np.repeat(np.arange(len(images)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    row, column = np.divmod(place, columns[image_indices])
    table = ChipTable(
        levels=(level,),
        image_widths=images.widths,
        image_heights=images.heights,
        image_indices=image_indices,
        level=np.zeros(len(place), dtype=np.int64),
        x=np.minimum(column * spec.stride, np.maximum(level_widths[image_indices] - spec.side, 0)),
        y=np.minimum(row * spec.stride, np.maximum(level_heights[image_indices] - spec.side, 0)),
        widths=np.full(len(place), spec.side),
        heights=np.full(len(place), spec.side),
        is_negative=np.zeros(len(place), dtype=np.bool_),
        moved_to=np.full(len(images.boxes), -1, dtype=np.int8),
    )
    if spec.empty == "keep":
        return table
    return table.select(np.flatnonzero(_show_boxes(table, images, least=spec.min_visibility)))


def num_tiles(spec: TileSpec, images: ImageBoxes) -> Int[np.ndarray, " m"]:
    """Count the tiles of each image, empty ones too."""
    widths, heights = LevelSpec(factor=spec.factor).resized(images.widths, images.heights)
    return _num_along(widths, spec) * _num_along(heights, spec)


def _num_along(sides: Int[np.ndarray, " m"], spec: TileSpec) -> Int[np.ndarray, " m"]:
    """Count the tiles along one axis of each level image."""
    room: np.ndarray = np.maximum(sides - spec.side, 0)
    return -(-room // spec.stride) + 1


def _show_boxes(table: ChipTable, images: ImageBoxes, *, least: float) -> Bool[np.ndarray, " c"]:
    """Tell which windows of one level show enough of a box to be learnt; the windows of an image follow each other."""
    widths, heights = table.levels[0].resized(images.widths, images.heights)
    scales = np.stack([widths / images.widths, heights / images.heights] * 2, axis=1)  # (m, 4)
    corners = np.stack([table.x, table.y, table.x + table.widths, table.y + table.heights], axis=1)
    starts = np.searchsorted(table.image_indices, np.arange(len(images) + 1))
    shows = np.zeros(len(table), dtype=np.bool_)
    for image in np.flatnonzero(images.has_wanted).tolist():
        own, windows = slice(*images.offsets[image : image + 2]), slice(*starts[image : image + 2])
        boxes = images.boxes[own][images.is_wanted[own]] * scales[image]  # (n, 4)
        left = intersections(corners[windows].astype(np.float64), boxes)  # (w, n)
        shows[windows] = ((left > 0) & (left >= least * area(boxes))).any(axis=1)
    return shows
