"""Match detections with ground truth, as COCO does: with hotcoco for a data set, or in one image.

Each detection, from the highest score down, takes the unmatched object of its class that it overlaps most. Crowds take
any number of detections, which are then ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hotcoco
import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.data.datasets import ImageRecord
from sniper.evaluation.blocks import MatchingBlocks, select_best, split_crowded
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry import Detections
from sniper.geometry.boxes import area, intersections, iou

LARGEST_AREA = 1e10
"""COCO's upper bound of areas, square pixels."""

AREA_RANGES: Mapping[str, tuple[float, float]] = {
    "all": (0.0, LARGEST_AREA),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, LARGEST_AREA),
}
"""COCO's smallest and largest areas of objects (both inclusive), square pixels."""

_EVERY_AREA = {"all": (0.0, LARGEST_AREA)}


@dataclass(frozen=True, kw_only=True, eq=False)
class COCOEvaluation:
    """What hotcoco computes.

    Attributes:
        result: with precision and recall.
        blocks: what it was computed on: the images, or blocks of crowded ones.
    """

    result: hotcoco.COCOeval
    blocks: MatchingBlocks

    @property
    def precision(self) -> Float[np.ndarray, "t r k a m"]:
        """(t, r, k, a, m) precision by IoU, recall, class, area and number of detections; -1 without objects."""
        assert self.result.eval is not None
        return np.array(self.result.eval["precision"])

    @property
    def recall(self) -> Float[np.ndarray, "t k a m"]:
        """(t, k, a, m) recall by IoU, class, area and number of detections; -1 without objects."""
        assert self.result.eval is not None
        return np.array(self.result.eval["recall"])


def run_coco_eval(
    pair: EvaluationPair,
    *,
    max_detections: Sequence[int],
    area_ranges: Mapping[str, tuple[float, float]] = _EVERY_AREA,
    iou_thresholds: Sequence[float] | None = None,
    use_categories: bool = True,
    max_overlaps: int | None = None,
) -> COCOEvaluation:
    """Match boxes or masks (`pair.iou_type`) by the COCO rules, and accumulate precision and recall.

    Of crowded images, which are split (`blocks`), only numbers with the last of `max_detections` are those of the
    images.

    Args:
        pair: detections and ground truth.
        max_detections: how many detections of each image and class count, with the highest scores; rising.
        area_ranges: smallest and largest area (inclusive), square image pixels, by name.
        iou_thresholds: COCO's 0.50, 0.55 … 0.95 if None.
        use_categories: False to match detections with objects of any class.
        max_overlaps: see `split_crowded`.

    Raises:
        DetectionsError: if there are too many boxes on each other to be compared.
    """
    blocks = split_crowded(
        pair,
        max_detections=max_detections[-1],
        iou=min(iou_thresholds or (0.5,)),
        use_categories=use_categories,
        max_overlaps=max_overlaps,
    )
    evaluation = hotcoco.COCOeval(*blocks.pair.hotcoco, pair.iou_type)
    params = evaluation.params
    params.max_dets = list(max_detections)
    params.area_rng = [list(bounds) for bounds in area_ranges.values()]
    params.area_rng_lbl = list(area_ranges)
    params.use_cats = use_categories
    if iou_thresholds is not None:
        params.iou_thrs = list(iou_thresholds)
    evaluation.evaluate()
    evaluation.accumulate()
    return COCOEvaluation(result=evaluation, blocks=blocks)


@dataclass(frozen=True, kw_only=True, eq=False)
class PairMatches:
    """All detections of all images, matched with the objects of their classes at one IoU threshold.

    A detection that is neither a true nor a false positive is ignored, since it lies in a crowd or has a lower score
    than `max_detections` others of its image and class.

    Attributes:
        pair: the detections and their ground truth.
        iou: least overlap of a match.
        is_true_positive: (n,) whether each detection matches an object.
        is_false_positive: (n,) whether each detection matches nothing.
        object_indices: (n,) the object of the ground truth that each true positive matches; -1 for others.
    """

    pair: EvaluationPair
    iou: float
    is_true_positive: Bool[np.ndarray, " n"]
    is_false_positive: Bool[np.ndarray, " n"]
    object_indices: Int[np.ndarray, " n"]

    @property
    def num_objects(self) -> int:
        """Number of objects, without crowds."""
        return int((~self.pair.truth.is_crowd).sum())

    def limit(self, max_detections: int) -> "PairMatches":
        """Return the matches where only some detections of each image and class count, those with the highest scores.

        A detection is matched before all with lower scores, so the matches of those that are left do not change.
        """
        if self.pair.num_per_image_and_class.max(initial=0) <= max_detections:
            return self
        is_best = select_best(self.pair, max_detections)
        return replace(
            self,
            is_true_positive=self.is_true_positive & is_best,
            is_false_positive=self.is_false_positive & is_best,
            object_indices=np.where(is_best, self.object_indices, -1),
        )

    @property
    def match_scores(self) -> Float[np.ndarray, " m"]:
        """The score of the detection that matches each object; -inf for objects that none matches, and for crowds.

        A detection is matched before all with lower scores, so an object is missed from a threshold on exactly if its
        score is below that threshold.
        """
        scores = np.full(len(self.pair.truth.labels), -math.inf)
        is_true = self.is_true_positive
        scores[self.object_indices[is_true]] = self.pair.scores[is_true]
        return scores

    def count_by_score(
        self,
    ) -> tuple[Float[np.ndarray, " p"], Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        """Count true and false positives of all classes from each score on.

        Returns:
            (p,) distinct scores of the detections that count, falling; (p,) true positives and (p,) false positives
            with at least that score.
        """
        counts = self.is_true_positive | self.is_false_positive
        order = np.argsort(-self.pair.scores[counts], kind="stable")
        scores = self.pair.scores[counts][order]
        # A threshold keeps all detections of the same score, so only the last of them is a point of the curve.
        points = np.flatnonzero(np.append(np.diff(scores) != 0, True)[: len(scores)])
        num_true = np.cumsum(self.is_true_positive[counts][order])[points]
        return scores[points], num_true, points + 1 - num_true


def match_pair(pair: EvaluationPair, *, iou: float = 0.5, max_detections: int | None = None) -> PairMatches:
    """Match detections with ground truth by the COCO rules for boxes or masks, at one IoU threshold.

    Args:
        pair: detections and ground truth.
        iou: least overlap of a match.
        max_detections: how many detections of each image and class count; None for all.
    """
    limit = pair.num_per_image_and_class.max(initial=1) if max_detections is None else max_detections
    evaluation = run_coco_eval(pair, max_detections=[int(limit)], iou_thresholds=[iou])
    return matches_at(evaluation, pair, iou=iou)


def matches_at(evaluation: COCOEvaluation, pair: EvaluationPair, *, iou: float) -> PairMatches:
    """Return the matches of an evaluation at one of its IoU thresholds.

    Args:
        evaluation: from `run_coco_eval`, with objects of every area as the first range.
        pair: that was evaluated.
        iou: the threshold.
    """
    # Candidates for wrong labels are not needed: no detection has a score of infinity.
    diagnostics = evaluation.result.image_diagnostics(iou_thr=iou, score_thr=math.inf)
    states = diagnostics["dt_status"]  # without those ignored
    numbers = np.fromiter(states, dtype=np.int64, count=len(states))
    indices = evaluation.blocks.rows[numbers - 1]  # hotcoco numbers detections from 1
    is_true = np.fromiter(map("tp".__eq__, states.values()), dtype=np.bool_, count=len(states))
    is_true_positive = np.zeros(len(pair), dtype=np.bool_)
    is_false_positive = np.zeros(len(pair), dtype=np.bool_)
    is_true_positive[indices] = is_true
    is_false_positive[indices] = ~is_true
    return PairMatches(
        pair=pair,
        iou=iou,
        is_true_positive=is_true_positive,
        is_false_positive=is_false_positive,
        object_indices=_matched_objects(diagnostics["dt_match"], evaluation, is_true_positive),
    )


def _matched_objects(
    matches: Mapping[int, int], evaluation: COCOEvaluation, is_true_positive: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Return the object that each true positive matches, by hotcoco's numbers of both, which count from 1."""
    numbers = np.array([*matches.items()], dtype=np.int64).reshape(-1, 2)
    objects = np.full(len(is_true_positive), -1)
    objects[evaluation.blocks.rows[numbers[:, 0] - 1]] = evaluation.blocks.object_rows[numbers[:, 1] - 1]
    return np.where(is_true_positive, objects, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMatches:
    """The detections of one class in all images, highest score first, matched with its objects.

    A detection that is ignored, since it lies in a crowd, is neither a true nor a false positive.

    Attributes:
        scores: (d,) of the detections, or their ranks, from the last.
        image_indices: (d,) the image of each detection.
        is_true_positive: (t, d) whether each detection matches an object, by IoU threshold.
        is_false_positive: (t, d) whether each detection matches nothing, by IoU threshold.
        num_objects: (m,) objects in each image, without crowds.
    """

    scores: Float[np.ndarray, " d"]
    image_indices: Int[np.ndarray, " d"]
    is_true_positive: Bool[np.ndarray, "t d"]
    is_false_positive: Bool[np.ndarray, "t d"]
    num_objects: Int[np.ndarray, " m"]


def matches_by_class(evaluation: COCOEvaluation, pair: EvaluationPair) -> list[ClassMatches]:
    """Return the matches of each class that has objects or detections.

    Args:
        evaluation: from `run_coco_eval`, with a single range of areas.
        pair: that was evaluated.
    """
    images_of_class: dict[int, list[Mapping[str, Any]]] = {}
    for image in evaluation.result.eval_imgs:
        if image is not None:
            images_of_class.setdefault(image["category_id"], []).append(image)
    return [_join_images(images, evaluation, pair) for images in images_of_class.values()]


def _join_images(
    images: Sequence[Mapping[str, Any]], evaluation: COCOEvaluation, pair: EvaluationPair
) -> ClassMatches:
    """Join hotcoco's matches of one class in single images."""
    blocks, num_thresholds = evaluation.blocks, len(evaluation.result.params.iou_thrs)
    block_of_rank = np.argsort(blocks.pair.image_ranks)
    scores, image_indices, is_matched, is_ignored = [], [], [], []
    num_objects = np.zeros(pair.truth.num_images, dtype=np.int64)
    for image in sorted(images, key=lambda image: image["image_id"]):
        index = blocks.images[block_of_rank[image["image_id"]]]
        num_objects[index] += len(image["gtIgnore"]) - sum(image["gtIgnore"])
        num = len(image["dtScores"])
        scores.append(np.array(image["dtScores"], dtype=np.float64))
        image_indices.append(np.full(num, index))
        is_matched.append(np.array(image["dtMatched"], dtype=np.bool_).reshape(num_thresholds, num))
        is_ignored.append(np.array(image["dtIgnore"], dtype=np.bool_).reshape(num_thresholds, num))
    joined = np.concatenate(scores)
    order = np.argsort(-joined, kind="stable")
    matched = np.concatenate(is_matched, axis=1)[:, order]
    counts = ~np.concatenate(is_ignored, axis=1)[:, order]
    return ClassMatches(
        scores=joined[order],
        image_indices=np.concatenate(image_indices)[order],
        is_true_positive=matched & counts,
        is_false_positive=~matched & counts,
        num_objects=num_objects,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageMatches:
    """The detections of one image, matched with its ground truth.

    Attributes:
        is_true_positive: (n,) whether each detection matches an object.
        is_ignored: (n,) whether each detection matches no object and lies in a crowd of its class.
        is_missed: (m,) whether each object is matched by no detection; False for crowds.
    """

    is_true_positive: Bool[np.ndarray, " n"]
    is_ignored: Bool[np.ndarray, " n"]
    is_missed: Bool[np.ndarray, " m"]


def match_detections(
    detections: Detections, ground_truth: ImageRecord, *, iou_threshold: float = 0.5
) -> ImageMatches:
    """Match the detections of one image with its objects, class by class.

    Args:
        detections: image frame, highest score first. May be empty.
        ground_truth: of the image.
        iou_threshold: least overlap of a match.
    """
    boxes, is_crowd = ground_truth.boxes, ground_truth.is_crowd
    is_true_positive = np.zeros(len(detections), dtype=np.bool_)
    is_ignored = np.zeros(len(detections), dtype=np.bool_)
    is_matched = np.zeros(len(boxes), dtype=np.bool_)
    for index, label in enumerate(detections.labels.tolist()):
        box = detections.boxes[
            index : index + 1
        ]  # one by one, since the overlaps of all may not fit into memory
        is_of_class = ground_truth.labels == label
        free = np.flatnonzero(is_of_class & ~is_crowd & ~is_matched)
        overlaps = iou(box, boxes[free])[0]  # (k,)
        best = np.argmax(overlaps) if len(free) else None
        if best is not None and overlaps[best] >= iou_threshold:
            is_true_positive[index] = is_matched[free[best]] = True
        else:
            crowds = boxes[is_of_class & is_crowd]
            is_ignored[index] = (intersections(box, crowds)[0] >= iou_threshold * area(box)).any()
    return ImageMatches(
        is_true_positive=is_true_positive, is_ignored=is_ignored, is_missed=~is_matched & ~is_crowd
    )
