"""Score boxes whatever their classes: the recall of proposals, with some number of them in each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sniper.evaluation.matching import AREA_RANGES, run_coco_eval
from sniper.evaluation.pair import EvaluationPair

LIMITS = (100, 300, 1000)
"""How many proposals of each image count."""


@dataclass(frozen=True, kw_only=True)
class ProposalRecall:
    """The recall of the objects of one range of areas with some number of proposals in each image.

    Attributes:
        max_proposals: how many proposals of each image count, with the highest scores.
        ar: average recall, the mean over IoU 0.50 to 0.95; -1 without objects.
        recall_50: recall at IoU 0.5; -1 without objects.
    """

    max_proposals: int
    ar: float
    recall_50: float


@dataclass(frozen=True, kw_only=True)
class SizeRecall:
    """The recall of the objects of one range of areas.

    Attributes:
        size: COCO's name of the range: all, small, medium or large.
        num_objects: in the ground truth, without crowds.
        recalls: by number of proposals, rising.
    """

    size: str
    num_objects: int
    recalls: tuple[ProposalRecall, ...]


@dataclass(frozen=True, kw_only=True)
class ProposalScores:
    """The recall of proposals.

    Attributes:
        num_images: in the ground truth.
        num_proposals: all that were given.
        sizes: objects of all sizes, then small, medium and large ones.
    """

    num_images: int
    num_proposals: int
    sizes: tuple[SizeRecall, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data, such as `ar_300` and `recall_50_300`; None for what is not defined."""
        return {
            "num_images": self.num_images,
            "num_proposals": self.num_proposals,
            "sizes": [
                {
                    "size": size.size,
                    "num_objects": size.num_objects,
                    **{f"ar_{row.max_proposals}": _or_none(row.ar) for row in size.recalls},
                    **{f"recall_50_{row.max_proposals}": _or_none(row.recall_50) for row in size.recalls},
                }
                for size in self.sizes
            ],
        }


def score_proposals(pair: EvaluationPair, *, limits: Sequence[int] = LIMITS) -> ProposalScores:
    """Compute the recall of proposals as COCO does without regard to categories.

    Args:
        pair: proposals and ground truth.
        limits: how many proposals of each image count, with the highest scores; rising.

    Raises:
        DetectionsError: if there are too many boxes on each other to be compared.
    """
    recall = class_agnostic_recall(pair, max_detections=limits, area_ranges=AREA_RANGES)
    areas = pair.truth.areas[~pair.truth.is_crowd]
    return ProposalScores(
        num_images=pair.truth.num_images,
        num_proposals=len(pair),
        sizes=tuple(
            SizeRecall(
                size=name,
                num_objects=int(((areas >= low) & (areas <= high)).sum()),
                recalls=tuple(
                    ProposalRecall(
                        max_proposals=limit,
                        ar=float(recall[:, a, m].mean()),
                        recall_50=float(recall[0, a, m]),
                    )
                    for m, limit in enumerate(limits)
                ),
            )
            for a, (name, (low, high)) in enumerate(AREA_RANGES.items())
        ),
    )


def class_agnostic_recall(
    pair: EvaluationPair,
    *,
    max_detections: Sequence[int],
    area_ranges: Mapping[str, tuple[float, float]],
) -> Float[np.ndarray, "t a m"]:
    """Compute the recall of the objects of all classes with detections of any class.

    Args:
        pair: detections and ground truth.
        max_detections: how many detections of each image count, with the highest scores; rising.
        area_ranges: smallest and largest area (inclusive), square image pixels, by name.

    Returns:
        (t, a, m) by IoU 0.50, 0.55 … 0.95, range of areas and number of detections; -1 without objects.

    Raises:
        DetectionsError: if there are too many boxes on each other to be compared.
    """
    evaluation = run_coco_eval(
        pair, max_detections=max_detections, area_ranges=area_ranges, use_categories=False
    )
    if evaluation.blocks.is_split and len(max_detections) > 1:  # only the last number is that of the images
        return np.concatenate(
            [
                class_agnostic_recall(pair, max_detections=[limit], area_ranges=area_ranges)
                for limit in max_detections
            ],
            axis=2,
        )
    return evaluation.recall[:, 0]


def _or_none(score: float) -> float | None:
    return None if score < 0 else score
