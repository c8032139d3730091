"""Soft suppression of overlapping detections, class by class.

Soft-NMS (Bodla et al., 2017) lowers the scores of what overlaps a better detection instead of dropping it; SNIPER
merges its levels with the Gaussian form, σ = 0.55 (SNIPER §4; authors' code).
"""

import numba
import numpy as np
from jaxtyping import Float, Int

from sniper.geometry.detections import Detections


def soft_nms(
    detections: Detections, *, sigma: float = 0.55, floor: float = 0.001, limit: int | None = None
) -> Detections:
    """Merge detections by Gaussian soft-NMS within each class.

    Args:
        detections: boxes in any one frame; scores are not changed in place. May be empty.
        sigma: width of the Gaussian; a score is multiplied by exp(-IoU² / sigma).
        floor: a detection whose score falls below this is dropped.
        limit: how many to keep over all classes; all of them when None.

    Returns:
        What is left, with lowered scores, best first.

    Raises:
        ValueError: if sigma is not positive.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0]])
        >>> twins = Detections(boxes=boxes, scores=np.array([0.9, 0.8]), labels=np.array([0, 0]))
        >>> soft_nms(twins, sigma=0.5).scores.round(3).tolist()
        [0.9, 0.108]
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    order, starts = _by_label(detections.labels)
    scores = detections.scores.astype(np.float64, copy=True)
    boxes = np.ascontiguousarray(detections.boxes, dtype=np.float64)
    _decay_all(boxes, scores, order, starts, sigma, floor)
    return _best_first(detections, scores, floor=floor, limit=limit)


def _by_label(labels: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " c"]]:
    """Sort detections by label: the order, and where each class starts (with the end as the last)."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    return order, np.append(starts, len(labels))


def _best_first(
    detections: Detections, scores: Float[np.ndarray, " n"], *, floor: float, limit: int | None
) -> Detections:
    """Take on new scores, drop what lies below the floor, and sort; equal scores keep their order."""
    order = np.argsort(-scores, kind="stable")
    order = order[(scores[order] >= floor) & np.isfinite(scores[order])][:limit]
    return Detections(
        boxes=detections.boxes[order],
        scores=scores[order].astype(detections.scores.dtype),
        labels=detections.labels[order],
    )


@numba.njit(cache=True)
def _overlap(boxes: np.ndarray, one: int, other: int) -> float:
    width = min(boxes[one, 2], boxes[other, 2]) - max(boxes[one, 0], boxes[other, 0])
    height = min(boxes[one, 3], boxes[other, 3]) - max(boxes[one, 1], boxes[other, 1])
    if width <= 0.0 or height <= 0.0:
        return 0.0
    shared = width * height
    area_one = (boxes[one, 2] - boxes[one, 0]) * (boxes[one, 3] - boxes[one, 1])
    area_other = (boxes[other, 2] - boxes[other, 0]) * (boxes[other, 3] - boxes[other, 1])
    return float(shared / (area_one + area_other - shared))


@numba.njit(cache=True)
def _decay_all(
    boxes: np.ndarray,
    scores: np.ndarray,
    order: np.ndarray,
    starts: np.ndarray,
    sigma: float,
    floor: float,
) -> None:
    """Lower `scores` in place. In each class: take the best left, decay the others by it, drop what falls."""
    for c in range(len(starts) - 1):
        left = order[starts[c] : starts[c + 1]].copy()
        num_left = len(left)
        while num_left > 0:
            best = 0
            for i in range(1, num_left):
                if scores[left[i]] > scores[left[best]] or (
                    scores[left[i]] == scores[left[best]] and left[i] < left[best]
                ):
                    best = i
            chosen = left[best]
            left[best] = left[num_left - 1]
            num_left -= 1
            i = 0
            while i < num_left:
                overlap = _overlap(boxes, chosen, left[i])
                if overlap > 0.0:
                    scores[left[i]] *= np.exp(-overlap * overlap / sigma)
                if scores[left[i]] < floor:
                    left[i] = left[num_left - 1]
                    num_left -= 1
                else:
                    i += 1
