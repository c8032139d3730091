"""Where a detector is right and where it is wrong: class by class, by size, and in false positives per image.

Matching is COCO's, by hotcoco: each detection, best first, takes the free object of its class that it overlaps most;
crowds take any number and count neither way. Images without objects count.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from jaxtyping import Bool, Float

from sniper.evaluation.coco import as_coco, as_results, check_detections_match
from sniper.geometry import Detections
from sniper.geometry.boxes import area, intersections
from sniper.geometry.boxes import iou as overlaps_of

PAPER_SIZES = (0.0, 25.0, 50.0, 100.0, 200.0, 300.0, math.inf)
"""Object sizes, square roots of areas in image pixels, that the paper tells recall between (SNIPER §5)."""

RECALLS = (0.5, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class.

    Attributes:
        name: of the class.
        num_objects: in the truth, crowds left out.
        num_detections: of all that were given.
        ap: as COCO's, over IoU 0.50 to 0.95; -1 without objects.
        ap50: at IoU 0.5.
        recall: the share of objects found, over the same IoUs.
    """

    name: str
    num_objects: int
    num_detections: int
    ap: float
    ap50: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class SizeScores:
    """The objects between two sizes.

    Attributes:
        at_least: smallest size, image pixels.
        below: first size too large, image pixels.
        ap: mean over classes and IoU 0.50 to 0.95; -1 without objects.
        recall: likewise.
        any_class_recall: of any detection, whatever its class: the recall of proposals (AR).
    """

    at_least: float
    below: float
    ap: float
    recall: float
    any_class_recall: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """What was found out.

    Attributes:
        classes: in the order of their ids.
        sizes: from small to large.
        false_positives: for some recalls, how many detections per image are no object at the score where that share of
            all objects is found (IoU 0.5, all classes together); None where it is never reached.
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
        """Give it as plain data."""
        return {
            "classes": [vars(one) for one in self.classes],
            "sizes": [
                {**vars(one), "below": None if one.below == math.inf else one.below} for one in self.sizes
            ],
            "false_positives_per_image": {
                f"at_recall_{recall:g}": None if value is None else round(value, 4)
                for recall, value in self.false_positives.items()
            },
        }


def diagnose(
    detections: Sequence[Mapping[str, Any]],
    ground_truth: Mapping[str, Any],
    *,
    max_detections: int = 100,
    sizes: Sequence[float] = PAPER_SIZES,
) -> Diagnosis:
    """Find out where detections are right and wrong.

    Args:
        detections: COCO results. May be empty.
        ground_truth: a COCO data set.
        max_detections: the best so many of each image and class count (of each image, for any class).
        sizes: where one bin of object sizes ends and the next begins, rising, image pixels.

    Raises:
        DetectionsError: if a detection is of an image or a category that the ground truth does not have.
        ValueError: if sizes do not rise.
    """
    if len(sizes) < 2 or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ValueError(f"sizes must rise, not {list(sizes)}")
    check_detections_match(detections, ground_truth)
    truth = as_coco(ground_truth)
    found = truth.load_res(as_results(detections))
    by_class = _accumulated(truth, found, max_detections=max_detections, sizes=sizes)
    any_class = _accumulated(truth, found, max_detections=max_detections, sizes=sizes, use_classes=False)
    names = {row["id"]: str(row.get("name", row["id"])) for row in ground_truth["categories"]}
    precision, recall = _curves(by_class)
    _, any_recall = _curves(any_class)  # (t, 1, a, m)
    category_ids = list(by_class.params.cat_ids)
    objects = [one for one in ground_truth["annotations"] if not one.get("iscrowd")]
    num_objects = _counts(objects, category_ids)
    num_found = _counts(detections, category_ids)
    return Diagnosis(
        classes=[
            ClassScores(
                name=names[category_id],
                num_objects=num_objects[k],
                num_detections=num_found[k],
                ap=_mean(precision[:, :, k, 0]),
                ap50=_mean(precision[0, :, k, 0]),
                recall=_mean(recall[:, k, 0]),
            )
            for k, category_id in enumerate(category_ids)
        ],
        sizes=[
            SizeScores(
                at_least=low,
                below=high,
                ap=_mean(precision[:, :, :, place]),
                recall=_mean(recall[:, :, place]),
                any_class_recall=_mean(any_recall[:, :, place]),
            )
            for place, (low, high) in enumerate(itertools.pairwise(sizes), start=1)
        ],
        false_positives=_false_positives(
            truth, found, num_images=len(ground_truth["images"]), max_detections=max_detections
        ),
        recalls=np.array(by_class.params.rec_thrs),
        precisions=np.stack([_mean_curve(precision[t, :, :, 0, -1]) for t in (0, 5, 9)]),
    )


def match(
    detections: Detections,
    boxes: Float[np.ndarray, "m 4"],
    labels: np.ndarray,
    is_crowd: Bool[np.ndarray, " m"],
    *,
    iou: float = 0.5,
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"], Bool[np.ndarray, " m"]]:
    """Compare what was found in one image with what is there, class by class.

    Args:
        detections: best first; boxes in the image frame. May be empty.
        boxes: (m, 4) xyxy of the objects, image frame. May be empty.
        labels: (m,) of the objects.
        is_crowd: (m,) whether each is a crowd.
        iou: the least overlap of a hit.

    Returns:
        (n,) which detections hit an object that no better one has hit, (n,) which are excused by lying in a crowd, and
        (m,) which objects are hit.
    """
    is_hit = np.zeros(len(detections), dtype=np.bool_)
    is_excused = np.zeros(len(detections), dtype=np.bool_)
    is_found = np.zeros(len(boxes), dtype=np.bool_)
    overlaps = overlaps_of(detections.boxes, boxes)  # (n, m)
    in_crowd = intersections(detections.boxes, boxes) >= iou * area(detections.boxes)[:, None]
    for place, label in enumerate(detections.labels.tolist()):
        is_own = labels == label
        free = np.flatnonzero(is_own & ~is_crowd & ~is_found)
        best = free[np.argmax(overlaps[place, free])] if len(free) else None
        if best is not None and overlaps[place, best] >= iou:
            is_hit[place] = is_found[best] = True
        else:
            is_excused[place] = (in_crowd[place] & is_own & is_crowd).any()
    return is_hit, is_excused, is_found


def _accumulated(
    truth: hotcoco.COCO,
    found: hotcoco.COCO,
    *,
    max_detections: int,
    sizes: Sequence[float],
    use_classes: bool = True,
) -> hotcoco.COCOeval:
    """Let hotcoco match and count, for all sizes and for each bin."""
    scoring = hotcoco.COCOeval(truth, found, "bbox")
    scoring.params.use_cats = use_classes
    scoring.params.max_dets = [max_detections]
    bins = list(itertools.pairwise(sizes))
    largest = 1e10
    scoring.params.area_rng = [
        [0.0, largest],
        *([low**2, min(np.nextafter(high**2, 0.0), largest)] for low, high in bins),
    ]
    scoring.params.area_rng_lbl = ["all", *(f"{low:g}-{high:g}" for low, high in bins)]
    scoring.evaluate()
    scoring.accumulate()
    return scoring


def _curves(scoring: hotcoco.COCOeval) -> tuple[np.ndarray, np.ndarray]:
    """Give (t, r, k, a, m) precisions and (t, k, a, m) recalls: IoU, recall, class, area, detections."""
    assert scoring.eval is not None
    return np.array(scoring.eval["precision"]), np.array(scoring.eval["recall"])


def _false_positives(
    truth: hotcoco.COCO, found: hotcoco.COCO, *, num_images: int, max_detections: int
) -> dict[float, float | None]:
    scoring = hotcoco.COCOeval(truth, found, "bbox")
    scoring.params.max_dets = [max_detections]
    scoring.params.iou_thrs = [0.5]
    scoring.params.area_rng, scoring.params.area_rng_lbl = [[0.0, 1e10]], ["all"]
    scoring.evaluate()
    scores: list[float] = []
    is_hit: list[bool] = []
    is_ignored: list[bool] = []
    num_objects = 0
    for pair in scoring.eval_imgs:
        if pair is None:
            continue
        scores += pair["dtScores"]
        is_hit += pair["dtMatched"][0]
        is_ignored += pair["dtIgnore"][0]
        num_objects += len(pair["gtIgnore"]) - sum(pair["gtIgnore"])
    if num_objects == 0:
        return dict.fromkeys(RECALLS)
    counts = ~np.array(is_ignored, dtype=np.bool_)
    counted = np.array(scores)[counts]
    order = np.argsort(-counted, kind="stable")
    hits = np.array(is_hit, dtype=np.bool_)[counts][order]
    # Whoever takes a score for the least takes all that have it.
    is_last = np.append(np.diff(counted[order]) != 0, True)[: len(order)]
    recalls, misses = np.cumsum(hits)[is_last] / num_objects, np.cumsum(~hits)[is_last]
    reached = {recall: np.flatnonzero(recalls >= recall) for recall in RECALLS}
    return {
        recall: float(misses[places[0]] / num_images) if len(places) else None
        for recall, places in reached.items()
    }


def _counts(entries: Sequence[Mapping[str, Any]], category_ids: Sequence[int]) -> list[int]:
    """Count entries by category."""
    places = {category_id: place for place, category_id in enumerate(category_ids)}
    of_entries = np.array([places[entry["category_id"]] for entry in entries], dtype=np.int64)
    counts: list[int] = np.bincount(of_entries, minlength=len(category_ids)).tolist()
    return counts


def _mean(values: np.ndarray) -> float:
    """Give the mean of what counts; -1 if nothing does."""
    counting = values[values > -1]
    return float(counting.mean()) if counting.size else -1.0


def _mean_curve(precision: Float[np.ndarray, "r k"]) -> Float[np.ndarray, " r"]:
    """Give the mean over the classes that have objects."""
    has_objects = (precision > -1).any(axis=0)
    if not has_objects.any():
        return np.zeros(len(precision))
    mean: np.ndarray = precision[:, has_objects].mean(axis=1)
    return mean
