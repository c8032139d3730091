"""Matches of the detections of one image with its objects."""

from pathlib import Path

import numpy as np
import pytest

from sniper.data.datasets import ImageRecord
from sniper.evaluation.matching import PairMatches, match_detections, matches_at, run_coco_eval
from sniper.geometry import Detections
from sniper.geometry.boxes import empty_boxes, from_xywh, iou
from tests.evaluation.random_pairs import random_pair


def record(boxes: np.ndarray, *, is_crowd: list[bool]) -> ImageRecord:
    return ImageRecord(
        image_id=1,
        file_name="a.png",
        path=Path("a.png"),
        image_root=Path(),
        width=100,
        height=100,
        boxes=boxes,
        labels=np.zeros(len(boxes), dtype=np.int64),
        is_crowd=np.array(is_crowd, dtype=np.bool_),
    )


def test_an_object_matches_one_detection_and_a_crowd_any_number() -> None:
    detections = Detections(
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
    boxes = np.array([[0.0, 0, 10, 10], [45, 45, 70, 70], [80, 0, 90, 10]])
    matches = match_detections(detections, record(boxes, is_crowd=[False, True, False]))
    assert matches.is_true_positive.tolist() == [True, False, False, False, False, False]
    assert matches.is_ignored.tolist() == [False, False, False, True, True, False]
    assert matches.is_missed.tolist() == [False, False, True]


def test_no_detections_and_no_objects_match_nothing() -> None:
    matches = match_detections(Detections.empty(), record(empty_boxes(), is_crowd=[]))
    assert len(matches.is_true_positive) == len(matches.is_ignored) == len(matches.is_missed) == 0


def match_random(seed: int, *, max_overlaps: int | None) -> PairMatches:
    pair = random_pair(seed, 40, 60, has_equal_scores=False)
    evaluation = run_coco_eval(pair, max_detections=[1000], iou_thresholds=[0.5], max_overlaps=max_overlaps)
    assert evaluation.blocks.is_split == (max_overlaps == 0)
    return matches_at(evaluation, pair, iou=0.5)


@pytest.mark.parametrize("max_overlaps", [None, 0])
@pytest.mark.parametrize("seed", range(3))
def test_each_true_positive_names_the_object_that_it_matches(seed: int, max_overlaps: int | None) -> None:
    matches = match_random(seed, max_overlaps=max_overlaps)
    pair, truth, is_true = matches.pair, matches.pair.truth, matches.is_true_positive
    objects = matches.object_indices[is_true]
    assert len(np.unique(objects)) == len(objects) > 3
    assert (matches.object_indices[~is_true] == -1).all()
    np.testing.assert_array_equal(truth.image_indices[objects], pair.image_indices[is_true])
    np.testing.assert_array_equal(truth.labels[objects], pair.labels[is_true])
    overlaps = iou(from_xywh(pair.boxes[is_true]), from_xywh(truth.boxes[objects]))
    assert overlaps.diagonal().min() >= 0.5
    np.testing.assert_array_equal(
        matches.object_indices, match_random(seed, max_overlaps=None).object_indices
    )


def test_an_object_is_missed_above_the_score_of_its_detection() -> None:
    matches = match_random(0, max_overlaps=None)
    for threshold in (0.0, 0.4, 0.8):
        num_missed = int((matches.match_scores < threshold)[~matches.pair.truth.is_crowd].sum())
        kept = matches.is_true_positive & (matches.pair.scores >= threshold)
        is_detected = (
            np.isfinite(matches.match_scores) if threshold == 0.0 else matches.match_scores >= threshold
        )
        assert int(is_detected.sum()) == int(kept.sum())
        assert num_missed == matches.num_objects - int(kept.sum())
    limited = matches.limit(1)
    assert (limited.object_indices >= 0).sum() == limited.is_true_positive.sum()
