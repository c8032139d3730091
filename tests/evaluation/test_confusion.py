"""The confusion matrix, against a slow count of its matches."""

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.evaluation.confusion import Confusion, ConfusionMatrix, count_confusions
from sniper.evaluation.matching import PairMatches, match_pair
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry.boxes import from_xywh, iou
from tests.evaluation.random_pairs import NUM_CLASSES, random_pair


def count(matches: PairMatches, score: float) -> ConfusionMatrix:
    matrix = count_confusions(matches, score)
    assert matrix is not None
    return matrix


def count_slowly(matches: PairMatches, score: float) -> np.ndarray:
    """Match detections with objects of any class, one after the other."""
    pair, truth = matches.pair, matches.pair.truth
    counts = np.zeros((NUM_CLASSES + 1, NUM_CLASSES + 1), dtype=np.int64)
    free = ~truth.is_crowd
    overlaps = iou(from_xywh(pair.boxes), from_xywh(truth.boxes))
    is_counted = (matches.is_true_positive | matches.is_false_positive) & (pair.scores >= score)
    for index in np.argsort(-pair.scores, kind="stable"):
        if not is_counted[index]:
            continue
        is_free = free & (truth.image_indices == pair.image_indices[index]) & (overlaps[index] >= 0.5)
        row = NUM_CLASSES
        if is_free.any():
            best = np.argmax(np.where(is_free, overlaps[index], -1))
            free[best] = False
            row = truth.labels[best]
        counts[row, pair.labels[index]] += 1
    np.add.at(counts, (truth.labels[free], NUM_CLASSES), 1)
    return counts


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 30), st.floats(0, 1))
def test_matches_are_those_of_a_slow_count(
    seed: int, num_objects: int, num_detections: int, score: float
) -> None:
    matches = match_pair(random_pair(seed, num_objects, num_detections, has_equal_scores=False))
    counts = count(matches, score).counts
    assert counts.tolist() == count_slowly(matches, score).tolist()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_rows_add_up_to_objects_and_columns_to_detections(seed: int, score: float) -> None:
    matches = match_pair(random_pair(seed, 12, 30))
    counts, truth = count(matches, score).counts, matches.pair.truth
    is_counted = (matches.is_true_positive | matches.is_false_positive) & (matches.pair.scores >= score)
    num_objects = np.bincount(truth.labels[~truth.is_crowd], minlength=NUM_CLASSES)
    num_detections = np.bincount(matches.pair.labels[is_counted], minlength=NUM_CLASSES)
    assert counts[:-1].sum(axis=1).tolist() == num_objects.tolist()
    assert counts[:, :-1].sum(axis=0).tolist() == num_detections.tolist()


def test_confusions_are_listed_from_the_most_frequent() -> None:
    boxes = [[40.0 * i, 0.0, 20.0, 20.0] for i in range(6)]
    detected_as = [1, 2, 2, 3, 3, 1]
    truth: dict[str, Any] = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "van"}, {"id": 3, "name": "bus"}],
        "annotations": [
            {"image_id": 1, "category_id": 3 if i == 5 else 1, "bbox": box} for i, box in enumerate(boxes)
        ],
    }
    detections = [
        {"image_id": 1, "category_id": category, "bbox": box, "score": 0.9 - 0.1 * i}
        for i, (box, category) in enumerate(zip(boxes, detected_as, strict=True))
    ]
    matches = match_pair(EvaluationPair.of(detections, truth))
    matrix = count(matches, 0.55)
    assert matrix.counts.tolist() == [[1, 2, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert matrix.find_largest(10) == [
        Confusion(object="car", detected_as="van", count=2, num_objects=5),
        Confusion(object="car", detected_as="bus", count=1, num_objects=5),
    ]
    assert matrix.find_largest(1) == matrix.find_largest(10)[:1]
    assert count(matches, math.nan).counts[:, -1].tolist() == [5, 0, 1, 0]
