"""Find the score threshold with the best F1, and compute precision, recall and F1 at a threshold."""

import math
from dataclasses import dataclass

import numpy as np

from sniper.evaluation.matching import PairMatches, match_pair
from sniper.evaluation.pair import EvaluationPair


@dataclass(frozen=True, kw_only=True)
class MatchCounts:
    """Counts of the detections from a score threshold on. Crowds, and detections in them, do not count.

    Attributes:
        num_objects: in the ground truth.
        num_true_positives: detections that match an object.
        num_false_positives: detections that match nothing.
    """

    num_objects: int
    num_true_positives: int
    num_false_positives: int

    @property
    def precision(self) -> float:
        """True positives per detection; NaN without detections."""
        return _divide(self.num_true_positives, self.num_true_positives + self.num_false_positives)

    @property
    def recall(self) -> float:
        """True positives per object; NaN without objects."""
        return _divide(self.num_true_positives, self.num_objects)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN): 0 if there are objects and none is detected; NaN without objects."""
        if self.num_objects == 0:
            return math.nan
        return _divide(
            2 * self.num_true_positives,
            self.num_true_positives + self.num_false_positives + self.num_objects,
        )


@dataclass(frozen=True, kw_only=True)
class ClassCounts(MatchCounts):
    """The counts of one class.

    Attributes:
        name: of the class.
    """

    name: str


@dataclass(frozen=True, kw_only=True)
class OperatingPoint(MatchCounts):
    """Precision, recall and F1 at one score threshold, of all classes together and of each.

    Attributes:
        score: detections with at least this score count; NaN if no threshold is better than another.
        iou: least overlap of a match.
        classes: by label.
    """

    score: float
    iou: float
    classes: tuple[ClassCounts, ...]


def find_best_f1(pair: EvaluationPair, *, iou: float = 0.5) -> OperatingPoint:
    """Find the score threshold with the best F1 over all classes together.

    Detections are matched by the COCO rules, class by class, without a limit per image. Of equal F1, the highest
    threshold is returned: fewer detections, of which more are right. All thresholds between two neighbouring scores
    keep the same detections; the one returned is the decimal number with the fewest digits (at least two) near the
    midpoint, so that it is the same when printed, and small differences of the scores do not change what it keeps.

    Args:
        pair: detections and ground truth.
        iou: least overlap of a match.

    Returns:
        The threshold, with precision, recall and F1 at it. Its `score` is NaN if no detection matches an object.
    """
    matches = match_pair(pair, iou=iou)
    return measure_at(matches, find_best_score(matches))


def find_best_score(matches: PairMatches) -> float:
    """Find the score threshold with the best F1; see `find_best_f1`."""
    scores, num_true, num_false = matches.count_by_score()
    if not num_true.any():
        return math.nan
    f1 = 2 * num_true / (num_true + num_false + matches.num_objects)
    best = int(np.argmax(f1))
    high = float(scores[best])
    return _between(float(scores[best + 1]), high) if best + 1 < len(scores) else high


def measure_at(matches: PairMatches, score: float) -> OperatingPoint:
    """Compute precision, recall and F1 of the detections with at least a score.

    Args:
        matches: of all detections.
        score: the threshold; NaN keeps no detection.
    """
    truth, labels = matches.pair.truth, matches.pair.labels
    is_kept = matches.pair.scores >= score
    num_objects, num_true, num_false = (
        np.bincount(labels_of, minlength=len(truth.categories)).tolist()
        for labels_of in (
            truth.labels[~truth.is_crowd],
            labels[is_kept & matches.is_true_positive],
            labels[is_kept & matches.is_false_positive],
        )
    )
    return OperatingPoint(
        score=score,
        iou=matches.iou,
        num_objects=sum(num_objects),
        num_true_positives=sum(num_true),
        num_false_positives=sum(num_false),
        classes=tuple(
            ClassCounts(
                name=category.name,
                num_objects=num_objects[label],
                num_true_positives=num_true[label],
                num_false_positives=num_false[label],
            )
            for label, category in enumerate(truth.categories)
        ),
    )


def _between(low: float, high: float) -> float:
    """Return the number with the fewest decimals, at least two, that rounds the midpoint and is in (low, high]."""
    middle = low + (high - low) / 2
    rounded = (round(middle, digits) for digits in range(2, 18))
    return next((number for number in rounded if low < number <= high), high)


def _divide(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
