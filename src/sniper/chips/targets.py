"""What a chip teaches: the boxes it shows, and which of them are valid there (SNIPER §3.1, §3.3)."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.chips.chip import Chip
from sniper.geometry.boxes import area


class BoxStatus(IntEnum):
    """How a chip treats one of its boxes.

    VALID: an object inside the level's valid range: anchors and proposals may match it.
    OUT_OF_RANGE: an object too small or too large for this level: no anchor matches it, but a proposal may.
    IGNORE: a crowd, or a sliver of an object: anchors and proposals on it are ignored.
    IN_NEGATIVE_CHIP: an object in a negative chip: anchors and proposals that overlap it are ignored.
    PADDING: no box: fills the rows of chips that have fewer boxes than others in their batch.
    """

    VALID = 0
    OUT_OF_RANGE = 1
    IGNORE = 2
    IN_NEGATIVE_CHIP = 3
    PADDING = 4


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
    """Tell what a chip teaches: every box that it touches, clipped, with its status.

    A box is valid by its size in the image, also where the chip shows only a part of it. A part with a side under
    `min_visible_side` is ignored rather than called background; a whole box stays, however small.

    Args:
        chip: the chip.
        boxes: (n, 4) xyxy, image frame, all boxes of its image. May be empty.
        labels: (n,) their labels.
        is_crowd: (n,) whether each is a region of many objects.
        is_moved_here: (n,) whether each was passed to this chip's level because finer windows could not hold it.
        is_negative: whether the chip is there for what the detector takes for objects; it teaches no box.
        min_visible_side: chip pixels that a clipped box must show in both axes to count (authors' code: 10).
        min_visibility: an object with less of its area left is not there, as far as the chip can tell; a crowd is.

    Returns:
        The boxes that share some area with the chip, and enough of their own, in the order given.
    """
    whole = chip.to_chip(boxes)
    clipped = chip.clip(whole)
    left = area(clipped)
    shown = (left > 0) & (is_crowd | (left >= min_visibility * area(whole)))
    sides = clipped[:, 2:] - clipped[:, :2]
    is_cut = (np.abs(whole - clipped) > 1e-6).any(axis=1)
    is_sliver = is_cut & (sides.min(axis=1, initial=np.inf) < min_visible_side)
    is_ignored = is_crowd | is_sliver | ~is_learnable(boxes)
    is_valid = chip.level.valid_range.contains(boxes) | is_moved_here
    status = np.where(is_valid, BoxStatus.VALID, BoxStatus.OUT_OF_RANGE)
    if is_negative:
        status = np.full(len(boxes), BoxStatus.IN_NEGATIVE_CHIP)
    status = np.where(is_ignored, BoxStatus.IGNORE, status)
    return ChipTarget(boxes=clipped[shown], labels=labels[shown], status=status[shown].astype(np.int64))


def is_learnable(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    """Tell which (n, 4) xyxy boxes of the image frame are at least 1 px wide and high."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1.0).all(axis=1)
