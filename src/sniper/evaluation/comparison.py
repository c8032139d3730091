"""Compare two detectors on the same images: differences of their scores, with bounds by a paired bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from sniper.evaluation.false_positives import FalsePositiveCurve
from sniper.evaluation.matching import ClassMatches, matches_by_class, run_coco_eval
from sniper.evaluation.pair import EvaluationPair

_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A score of the second detector minus that of the first, with its 95 % confidence interval.

    Attributes:
        difference: on all images; of the mean scores where there are several sets of detections. NaN where one of them
            is not defined.
        low: 2.5 % quantile over resampled images; NaN where too few of them define the score.
        high: 97.5 % quantile over resampled images; NaN where too few of them define the score.
    """

    difference: float
    low: float
    high: float


@runtime_checkable
class Resampled(Protocol):
    """A score of one set of detections, for images drawn with replacement.

    Attributes:
        num_images: that are drawn from.
    """

    num_images: int

    def __call__(self, weights: Int[np.ndarray, " m"]) -> float:
        """Compute the score where each image counts as often as its weight; below 0 where it is not defined."""


class ResampledAP:
    """COCO's AP of one set of detections, for images drawn with replacement.

    Args:
        pair: detections and ground truth.
        max_detections: how many detections of each image and class count.
    """

    def __init__(self, pair: EvaluationPair, *, max_detections: int = 100) -> None:
        evaluation = run_coco_eval(pair, max_detections=[max_detections])
        self.num_images = pair.truth.num_images
        self._classes = matches_by_class(evaluation, pair)

    def __call__(self, weights: Int[np.ndarray, " m"]) -> float:
        """Compute the AP where each image counts as often as its weight.

        Args:
            weights: (m,) of the images, in the order of the ground truth; all 1 for the AP of `evaluate`.

        Returns:
            The mean over the classes that have objects in those images; -1 if there is none.
        """
        aps = [ap for matches in self._classes if (ap := _ap_of(matches, weights)) is not None]
        return float(np.mean(aps)) if aps else -1.0


class ResampledFalsePositives:
    """The false positives per image at a recall of one set of detections, for images drawn with replacement.

    Args:
        curve: of the detections.
        recall: of all classes together.
        on_clean: count those on clean images per clean image.
    """

    def __init__(self, curve: FalsePositiveCurve, *, recall: float, on_clean: bool) -> None:
        self.num_images = curve.num_images
        self._curve, self._recall, self._on_clean = curve, recall, on_clean

    def __call__(self, weights: Int[np.ndarray, " m"]) -> float:
        """Compute the count where each image counts as often as its weight.

        Args:
            weights: (m,) of the images, in the order of the ground truth.

        Returns:
            The count at the threshold that reaches the recall in those images; -1 if none does, or, on clean images,
            if there are none.
        """
        point = self._curve.at_recall(self._recall, weights)
        count = point.per_clean_image if self._on_clean else point.per_image
        return -1.0 if count is None else count


def _ap_of(matches: ClassMatches, weights: Int[np.ndarray, " m"]) -> float | None:
    """Compute the mean over IoUs of the mean precision at 101 recalls; None without objects."""
    num_objects = int((weights * matches.num_objects).sum())
    if num_objects == 0:
        return None
    weight_of_detection = weights[matches.image_indices]
    true_positives = np.cumsum(matches.is_true_positive * weight_of_detection, axis=1)  # (t, d)
    false_positives = np.cumsum(matches.is_false_positive * weight_of_detection, axis=1)
    precision = true_positives / np.maximum(true_positives + false_positives, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = true_positives / num_objects
    return float(np.mean([_mean_precision(*curve) for curve in zip(recall, precision, strict=True)]))


def _mean_precision(recall: Float[np.ndarray, " d"], precision: Float[np.ndarray, " d"]) -> float:
    """Compute the mean of the precisions at 101 recalls; 0 counts for a recall that is not reached."""
    first = np.searchsorted(recall, _RECALLS, side="left")
    reached = first[first < len(recall)]
    return float(precision[reached].sum() / len(_RECALLS))


def compare(
    first: Sequence[Resampled],
    second: Sequence[Resampled],
    *,
    generator: np.random.Generator,
    num_resamples: int = 1000,
    min_defined: float = 0.0,
) -> Difference:
    """Compute the difference of a score between two detectors and its bounds over test images (a paired bootstrap).

    Images are drawn with replacement, the same ones for both detectors. Several seeds of a detector are averaged; the
    bounds do not include the variation between seeds. They are over the draws in which all scores are defined.

    Args:
        first: scores of one detector, one for each seed.
        second: scores of the other detector, on the same images.
        generator: draws the images.
        num_resamples: number of draws.
        min_defined: fraction of the draws below which there are no bounds.

    Raises:
        ValueError: if the scores are of different numbers of images, of fewer than two, or one side has none.
    """
    counts = {score.num_images for score in (*first, *second)}
    if len(counts) != 1 or not first or not second:
        raise ValueError(
            f"expected scores of the same images, got {len(first)} and {len(second)} of {counts}"
        )
    num_images = counts.pop()
    if num_images < 2:
        raise ValueError("a single image cannot be resampled")

    def difference(weights: Int[np.ndarray, " m"]) -> float:
        """Return NaN where a score is not defined for those images."""
        scores = [[score(weights) for score in seeds] for seeds in (first, second)]
        if min(map(min, scores)) < 0:
            return math.nan
        return float(np.mean(scores[1]) - np.mean(scores[0]))

    resampled = [
        difference(np.bincount(generator.integers(num_images, size=num_images), minlength=num_images))
        for _ in range(num_resamples)
    ]
    num_defined = int(np.isfinite(resampled).sum())
    has_bounds = num_defined > 0 and num_defined >= min_defined * num_resamples
    low, high = np.nanquantile(resampled, [0.025, 0.975]) if has_bounds else (math.nan, math.nan)
    return Difference(
        difference=difference(np.ones(num_images, dtype=np.int64)), low=float(low), high=float(high)
    )
