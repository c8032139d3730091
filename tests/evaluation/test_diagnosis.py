"""Scores by size and by class, against pycocotools."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sniper.evaluation.coco import score
from sniper.evaluation.diagnosis import diagnose
from sniper.evaluation.pair import EvaluationPair


def random_results(
    seed: int, *, num_images: int = 6, num_classes: int = 3
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw detections with equal scores, and objects with some crowds; some images have neither."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        for _ in range(int(rng.integers(0, 8))):
            x, y = rng.uniform(0, 300, 2)
            w, h = np.exp(rng.uniform(2, 5.8, 2))
            box = [float(value) for value in (x, y, w, h)]
            category = int(rng.integers(1, num_classes + 1))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                shift = rng.normal(0, 0.12, 4) * [w, h, w, h]
                moved = (np.array(box) + shift).clip([-50, -50, 3, 3], None)
                detections.append(
                    {
                        "image_id": image_id,
                        "category_id": category
                        if rng.random() < 0.8
                        else int(rng.integers(1, num_classes + 1)),
                        "bbox": moved.tolist(),
                        "score": round(float(rng.random()), 1),
                    }
                )
    ground_truth = {
        "images": [{"id": image_id} for image_id in range(1, num_images + 2)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, num_classes + 1)],
        "annotations": annotations,
    }
    return detections, ground_truth


def by_pycocotools(
    detections: list[dict[str, Any]],
    ground_truth: dict[str, Any],
    *,
    use_classes: bool,
    sizes: list[float],
    limit: int,
) -> tuple[np.ndarray, np.ndarray]:
    reference = COCO()
    reference.dataset = {**ground_truth, "info": {}}
    reference.createIndex()
    evaluation = COCOeval(reference, reference.loadRes(detections), "bbox")
    evaluation.params.useCats = int(use_classes)
    evaluation.params.maxDets = [limit]
    evaluation.params.areaRng = [
        [0, 1e10],
        *([low**2, min(high**2, 1e10)] for low, high in itertools.pairwise(sizes)),
    ]
    evaluation.params.areaRngLbl = ["all", *map(str, sizes[:-1])]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def mean_of(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([3, 100]))
def test_scores_by_size_equal_those_of_pycocotools(seed: int, limit: int) -> None:
    detections, ground_truth = random_results(seed)
    if not detections:
        return
    sizes = [0.0, 40.0, 120.0, math.inf]
    pair = EvaluationPair.of(detections, ground_truth)
    diagnosis = diagnose(pair, max_detections=limit, sizes=sizes)
    precision, _ = by_pycocotools(detections, ground_truth, use_classes=True, sizes=sizes, limit=limit)
    _, any_recall = by_pycocotools(detections, ground_truth, use_classes=False, sizes=sizes, limit=limit)
    for a, bin_ in enumerate(diagnosis.sizes, start=1):
        assert bin_.ap == pytest.approx(mean_of(precision[:, :, :, a, 0]), abs=1e-9)
        assert bin_.any_class_recall == pytest.approx(mean_of(any_recall[:, :, a, 0]), abs=1e-9)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([10, 100]))
def test_scores_by_class_equal_those_of_pycocotools(seed: int, limit: int) -> None:
    detections, ground_truth = random_results(seed, num_images=3, num_classes=2)
    if not detections:
        return
    classes = score(EvaluationPair.of(detections, ground_truth), max_detections=limit).classes
    precision, recall = by_pycocotools(detections, ground_truth, use_classes=True, sizes=[], limit=limit)
    for k, scores in enumerate(classes):
        assert scores.ap == pytest.approx(mean_of(precision[:, :, k, 0, 0]), abs=1e-9)
        assert scores.ap50 == pytest.approx(mean_of(precision[0, :, k, 0, 0]), abs=1e-9)
        assert scores.ar == pytest.approx(mean_of(recall[:, k, 0, 0]), abs=1e-9)
        objects = [a for a in ground_truth["annotations"] if a["category_id"] == k + 1 and not a["iscrowd"]]
        assert scores.num_objects == len(objects)
        assert scores.num_detections == sum(entry["category_id"] == k + 1 for entry in detections)


def test_without_objects_ap_is_minus_one() -> None:
    ground_truth: dict[str, Any] = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [],
    }
    diagnosis = diagnose(EvaluationPair.of([], ground_truth))
    (scores,) = score(EvaluationPair.of([], ground_truth)).classes
    assert (scores.ap, scores.ap50, scores.ar) == (-1, -1, -1)
    assert (diagnosis.precisions == 0).all()


def test_falling_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes must rise, not \[0, 50, 20\]"):
        diagnose(EvaluationPair.of(*random_results(0)), sizes=[0, 50, 20])
