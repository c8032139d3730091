"""Matches of the detections of one image with its objects."""

from pathlib import Path

import numpy as np

from sniper.data.datasets import ImageRecord
from sniper.evaluation.matching import match_detections
from sniper.geometry import Detections
from sniper.geometry.boxes import empty_boxes


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
