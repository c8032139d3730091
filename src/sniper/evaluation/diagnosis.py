"""Score a detector by class and by object size, and count its false positives per image.

Matching is COCO's, see `matching`. Images without objects count.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from jaxtyping import Float

from sniper.evaluation.matching import LARGEST_AREA, matches_by_class, run_coco_eval
from sniper.evaluation.pair import EvaluationPair

PAPER_SIZES = (0.0, 25.0, 50.0, 100.0, 200.0, 300.0, math.inf)
"""The bins of object sizes (square roots of areas, image pixels) by which the paper reports recall (SNIPER §5)."""

RECALLS = (0.5, 0.8, 0.9)
"""The recalls at which false positives are counted."""


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """The scores of one class.

    Attributes:
        name: of the class.
        num_objects: in the ground truth, without crowds.
        num_detections: all that were given.
        ap: mean over IoU 0.50 to 0.95, as COCO's; -1 without objects.
        ap50: at IoU 0.5.
        recall: mean over IoU 0.50 to 0.95.
    """

    name: str
    num_objects: int
    num_detections: int
    ap: float
    ap50: float
    recall: float


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
    """Scores by class and by size, false positives, and curves of precision over recall.

    Attributes:
        classes: in the order of their ids.
        sizes: from small to large.
        false_positives: false positives per image, by recall; see `count_false_positives`.
        recalls: (r,) from 0 to 1.
        precisions: (t, r) for IoU 0.50, 0.75 and 0.95: the precision at each recall, as COCO interpolates it; the mean
            over classes.
    """

    classes: Sequence[ClassScores]
    sizes: Sequence[SizeScores]
    false_positives: Mapping[float, float | None]
    recalls: Float[np.ndarray, " r"]
    precisions: Float[np.ndarray, "t r"]

    def as_dict(self) -> dict[str, Any]:
        """Return the tables as plain data for JSON, without the curves."""
        return {
            "classes": [vars(scores) for scores in self.classes],
            "sizes": [
                {**vars(scores), "below": None if scores.below == math.inf else scores.below}
                for scores in self.sizes
            ],
            "false_positives_per_image": {
                f"at_recall_{recall:g}": None if count is None else round(count, 4)
                for recall, count in self.false_positives.items()
            },
        }


def diagnose(
    pair: EvaluationPair,
    *,
    max_detections: int = 100,
    sizes: Sequence[float] = PAPER_SIZES,
) -> Diagnosis:
    """Compute scores by class and by size, and false positives per image.

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
    any_class = run_coco_eval(
        pair, max_detections=[max_detections], area_ranges=area_ranges, use_categories=False
    )
    precision, recall = _curves(by_class)
    _, any_recall = _curves(any_class)  # (t, 1, a, m)
    truth, num_classes = pair.truth, len(pair.truth.categories)
    num_objects = np.bincount(truth.labels[~truth.is_crowd], minlength=num_classes).tolist()
    num_detections = np.bincount(pair.labels, minlength=num_classes).tolist()
    return Diagnosis(
        classes=[
            ClassScores(
                name=category.name,
                num_objects=num_objects[label],
                num_detections=num_detections[label],
                ap=_mean(precision[:, :, label, 0]),
                ap50=_mean(precision[0, :, label, 0]),
                recall=_mean(recall[:, label, 0]),
            )
            for label, category in enumerate(truth.categories)
        ],
        sizes=[
            SizeScores(
                at_least=low,
                below=high,
                ap=_mean(precision[:, :, :, a]),
                recall=_mean(recall[:, :, a]),
                any_class_recall=_mean(any_recall[:, :, a]),
            )
            for a, (low, high) in enumerate(bins, start=1)
        ],
        false_positives=count_false_positives(pair, max_detections=max_detections),
        recalls=np.array(by_class.params.rec_thrs),
        precisions=np.stack([_mean_curve(precision[t, :, :, 0, -1]) for t in (0, 5, 9)]),
    )


def count_false_positives(
    pair: EvaluationPair, *, recalls: Sequence[float] = RECALLS, max_detections: int = 100
) -> dict[float, float | None]:
    """Count false positives per image at the highest score threshold that reaches each recall (IoU 0.5, all classes).

    Args:
        pair: detections and ground truth.
        recalls: fractions of all objects.
        max_detections: how many detections of each image and class count.

    Returns:
        The count for each recall; None where it is not reached.
    """
    evaluation = run_coco_eval(pair, max_detections=[max_detections], iou_thresholds=[0.5])
    classes = matches_by_class(evaluation, pair)
    num_objects = sum(int(matches.num_objects.sum()) for matches in classes)
    if num_objects == 0:
        return dict.fromkeys(recalls)
    scores = np.concatenate([matches.scores for matches in classes])
    is_true = np.concatenate([matches.is_true_positive[0] for matches in classes])
    is_false = np.concatenate([matches.is_false_positive[0] for matches in classes])
    order = np.argsort(-scores, kind="stable")
    # A threshold keeps all detections of the same score, so only the last of them is a point of the curve.
    is_last = np.append(np.diff(scores[order]) != 0, True)[: len(order)]
    recall = np.cumsum(is_true[order])[is_last] / num_objects
    false_positives = np.cumsum(is_false[order])[is_last]
    reached = {level: np.flatnonzero(recall >= level) for level in recalls}
    return {
        level: float(false_positives[points[0]] / pair.truth.num_images) if len(points) else None
        for level, points in reached.items()
    }


def _curves(evaluation: hotcoco.COCOeval) -> tuple[np.ndarray, np.ndarray]:
    """Return (t, r, k, a, m) precisions and (t, k, a, m) recalls: IoU, recall, class, area, detections."""
    assert evaluation.eval is not None
    return np.array(evaluation.eval["precision"]), np.array(evaluation.eval["recall"])


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not -1; -1 if all are."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _mean_curve(precision: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
    """Return the mean over the classes that have objects."""
    has_objects = (precision > -1).any(axis=0)
    if not has_objects.any():
        return np.zeros(len(precision))
    mean: np.ndarray = precision[:, has_objects].mean(axis=1)
    return mean
