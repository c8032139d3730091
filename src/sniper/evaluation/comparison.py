"""Compare two detectors on the same images: the difference of their APs, with bounds by a paired bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sniper.evaluation.matching import ClassMatches, matches_by_class, run_coco_eval
from sniper.evaluation.pair import EvaluationPair

_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The AP of the second detector minus that of the first, with its 95 % confidence interval.

    Attributes:
        difference: on all images; of the mean APs where there are several sets of detections.
        low: 2.5 % quantile over resampled images.
        high: 97.5 % quantile over resampled images.
    """

    difference: float
    low: float
    high: float


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
    first: Sequence[ResampledAP],
    second: Sequence[ResampledAP],
    *,
    generator: np.random.Generator,
    num_resamples: int = 1000,
) -> Difference:
    """Compute the difference of AP between two detectors and its bounds over test images (a paired bootstrap).

    Images are drawn with replacement, the same ones for both detectors. Several seeds of a detector are averaged; the
    bounds do not include the variation between seeds.

    Args:
        first: APs of one detector, one for each seed.
        second: APs of the other detector, on the same images.
        generator: draws the images.
        num_resamples: number of draws.

    Raises:
        ValueError: if the APs are of different numbers of images, of fewer than two, or one side has none.
    """
    counts = {ap.num_images for ap in (*first, *second)}
    if len(counts) != 1 or not first or not second:
        raise ValueError(f"expected APs of the same images, got {len(first)} and {len(second)} of {counts}")
    num_images = counts.pop()
    if num_images < 2:
        raise ValueError("a single image cannot be resampled")

    def difference(weights: Int[np.ndarray, " m"]) -> float:
        """Return NaN where those images have no objects."""
        aps = [[ap(weights) for ap in seeds] for seeds in (first, second)]
        if min(map(min, aps)) < 0:
            return math.nan
        return float(np.mean(aps[1]) - np.mean(aps[0]))

    resampled = [
        difference(np.bincount(generator.integers(num_images, size=num_images), minlength=num_images))
        for _ in range(num_resamples)
    ]
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return Difference(
        difference=difference(np.ones(num_images, dtype=np.int64)), low=float(low), high=float(high)
    )
