"""Count which classes are detected as which: the confusion matrix at one score threshold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hotcoco
import numpy as np
from jaxtyping import Int

from sniper.data.datasets import Category
from sniper.evaluation.blocks import split_crowded
from sniper.evaluation.matching import PairMatches
from sniper.evaluation.pair import EvaluationPair

MAX_CLASSES = 4096
"""A confusion matrix of more classes would not fit into memory."""

_MAX_CELLS = 1 << 24  # of all matrices that hotcoco holds at once: one for each image, 8 bytes each

BACKGROUND = "background"
"""Names the row of detections that match no object, and the column of objects that no detection matches."""


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Objects of one class that are detected as another.

    Attributes:
        object: name of the class of the objects.
        detected_as: name of the class of the detections.
        count: how often.
        num_objects: of the class.
    """

    object: str
    detected_as: str
    count: int
    num_objects: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfusionMatrix:
    """Objects by class (rows) and detections by class (columns); the last row and column are the background.

    Boxes are matched whatever their classes: each detection, from the highest score down, takes the unmatched object
    that it overlaps most. An object that no detection matches is in the last column, a detection that matches no object
    in the last row. A row adds up to the objects of its class, a column to the detections.

    Attributes:
        categories: by label.
        counts: (c + 1, c + 1).
        score: detections with at least this score count.
        iou: least overlap of a match.
    """

    categories: Sequence[Category]
    counts: Int[np.ndarray, "c1 c1"]
    score: float
    iou: float

    def find_largest(self, count: int) -> list[Confusion]:
        """Return the most frequent confusions of two classes, without the background."""
        between = self.counts[:-1, :-1].copy()
        np.fill_diagonal(between, 0)
        order = np.argsort(-between, axis=None, kind="stable")[:count]
        pairs = zip(*np.unravel_index(order, between.shape), strict=True)
        return [
            Confusion(
                object=self.categories[row].name,
                detected_as=self.categories[column].name,
                count=int(between[row, column]),
                num_objects=int(self.counts[row].sum()),
            )
            for row, column in pairs
            if between[row, column]
        ]

    def as_list(self) -> list[dict[str, Any]]:
        """Return the cells that are not 0, row by row; `object` or `detected_as` is None for the background."""
        names = [*(category.name for category in self.categories), None]
        return [
            {"object": names[row], "detected_as": names[column], "count": int(self.counts[row, column])}
            for row, column in np.argwhere(self.counts > 0).tolist()
        ]


def count_confusions(matches: PairMatches, score: float) -> ConfusionMatrix | None:
    """Compute the confusion matrix of the detections with at least a score; None for more than `MAX_CLASSES` classes.

    Crowds do not count, nor do detections that COCO's rules ignore, since they lie in a crowd of their class.

    Args:
        matches: of all detections.
        score: the threshold; NaN keeps no detection.

    Raises:
        DetectionsError: if there are too many boxes on each other to be compared.
    """
    if len(matches.pair.truth.categories) > MAX_CLASSES:
        return None
    counts = matches.is_true_positive | matches.is_false_positive
    kept = matches.pair.select(counts & (matches.pair.scores >= score))
    return ConfusionMatrix(
        categories=matches.pair.truth.categories,
        counts=count_pairs(kept, iou=matches.iou, max_detections=max(len(kept), 1)),
        score=score,
        iou=matches.iou,
    )


def count_pairs(pair: EvaluationPair, *, iou: float, max_detections: int) -> Int[np.ndarray, "c1 c1"]:
    """Count the matches of objects (rows) and detections (columns) by class; see `ConfusionMatrix`.

    Args:
        pair: detections and ground truth of at most `MAX_CLASSES` classes.
        iou: least overlap of a match.
        max_detections: how many detections of each image count, with the highest scores.

    Raises:
        DetectionsError: if there are too many boxes on each other to be compared.
    """
    without_crowds = replace(pair, truth=pair.truth.select(~pair.truth.is_crowd))
    blocks = split_crowded(without_crowds, max_detections=max_detections, iou=iou, use_categories=False)
    num_classes = len(pair.truth.categories)
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    for images in _chunks(blocks.pair):
        part, labels = _with_own_labels(blocks.pair.select_images(images))
        result = hotcoco.COCOeval(*part.hotcoco, "bbox").confusion_matrix(iou_thr=iou, max_det=max_detections)
        rows = [*labels.tolist(), num_classes]
        counts[np.ix_(rows, rows)] += np.array(result["matrix"], dtype=np.int64)
    return counts


def _chunks(pair: EvaluationPair) -> Iterator[Int[np.ndarray, " k"]]:
    """Iterate over images such that the matrices of their classes, one for each image, fit into memory."""
    truth, num_classes = pair.truth, len(pair.truth.categories)
    keys = [
        images * num_classes + labels
        for images, labels in ((pair.image_indices, pair.labels), (truth.image_indices, truth.labels))
    ]
    num_labels = np.bincount(np.unique(np.concatenate(keys)) // num_classes, minlength=truth.num_images)
    first, total = 0, 0
    for image, count in enumerate(num_labels.tolist()):
        total += count
        side = min(total, num_classes) + 1
        if image > first and side**2 * (image - first + 1) > _MAX_CELLS:
            yield np.arange(first, image)
            first, total = image, count
    yield np.arange(first, truth.num_images)


def _with_own_labels(pair: EvaluationPair) -> tuple[EvaluationPair, Int[np.ndarray, " k"]]:
    """Return a pair with only the classes that it has boxes of, and their labels."""
    truth = pair.truth
    labels, new = np.unique(np.concatenate([pair.labels, truth.labels]), return_inverse=True)
    categories = tuple(truth.categories[label] for label in labels.tolist())
    truth = replace(truth, categories=categories, labels=new[len(pair) :])
    return replace(pair, truth=truth, labels=new[: len(pair)]), labels
