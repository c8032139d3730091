"""Score a detector by object size, and compute its precision over recall. Matching is COCO's, see `matching`."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sniper.evaluation.coco import mean_of_defined
from sniper.evaluation.matching import LARGEST_AREA, run_coco_eval
from sniper.evaluation.pair import EvaluationPair
from sniper.evaluation.proposals import class_agnostic_recall

PAPER_SIZES = (0.0, 25.0, 50.0, 100.0, 200.0, 300.0, math.inf)
"""The bins of object sizes (square roots of areas, image pixels) by which the paper reports recall (SNIPER §5)."""


@dataclass(frozen=True, kw_only=True)
class SizeScores:
    """The scores of the objects of one range of sizes.

    Attributes:
        at_least: smallest size, image pixels.
        below: first size too large, image pixels.
        ap: mean over classes and IoU 0.50 to 0.95; -1 without objects.
        recall: mean over classes and IoU 0.50 to 0.95; -1 without objects.
        any_class_recall: of the same objects with detections of any class: the recall of proposals (AR).
    """

    at_least: float
    below: float
    ap: float
    recall: float
    any_class_recall: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """Scores by size, and curves of precision over recall.

    Attributes:
        sizes: from small to large.
        recalls: (r,) from 0 to 1.
        precisions: (t, r) for IoU 0.50, 0.75 and 0.95: the precision at each recall, as COCO interpolates it; the mean
            over classes.
    """

    sizes: Sequence[SizeScores]
    recalls: Float[np.ndarray, " r"]
    precisions: Float[np.ndarray, "t r"]

    def as_dict(self) -> dict[str, Any]:
        """Return the tables as plain data for JSON, without the curves."""
        return {
            "sizes": [
                {**vars(scores), "below": None if scores.below == math.inf else scores.below}
                for scores in self.sizes
            ],
        }


def diagnose(
    pair: EvaluationPair,
    *,
    max_detections: int = 100,
    sizes: Sequence[float] = PAPER_SIZES,
) -> Diagnosis:
    """Compute scores by size, and precision over recall.

    Args:
        pair: detections and ground truth.
        max_detections: how many detections of each image and class count; of each image, for recall of any class.
        sizes: edges of the bins of object sizes, rising, image pixels.

    Raises:
        ValueError: if sizes do not rise.
    """
    if len(sizes) < 2 or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ValueError(f"sizes must rise, not {list(sizes)}")
    bins = list(itertools.pairwise(sizes))
    area_ranges = {"all": (0.0, LARGEST_AREA)} | {
        f"{low:g}-{high:g}": (low**2, min(float(np.nextafter(high**2, 0.0)), LARGEST_AREA))
        for low, high in bins
    }
    by_class = run_coco_eval(pair, max_detections=[max_detections], area_ranges=area_ranges)
    any_recall = class_agnostic_recall(pair, max_detections=[max_detections], area_ranges=area_ranges)
    precision, recall = by_class.precision, by_class.recall
    return Diagnosis(
        sizes=[
            SizeScores(
                at_least=low,
                below=high,
                ap=mean_of_defined(precision[:, :, :, a]),
                recall=mean_of_defined(recall[:, :, a]),
                any_class_recall=mean_of_defined(any_recall[:, a]),
            )
            for a, (low, high) in enumerate(bins, start=1)
        ],
        recalls=np.array(by_class.result.params.rec_thrs),
        precisions=np.stack([_mean_curve(precision[t, :, :, 0, -1]) for t in (0, 5, 9)]),
    )


def _mean_curve(precision: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
    """Return the mean over the classes that have objects."""
    has_objects = (precision > -1).any(axis=0)
    if not has_objects.any():
        return np.zeros(len(precision))
    mean: np.ndarray = precision[:, has_objects].mean(axis=1)
    return mean
