"""Ground truth in the frame of a chip: its boxes and how training treats each of them (SNIPER §3.2, §3.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.chip import Chip
from sniper.geometry.boxes import area


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
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    status: Int[np.ndarray, " n"]


@runtime_checkable
class SliceableArray(Protocol):
    """An array whose first axis can be sliced, such as a NumPy array or a torch tensor."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return some of its items."""


Array = TypeVar("Array", bound=SliceableArray)
NewArray = TypeVar("NewArray", bound=SliceableArray)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipTargets(Generic[Array]):
    """The ground truth of a batch of chips, all padded to the same number of boxes.

    `Array` is a NumPy array or a torch tensor. Values that are needed as plain numbers are tuples, because reading them
    from a tensor on a GPU would force a sync.

    Attributes:
        boxes: (B, M, 4) float32 xyxy, chip frame, clipped to the chip: the valid boxes of each chip first, then its
            other boxes, then padding of zeros. M is at least 1.
        labels: (B, M) int64, 0..C-1; 0 for padding.
        status: (B, M) int64 values of `BoxStatus`.
        valid_sizes: (B, 2) float32, the half-open valid range of box sizes of each chip, in chip pixels.
        num_boxes: number of boxes of each chip, padding excluded.
        num_valid: number of valid boxes of each chip.
        seeds: one for each chip; random draws for a chip depend on its seed alone.
    """

    boxes: Float[Array, "b m 4"]
    labels: Int[Array, "b m"]
    status: Int[Array, "b m"]
    valid_sizes: Float[Array, "b 2"]
    num_boxes: tuple[int, ...]
    num_valid: tuple[int, ...]
    seeds: tuple[int, ...]

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
        )

    def part(self, start: int, stop: int) -> "ChipTargets[Array]":
        """Return the targets of the chips from `start` up to, but not including, `stop`."""
        arrays: ChipTargets[Array] = self.map(lambda array: array[start:stop])
        return replace(
            arrays,
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
    return ChipTarget(boxes=clipped[is_kept], labels=labels[is_kept], status=status[is_kept].astype(np.int64))


def is_learnable(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    """Check which (n, 4) xyxy boxes, image frame, are at least 1 px wide and high."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1.0).all(axis=1)


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
    shape = len(targets), max(1, *num_boxes)
    boxes = np.zeros((*shape, 4), dtype=np.float32)
    labels = np.zeros(shape, dtype=np.int64)
    status = np.full(shape, BoxStatus.PADDING, dtype=np.int64)
    for i, target in enumerate(targets):
        order = np.argsort(target.status != BoxStatus.VALID, kind="stable")
        boxes[i, : len(order)] = target.boxes[order]
        labels[i, : len(order)] = target.labels[order]
        status[i, : len(order)] = target.status[order]
    return ChipTargets(
        boxes=boxes,
        labels=labels,
        status=status,
        valid_sizes=np.array(valid_sizes, dtype=np.float32),
        num_boxes=num_boxes,
        num_valid=tuple((status == BoxStatus.VALID).sum(axis=1).tolist()),
        seeds=tuple(seeds),
    )


def unstack_targets(targets: ChipTargets[np.ndarray]) -> list[ChipTarget]:
    """Return the targets of each chip without padding, valid boxes first."""
    return [
        ChipTarget(boxes=boxes[:count], labels=labels[:count], status=status[:count])
        for boxes, labels, status, count in zip(
            targets.boxes, targets.labels, targets.status, targets.num_boxes, strict=True
        )
    ]
