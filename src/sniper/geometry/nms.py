"""Merging of overlapping detections, class by class: soft and hard suppression, and fusion.

Soft-NMS (Bodla et al., 2017) lowers the scores of what overlaps a better detection instead of dropping it; SNIPER
merges its levels with the Gaussian form, σ = 0.55 (SNIPER §4; authors' code). Weighted box fusion (Solovyev et al.,
2021) averages boxes that overlap, weighted by their scores.
"""

import math
from typing import Literal

import numba
import numpy as np
from jaxtyping import Bool, Int

from sniper.geometry.detections import Detections

Decay = Literal["gaussian", "linear", "hard"]

_GAUSSIAN, _LINEAR, _HARD = range(3)
_CODES = {"gaussian": _GAUSSIAN, "linear": _LINEAR, "hard": _HARD}


def soft_nms(
    detections: Detections,
    *,
    decay: Decay = "gaussian",
    sigma: float = 0.55,
    iou: float = 0.5,
    floor: float = 0.001,
    limit: int | None = None,
) -> Detections:
    """Merge detections by suppression within each class: the best stays, what overlaps it is lowered, and so on.

    Args:
        detections: boxes in any one frame; scores are not changed in place. May be empty.
        decay: `gaussian` multiplies a score by exp(-IoU² / sigma); `linear` by 1 - IoU, if that overlap is above `iou`;
            `hard` drops what overlaps by more than `iou`.
        sigma: width of the Gaussian.
        iou: see `decay`.
        floor: a detection whose score falls below this is dropped.
        limit: how many to keep over all classes; all of them when None.

    Returns:
        What is left, with lowered scores, best first; equal ones in the order given.

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
    kept = detections.select(np.isfinite(detections.scores) & (detections.scores >= floor))
    scores = kept.scores.astype(np.float64, copy=True)
    starts = _starts(kept.labels)
    most = len(kept) if limit is None else min(limit, len(kept))
    chosen = _choose(
        np.ascontiguousarray(kept.boxes, dtype=np.float64),
        scores,
        kept.labels.astype(np.int64),
        starts,
        _CODES[decay],
        sigma if decay == "gaussian" else iou,
        floor,
        most,
    )
    return Detections(
        boxes=kept.boxes[chosen],
        scores=scores[chosen].astype(detections.scores.dtype),
        labels=kept.labels[chosen],
    )


def weighted_box_fusion(
    detections: Detections, *, iou: float = 0.55, floor: float = 0.001, limit: int | None = None
) -> Detections:
    """Merge detections by weighted box fusion within each class.

    From the best to the worst, each joins the fused box that it overlaps most, if by more than `iou`, or begins one. A
    fused box is the mean of its members, weighted by their scores, and has the score of its best: the levels of a
    pyramid are no jury, for an object is seen by few of them.

    Args:
        detections: boxes in any one frame. May be empty.
        iou: see above.
        floor: detections below this score are left out, and those of 0.
        limit: how many to keep over all classes; all of them when None. The time grows with the boxes of a class times
            its clusters, whatever the limit.

    Returns:
        The fused boxes, best first; equal ones in the order of their best members.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 12.0]])
        >>> pair = Detections(boxes=boxes, scores=np.array([0.75, 0.25]), labels=np.array([0, 0]))
        >>> weighted_box_fusion(pair).boxes.tolist()
        [[0.0, 0.0, 8.0, 9.0]]
    """
    is_used = np.isfinite(detections.scores) & (detections.scores >= floor) & (detections.scores > 0)
    order = np.flatnonzero(is_used)
    order = order[np.argsort(-detections.scores[order], kind="stable")]
    ranked = detections.select(order)
    starts = _starts(ranked.labels)
    fused = np.ascontiguousarray(ranked.boxes, dtype=np.float64).copy()
    is_first = _fuse(fused, ranked.scores.astype(np.float64), ranked.labels.astype(np.int64), starts, iou)
    first = np.flatnonzero(is_first)[:limit]
    return Detections(boxes=fused[first], scores=ranked.scores[first], labels=ranked.labels[first])


def is_part_of_better(
    detections: Detections,
    is_asked: Bool[np.ndarray, " n"],
    *,
    share: float = 0.7,
    as_sure: float = 0.5,
) -> Bool[np.ndarray, " n"]:
    """Tell which of some detections lie mostly in another of their class that is not asked about.

    Args:
        detections: boxes in any one frame. May be empty.
        is_asked: (n,) which ones are meant.
        share: how much of a box must lie in the other, of its area.
        as_sure: the other must have at least this much of its score.

    Returns:
        (n,) flags; those that are not asked about have none.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 3.0, 9.0]])
        >>> pair = Detections(boxes=boxes, scores=np.array([0.8, 0.9]), labels=np.array([0, 0]))
        >>> is_part_of_better(pair, np.array([False, True])).tolist()
        [False, True]
    """
    answer = np.zeros(len(detections), dtype=np.bool_)
    others = np.flatnonzero(~is_asked)
    asked = np.flatnonzero(is_asked)
    if len(asked) and len(others):
        others = others[np.argsort(detections.boxes[others, 0], kind="stable")]  # by their left edges
        answer[asked] = _lie_inside(
            np.ascontiguousarray(detections.boxes, dtype=np.float64),
            detections.scores.astype(np.float64),
            detections.labels.astype(np.int64),
            asked,
            others,
            share,
            as_sure,
        )
    return answer


def _starts(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " c"]:
    """Tell where each class would start if the labels were sorted."""
    return np.concatenate([[0], np.cumsum(np.bincount(labels))]).astype(np.int64)


@numba.njit(cache=True)
def _overlap(boxes: np.ndarray, one: int, other: int) -> float:
    width = min(boxes[one, 2], boxes[other, 2]) - max(boxes[one, 0], boxes[other, 0])
    if width <= 0.0:
        return 0.0
    height = min(boxes[one, 3], boxes[other, 3]) - max(boxes[one, 1], boxes[other, 1])
    if height <= 0.0:
        return 0.0
    shared = width * height
    area_one = (boxes[one, 2] - boxes[one, 0]) * (boxes[one, 3] - boxes[one, 1])
    area_other = (boxes[other, 2] - boxes[other, 0]) * (boxes[other, 3] - boxes[other, 1])
    return float(shared / (area_one + area_other - shared))


@numba.njit(cache=True)
def _lie_inside(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    asked: np.ndarray,
    others: np.ndarray,
    share: float,
    as_sure: float,
) -> np.ndarray:
    inside = np.zeros(len(asked), dtype=np.bool_)
    for i in range(len(asked)):
        one = asked[i]
        area = (boxes[one, 2] - boxes[one, 0]) * (boxes[one, 3] - boxes[one, 1])
        for j in range(len(others)):
            other = others[j]
            if boxes[other, 0] >= boxes[one, 2]:
                break
            if labels[other] != labels[one] or scores[other] < as_sure * scores[one]:
                continue
            width = min(boxes[one, 2], boxes[other, 2]) - max(boxes[one, 0], boxes[other, 0])
            height = min(boxes[one, 3], boxes[other, 3]) - max(boxes[one, 1], boxes[other, 1])
            if width > 0.0 and height > 0.0 and width * height >= share * area:
                inside[i] = True
                break
    return inside


@numba.njit(cache=True)
def _sink(heap: np.ndarray, size: int, place: int, scores: np.ndarray) -> None:
    """Let an entry of a heap, best score and then lowest index on top, sink to where it belongs."""
    entry = heap[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            scores[heap[other]] > scores[heap[child]]
            or (scores[heap[other]] == scores[heap[child]] and heap[other] < heap[child])
        ):
            child = other
        if scores[entry] > scores[heap[child]] or (
            scores[entry] == scores[heap[child]] and entry < heap[child]
        ):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = entry


@numba.njit(cache=True)
def _choose(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    starts: np.ndarray,
    decay: int,
    width: float,
    floor: float,
    limit: int,
) -> np.ndarray:
    """Lower `scores` in place, and give the indices of the `limit` best.

    Scores only ever fall. So a box is not lowered before it is the best of all by the score that it had last: if it
    still is after what was chosen from its class in the meantime has lowered it, it is chosen.
    """
    size = len(scores)
    heap = np.arange(size)
    for place in range(size // 2 - 1, -1, -1):
        _sink(heap, size, place, scores)
    chosen = np.empty(limit, dtype=np.int64)
    of_class = np.empty(size, dtype=np.int64)  # what was chosen of each class, from its start on
    counts = np.zeros(len(starts), dtype=np.int64)
    num_met = np.zeros(size, dtype=np.int64)  # how many of those each box was lowered by
    num_chosen = 0
    while size > 0 and num_chosen < limit:
        best = heap[0]
        own = classes[best]
        if num_met[best] == counts[own]:
            chosen[num_chosen] = best
            num_chosen += 1
            of_class[starts[own] + counts[own]] = best
            counts[own] += 1
            is_done = True
        else:
            score = scores[best]
            for k in range(num_met[best], counts[own]):
                overlap = _overlap(boxes, best, of_class[starts[own] + k])
                if decay == _GAUSSIAN:
                    if overlap > 0.0:
                        score *= math.exp(-overlap * overlap / width)
                elif overlap > width:
                    score = score * (1.0 - overlap) if decay == _LINEAR else 0.0
            num_met[best] = counts[own]
            is_done = score < floor or score <= 0.0
            scores[best] = score
        if is_done:
            size -= 1
            heap[0] = heap[size]
        if size > 0:
            _sink(heap, size, 0, scores)
    return chosen[:num_chosen]


@numba.njit(cache=True)
def _fuse(
    fused: np.ndarray, scores: np.ndarray, classes: np.ndarray, starts: np.ndarray, iou: float
) -> np.ndarray:
    """Turn the first member of each cluster into its mean, in place; tells which are first members."""
    is_first = np.zeros(len(scores), dtype=np.bool_)
    of_class = np.empty(len(scores), dtype=np.int64)
    counts = np.zeros(len(starts), dtype=np.int64)
    weights = scores.copy()
    for one in range(len(scores)):
        own = classes[one]
        best, most = -1, iou
        for k in range(counts[own]):
            overlap = _overlap(fused, one, of_class[starts[own] + k])
            if overlap > most:
                best, most = of_class[starts[own] + k], overlap
        if best < 0:
            is_first[one] = True
            of_class[starts[own] + counts[own]] = one
            counts[own] += 1
            continue
        weight = weights[best] + scores[one]
        for side in range(4):
            fused[best, side] = (fused[best, side] * weights[best] + fused[one, side] * scores[one]) / weight
        weights[best] = weight
    return is_first
