"""Comparison of detectors, against COCO's own numbers and data sets with repeated images."""

import copy
import math
from typing import Any

import numpy as np
import pytest

from sniper.evaluation.coco import evaluate
from sniper.evaluation.comparison import ResampledAP, ResampledFalsePositives, compare
from sniper.evaluation.false_positives import FalsePositiveCurve
from sniper.evaluation.matching import match_pair
from sniper.evaluation.pair import EvaluationPair
from tests.evaluation.test_diagnosis import random_results


def resampled(detections: list[dict[str, Any]], ground_truth: dict[str, Any]) -> ResampledAP:
    return ResampledAP(EvaluationPair.of(detections, ground_truth))


@pytest.mark.parametrize("seed", range(8))
def test_with_every_image_once_ap_equals_that_of_coco(seed: int) -> None:
    detections, ground_truth = random_results(seed)
    weights = np.ones(len(ground_truth["images"]), dtype=np.int64)
    assert resampled(detections, ground_truth)(weights) == pytest.approx(
        evaluate(detections, ground_truth).ap, abs=1e-9
    )


def repeated(
    detections: list[dict[str, Any]], ground_truth: dict[str, Any], weights: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Repeat each image as often as its weight, each copy with its own id."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    for image, count in zip(ground_truth["images"], weights.tolist(), strict=True):
        for _ in range(count):
            new_id = len(images) + 1
            images.append({"id": new_id})
            for rows, into in ((ground_truth["annotations"], annotations), (detections, copies)):
                into += [{**row, "image_id": new_id} for row in rows if row["image_id"] == image["id"]]
    for annotation_id, row in enumerate(annotations, start=1):
        row["id"] = annotation_id
    return copies, {**ground_truth, "images": images, "annotations": annotations}


@pytest.mark.parametrize("seed", range(8))
def test_weights_equal_repeated_images(seed: int) -> None:
    detections, ground_truth = random_results(seed)
    for rank, detection in enumerate(detections):
        detection["score"] = 1 - rank / 1000  # copies of a detection are adjacent in the order of scores
    weights = np.random.default_rng(seed).integers(0, 4, size=len(ground_truth["images"]))
    copies, larger = repeated(detections, ground_truth, weights)
    # Between the copies of a false positive, precision falls step by step; with weights it falls at once.
    assert resampled(detections, ground_truth)(weights) == pytest.approx(
        evaluate(copies, larger).ap, abs=0.02
    )


def test_without_images_ap_is_minus_one_and_without_detections_zero() -> None:
    detections, ground_truth = random_results(0)
    assert resampled(detections, ground_truth)(np.zeros(len(ground_truth["images"]), dtype=np.int64)) == -1.0
    assert resampled([], ground_truth)(np.ones(len(ground_truth["images"]), dtype=np.int64)) == 0.0


def test_bounds_exclude_zero_only_for_a_different_detector() -> None:
    detections, ground_truth = random_results(3, num_images=40)
    same = compare(
        [resampled(detections, ground_truth)],
        [resampled(detections, ground_truth)],
        generator=np.random.default_rng(0),
        num_resamples=100,
    )
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    half = compare(
        [resampled(detections, ground_truth)],
        [resampled(detections[::2], ground_truth)],
        generator=np.random.default_rng(0),
        num_resamples=200,
    )
    ap = evaluate(detections, ground_truth).ap
    assert half.difference == pytest.approx(evaluate(detections[::2], ground_truth).ap - ap, abs=1e-9)
    assert half.low < half.difference < half.high < 0


def test_seeds_are_averaged() -> None:
    detections, ground_truth = random_results(3, num_images=12)
    one, other = resampled(detections, ground_truth), resampled(detections[::2], ground_truth)
    averaged = compare([one], [one, other], generator=np.random.default_rng(0), num_resamples=10)
    alone = compare([one], [other], generator=np.random.default_rng(0), num_resamples=10)
    assert averaged.difference == pytest.approx(alone.difference / 2)
    assert averaged.low == pytest.approx(alone.low / 2)


def test_bounds_of_small_sets_mostly_contain_the_difference_of_large_ones() -> None:
    detections, ground_truth = random_results(5, num_images=400)
    worse = [detection for index, detection in enumerate(detections) if index % 4]
    on_all_images = compare(
        [resampled(detections, ground_truth)],
        [resampled(worse, ground_truth)],
        generator=np.random.default_rng(0),
        num_resamples=2,
    ).difference
    num_contained = 0
    for start in range(0, 400, 40):
        ids = {image["id"] for image in ground_truth["images"][start : start + 40]}
        subset = copy.deepcopy(ground_truth)
        subset["images"] = [row for row in ground_truth["images"] if row["id"] in ids]
        subset["annotations"] = [row for row in ground_truth["annotations"] if row["image_id"] in ids]
        one, other = (
            resampled([row for row in rows if row["image_id"] in ids], subset) for rows in (detections, worse)
        )
        difference = compare([one], [other], generator=np.random.default_rng(start), num_resamples=100)
        num_contained += difference.low <= on_all_images <= difference.high
    assert num_contained >= 7


def test_no_seeds_and_a_single_image_are_refused() -> None:
    detections, ground_truth = random_results(0)
    with pytest.raises(ValueError, match="expected scores of the same images, got 0 and 1"):
        compare([], [resampled(detections, ground_truth)], generator=np.random.default_rng(0))
    single = {**ground_truth, "images": [{"id": 1}], "annotations": []}
    one = resampled([], single)
    with pytest.raises(ValueError, match="a single image cannot be resampled"):
        compare([one], [one], generator=np.random.default_rng(0))


def test_resamples_without_objects_do_not_count() -> None:
    box = {"category_id": 1, "bbox": [10, 10, 50, 40], "image_id": 1}
    ground_truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [box],
    }
    detections = resampled([{**box, "score": 0.9}], ground_truth)
    difference = compare([resampled([], ground_truth)], [detections], generator=np.random.default_rng(0))
    assert (difference.difference, difference.low, difference.high) == pytest.approx((1.0, 1.0, 1.0))


def false_positives(
    detections: list[dict[str, Any]],
    ground_truth: dict[str, Any],
    *,
    recall: float = 0.5,
    on_clean: bool = False,
) -> ResampledFalsePositives:
    matches = match_pair(EvaluationPair.of(detections, ground_truth), max_detections=100)
    return ResampledFalsePositives(FalsePositiveCurve(matches), recall=recall, on_clean=on_clean)


@pytest.mark.parametrize("seed", range(4))
def test_with_every_image_once_false_positives_equal_those_of_the_scores(seed: int) -> None:
    detections, ground_truth = random_results(seed)
    weights = np.ones(len(ground_truth["images"]), dtype=np.int64)
    (half, *_) = evaluate(detections, ground_truth).false_positives.points
    assert half.per_image is not None
    assert false_positives(detections, ground_truth)(weights) == half.per_image
    assert false_positives(detections, ground_truth, on_clean=True)(weights) == half.per_clean_image


def test_too_few_draws_that_reach_a_recall_give_no_bounds() -> None:
    detections, ground_truth = random_results(3, num_images=40)
    some = false_positives(detections, ground_truth)
    matches = match_pair(EvaluationPair.of(detections, ground_truth))
    highest = matches.is_true_positive.sum() / matches.num_objects  # reached in about half of the draws
    high = false_positives(detections, ground_truth, recall=float(highest))
    generator = np.random.default_rng(0)
    bounds = compare([some], [high], generator=generator, num_resamples=100)
    assert bounds.low < bounds.difference < bounds.high
    none = compare([some], [high], generator=generator, num_resamples=100, min_defined=0.95)
    assert none.difference == bounds.difference
    assert math.isnan(none.low)
    assert math.isnan(none.high)
    never = compare([some], [false_positives([], ground_truth)], generator=generator, num_resamples=10)
    assert all(map(math.isnan, (never.difference, never.low, never.high)))
