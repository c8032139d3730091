"""Search a fine level only where coarser levels have found, or suspect, objects of the sizes that it answers for.

There are two sources of such cues: the detections themselves, since the unsure ones of a coarse level say where small
objects are likely; and the cells of a branch that is trained to predict such places, as in AutoFocus (Najibi et al.
2019). One cover makes windows of either.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips import ImageBoxes, Level, LevelSpec, PyramidSpec
from sniper.chips.cover import cover_dense
from sniper.config.experiment import FocusSpec, PredictSpec
from sniper.errors import ConfigError
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.geometry.focus_cells import FocusCells
from sniper.geometry.nms import soft_nms
from sniper.inference.windows import GRID, FreeWindow, Tiling, Window, WindowDetections, join_windows

_SEEN_SIZE = 16.0  # level pixels that an object needs to be seen at a coarser level: a cell of stride 16
_COMMON_SIZE = 64.0  # level pixels of objects that every level is taken to have, whatever its valid range
_MARGIN = 32  # level pixels around an object that help to recognize it
_SIZE_TOLERANCE = 1.25  # sizes of objects are not exact at a coarser level
_UNITS = 20  # of which the minimum sum of scores consists: scores are counted in whole ones
_TOLERANCE = 16.0  # level pixels; of the depth of one object as two windows detect it
_DUPLICATE_IOU = 0.5  # of the detections that stand for one object


def check_levels(spec: PredictSpec) -> None:
    """Check that a focus that is set has levels to search less of.

    Raises:
        ConfigError: if there is one level.
    """
    if isinstance(spec.focus, FocusSpec) and len(spec.levels) < 2:
        raise ConfigError(
            "predict.focus: has no effect on one level (predict.levels); a focus needs a coarser one beside it, so set "
            "it to null, or more levels"
        )


@dataclass(frozen=True, kw_only=True)
class FocusWindow(FreeWindow):
    """A window at a likely place. Of the windows that show an object, the one in which it is deepest is responsible.

    Attributes:
        others: (k, 4) xyxy, level frame, the windows of the level that overlap this one.
    """

    others: tuple[tuple[int, int, int, int], ...] = ()

    def responsible(
        self, boxes: Float[np.ndarray, "n 4"]
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """See `Window.responsible`."""
        own, *others = depths(
            self._to_level(boxes), np.array([self.corners, *self.others], dtype=np.float64), self.level
        )
        deepest = np.max(others, axis=0) if others else np.full(len(boxes), -np.inf)
        is_responsible = own >= deepest - _TOLERANCE
        return is_responsible, is_responsible & (deepest >= own - _TOLERANCE)


def depths(
    boxes: Float[np.ndarray, "n 4"], windows: Float[np.ndarray, "w 4"], level: Level
) -> Float[np.ndarray, "w n"]:
    """Return how deep the centres of boxes lie inside windows: the distance from the nearest inner border.

    Args:
        boxes: (n, 4) xyxy, level frame.
        windows: (w, 4) xyxy, level frame.
        level: the level; its borders are no inner ones.

    Returns:
        (w, n) level pixels; negative outside.
    """
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    left, top, right, bottom = (windows[:, [side]] for side in range(4))
    return np.minimum.reduce(
        [
            np.where(left > 0, x - left, np.inf),
            np.where(top > 0, y - top, np.inf),
            np.where(right < level.width, right - x, np.inf),
            np.where(bottom < level.height, bottom - y, np.inf),
        ]
    )


@dataclass(kw_only=True, eq=False)
class LevelResult:
    """What was found at one level of an image, whatever its size.

    Attributes:
        level: the level.
        windows: the detections of each window that was searched.
        cells: of the focus head, of the whole level; 0 where it was not searched. None if there are none.
    """

    level: Level
    windows: dict[Window, WindowDetections] = field(default_factory=dict)
    cells: FocusCells | None = None

    def add(self, window: Window, detections: Detections) -> None:
        """Add the detections of a window, in its frame; in place of earlier ones, where a search of it is repeated."""
        self.windows[window] = WindowDetections.of(window, detections, in_valid_range=False)

    def add_cells(self, window: Window, cells: FocusCells) -> None:
        """Add the cells of a window; where windows overlap, the higher probability counts."""
        if self.cells is None:
            sides = Sides(self.level.width, self.level.height)
            self.cells = FocusCells.none(sides, stride=cells.stride)
        x, y, _, _ = window.corners
        self.cells = self.cells.joined(cells, x=x, y=y)

    @property
    def searched_boxes(self) -> Float[np.ndarray, "w 4"]:
        """The windows that were searched, xyxy, image frame."""
        corners = [window.corners for window in self.windows]
        return self.level.to_image(np.array(corners, dtype=np.float64).reshape(-1, 4))

    def has_shown(self, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
        """Check which boxes, (n, 4) xyxy in the image frame, the level answers for and has shown in a window."""
        x, y = ((boxes[:, axis, None] + boxes[:, axis + 2, None]) / 2 for axis in (0, 1))
        x1, y1, x2, y2 = self.searched_boxes.T
        is_inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)  # (n, w)
        return is_inside.any(axis=1) & self.level.valid_range.contains(boxes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cues:
    """Places where objects of a level are likely.

    Attributes:
        boxes: (n, 4) xyxy, image frame. May be empty.
        scores: (n,) from 0 to 1.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]


def choose_windows(
    level: Level, coarser: Sequence[LevelResult], *, focus: FocusSpec, limit: int | Sides
) -> Sequence[Window]:
    """Choose the windows of a level that are searched.

    Windows are taken greedily, each the one that contains the most cues that no other window contains, weighted by
    their scores, as long as the scores sum to at least `focus.min_score`. The level is searched as a whole if no
    coarser level can show its objects, or if the windows would have as many pixels.

    Args:
        level: the level, bound to an image.
        coarser: what was found at the coarser levels, coarsest first.
        focus: where to search.
        limit: longest side of a window of a level that is searched as a whole, or both sides, level pixels.

    Returns:
        The windows, row by row; none if nothing is likely.
    """
    whole = list(Tiling.of(level, limit=limit).windows())
    if not coarser or not shows_objects_of(level, coarser[-1].level):
        return whole
    cues = _cells_of(coarser[-1]) if focus.cues == "head" else _detections_of(coarser, level)
    corners = _cover(level, cues, focus)
    if _num_pixels(corners) >= sum(
        window.padded_sides.width * window.padded_sides.height for window in whole
    ):
        return whole
    rows = [tuple(row) for row in corners.tolist()]
    others = _overlapping(corners)
    return [
        FocusWindow(level=level, corners=row, others=tuple(rows[other] for other in others[index]))
        for index, row in enumerate(rows)
    ]


def shows_objects_of(finer: Level, coarser: Level) -> bool:
    """Check whether objects of a level can still be seen at the next coarser one, which a focus needs.

    Those of 64 pixels of the level, and the largest ones of its valid range, must have at least 16 pixels there: either
    of them, since a range may be narrow, or not end at all.
    """
    below = finer.valid_range.below
    largest = max(_COMMON_SIZE / finer.scale, below if math.isfinite(below) else 0.0)
    return largest * coarser.scale >= _SEEN_SIZE


def focused_levels(levels: Sequence[LevelSpec], sides: Sides) -> list[Level]:
    """Return the levels of an image that a focus may search less of.

    Args:
        levels: of inference.
        sides: of the image.
    """
    by_scale = sorted((level.at(**sides._asdict()) for level in levels), key=lambda level: level.scale)
    return [finer for coarser, finer in itertools.pairwise(by_scale) if shows_objects_of(finer, coarser)]


def _overlapping(corners: Int[np.ndarray, "w 4"]) -> list[list[int]]:
    """Return for each window, (w, 4) xyxy, the indices of the others that overlap it."""
    overlaps = np.logical_and.reduce(
        [corners[:, None, side] < corners[None, :, side + 2] for side in (0, 1)]
        + [corners[None, :, side] < corners[:, None, side + 2] for side in (0, 1)]
    )  # (w, w)
    return [
        [other for other in np.flatnonzero(row).tolist() if other != index]
        for index, row in enumerate(overlaps)
    ]


def _detections_of(coarser: Sequence[LevelResult], level: Level) -> Cues:
    """Return the detections whose size a level answers for, one for each object."""
    joined = join_windows([window for of_level in coarser for window in of_level.windows.values()])
    low, high = level.valid_range.at_least, level.valid_range.below
    sizes = np.sqrt(np.prod(joined.boxes[:, 2:] - joined.boxes[:, :2], axis=1))
    is_in_range = (sizes * _SIZE_TOLERANCE >= low) & (sizes < high * _SIZE_TOLERANCE)
    each = soft_nms(joined[is_in_range], decay="hard", iou_threshold=_DUPLICATE_IOU, score_threshold=0.0)
    return Cues(boxes=each.boxes, scores=each.scores)


def _cells_of(coarser: LevelResult) -> Cues:
    """Return the cells of the focus head; a level that was searched nowhere has none."""
    if coarser.cells is None:
        return Cues(boxes=np.zeros((0, 4)), scores=np.zeros(0))
    boxes = coarser.level.to_image(coarser.cells.boxes())
    return Cues(boxes=boxes, scores=coarser.cells.probabilities.reshape(-1).astype(np.float64))


def _cover(level: Level, cues: Cues, focus: FocusSpec) -> Int[np.ndarray, "w 4"]:
    """Return the windows, (w, 4) xyxy in the level frame, whose corners lie on the grid."""
    padded = [max(-(-side // GRID) * GRID, focus.window) for side in (level.width, level.height)]
    units = np.rint(cues.scores * (_UNITS / focus.min_score)).astype(np.int64).clip(0, _UNITS)
    boxes, units = level.to_level(cues.boxes[units > 0]), units[units > 0]
    centres, halves = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    halves = np.minimum(halves + _MARGIN, (focus.window - GRID) / 2)  # what a window on the grid can contain
    boxes = np.concatenate([centres - halves, centres + halves], axis=1)
    boxes = boxes.clip(0, np.tile(np.array(padded, dtype=np.float64), 2))
    boxes = np.repeat(boxes, units, axis=0)
    count = len(boxes)
    table, _ = cover_dense(
        PyramidSpec(
            chip_size=focus.window,
            stride=GRID,
            levels=(LevelSpec(factor=1.0), LevelSpec(long_side=focus.window)),
        ),
        ImageBoxes(
            widths=np.array([padded[0]]),
            heights=np.array([padded[1]]),
            offsets=np.array([0, count]),
            boxes=boxes,
            is_required=np.ones(count, dtype=np.bool_),
        ),
        is_excluded=np.tile([False, True], (count, 1)),
        min_boxes=np.array([_UNITS, _UNITS]),
        generator=np.random.default_rng(0),
    )
    corners = np.stack([table.x, table.y, table.x + focus.window, table.y + focus.window], axis=1)
    corners = corners.astype(np.int64)[np.lexsort([table.x, table.y])]
    return corners.clip(0, [level.width, level.height] * 2)


def _num_pixels(corners: Int[np.ndarray, "w 4"]) -> int:
    """Return the number of pixels of windows that are padded to the grid."""
    sides = -(-(corners[:, 2:] - corners[:, :2]) // GRID) * GRID
    return int(sides.prod(axis=1).sum())
