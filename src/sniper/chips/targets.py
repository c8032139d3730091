"""Ground truth in the frame of a chip: its boxes and how training treats each of them (SNIPER §3.2, §3.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.chip import Chip
from sniper.geometry.boxes import area
from sniper.geometry.masks import MaskArrays


class BoxStatus(IntEnum):
    """How a chip treats one of its boxes.

    VALID: an object inside the level's valid range: anchors and proposals may match it.
    OUT_OF_RANGE: an object too small or too large for this level, or in a negative chip: no anchor matches it, but a
        proposal may.
    IGNORE: a crowd, or a sliver of an object: anchors and proposals on it are ignored.
    PADDING: no box: fills the rows of chips that have fewer boxes than others in their batch.
    """

    VALID = 0
    OUT_OF_RANGE = 1
    IGNORE = 2
    PADDING = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipTarget:
    """The ground truth of one chip.

    Attributes:
        boxes: (n, 4) xyxy, chip frame, clipped to the chip. May be empty.
        labels: (n,) contiguous class labels, 0..C-1.
        status: (n,) values of `BoxStatus`.
        masks: polygons of the n objects, chip frame, not clipped; ignored boxes have none. None where the data set has
            no masks.
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    status: Int[np.ndarray, " n"]
    masks: MaskArrays | None = None


@runtime_checkable
class SliceableArray(Protocol):
    """An array whose first axis can be sliced, such as a NumPy array or a torch tensor."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return some of its items."""


Array = TypeVar("Array", bound=SliceableArray)
NewArray = TypeVar("NewArray", bound=SliceableArray)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipMasks(Generic[Array]):
    """The masks of the boxes of a batch of chips, as polygons: what `rasterize_rings` and its like take.

    The mask of a box is the union of its rings, each filled by the even-odd rule.

    Attributes:
        points: (p, 2) float32 xy of the corners of all rings, chip frame, not clipped to the chip.
        ring_offsets: (r + 1,) int64, where the points of each ring begin; the last is p.
        rings: (B, M, 2) int64, for each box its first ring and the one after its last; equal for a box without a mask,
            and for padding.
    """

    points: Float[Array, "p 2"]
    ring_offsets: Int[Array, " r_plus_1"]
    rings: Int[Array, "b m 2"]

    def map(self, function: Callable[[Array], NewArray]) -> "ChipMasks[NewArray]":
        """Apply a function to every array."""
        return ChipMasks(
            points=function(self.points),
            ring_offsets=function(self.ring_offsets),
            rings=function(self.rings),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipTargets(Generic[Array]):
    """The ground truth of a batch of chips, all padded to the same number of boxes.

    `Array` is a NumPy array or a torch tensor. Values that are needed as plain numbers are tuples, because reading them
    from a tensor on a GPU would force a sync.

    Attributes:
        boxes: (B, M, 4) float32 xyxy, chip frame, clipped to the chip: the valid boxes of each chip first, then its
            other boxes, then padding of zeros. M is a `padded_count`.
        labels: (B, M) int64, 0..C-1; 0 for padding.
        status: (B, M) int64 values of `BoxStatus`.
        valid_sizes: (B, 2) float32, the half-open valid range of box sizes of each chip, in chip pixels.
        num_boxes: number of boxes of each chip, padding excluded.
        num_valid: number of valid boxes of each chip.
        seeds: one for each chip; random draws for a chip depend on its seed alone.
        masks: of the boxes; None where the data set has no masks.
    """

    boxes: Float[Array, "b m 4"]
    labels: Int[Array, "b m"]
    status: Int[Array, "b m"]
    valid_sizes: Float[Array, "b 2"]
    num_boxes: tuple[int, ...]
    num_valid: tuple[int, ...]
    seeds: tuple[int, ...]
    masks: ChipMasks[Array] | None = None

    def __len__(self) -> int:
        return len(self.num_boxes)

    def map(self, function: Callable[[Array], NewArray]) -> "ChipTargets[NewArray]":
        """Apply a function to every array, for instance to move them to a device."""
        return ChipTargets(
            boxes=function(self.boxes),
            labels=function(self.labels),
            status=function(self.status),
            valid_sizes=function(self.valid_sizes),
            num_boxes=self.num_boxes,
            num_valid=self.num_valid,
            seeds=self.seeds,
            masks=None if self.masks is None else self.masks.map(function),
        )

    def part(self, start: int, stop: int) -> "ChipTargets[Array]":
        """Return the targets of the chips from `start` up to, but not including, `stop`."""
        masks = self.masks  # the rings of all chips are kept: those of a part are not known without a sync
        arrays: ChipTargets[Array] = replace(self, masks=None).map(lambda array: array[start:stop])
        return replace(
            arrays,
            masks=None if masks is None else replace(masks, rings=masks.rings[start:stop]),
            num_boxes=self.num_boxes[start:stop],
            num_valid=self.num_valid[start:stop],
            seeds=self.seeds[start:stop],
        )


def assign_targets(
    chip: Chip,
    *,
    boxes: Float[np.ndarray, "n 4"],
    labels: Int[np.ndarray, " n"],
    is_crowd: Bool[np.ndarray, " n"],
    is_moved_here: Bool[np.ndarray, " n"],
    is_negative: bool = False,
    masks: MaskArrays | None = None,
    min_visible_side: float = 10.0,
    min_visibility: float = 0.0,
) -> ChipTarget:
    """Compute the ground truth of one chip: the boxes that overlap it, clipped, each with its status.

    Whether a box is valid depends on its size in the image, also where the chip shows only a part of it. A clipped box
    with a side below `min_visible_side` is ignored instead of counting as background; a whole box stays, however small.

    Args:
        chip: the chip.
        boxes: (n, 4) xyxy, image frame, all boxes of its image. May be empty.
        labels: (n,) their labels.
        is_crowd: (n,) whether each is a crowd region.
        is_moved_here: (n,) whether each was moved to this chip's level because it fits into no chip of a finer level.
        is_negative: whether this is a negative chip, which has no valid boxes.
        masks: of the n objects, image frame, if the data set has masks.
        min_visible_side: smallest side of a clipped box that is not ignored, chip pixels (authors' code: 10).
        min_visibility: smallest share of its area that an object must keep; with less it is left out. Crowds are always
            kept.

    Returns:
        The boxes that share some area with the chip and are not left out, in the order given.
    """
    whole = chip.to_chip(boxes)
    clipped = chip.clip(whole)
    visible = area(clipped)
    is_kept = (visible > 0) & (is_crowd | (visible >= min_visibility * area(whole)))
    sides = clipped[:, 2:] - clipped[:, :2]
    is_cut = (np.abs(whole - clipped) > 1e-6).any(axis=1)
    is_sliver = is_cut & (sides.min(axis=1, initial=np.inf) < min_visible_side)
    is_ignored = is_crowd | is_sliver | ~is_learnable(boxes)
    is_valid = (chip.level.valid_range.contains(boxes) | is_moved_here) & (not is_negative)
    status = np.where(is_valid, BoxStatus.VALID, BoxStatus.OUT_OF_RANGE)
    status = np.where(is_ignored, BoxStatus.IGNORE, status)
    return ChipTarget(
        boxes=clipped[is_kept],
        labels=labels[is_kept],
        status=status[is_kept].astype(np.int64),
        masks=None if masks is None else _to_chip(masks, chip, is_kept=is_kept, is_used=~is_ignored),
    )


def _to_chip(
    masks: MaskArrays, chip: Chip, *, is_kept: Bool[np.ndarray, " n"], is_used: Bool[np.ndarray, " n"]
) -> MaskArrays:
    """Return the polygons of the kept objects in the chip frame, without those of unused ones."""
    polygons = masks.select(np.flatnonzero(is_kept & is_used)).to_polygons()
    points = chip.to_chip(np.tile(polygons.points.astype(np.float64), 2))[:, :2]
    return polygons.with_points(points.astype(np.float32)).spread(is_used[is_kept])


def is_learnable(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    """Check which (n, 4) xyxy boxes, image frame, are at least 1 px wide and high."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1.0).all(axis=1)


def padded_count(count: int) -> int:
    """Return the number of boxes that a number is padded to: 8, 16, 24, 32, and from there multiples of 32.

    Few shapes occur, since a GPU prepares for each anew.

    Example:
        >>> [padded_count(count) for count in (0, 8, 9, 33)]
        [8, 8, 16, 64]
    """
    multiple = 8 if count <= 32 else 32
    return max(-(-count // multiple), 1) * multiple


def stack_targets(
    targets: Sequence[ChipTarget], *, valid_sizes: Sequence[Sequence[float]], seeds: Sequence[int]
) -> ChipTargets[np.ndarray]:
    """Stack the targets of the chips of a batch, valid boxes first, and pad them to one number of boxes.

    Args:
        targets: of each chip; at least one.
        valid_sizes: the two ends of the valid range of each chip, chip pixels.
        seeds: one for each chip.
    """
    num_boxes = tuple(len(target.labels) for target in targets)
    shape = len(targets), padded_count(max(num_boxes))
    boxes = np.zeros((*shape, 4), dtype=np.float32)
    labels = np.zeros(shape, dtype=np.int64)
    status = np.full(shape, BoxStatus.PADDING, dtype=np.int64)
    orders = []
    for i, target in enumerate(targets):
        order = np.argsort(target.status != BoxStatus.VALID, kind="stable")
        boxes[i, : len(order)] = target.boxes[order]
        labels[i, : len(order)] = target.labels[order]
        status[i, : len(order)] = target.status[order]
        orders.append(order)
    return ChipTargets(
        boxes=boxes,
        labels=labels,
        status=status,
        valid_sizes=np.array(valid_sizes, dtype=np.float32),
        num_boxes=num_boxes,
        num_valid=tuple((status == BoxStatus.VALID).sum(axis=1).tolist()),
        seeds=tuple(seeds),
        masks=_stack_masks(targets, orders, num_boxes=shape[1]),
    )


def _stack_masks(
    targets: Sequence[ChipTarget], orders: Sequence[Int[np.ndarray, " _"]], *, num_boxes: int
) -> ChipMasks[np.ndarray] | None:
    """Stack the masks of the chips of a batch, those of each chip in another order."""
    masks = [
        target.masks.select(order)
        for target, order in zip(targets, orders, strict=True)
        if target.masks is not None
    ]
    if len(masks) < len(targets):
        return None
    rings = np.zeros((len(targets), num_boxes, 2), dtype=np.int64)
    joined, first = MaskArrays.concatenate(masks), 0
    for of_chip, each in zip(rings, masks, strict=True):
        of_chip[: len(each), 0] = joined.offsets[first : first + len(each)]
        of_chip[: len(each), 1] = joined.offsets[first + 1 : first + len(each) + 1]
        first += len(each)
    return ChipMasks(points=joined.points, ring_offsets=joined.ring_offsets, rings=rings)
