"""Count false positives per image at the score thresholds that reach given recalls, on all images and on clean ones.

A clean image has no object of the evaluated categories. Crowds are no objects: what they cover is ignored, and the rest
of the image is background.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sniper.evaluation.matching import PairMatches

RECALLS = (0.5, 0.8, 0.9)
"""The recalls at which false positives are counted."""


@dataclass(frozen=True, kw_only=True)
class FalsePositivesAtRecall:
    """False positives at the highest score threshold that reaches a recall.

    Attributes:
        recall: matched objects over all objects, of all classes together.
        score: the threshold: detections with at least this score count. None if the recall is not reached, or there
            are no objects.
        per_image: false positives per image; None without a threshold.
        per_clean_image: those on clean images per clean image; None without a threshold or clean images.
    """

    recall: float
    score: float | None = None
    per_image: float | None = None
    per_clean_image: float | None = None


@dataclass(frozen=True, kw_only=True)
class FalsePositives:
    """False positives per image at several recalls.

    Attributes:
        num_clean_images: images without objects.
        points: by recall, in the order given.
    """

    num_clean_images: int
    points: tuple[FalsePositivesAtRecall, ...]

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the numbers as plain data; those at a recall are named after it.

        They are `fp_per_image_at_80`, `fp_per_clean_image_at_80` and `score_at_recall_80`.
        """
        return {
            "num_clean_images": self.num_clean_images,
            **{name_of(point.recall, on_clean=False): point.per_image for point in self.points},
            **{name_of(point.recall, on_clean=True): point.per_clean_image for point in self.points},
            **{f"score_at_recall_{100 * point.recall:g}": point.score for point in self.points},
        }


def name_of(recall: float, *, on_clean: bool) -> str:
    """Return the name of the false positives per image at a recall.

    Example:
        >>> name_of(0.8, on_clean=True)
        'fp_per_clean_image_at_80'
    """
    return f"fp_per_{'clean_image' if on_clean else 'image'}_at_{100 * recall:g}"


class FalsePositiveCurve:
    """Counts true and false positives of all classes by score, where each image may count several times.

    Args:
        matches: at one IoU. Detections that are ignored do not count.
    """

    def __init__(self, matches: PairMatches) -> None:
        pair, truth = matches.pair, matches.pair.truth
        objects = truth.image_indices[~truth.is_crowd]
        self.num_objects: Int[np.ndarray, " m"] = np.bincount(objects, minlength=truth.num_images)
        self._true_scores, self._true_images = (
            values[matches.is_true_positive] for values in (pair.scores, pair.image_indices)
        )
        self._false_scores, self._false_images = (
            values[matches.is_false_positive] for values in (pair.scores, pair.image_indices)
        )
        order = np.argsort(-self._true_scores, kind="stable")
        self._true_scores, self._true_images = self._true_scores[order], self._true_images[order]

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.num_objects)

    def at_recall(
        self, recall: float, weights: Int[np.ndarray, " m"] | None = None
    ) -> FalsePositivesAtRecall:
        """Count the false positives at the highest score threshold that reaches a recall.

        A threshold keeps all detections of the same score.

        Args:
            recall: above 0, at most 1.
            weights: (m,) how often each image counts; once if None.
        """
        if weights is None:
            weights = np.ones(self.num_images, dtype=np.int64)
        num_objects = int((weights * self.num_objects).sum())
        recalls = np.cumsum(weights[self._true_images]) / max(num_objects, 1)
        first = int(np.searchsorted(recalls, recall))
        if first == len(recalls):
            return FalsePositivesAtRecall(recall=recall)
        score = float(self._true_scores[first])
        images = self._false_images[self._false_scores >= score]
        is_clean = self.num_objects == 0
        return FalsePositivesAtRecall(
            recall=recall,
            score=score,
            per_image=float(weights[images].sum() / weights.sum()),
            per_clean_image=_mean_of(weights[images] * is_clean[images], weights[is_clean]),
        )


def _mean_of(counts: Int[np.ndarray, " n"], weights: Int[np.ndarray, " k"]) -> float | None:
    return float(counts.sum() / weights.sum()) if weights.any() else None


def count_false_positives(matches: PairMatches, *, recalls: Sequence[float] = RECALLS) -> FalsePositives:
    """Count false positives per image at the highest score thresholds that reach some recalls.

    Recall and false positives are of all classes together. Images without objects count.

    Args:
        matches: at the IoU of the count, with the limit of detections per image that is to hold.
        recalls: fractions of all objects.
    """
    curve = FalsePositiveCurve(matches)
    return FalsePositives(
        num_clean_images=int((curve.num_objects == 0).sum()),
        points=tuple(curve.at_recall(recall) for recall in recalls),
    )
