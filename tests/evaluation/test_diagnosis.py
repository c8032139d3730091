"""Where a detector is right and wrong, against counting by hand and against pycocotools."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sniper.errors import DetectionsError
from sniper.evaluation.coco import evaluate
from sniper.evaluation.diagnosis import diagnose, match
from sniper.geometry import Detections


def drawn(
    seed: int, *, num_images: int = 6, num_classes: int = 3
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw objects, crowds among them, and detections, with ties; some images have none of either."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
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
                found.append(
                    {
                        "image_id": image_id,
                        "category_id": category
                        if rng.random() < 0.8
                        else int(rng.integers(1, num_classes + 1)),
                        "bbox": moved.tolist(),
                        "score": round(float(rng.random()), 1),
                    }
                )
    truth = {
        "images": [{"id": image_id} for image_id in range(1, num_images + 2)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, num_classes + 1)],
        "annotations": annotations,
    }
    return found, truth


def by_pycocotools(
    found: list[dict[str, Any]], truth: dict[str, Any], *, use_classes: bool, sizes: list[float], limit: int
) -> tuple[np.ndarray, np.ndarray]:
    reference = COCO()
    reference.dataset = {**truth, "info": {}}
    reference.createIndex()
    scoring = COCOeval(reference, reference.loadRes(found), "bbox")
    scoring.params.useCats = int(use_classes)
    scoring.params.maxDets = [limit]
    scoring.params.areaRng = [
        [0, 1e10],
        *([low**2, min(high**2, 1e10)] for low, high in itertools.pairwise(sizes)),
    ]
    scoring.params.areaRngLbl = ["all", *map(str, sizes[:-1])]
    scoring.evaluate()
    scoring.accumulate()
    return scoring.eval["precision"], scoring.eval["recall"]


def mean_of(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([3, 100]))
def test_classes_and_sizes_are_scored_as_pycocotools_does(seed: int, limit: int) -> None:
    found, truth = drawn(seed)
    if not found:
        return
    sizes = [0.0, 40.0, 120.0, math.inf]
    told = diagnose(found, truth, max_detections=limit, sizes=sizes)
    precision, recall = by_pycocotools(found, truth, use_classes=True, sizes=sizes, limit=limit)
    for k, one in enumerate(told.classes):
        assert one.ap == pytest.approx(mean_of(precision[:, :, k, 0, 0]), abs=1e-9)
        assert one.ap50 == pytest.approx(mean_of(precision[0, :, k, 0, 0]), abs=1e-9)
        assert one.recall == pytest.approx(mean_of(recall[:, k, 0, 0]), abs=1e-9)
        own = [a for a in truth["annotations"] if a["category_id"] == k + 1 and not a["iscrowd"]]
        assert one.num_objects == len(own)
    _, any_recall = by_pycocotools(found, truth, use_classes=False, sizes=sizes, limit=limit)
    for place, bin_ in enumerate(told.sizes, start=1):
        assert bin_.ap == pytest.approx(mean_of(precision[:, :, :, place, 0]), abs=1e-9)
        assert bin_.any_class_recall == pytest.approx(mean_of(any_recall[:, :, place, 0]), abs=1e-9)


def test_false_positives_are_counted_where_a_recall_is_reached_and_empty_images_count() -> None:
    boxes = [[100.0 * i, 0.0, 50.0, 50.0] for i in range(10)]
    truth = {
        "images": [{"id": 1}, {"id": 2}],  # nothing is in the second
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes],
    }
    hits = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9 - 0.05 * i}
        for i, box in enumerate(boxes[:8])
    ]
    alarms = [
        {"image_id": 2, "category_id": 1, "bbox": [0.0, 0.0, 30.0, 30.0], "score": score}
        for score in (0.95, 0.62, 0.1)
    ]
    told = diagnose([*hits, *alarms], truth)
    assert told.false_positives == {0.5: 0.5, 0.8: 1.0, 0.9: None}
    assert told.as_dict()["false_positives_per_image"]["at_recall_0.9"] is None


def test_what_is_found_in_a_crowd_is_no_false_positive() -> None:
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 200.0, 200.0], "iscrowd": 1},
            {"image_id": 1, "category_id": 1, "bbox": [300.0, 0.0, 50.0, 50.0]},
        ],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [10.0 * i, 10.0, 50.0, 50.0], "score": 0.9}
        for i in range(5)
    ]
    found.append({"image_id": 1, "category_id": 1, "bbox": [300.0, 0.0, 50.0, 50.0], "score": 0.5})
    assert diagnose(found, truth).false_positives[0.9] == 0.0


def test_nothing_found_and_nothing_there_are_told_as_such() -> None:
    truth: dict[str, Any] = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}], "annotations": []}
    told = diagnose([], truth)
    assert told.classes[0].ap == -1
    assert told.false_positives == {0.5: None, 0.8: None, 0.9: None}
    assert (told.precisions == 0).all()


def test_sizes_that_do_not_rise_and_strangers_are_refused() -> None:
    found, truth = drawn(0)
    with pytest.raises(ValueError, match=r"sizes must rise, not \[0, 50, 20\]"):
        diagnose(found, truth, sizes=[0, 50, 20])
    with pytest.raises(DetectionsError, match="no image has id 99"):
        diagnose([{**found[0], "image_id": 99}], truth)


def test_the_limit_is_cocos_and_is_told_when_it_bites() -> None:
    box = [10.0, 10.0, 40.0, 40.0]
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box}],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [200.0 + i, 10.0, 40.0, 40.0], "score": 0.9}
        for i in range(14)
    ]
    found.append({"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5})
    few, enough = evaluate(found, truth, max_detections=12), evaluate(found, truth)
    assert (few.num_cut, enough.num_cut) == (1, 0)
    assert few.as_dict()["ar_12"] == 0.0
    assert enough.as_dict()["ar_100"] == 1.0
    with pytest.raises(ValueError, match="at least 10"):
        evaluate(found, truth, max_detections=9)


def test_detections_of_one_score_count_together() -> None:
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 10.0, 10.0]}],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [x, 0.0, 10.0, 10.0], "score": 0.7}
        for x in (0.0, 50.0, 90.0)
    ]
    assert diagnose(found, truth).false_positives[0.9] == 2.0
    assert diagnose(found[::-1], truth).false_positives[0.9] == 2.0


def test_a_detection_hits_one_free_object_of_its_class_and_a_crowd_excuses_any_number() -> None:
    found = Detections(
        boxes=np.array(
            [
                [0.0, 0, 10, 10],
                [1, 0, 11, 10],
                [0, 0, 10, 10],
                [50, 50, 60, 60],
                [55, 55, 60, 60],
                [90, 90, 95, 95],
            ]
        ),
        scores=np.linspace(0.9, 0.4, 6),
        labels=np.array([0, 0, 1, 0, 0, 0]),
    )
    is_hit, is_excused, is_found = match(
        found,
        np.array([[0.0, 0, 10, 10], [45, 45, 70, 70]]),
        np.array([0, 0]),
        np.array([False, True]),
    )
    assert is_hit.tolist() == [True, False, False, False, False, False]
    assert is_excused.tolist() == [False, False, False, True, True, False]
    assert is_found.tolist() == [True, False]
    nothing = match(Detections.empty(), np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    assert [len(part) for part in nothing] == [0, 0, 0]
