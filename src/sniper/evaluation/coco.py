"""Score detections by the COCO rules."""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from sniper.evaluation.exchanged import find_exchanged_classes
from sniper.evaluation.false_positives import FalsePositives, count_false_positives
from sniper.evaluation.matching import AREA_RANGES, COCOEvaluation, PairMatches, matches_at, run_coco_eval
from sniper.evaluation.numbers import NUMBERS, CocoNumbers
from sniper.evaluation.pair import EvaluationPair, Results, Truth


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """The scores of one class.

    Attributes:
        name: of the class.
        num_objects: in the ground truth, without crowds.
        num_detections: all that were given.
        ap: mean over IoU 0.50 to 0.95; -1 without objects.
        ap50: at IoU 0.5; -1 without objects.
        ar: the highest recall with the best `max_detections` of each image, mean over IoU 0.50 to 0.95; -1 without
            objects.
    """

    name: str
    num_objects: int
    num_detections: int
    ap: float
    ap50: float
    ar: float


@dataclass(frozen=True, kw_only=True)
class CocoScores(CocoNumbers):
    """The twelve COCO numbers, and `classes`: the scores of each class, in the order of their ids."""

    classes: tuple[ClassScores, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scores(CocoScores):
    """The COCO scores of boxes, and false positives per image.

    `num_cut` counts the pairs of image and class with more than `max_detections` detections. `masks` has the scores of
    masks, where both the detections and the ground truth have masks; all others are of boxes. `false_positives` are
    those at IoU 0.5 among the best `max_detections` of each image and class.
    """

    num_images: int
    num_detections: int
    num_cut: int
    false_positives: FalsePositives
    masks: CocoScores | None = None

    def as_dict(self) -> dict[str, float | int]:
        """Return the numbers of boxes of all classes by name.

        `ar` is named after `max_detections`, such as `ar_100`, and false positives after the recall, such as
        `fp_per_image_at_80`. The latter are left out where they are not defined.
        """
        left_out = ("max_detections", "classes", "false_positives", "masks")
        names = [field.name for field in dataclasses.fields(self) if field.name not in left_out]
        false_positives = self.false_positives.as_dict()
        return {self._name_of(name): getattr(self, name) for name in names} | {
            name: value for name, value in false_positives.items() if value is not None
        }


def evaluate(detections: Results, ground_truth: Truth, *, max_detections: int = 100) -> Scores:
    """Score detections by the COCO rules for boxes, and for masks where both sides have them.

    COCO uses the 100 best detections of each image and class. This limits recall on denser images (drone views show
    several hundred objects), in every tool that reports COCO numbers; `num_cut` counts how often.

    Args:
        detections: path of a COCO results file, or COCO results, each with `image_id`, `category_id`, `bbox` (x, y,
            width, height; image frame, pixels) and `score`. May be empty. Equal scores are ordered by image id, then
            as given. Those with a `category_name` are matched with the categories by name, all others by id.
        ground_truth: path of annotations, a `Dataset`, or a COCO object: `images`, `categories`, `annotations`. The
            area of an annotation without `area` is that of its box; one without `iscrowd` is no crowd; `id` is not
            needed.
        max_detections: how many detections of each image and class count, at least 10; 100 for COCO's own numbers.

    Returns:
        The twelve numbers, false positives per image, and the number of images and detections.

    Raises:
        DetectionsError: if detections cannot be scored, or the ground truth does not have the image or category of one.
        AnnotationError: if annotations cannot be loaded, or no category name of the detections is one of theirs.

    Example:
        >>> box = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 50, 40]}
        >>> truth = {"images": [{"id": 7}], "categories": [{"id": 1}], "annotations": [box]}
        >>> scores = evaluate([{**box, "score": 0.9}], truth)
        >>> round(scores.ap, 6), scores.ap_small
        (1.0, -1.0)
    """
    pair = EvaluationPair.of(detections, ground_truth)
    scores = score(pair, max_detections=max_detections)
    for warning in (*pair.warnings, *find_exchanged_classes(pair)):
        warnings.warn(warning, stacklevel=2)
    return scores


def score(pair: EvaluationPair, *, max_detections: int = 100, matches: PairMatches | None = None) -> Scores:
    """Score detections that are paired with their ground truth; see `evaluate`.

    Args:
        pair: detections and ground truth.
        max_detections: how many detections of each image and class count.
        matches: of all detections of the pair at IoU 0.5, where they are known; it saves time.
    """
    if max_detections < 10:
        raise ValueError(
            f"max_detections must be at least 10, since AR is also computed at 10, not {max_detections}"
        )
    evaluation = run_coco_eval(pair, max_detections=(1, 10, max_detections), area_ranges=AREA_RANGES)
    if matches is None:
        matches = matches_at(evaluation, pair, iou=0.5)
    return Scores(
        **_to_scores(pair, evaluation, max_detections=max_detections),
        num_images=pair.truth.num_images,
        num_detections=len(pair),
        num_cut=int((pair.num_per_image_and_class > max_detections).sum()),
        false_positives=count_false_positives(matches.limit(max_detections)),
        masks=_score_masks(pair, max_detections=max_detections),
    )


def _score_masks(pair: EvaluationPair, *, max_detections: int) -> CocoScores | None:
    masks = pair.for_masks()
    if masks is None:
        return None
    evaluation = run_coco_eval(masks, max_detections=(1, 10, max_detections), area_ranges=AREA_RANGES)
    return CocoScores(**_to_scores(masks, evaluation, max_detections=max_detections))


def _to_scores(pair: EvaluationPair, evaluation: COCOEvaluation, *, max_detections: int) -> dict[str, Any]:
    """Return the fields of `CocoScores`."""
    stats = _summarize(evaluation)
    if evaluation.blocks.is_split:  # the best 1 and 10 of each image are not those of each block
        few = run_coco_eval(
            pair,
            max_detections=(1, 10, 10),
            area_ranges=AREA_RANGES,
            max_overlaps=10 * len(pair.truth.labels),  # so that it is not split again
        )
        stats[6:8] = _summarize(few)[6:8]
    return {
        **dict(zip(NUMBERS, stats, strict=True)),
        "max_detections": max_detections,
        "classes": _score_classes(pair, evaluation),
    }


def _summarize(evaluation: COCOEvaluation) -> list[float]:
    """Return COCO's twelve numbers."""
    evaluation.result.summary_lines()  # fills `stats` as `summarize` does, but prints nothing
    return [float(number) for number in evaluation.result.stats]


def _score_classes(pair: EvaluationPair, evaluation: COCOEvaluation) -> tuple[ClassScores, ...]:
    truth, num_classes = pair.truth, len(pair.truth.categories)
    precision = evaluation.precision[:, :, :, 0, -1]  # (t, r, k): of all areas
    recall = evaluation.recall[:, :, 0, -1]  # (t, k)
    num_objects = np.bincount(truth.labels[~truth.is_crowd], minlength=num_classes).tolist()
    num_detections = np.bincount(pair.labels, minlength=num_classes).tolist()
    return tuple(
        ClassScores(
            name=category.name,
            num_objects=num_objects[label],
            num_detections=num_detections[label],
            ap=mean_of_defined(precision[:, :, label]),
            ap50=mean_of_defined(precision[0, :, label]),
            ar=mean_of_defined(recall[:, label]),
        )
        for label, category in enumerate(truth.categories)
    )


def mean_of_defined(values: np.ndarray) -> float:
    """Return the mean of the values that are not -1; -1 if all are."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
