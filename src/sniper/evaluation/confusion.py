"""Count which classes are detected as which: the confusion matrix at one score threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from jaxtyping import Int

from sniper.data.datasets import Category
from sniper.evaluation.matching import PairMatches

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


def count_confusions(matches: PairMatches, score: float) -> ConfusionMatrix:
    """Compute the confusion matrix of the detections with at least a score.

    Crowds do not count, nor do detections that COCO's rules ignore, since they lie in a crowd of their class.

    Args:
        matches: of all detections.
        score: the threshold; NaN keeps no detection.
    """
    counts = matches.is_true_positive | matches.is_false_positive
    kept = matches.pair.select(counts & (matches.pair.scores >= score))
    result = hotcoco.COCOeval(*kept.hotcoco, "bbox").confusion_matrix(
        iou_thr=matches.iou, max_det=max(len(kept), 1)
    )
    return ConfusionMatrix(
        categories=matches.pair.truth.categories,
        counts=np.array(result["matrix"], dtype=np.int64),
        score=score,
        iou=matches.iou,
    )
