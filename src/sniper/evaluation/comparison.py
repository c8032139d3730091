"""Compare two detectors on the same images: differences of their scores, with bounds by a paired bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from sniper.evaluation.false_positives import FalsePositiveCurve
from sniper.evaluation.match_table import MatchTable
from sniper.evaluation.matching import ClassMatches
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
        matches: of the detections, or the detections and their ground truth.
        max_detections: how many detections of each image and class count, where they are to be matched.
        num_ious: the mean is over this many of COCO's ten IoUs, from 0.50 on; 1 for AP50.
    """

    def __init__(
        self, matches: EvaluationPair | MatchTable, *, max_detections: int = 100, num_ious: int = 10
    ) -> None:
        if isinstance(matches, EvaluationPair):
            matches = MatchTable.of(matches, max_detections=max_detections)
        self.num_images = matches.num_images
        self._classes = [
            replace(
                each,
                is_true_positive=each.is_true_positive[:num_ious],
                is_false_positive=each.is_false_positive[:num_ious],
            )
            for each in matches.classes
        ]

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
    draws = resample([*first, *second], generator=generator, num_resamples=num_resamples)
    every_image = np.ones(counts.pop(), dtype=np.int64)
    whole = np.array([[score(every_image) for score in (*first, *second)]])

    def differences(scores: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
        """Return NaN where a score is not defined for those images."""
        means = scores[:, len(first) :].mean(axis=1) - scores[:, : len(first)].mean(axis=1)
        return np.where((scores < 0).any(axis=1), math.nan, means)

    low, high = bounds_of(differences(draws), min_defined=min_defined)
    return Difference(difference=float(differences(whole)[0]), low=low, high=high)


def resample(
    scores: Sequence[Resampled], *, generator: np.random.Generator, num_resamples: int = 1000
) -> Float[np.ndarray, "r k"]:
    """Compute scores of images drawn with replacement, the same ones for all scores.

    Args:
        scores: of the same images.
        generator: draws the images.
        num_resamples: number of draws.

    Returns:
        (r, k) by draw and score; below 0 where a score is not defined for the images of a draw.

    Raises:
        ValueError: if the scores are of different numbers of images, or of fewer than two.
    """
    counts = {score.num_images for score in scores}
    if len(counts) != 1:
        raise ValueError(f"expected scores of the same images, got {len(scores)} of {counts}")
    num_images = counts.pop()
    if num_images < 2:
        raise ValueError("a single image cannot be resampled")
    draws = np.empty((num_resamples, len(scores)))
    for row in draws:
        weights = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
        row[:] = [score(weights) for score in scores]
    return draws


def bounds_of(values: Float[np.ndarray, " r"], *, min_defined: float = 0.0) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of a score over resampled images.

    Args:
        values: (r,) of the draws; NaN where it is not defined.
        min_defined: fraction of the draws that must define it; NaN is returned for less, and without any.
    """
    num_defined = int(np.isfinite(values).sum())
    if num_defined == 0 or num_defined < min_defined * len(values):
        return math.nan, math.nan
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
