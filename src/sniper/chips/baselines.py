"""The alternatives to chips: whole images, at one level or more, and a blind grid of tiles."""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le, MaxLen, MinLen
from jaxtyping import Bool, Int
from pydantic import PositiveFloat, PositiveInt

from sniper.chips.image_boxes import ImageBoxes
from sniper.chips.pyramid import MAX_CHIP_SIZE, MAX_FACTOR, MAX_LEVELS, LevelSpec, check_ranges
from sniper.chips.table import ChipTable
from sniper.errors import ConfigError
from sniper.geometry.boxes import area, intersections
from sniper.specs import Fraction, spec_dataclass

MAX_BATCH_MEGAPIXELS = 1000.0
"""The most pixels in a batch of images of various sizes, in millions: 12 GB."""

_MAX_TILES = 100_000_000
_MAX_PAIRS = 1 << 22  # of a tile and a box that are compared at once


@spec_dataclass
class WholeSpec:
    """Train on whole images.

    One level without a range is how most detectors are trained. Several levels are multi-scale training; with valid
    ranges this is SNIP (Singh and Davis 2018), the accuracy that SNIPER aims at.

    Attributes:
        levels: the levels that images are resized to. An image is used at the levels where one of its boxes is valid.
        batch_megapixels: images of similar shape fill a batch until it has this many million pixels, padding included,
            or as many images as a batch has chips. A larger image is a batch of its own. None takes as many pixels as a
            batch of chips has.
    """

    levels: Annotated[tuple[LevelSpec, ...], MinLen(1), MaxLen(MAX_LEVELS)] = (
        LevelSpec(short_side=800, max_long_side=1333),
    )
    batch_megapixels: Annotated[PositiveFloat, Le(MAX_BATCH_MEGAPIXELS)] | None = None

    def __post_init__(self) -> None:
        check_ranges(self.levels)


@spec_dataclass
class TileSpec:
    """Train on a grid of tiles over each image, placed without regard to its objects.

    Attributes:
        side: side of a tile, pixels.
        overlap: share of a tile that the next one repeats, up to 0.9.
        factor: factor by which images are resized before.
        empty: whether tiles without boxes are kept or dropped.
        min_visibility: boxes with a smaller visible fraction of their area are left out of a tile.
    """

    side: Annotated[PositiveInt, Le(MAX_CHIP_SIZE)] = 512
    overlap: Annotated[float, Ge(0), Le(0.9)] = 0.2
    factor: Annotated[PositiveFloat, Le(MAX_FACTOR)] = 1.0
    empty: Literal["keep", "drop"] = "keep"
    min_visibility: Fraction = 0.1

    @property
    def stride(self) -> int:
        """The distance between neighbouring tiles, pixels."""
        return max(round(self.side * (1 - self.overlap)), 1)


def whole_images(spec: WholeSpec, images: ImageBoxes) -> ChipTable:
    """Return every image at every level where one of its required boxes is valid, level after level.

    As in SNIP, an image without a valid box is not used at a level. Without ranges, these are the images without boxes.

    Example:
        >>> image = ImageBoxes(
        ...     widths=np.array([640]),
        ...     heights=np.array([480]),
        ...     offsets=np.array([0, 1]),
        ...     boxes=np.array([[10.0, 10.0, 40.0, 40.0]]),
        ...     is_required=np.array([True]),
        ... )
        >>> table = whole_images(WholeSpec(), image)
        >>> table.widths.tolist(), table.heights.tolist()
        ([1067], [800])
    """
    parts = []
    for index, level in enumerate(spec.levels):
        is_valid = level.valid_range.contains(images.boxes) & images.is_required
        indices = np.unique(images.image_of_box[is_valid])
        widths, heights = level.resized(images.widths[indices], images.heights[indices])
        parts.append((indices, np.full(len(indices), index), widths, heights))
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
    """Return the tiles of every image, row by row; the last row and column end at the borders.

    Raises:
        ConfigError: if there are too many.

    Example:
        >>> image = ImageBoxes(
        ...     widths=np.array([1000]),
        ...     heights=np.array([400]),
        ...     offsets=np.array([0, 0]),
        ...     boxes=np.zeros((0, 4)),
        ...     is_required=np.zeros(0, dtype=bool),
        ... )
        >>> tiles(TileSpec(), image).x.tolist()
        [0, 410, 488]
    """
    level = LevelSpec(factor=spec.factor)
    level_widths, level_heights = level.resized(images.widths, images.heights)
    columns, rows = (_num_along(sides, spec) for sides in (level_widths, level_heights))
    counts = columns * rows
    if counts.sum() > _MAX_TILES:
        raise ConfigError(
            f"data.tiles: tiles of {spec.side} pixels at a distance of {spec.stride} give {counts.sum():,} tiles, "
            f"expected at most {_MAX_TILES:,}"
        )
    image_indices = np.repeat(np.arange(len(images)), counts)
    position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    row, column = np.divmod(position, columns[image_indices])
    table = ChipTable(
        levels=(level,),
        image_widths=images.widths,
        image_heights=images.heights,
        image_indices=image_indices,
        level=np.zeros(len(position), dtype=np.int64),
        x=np.minimum(column * spec.stride, np.maximum(level_widths[image_indices] - spec.side, 0)),
        y=np.minimum(row * spec.stride, np.maximum(level_heights[image_indices] - spec.side, 0)),
        widths=np.full(len(position), spec.side),
        heights=np.full(len(position), spec.side),
        is_negative=np.zeros(len(position), dtype=np.bool_),
        moved_to=np.full(len(images.boxes), -1, dtype=np.int8),
    )
    if spec.empty == "keep":
        return table
    return table.select(np.flatnonzero(_shows_enough(table, images, min_visibility=spec.min_visibility)))


def num_tiles(spec: TileSpec, images: ImageBoxes) -> Int[np.ndarray, " m"]:
    """Count the tiles of each image, empty tiles included."""
    widths, heights = LevelSpec(factor=spec.factor).resized(images.widths, images.heights)
    return _num_along(widths, spec) * _num_along(heights, spec)


def _num_along(sides: Int[np.ndarray, " m"], spec: TileSpec) -> Int[np.ndarray, " m"]:
    """Count the tiles along one axis of each level image."""
    last_start: np.ndarray = np.maximum(sides - spec.side, 0)
    return -(-last_start // spec.stride) + 1


def _shows_enough(table: ChipTable, images: ImageBoxes, *, min_visibility: float) -> Bool[np.ndarray, " c"]:
    """Check which tiles show enough of a required box; the table must be ordered by image and have one level."""
    widths, heights = table.levels[0].resized(images.widths, images.heights)
    scales = np.stack([widths / images.widths, heights / images.heights] * 2, axis=1)  # (m, 4)
    corners = np.stack([table.x, table.y, table.x + table.widths, table.y + table.heights], axis=1)
    shows = np.zeros(len(table), dtype=np.bool_)
    for image in np.flatnonzero(images.has_required).tolist():
        rows, windows = slice(*images.offsets[image : image + 2]), slice(*table.offsets[image : image + 2])
        boxes = images.boxes[rows][images.is_required[rows]] * scales[image]  # (n, 4)
        at_once = max(_MAX_PAIRS // len(boxes), 1)  # the areas of all may not fit into memory
        for first in range(windows.start, windows.stop, at_once):
            part = slice(first, min(first + at_once, windows.stop))
            shown = intersections(corners[part].astype(np.float64), boxes)  # (w, n)
            shows[part] = ((shown > 0) & (shown >= min_visibility * area(boxes))).any(axis=1)
    return shows
