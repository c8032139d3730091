"""Find the images that a filter keeps: by the class, size and level of their objects and detections, and by errors."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.browse.chips import ChosenChips
from sniper.browse.content import MatchedDetections
from sniper.chips import ValidRange
from sniper.data.datasets import Dataset

Kind = Literal["all", "objects", "empty", "errors", "false", "missed", "correct"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Images to keep: all; with or without objects; with an error, a false positive or a missed object; with no error."""

ERROR_KINDS: tuple[Kind, ...] = ("errors", "false", "missed", "correct")
"""Those that need detections."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which images are kept.

    Attributes:
        kind: see `KINDS`; only boxes of the class, size and level below count.
        label: of objects and detections; None for every class.
        at_least: smallest size of a box, image pixels.
        below: smallest size that is too large, image pixels.
        level: index of the level that learns from a box; None for every level.
        name: part of the file name, in any case; empty for every name.
        min_score: detections with a lower score do not count.
    """

    kind: Kind = "all"
    label: int | None = None
    at_least: float = 0.0
    below: float = math.inf
    level: int | None = None
    name: str = ""
    min_score: float = 0.0

    @property
    def selects_boxes(self) -> bool:
        """Whether class, size or level of a box matters."""
        return (self.label, self.level) != (None, None) or self.at_least > 0 or self.below < math.inf


def select_images(
    dataset: Dataset,
    chosen: Filter,
    *,
    detections: MatchedDetections | None = None,
    chips: ChosenChips | None = None,
) -> Int[np.ndarray, " k"]:
    """Return the indices of the images that a filter keeps, rising.

    Args:
        dataset: the images and their objects.
        chosen: the filter. Its level is of the pyramid of the chips.
        detections: of the images; required by `ERROR_KINDS`.
        chips: required by a filter with a level.

    Raises:
        ValueError: if detections or chips are required and None.
    """
    is_kept = _counts(dataset, chosen, detections=detections, chips=chips)
    if chosen.name:
        part = chosen.name.casefold()
        is_kept &= np.array([part in name.casefold() for name in dataset.file_names.tolist()], dtype=np.bool_)
    return np.flatnonzero(is_kept)


def _counts(
    dataset: Dataset, chosen: Filter, *, detections: MatchedDetections | None, chips: ChosenChips | None
) -> Bool[np.ndarray, " m"]:
    """Check which images are kept, whatever their names."""
    if chosen.kind == "all" and not chosen.selects_boxes:
        return np.ones(len(dataset), dtype=np.bool_)
    moved_to = None if chips is None else chips.table.moved_to
    fits = _fits(chosen, dataset.boxes, dataset.labels, chips, moved_to=moved_to)
    is_object = fits & ~dataset.is_crowd
    has_object = _any(is_object, dataset.offsets)
    if chosen.kind == "objects":
        return has_object
    if chosen.kind == "empty":
        return ~has_object
    if detections is None:
        if chosen.kind == "all":
            return has_object
        raise ValueError(f"{chosen.kind} requires detections")
    is_shown = (detections.scores >= chosen.min_score) & _fits(
        chosen, detections.boxes, detections.labels, chips
    )
    if chosen.kind == "all":
        return has_object | _any(is_shown, detections.offsets)
    has_false = _any(is_shown & detections.is_false_positive, detections.offsets)
    has_missed = _any(is_object & (detections.match_scores < chosen.min_score), dataset.offsets)
    return {
        "errors": has_false | has_missed,
        "false": has_false,
        "missed": has_missed,
        "correct": ~(has_false | has_missed),
    }[chosen.kind]


def _fits(
    chosen: Filter,
    boxes: Float[np.ndarray, "n 4"],
    labels: Int[np.ndarray, " n"],
    chips: ChosenChips | None,
    *,
    moved_to: Int[np.ndarray, " n"] | None = None,
) -> Bool[np.ndarray, " n"]:
    """Check which boxes are of the class, size and level of a filter; `moved_to` is that of `ChipTable`."""
    fits = ValidRange(at_least=chosen.at_least, below=chosen.below).contains(boxes)
    if chosen.label is not None:
        fits &= labels == chosen.label
    if chosen.level is not None:
        if chips is None:
            raise ValueError("a level requires chips")
        is_of_level = chips.pyramid.levels[chosen.level].valid_range.contains(boxes)
        fits &= is_of_level if moved_to is None else is_of_level | (moved_to == chosen.level)
    return fits


def _any(flags: Bool[np.ndarray, " n"], offsets: Int[np.ndarray, " m_plus_1"]) -> Bool[np.ndarray, " m"]:
    """Check which images have a box with a flag."""
    totals = np.concatenate([[0], np.cumsum(flags)])
    return totals[offsets[1:]] > totals[offsets[:-1]]
