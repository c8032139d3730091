"""The score threshold with the best F1, against brute force."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.evaluation.matching import match_pair
from sniper.evaluation.operating_point import MatchCounts, OperatingPoint, find_best_f1, measure_at
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry.boxes import area, from_xywh, intersections, iou
from tests.evaluation.random_pairs import random_pair

_OBJECT = [10.0, 10.0, 20.0, 20.0]
_ELSEWHERE = [60.0, 60.0, 20.0, 20.0]


def pair_of(detections: list[dict[str, Any]], objects: list[dict[str, Any]]) -> EvaluationPair:
    rows = [{"image_id": 1, "category_id": 1, "bbox": _OBJECT} | entry for entry in detections]
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "ship"}, {"id": 2, "name": "buoy"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": _OBJECT} | entry for entry in objects],
    }
    return EvaluationPair.of(rows, truth)


def count_slowly(pair: EvaluationPair, score: float) -> tuple[int, int]:
    """Count true and false positives among the detections with at least a score, one after the other."""
    truth = pair.truth
    found, objects = from_xywh(pair.boxes), from_xywh(truth.boxes)
    free = ~truth.is_crowd
    num_true = num_false = 0
    for index in np.lexsort((pair.image_indices, -pair.scores)):
        if pair.scores[index] < score:
            break
        same = (truth.image_indices == pair.image_indices[index]) & (truth.labels == pair.labels[index])
        box = found[index : index + 1]
        overlaps = np.where(same & free, iou(box, objects)[0], -1.0)
        in_crowd = same & truth.is_crowd & (intersections(box, objects)[0] / area(box)[0] >= 0.5)
        if len(overlaps) and overlaps.max() >= 0.5:
            free[len(overlaps) - 1 - np.argmax(overlaps[::-1])] = False
            num_true += 1
        elif not in_crowd.any():
            num_false += 1
    return num_true, num_false


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 30))
def test_no_threshold_has_a_better_f1(seed: int, num_objects: int, num_detections: int) -> None:
    pair = random_pair(seed, num_objects, num_detections)
    point = find_best_f1(pair)
    num_counted = int((~pair.truth.is_crowd).sum())
    counts = {score: count_slowly(pair, score) for score in sorted(set(pair.scores.tolist()), reverse=True)}
    f1 = {
        score: 2 * num_true / max(num_true + num_false + num_counted, 1)
        for score, (num_true, num_false) in counts.items()
    }
    if not any(f1.values()):
        assert math.isnan(point.score)
        return
    assert (point.num_true_positives, point.num_false_positives) == count_slowly(pair, point.score)
    assert point.f1 == pytest.approx(max(f1.values()), abs=1e-12)
    first = next(score for score, value in f1.items() if value == max(f1.values()))
    assert counts[first] == (point.num_true_positives, point.num_false_positives)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_the_counts_of_classes_add_up_to_those_of_all(seed: int, score: float) -> None:
    pair = random_pair(seed, 12, 30)
    point = measure_at(match_pair(pair), score)
    assert (point.num_true_positives, point.num_false_positives) == count_slowly(pair, score)
    for name in ("num_objects", "num_true_positives", "num_false_positives"):
        assert sum(getattr(counts, name) for counts in point.classes) == getattr(point, name)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.9, 0.1), 0.5),  # the midpoint
        ((0.9, 0.4), 0.65),
        ((0.5123, 0.5117), 0.512),  # as many digits as are needed
        ((0.5, 0.5), 0.5),  # all scores are equal
        ((0.5, math.nextafter(0.5, 0)), 0.5),  # no number is between them
    ],
)
def test_the_threshold_is_the_shortest_number_between_scores(
    scores: tuple[float, float], expected: float
) -> None:
    pair = pair_of([{"score": scores[0]}, {"score": scores[1], "bbox": _ELSEWHERE}], [{}])
    assert find_best_f1(pair).score == expected


def test_of_equal_f1_the_highest_threshold_is_chosen() -> None:
    found: list[dict[str, Any]] = [
        {"score": 0.9},
        {"score": 0.8, "bbox": _ELSEWHERE},
        {"score": 0.7, "bbox": _ELSEWHERE},
    ]
    second = {"score": 0.6, "image_id": 2}
    pair = pair_of([*found, second], [{}, {"image_id": 2}])
    # F1 is 2/3 with the best detection alone, and with all four.
    assert [measure_at(match_pair(pair), score).f1 for score in (0.9, 0.6)] == [2 / 3, 2 / 3]
    assert find_best_f1(pair).score == 0.85


def test_more_detections_than_coco_counts_are_kept() -> None:
    boxes = [[20.0 * x, 20.0 * y, 15.0, 15.0] for x in range(15) for y in range(10)]
    point = find_best_f1(
        pair_of([{"bbox": box, "score": 0.5} for box in boxes], [{"bbox": box} for box in boxes])
    )
    assert (point.num_objects, point.recall) == (150, 1.0)


@pytest.mark.parametrize(
    ("detections", "objects", "expected"),
    [
        ([], [{}], (math.nan, math.nan, 0.0, 0.0)),
        ([{"score": 0.5}], [], (math.nan, math.nan, math.nan, math.nan)),
        ([{"score": 0.5}], [{"iscrowd": 1}], (math.nan, math.nan, math.nan, math.nan)),
        ([{"score": 0.5, "bbox": _ELSEWHERE}], [{}], (math.nan, math.nan, 0.0, 0.0)),
        ([], [], (math.nan, math.nan, math.nan, math.nan)),
    ],
)
def test_what_is_undefined_is_nan(
    detections: list[dict[str, Any]], objects: list[dict[str, Any]], expected: tuple[float, ...]
) -> None:
    point = find_best_f1(pair_of(detections, objects))
    assert (point.score, point.precision, point.recall, point.f1) == pytest.approx(expected, nan_ok=True)


def test_each_class_is_measured_at_the_same_score() -> None:
    point: OperatingPoint = find_best_f1(
        pair_of(
            [{"score": 0.9}, {"score": 0.8, "bbox": _ELSEWHERE, "category_id": 2}, {"score": 0.1}],
            [{}, {"image_id": 2}],
        )
    )
    ship, buoy = point.classes
    assert point.score == 0.85
    assert (ship.name, ship.precision, ship.recall, ship.f1) == ("ship", 1.0, 0.5, 2 / 3)
    assert (buoy.name, buoy.num_objects, buoy.num_false_positives) == ("buoy", 0, 0)
    assert all(map(math.isnan, (buoy.precision, buoy.recall, buoy.f1)))


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    counts = MatchCounts(num_objects=8, num_true_positives=3, num_false_positives=2)
    assert counts.f1 == pytest.approx(2 / (1 / counts.precision + 1 / counts.recall))
