"""Merging of overlapping detections: soft-NMS, NMS and weighted box fusion, and one box per object for viewing.

Soft-NMS (Bodla et al., 2017) lowers the scores of detections that overlap a better one instead of dropping them; SNIPER
merges its levels with the Gaussian form, σ = 0.55 (SNIPER §4; authors' code). Weighted box fusion (Solovyev et al.,
2021) averages overlapping boxes, weighted by their scores.
"""

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from sniper.geometry.detections import Detections
from sniper.geometry.kernels import kernel

Decay = Literal["gaussian", "linear", "hard"]

_SAME_CLASS_IOU, _ANY_CLASS_IOU = (
    0.5,
    0.6,
)  # above which a box is a second one on an object; see `drop_duplicates`
_GAUSSIAN, _LINEAR, _HARD = range(3)
_CODES = {"gaussian": _GAUSSIAN, "linear": _LINEAR, "hard": _HARD}


def soft_nms(
    detections: Detections,
    *,
    decay: Decay = "gaussian",
    sigma: float = 0.55,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
    max_detections: int | None = None,
) -> Detections:
    """Merge overlapping detections of each class by soft-NMS or NMS.

    The best detection is kept, the scores of those that overlap it are lowered, then the next best is kept, and so on.

    Args:
        detections: boxes in any one frame. May be empty. Not changed.
        decay: `gaussian` multiplies a score by exp(-IoU² / sigma). `linear` multiplies it by 1 - IoU where the IoU is
            above `iou_threshold`. `hard` is NMS: it drops detections whose IoU is above `iou_threshold`.
        sigma: width of the Gaussian.
        iou_threshold: see `decay`; the Gaussian does not use it.
        score_threshold: detections whose score is or falls below this are dropped.
        max_detections: maximum number over all classes; None keeps all.

    Returns:
        The detections that are kept, with lowered scores, best first; equal scores in the order given.

    Raises:
        ValueError: if sigma is not positive.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0]])
        >>> duplicates = Detections(boxes=boxes, scores=np.array([0.9, 0.8]), labels=np.array([0, 0]))
        >>> soft_nms(duplicates, sigma=0.5).scores.round(3).tolist()
        [0.9, 0.108]
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    candidates = detections[np.isfinite(detections.scores) & (detections.scores >= score_threshold)]
    scores = candidates.scores.astype(np.float64, copy=True)
    limit = len(candidates) if max_detections is None else min(max_detections, len(candidates))
    kept = _soft_nms(
        np.ascontiguousarray(candidates.boxes, dtype=np.float64),
        scores,
        candidates.labels.astype(np.int64),
        _class_starts(candidates.labels),
        _CODES[decay],
        sigma if decay == "gaussian" else iou_threshold,
        score_threshold,
        limit,
    )
    return replace(candidates[kept], scores=scores[kept].astype(detections.scores.dtype))


def drop_duplicates(
    detections: Detections,
    *,
    iou_threshold: float = _SAME_CLASS_IOU,
    any_class_iou_threshold: float = _ANY_CLASS_IOU,
) -> Detections:
    """Drop second boxes on an object, which soft-NMS keeps with lower scores: NMS within classes, then across them.

    The thresholds separate duplicates from objects that overlap: of the objects of COCO val2017, VisDrone val and five
    smaller data sets, 0.0 to 0.7 % overlap another of their class by an IoU above 0.5, and 0.0 to 1.0 % one of another
    class, such as a rider and a horse, by more than 0.6.

    Args:
        detections: boxes in any one frame. May be empty.
        iou_threshold: a detection is dropped if its IoU with a better one of its class is above this.
        any_class_iou_threshold: the same for a better one of any class.

    Returns:
        The detections that are kept, with their scores, best first. Those above a score do not depend on those below.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 6.0], [0.0, 0.0, 9.0, 8.0]])
        >>> detections = Detections(boxes=boxes, scores=np.array([0.9, 0.8, 0.7]), labels=np.array([0, 0, 1]))
        >>> drop_duplicates(detections).scores.tolist()
        [0.9]
    """
    return detections[
        find_first_boxes(
            detections, iou_threshold=iou_threshold, any_class_iou_threshold=any_class_iou_threshold
        )
    ]


def find_first_boxes(
    detections: Detections,
    *,
    iou_threshold: float = _SAME_CLASS_IOU,
    any_class_iou_threshold: float = _ANY_CLASS_IOU,
) -> Int[np.ndarray, " k"]:
    """Return the indices of the detections that `drop_duplicates` keeps, best first."""
    first = _nms(detections, detections.labels, iou_threshold)
    kept = detections[first]
    return first[_nms(kept, np.zeros_like(kept.labels), any_class_iou_threshold)]


def _nms(
    detections: Detections, labels: Int[np.ndarray, " n"], iou_threshold: float
) -> Int[np.ndarray, " k"]:
    """Return the indices that NMS within equal labels keeps, best first."""
    return _soft_nms(
        np.ascontiguousarray(detections.boxes, dtype=np.float64),
        detections.scores.astype(np.float64, copy=True),
        labels.astype(np.int64),
        _class_starts(labels),
        _HARD,
        iou_threshold,
        0.0,
        len(detections),
    )


@kernel
def first_boxes(boxes: np.ndarray, iou_threshold: float, limit: int) -> np.ndarray:
    """Return the first boxes that NMS keeps, and stop once there are enough.

    Args:
        boxes: (n, 4) xyxy in any one frame, best first, contiguous. May be empty.
        iou_threshold: a box is dropped if its IoU with a better one that is kept is above this.
        limit: maximum number of boxes to keep.

    Returns:
        (k,) int64 indices of the boxes kept, best first. In float32 they are those of torchvision's `nms`.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [0.0, 0.0, 5.0, 5.0]], dtype=np.float32)
        >>> first_boxes(boxes, 0.7, 2).tolist()
        [0, 2]
    """
    limit = min(limit, len(boxes))
    kept = np.empty(limit, dtype=np.int64)
    corners = np.empty((5, limit), dtype=boxes.dtype)  # x1, y1, x2, y2 and area of those kept
    count = 0
    for i in range(len(boxes)):
        if count == limit:
            break
        x1, y1, x2, y2 = boxes[i]
        area = (x2 - x1) * (y2 - y1)
        is_kept = True
        for k in range(count):
            width = min(corners[2, k], x2) - max(corners[0, k], x1)
            height = min(corners[3, k], y2) - max(corners[1, k], y1)
            if width > 0 and height > 0:
                shared = width * height
                if shared / (corners[4, k] + area - shared) > iou_threshold:
                    is_kept = False
                    break
        if is_kept:
            corners[0, count], corners[1, count], corners[2, count], corners[3, count] = x1, y1, x2, y2
            corners[4, count] = area
            kept[count] = i
            count += 1
    return kept[:count]


def weighted_box_fusion(
    detections: Detections,
    *,
    iou_threshold: float = 0.55,
    score_threshold: float = 0.001,
    max_detections: int | None = None,
) -> Detections:
    """Merge overlapping detections of each class by weighted box fusion.

    From the best to the worst, each detection joins the fused box with which it has the largest IoU, if that is above
    `iou_threshold`, or starts a new one. A fused box is the mean of its members, weighted by their scores. Its score is
    that of its best member, not their mean: an object is found at few levels of a pyramid, so levels without it are no
    evidence against it. So is its mask, which keeps its place in the image.

    Args:
        detections: boxes in any one frame. May be empty.
        iou_threshold: see above.
        score_threshold: detections below this score are dropped, and those of score 0.
        max_detections: maximum number over all classes; None keeps all. The time grows with the boxes of a class times
            its fused boxes, whatever the maximum.

    Returns:
        The fused boxes, best first; equal scores in the order of their best members.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 12.0]])
        >>> pair = Detections(boxes=boxes, scores=np.array([0.75, 0.25]), labels=np.array([0, 0]))
        >>> weighted_box_fusion(pair).boxes.tolist()
        [[0.0, 0.0, 8.0, 9.0]]
    """
    is_candidate = np.isfinite(detections.scores) & (detections.scores >= score_threshold)
    candidates = np.flatnonzero(is_candidate & (detections.scores > 0))
    ranked = detections[candidates[np.argsort(-detections.scores[candidates], kind="stable")]]
    boxes = np.ascontiguousarray(ranked.boxes, dtype=np.float64).copy()
    is_fused_box = _fuse(
        boxes,
        ranked.scores.astype(np.float64),
        ranked.labels.astype(np.int64),
        _class_starts(ranked.labels),
        iou_threshold,
    )
    kept = np.flatnonzero(is_fused_box)[:max_detections]
    return replace(ranked[kept], boxes=boxes[kept])


def is_mostly_contained(
    detections: Detections,
    is_candidate: Bool[np.ndarray, " n"],
    *,
    min_overlap: float = 0.7,
    min_score_ratio: float = 0.5,
) -> Bool[np.ndarray, " n"]:
    """Check which candidates lie mostly inside a detection of their class that is not a candidate.

    Args:
        detections: boxes in any one frame. May be empty.
        is_candidate: (n,) which detections to check.
        min_overlap: fraction of the candidate's area that must lie inside the other box.
        min_score_ratio: the other score must be at least this times the candidate's.

    Returns:
        (n,) flags; False for detections that are no candidates.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 3.0, 9.0]])
        >>> pair = Detections(boxes=boxes, scores=np.array([0.8, 0.9]), labels=np.array([0, 0]))
        >>> is_mostly_contained(pair, np.array([False, True])).tolist()
        [False, True]
    """
    is_contained = np.zeros(len(detections), dtype=np.bool_)
    others = np.flatnonzero(~is_candidate)
    candidates = np.flatnonzero(is_candidate)
    if len(candidates) and len(others):
        others = others[np.argsort(detections.boxes[others, 0], kind="stable")]  # by their left edges
        is_contained[candidates] = _are_contained(
            np.ascontiguousarray(detections.boxes, dtype=np.float64),
            detections.scores.astype(np.float64),
            detections.labels.astype(np.int64),
            candidates,
            others,
            min_overlap,
            min_score_ratio,
        )
    return is_contained


def _class_starts(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " c"]:
    """Return where each class would start if the labels were sorted."""
    return np.concatenate([[0], np.cumsum(np.bincount(labels))]).astype(np.int64)


@kernel
def _iou(boxes: np.ndarray, i: int, j: int) -> float:
    width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
    if width <= 0.0:
        return 0.0
    height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
    if height <= 0.0:
        return 0.0
    shared = width * height
    area_i = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])
    area_j = (boxes[j, 2] - boxes[j, 0]) * (boxes[j, 3] - boxes[j, 1])
    return float(shared / (area_i + area_j - shared))


@kernel
def _are_contained(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    candidates: np.ndarray,
    others: np.ndarray,
    min_overlap: float,
    min_score_ratio: float,
) -> np.ndarray:
    """Check which candidates lie mostly inside one of the others, which are sorted by their left edges."""
    is_contained = np.zeros(len(candidates), dtype=np.bool_)
    for c in range(len(candidates)):
        i = candidates[c]
        area = (boxes[i, 2] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 1])
        for o in range(len(others)):
            j = others[o]
            if boxes[j, 0] >= boxes[i, 2]:
                break
            if labels[j] != labels[i] or scores[j] < min_score_ratio * scores[i]:
                continue
            width = min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0])
            height = min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1])
            if width > 0.0 and height > 0.0 and width * height >= min_overlap * area:
                is_contained[c] = True
                break
    return is_contained


@kernel
def _sift_down(heap: np.ndarray, size: int, position: int, scores: np.ndarray) -> None:
    """Restore the heap below a position; the best score is on top, and the lowest index among equal scores."""
    entry = heap[position]
    while True:
        child = 2 * position + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (
            scores[heap[right]] > scores[heap[child]]
            or (scores[heap[right]] == scores[heap[child]] and heap[right] < heap[child])
        ):
            child = right
        if scores[entry] > scores[heap[child]] or (
            scores[entry] == scores[heap[child]] and entry < heap[child]
        ):
            break
        heap[position] = heap[child]
        position = child
    heap[position] = entry


@kernel
def _soft_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    starts: np.ndarray,
    decay: int,
    width: float,
    score_threshold: float,
    limit: int,
) -> np.ndarray:
    """Lower `scores` in place, and return the indices of the `limit` best.

    Scores only decrease, so they are updated lazily: a score is recomputed when its box reaches the top of the heap. A
    box that is still the best after all kept boxes of its class have lowered it is kept.
    """
    size = len(scores)
    heap = np.arange(size)
    for position in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, position, scores)
    kept = np.empty(limit, dtype=np.int64)
    kept_of_class = np.empty(size, dtype=np.int64)  # the kept boxes of each class, from its start on
    counts = np.zeros(len(starts), dtype=np.int64)
    num_applied = np.zeros(size, dtype=np.int64)  # how many kept boxes have lowered each score
    num_kept = 0
    while size > 0 and num_kept < limit:
        best = heap[0]
        label = labels[best]
        if num_applied[best] == counts[label]:
            kept[num_kept] = best
            num_kept += 1
            kept_of_class[starts[label] + counts[label]] = best
            counts[label] += 1
            is_done = True
        else:
            score = scores[best]
            for k in range(num_applied[best], counts[label]):
                overlap = _iou(boxes, best, kept_of_class[starts[label] + k])
                if decay == _GAUSSIAN:
                    if overlap > 0.0:
                        score *= math.exp(-overlap * overlap / width)
                elif overlap > width:
                    score = score * (1.0 - overlap) if decay == _LINEAR else 0.0
            num_applied[best] = counts[label]
            is_done = score < score_threshold or score <= 0.0
            scores[best] = score
        if is_done:
            size -= 1
            heap[0] = heap[size]
        if size > 0:
            _sift_down(heap, size, 0, scores)
    return kept[:num_kept]


@kernel
def _fuse(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, starts: np.ndarray, iou_threshold: float
) -> np.ndarray:
    """Turn the best member of each fused box into the weighted mean, in place; return which boxes those are."""
    is_fused_box = np.zeros(len(scores), dtype=np.bool_)
    fused_of_class = np.empty(len(scores), dtype=np.int64)
    counts = np.zeros(len(starts), dtype=np.int64)
    weights = scores.copy()
    for i in range(len(scores)):
        label = labels[i]
        best, largest = -1, iou_threshold
        for k in range(counts[label]):
            overlap = _iou(boxes, i, fused_of_class[starts[label] + k])
            if overlap > largest:
                best, largest = fused_of_class[starts[label] + k], overlap
        if best < 0:
            is_fused_box[i] = True
            fused_of_class[starts[label] + counts[label]] = i
            counts[label] += 1
            continue
        weight = weights[best] + scores[i]
        for side in range(4):
            boxes[best, side] = (boxes[best, side] * weights[best] + boxes[i, side] * scores[i]) / weight
        weights[best] = weight
    return is_fused_box
