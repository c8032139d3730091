"""What is drawn on the images: objects, detections with their errors, and chips with the boxes that they learn from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.browse.chips import ChosenChips
from sniper.chips.targets import assign_targets
from sniper.data.datasets import Dataset
from sniper.evaluation.matching import match_pair
from sniper.evaluation.operating_point import find_best_score
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry.boxes import from_xywh
from sniper.geometry.detections import DEFAULT_MIN_SCORE

_DECIMALS = 2  # of coordinates, pixels
MAX_CHIPS = 2000
"""The most chips of an image that are drawn; browsers are slow with more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchedDetections:
    """The detections of a data set, matched with its objects; ordered by image, those of an image by falling score.

    Attributes:
        offsets: (m + 1,) where the detections of each image start.
        boxes: (n, 4) xyxy, image frame.
        labels: (n,) of the data set's categories.
        scores: (n,) of the detections.
        is_true_positive: (n,) whether each matches an object.
        is_false_positive: (n,) whether each matches nothing; others lie in crowds and are ignored.
        match_scores: (k,) for each object of the data set, the score of the detection that matches it; -inf if none
            does.
        best_score: from which on F1 is best; 0.3 where no detection matches an object.
    """

    offsets: Int[np.ndarray, " m_plus_1"]
    boxes: Float[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    is_true_positive: Bool[np.ndarray, " n"]
    is_false_positive: Bool[np.ndarray, " n"]
    match_scores: Float[np.ndarray, " k"]
    best_score: float

    @classmethod
    def of(cls, pair: EvaluationPair) -> Self:
        """Match detections with the objects of their classes, at IoU 0.5."""
        matches = match_pair(pair)
        best = find_best_score(matches)
        order = np.lexsort((-pair.scores, pair.image_indices))
        counts = np.bincount(pair.image_indices, minlength=pair.truth.num_images)
        return cls(
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            boxes=from_xywh(pair.boxes[order]),
            labels=pair.labels[order],
            scores=pair.scores[order],
            is_true_positive=matches.is_true_positive[order],
            is_false_positive=matches.is_false_positive[order],
            match_scores=matches.match_scores,
            best_score=DEFAULT_MIN_SCORE if math.isnan(best) else best,
        )


def describe_image(
    dataset: Dataset, index: int, *, detections: MatchedDetections | None, chips: ChosenChips | None
) -> dict[str, Any]:
    """Return what is drawn on an image, as JSON values.

    Args:
        dataset: the images and their objects.
        index: of the image.
        detections: of all images; None if there are none to show.
        chips: of all images; None if they are not chosen yet.

    Returns:
        The objects, the detections and the chips. Boxes are xyxy, image frame. The chips are those with the most valid
        boxes if there are more than `MAX_CHIPS`, in the order of their level and position.
    """
    record = dataset[index]
    rows = dataset.boxes_of(index)
    match_scores = None
    if detections is not None:
        scores = detections.match_scores[rows].tolist()
        match_scores = [score if math.isfinite(score) else None for score in scores]
    content: dict[str, Any] = {
        "objects": {
            "boxes": _rounded(record.boxes),
            "labels": record.labels.tolist(),
            "crowds": record.is_crowd.tolist(),
            "match_scores": match_scores,
        },
        "detections": None if detections is None else _describe_detections(detections, index),
    }
    if chips is not None:
        content |= _describe_chips(dataset, index, chips)
    return content


def _describe_detections(detections: MatchedDetections, index: int) -> dict[str, Any]:
    rows = slice(*detections.offsets[index : index + 2].tolist())
    kinds = np.where(detections.is_false_positive[rows], "false", "ignored")
    return {
        "boxes": _rounded(detections.boxes[rows]),
        "labels": detections.labels[rows].tolist(),
        "scores": detections.scores[rows].tolist(),
        "kinds": np.where(detections.is_true_positive[rows], "true", kinds).tolist(),
    }


def _describe_chips(dataset: Dataset, index: int, chips: ChosenChips) -> Mapping[str, Any]:
    record, table = dataset[index], chips.table
    moved_to = table.moved_to[dataset.boxes_of(index)]
    described = []
    for row in range(*table.offsets[index : index + 2].tolist()):
        chip = table.chip(row)
        target = assign_targets(
            chip,
            boxes=record.boxes,
            labels=record.labels,
            is_crowd=record.is_crowd,
            is_moved_here=moved_to == chip.level.index,
            is_negative=bool(table.is_negative[row]),
            min_visible_side=chips.min_visible_side,
        )
        visible = np.array([[0, 0, *chip.visible]], dtype=np.float64)
        described.append(
            {
                "level": chip.level.index,
                "scale": round(chip.level.scale, 4),
                "window": _rounded(chip.to_image(visible))[0],
                "negative": bool(table.is_negative[row]),
                "boxes": _rounded(chip.to_image(target.boxes)),
                "labels": target.labels.tolist(),
                "status": target.status.tolist(),
            }
        )
    shown = described
    if len(described) > MAX_CHIPS:
        num_valid = np.array([chip["status"].count(0) for chip in described])
        shown = [described[row] for row in np.sort(np.argsort(-num_valid, kind="stable")[:MAX_CHIPS])]
    return {"chips": shown, "num_chips": len(described)}


def _rounded(boxes: Float[np.ndarray, "n 4"]) -> list[list[float]]:
    return boxes.round(_DECIMALS).tolist()
