"""Overlapping windows of a large level image, and the detections of all windows joined without duplicates.

The corners of windows lie on a grid that all strides of the network divide, so that far from its borders a window shows
the network the same pixels as the whole level image would. Each window is responsible for the objects whose centres are
nearest to its own. An object longer than the overlap is truncated by the border of its window; a truncated detection is
dropped where another window or level has detected the whole object.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from sniper.chips import ChipTable, ImageBoxes, Level, LevelSpec
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.geometry.nms import is_mostly_contained, soft_nms

GRID = 64  # level pixels; all strides divide it
_CONTEXT = 64  # level pixels around an object that help to recognize it
_MAX_ELONGATION = 1.5  # longest side of an object over its size, up to which one window contains all of it
_BORDER = 4.0  # level pixels; a box that ends this close to an inner border is truncated by it
_SHARED = 8.0  # level pixels; tolerance for the centre of one object as two windows detect it
_DUPLICATE_IOU = 0.7  # of two windows' detections of one object
_MIN_OVERLAP = 0.7  # of a truncated detection with the whole one
_MIN_SCORE_RATIO = 0.5  # of the whole detection to the truncated one


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a level image, divided into overlapping windows.

    Attributes:
        spans: start and stop of each window, level pixels.
    """

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, length: int, *, limit: int, overlap: float) -> "Axis":
        """Divide an axis.

        Args:
            length: of the level image, pixels.
            limit: maximum length of a window, pixels.
            overlap: of neighbouring windows, pixels; half of the limit at most.
        """
        if length <= limit:
            return cls(spans=((0, length),))
        step = max(math.floor((limit - min(overlap, limit / 2)) / GRID), 1) * GRID
        num_windows = math.ceil((length - limit) / step) + 1
        starts = [i * step for i in range(num_windows)]
        return cls(spans=tuple((start, min(start + limit, length)) for start in starts))

    def is_truncated(
        self, index: int, low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """Check which intervals, (n,) in level pixels, end at an inner border of a window."""
        start, stop = self.spans[index]
        is_truncated = np.zeros(len(low), dtype=np.bool_)
        if index > 0:
            is_truncated |= low < start + _BORDER
        if index + 1 < len(self.spans):
            is_truncated |= high > stop - _BORDER
        return is_truncated

    def responsible(
        self, index: int, centres: Float[np.ndarray, " n"]
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Check for which centres, (n,) in level pixels, a window is responsible, and for which its neighbour is, too.

        The line between neighbours is the middle of their overlap. Two windows detect the same object with slightly
        different centres, so both are responsible near the line.
        """
        start = -math.inf if index == 0 else self._line(index)
        stop = math.inf if index + 1 == len(self.spans) else self._line(index + 1)
        is_responsible = (centres >= start - _SHARED) & (centres < stop + _SHARED)
        is_near_line = (np.abs(centres - start) <= _SHARED) | (np.abs(centres - stop) <= _SHARED)
        return is_responsible, is_responsible & is_near_line

    def _line(self, index: int) -> float:
        return (self.spans[index - 1][1] + self.spans[index][0]) / 2


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The windows of one level of one image.

    Attributes:
        level: the level.
        x_axis: the windows from left to right.
        y_axis: the windows from top to bottom.
    """

    level: Level
    x_axis: Axis
    y_axis: Axis

    @classmethod
    def of(cls, level: Level, *, limit: int | Sides) -> "Tiling":
        """Divide a level image into windows whose overlap contains the largest objects of the level.

        Args:
            level: the level.
            limit: maximum side of a window, or maximum width and height, level pixels.
        """
        width, height = (limit, limit) if isinstance(limit, int) else limit
        overlap = _MAX_ELONGATION * level.valid_sizes[1] + _CONTEXT
        return cls(
            level=level,
            x_axis=Axis.of(level.width, limit=width, overlap=overlap),
            y_axis=Axis.of(level.height, limit=height, overlap=overlap),
        )

    def windows(self) -> Iterator["TilingWindow"]:
        """Iterate the windows, row by row."""
        for row in range(len(self.y_axis.spans)):
            for column in range(len(self.x_axis.spans)):
                yield TilingWindow.of(self, column=column, row=row)


@dataclass(frozen=True, kw_only=True)
class Window(ABC):
    """A part of a level image that is searched at once; the whole of a small one.

    Attributes:
        level: the level.
        corners: the window as xyxy, level frame, whole pixels.
    """

    level: Level
    corners: tuple[int, int, int, int]

    @property
    def sides(self) -> Sides:
        """Width and height, level pixels."""
        x1, y1, x2, y2 = self.corners
        return Sides(x2 - x1, y2 - y1)

    @property
    def padded_sides(self) -> Sides:
        """Width and height, padded to the grid as detectors do."""
        width, height = self.sides
        return Sides(-(-width // GRID) * GRID, -(-height // GRID) * GRID)

    def to_image(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Convert (n, 4) xyxy boxes from the window's frame to the image frame."""
        return self.level.to_image(self._to_level(boxes))

    @abstractmethod
    def is_truncated(self, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
        """Check which boxes, (n, 4) xyxy in the window's frame, end at an inner border of it."""

    @abstractmethod
    def responsible(
        self, boxes: Float[np.ndarray, "n 4"]
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Check for which boxes of its frame this window is responsible, and for which another is, too."""

    def keeps(
        self, boxes: Float[np.ndarray, "n 4"], *, in_valid_range: bool
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Check which boxes of its frame are kept: those that this window is responsible for.

        Args:
            boxes: (n, 4) xyxy, in the window's frame.
            in_valid_range: keep only boxes with a size in the valid range of the level.

        Returns:
            (n,) which are kept, and for which another window is responsible, too.
        """
        is_kept, is_shared = self.responsible(boxes)
        if in_valid_range:
            is_kept = is_kept & self.level.valid_range.contains(self.to_image(boxes))
        return is_kept, is_shared

    def _to_level(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        x, y, _, _ = self.corners
        return boxes + np.array([x, y, x, y])


@dataclass(frozen=True, kw_only=True)
class TilingWindow(Window):
    """One of the windows into which a level image is divided.

    Attributes:
        tiling: all windows of the level.
        column: index from the left.
        row: index from the top.
    """

    tiling: Tiling
    column: int
    row: int

    @classmethod
    def of(cls, tiling: Tiling, *, column: int, row: int) -> "TilingWindow":
        """Return the window in a column and a row."""
        (x1, x2), (y1, y2) = tiling.x_axis.spans[column], tiling.y_axis.spans[row]
        return cls(level=tiling.level, corners=(x1, y1, x2, y2), tiling=tiling, column=column, row=row)

    def is_truncated(self, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
        """See `Window.is_truncated`."""
        x1, y1, x2, y2 = self._to_level(boxes).T
        return self.tiling.x_axis.is_truncated(self.column, x1, x2) | self.tiling.y_axis.is_truncated(
            self.row, y1, y2
        )

    def responsible(
        self, boxes: Float[np.ndarray, "n 4"]
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """See `Window.responsible`: the window whose centre is nearest is responsible."""
        x, y, _, _ = self.corners
        in_x, shared_in_x = self.tiling.x_axis.responsible(self.column, x + (boxes[:, 0] + boxes[:, 2]) / 2)
        in_y, shared_in_y = self.tiling.y_axis.responsible(self.row, y + (boxes[:, 1] + boxes[:, 3]) / 2)
        is_responsible = in_x & in_y
        return is_responsible, is_responsible & (shared_in_x | shared_in_y)


@dataclass(frozen=True, kw_only=True)
class FreeWindow(Window):
    """A window at any place, such as a chip: all other windows may show the same objects."""

    def is_truncated(self, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
        """See `Window.is_truncated`."""
        left, top, right, bottom = self.corners
        x1, y1, x2, y2 = self._to_level(boxes).T
        is_truncated = np.zeros(len(boxes), dtype=np.bool_)
        for is_inner, ends in (
            (left > 0, x1 < left + _BORDER),
            (top > 0, y1 < top + _BORDER),
            (right < self.level.width, x2 > right - _BORDER),
            (bottom < self.level.height, y2 > bottom - _BORDER),
        ):
            is_truncated |= ends & is_inner
        return is_truncated

    def responsible(
        self, boxes: Float[np.ndarray, "n 4"]
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """See `Window.responsible`: it is for all."""
        is_responsible = np.ones(len(boxes), dtype=np.bool_)
        return is_responsible, is_responsible


def list_windows(levels: Sequence[LevelSpec], images: ImageBoxes, *, limit: int) -> ChipTable:
    """Return the windows in which images are searched at all levels, as squares of the longest side of a window.

    Args:
        levels: at which images are searched.
        images: their boxes do not matter.
        limit: longest side of a window, level pixels.

    Returns:
        The windows, ordered by image. What is beyond the image is padding.
    """
    rows = [
        (image, level.index, *window.corners[:2])
        for image, (width, height) in enumerate(
            zip(images.widths.tolist(), images.heights.tolist(), strict=True)
        )
        for level in (spec.at(width=width, height=height, index=index) for index, spec in enumerate(levels))
        for window in Tiling.of(level, limit=limit).windows()
    ]
    image_indices, level_indices, x, y = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return ChipTable(
        levels=tuple(levels),
        image_widths=images.widths,
        image_heights=images.heights,
        image_indices=image_indices,
        level=level_indices,
        x=x,
        y=y,
        widths=np.full(len(rows), limit),
        heights=np.full(len(rows), limit),
        is_negative=np.zeros(len(rows), dtype=np.bool_),
        moved_to=np.full(len(images.boxes), -1, dtype=np.int8),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowDetections:
    """The detections that a window is responsible for.

    Attributes:
        level: index of the window's level.
        detections: in the image frame.
        is_truncated: (n,) whether each ends at an inner border of the window.
        is_shared: (n,) whether another window of the level is responsible for each, too.
    """

    level: int
    detections: Detections
    is_truncated: Bool[np.ndarray, " n"]
    is_shared: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, window: Window, detections: Detections, *, in_valid_range: bool) -> "WindowDetections":
        """Select the detections that a window is responsible for.

        Args:
            window: the window.
            detections: all of its detections, in its frame.
            in_valid_range: select only boxes with a size in the valid range of the level.
        """
        is_kept, is_shared = window.keeps(detections.boxes, in_valid_range=in_valid_range)
        return cls(
            level=window.level.index,
            detections=_to_image(detections[is_kept], window.to_image),
            is_truncated=window.is_truncated(detections.boxes)[is_kept],
            is_shared=is_shared[is_kept],
        )

    def select(self, is_kept: Bool[np.ndarray, " n"]) -> "WindowDetections":
        """Return some of the detections."""
        return replace(
            self,
            detections=self.detections[is_kept],
            is_truncated=self.is_truncated[is_kept],
            is_shared=self.is_shared[is_kept],
        )


def _to_image(
    detections: Detections, convert: Callable[[Float[np.ndarray, "n 4"]], Float[np.ndarray, "n 4"]]
) -> Detections:
    """Convert detections to the image frame, boxes and masks."""
    masks = detections.masks
    return replace(
        detections,
        boxes=convert(detections.boxes),
        masks=None if masks is None else masks.with_boxes(convert(masks.boxes)),
    )


def join_windows(windows: Sequence[WindowDetections]) -> Detections:
    """Join the detections of all windows and levels of one image.

    Truncated detections are dropped where another window or level has detected the whole object, and so are duplicates
    that two windows of one level have detected near the line between them. Detections of different levels are not
    merged.
    """
    if not windows:
        return Detections.empty()
    joined = Detections.join([window.detections for window in windows])
    is_truncated = np.concatenate([window.is_truncated for window in windows])
    is_shared = np.concatenate([window.is_shared for window in windows])
    level = np.repeat(
        [window.level for window in windows], [len(window.detections) for window in windows]
    )  # (n,)
    is_kept = ~is_mostly_contained(
        joined, is_truncated, min_overlap=_MIN_OVERLAP, min_score_ratio=_MIN_SCORE_RATIO
    )
    shared_per_level = [
        joined[is_kept & is_shared & (level == index)] for index in np.unique(level[is_shared])
    ]
    without_duplicates = [
        soft_nms(detections, decay="hard", iou_threshold=_DUPLICATE_IOU, score_threshold=0.0)
        for detections in shared_per_level
    ]
    return Detections.join([joined[is_kept & ~is_shared], *without_duplicates])
