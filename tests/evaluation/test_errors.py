"""Errors by type, against the counts of hotcoco."""

from collections import Counter
from pathlib import Path

import hotcoco
import numpy as np
import pytest

from sniper.data.datasets import ImageRecord
from sniper.evaluation.errors import ErrorKind, find_errors
from sniper.geometry import Detections
from sniper.geometry.boxes import area, to_xywh

OBJECT = [10.0, 10.0, 50.0, 50.0]
FAR = [200.0, 200.0, 240.0, 240.0]


def record_of(boxes: object, labels: object, *, is_crowd: object = None) -> ImageRecord:
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    crowds = np.zeros(len(array), dtype=np.bool_) if is_crowd is None else np.array(is_crowd)
    return ImageRecord(
        image_id=1,
        file_name="a.png",
        path=Path("a.png"),
        image_root=Path(),
        width=300,
        height=300,
        boxes=array,
        labels=np.array(labels, dtype=np.int64),
        is_crowd=crowds,
    )


def detections_of(boxes: object, labels: object) -> Detections:
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Detections(
        boxes=array, scores=np.linspace(0.9, 0.5, len(array)), labels=np.array(labels, dtype=np.int64)
    )


@pytest.mark.parametrize(
    ("box", "label", "kind", "misses"),
    [
        (FAR, 0, ErrorKind.BACKGROUND, True),
        (OBJECT, 1, ErrorKind.WRONG_CLASS, False),
        ([10, 10, 50, 25], 0, ErrorKind.LOOSE, False),
        ([10, 10, 50, 25], 1, ErrorKind.WRONG_CLASS_AND_LOOSE, True),
    ],
)
def test_an_error_has_the_type_of_its_overlap_and_class(
    box: list[float], label: int, kind: ErrorKind, misses: bool
) -> None:
    found = find_errors(detections_of([box], [label]), record_of([OBJECT], [0]))
    assert [error.kind for error in found.errors] == [kind, *[ErrorKind.MISSED] * misses]
    assert found.is_missed.tolist() == [True]
    assert found.errors[0].object == (None if kind is ErrorKind.BACKGROUND else 0)


def test_a_second_box_on_an_object_is_a_duplicate() -> None:
    found = find_errors(detections_of([OBJECT, OBJECT], [0, 0]), record_of([OBJECT], [0]))
    (error,) = found.errors
    assert (error.kind, error.detection, error.object) == (ErrorKind.DUPLICATE, 1, 0)
    assert error.overlap == pytest.approx(1.0)


def test_crowds_are_neither_missed_nor_do_detections_in_them_count() -> None:
    truth = record_of([OBJECT, FAR], [0, 0], is_crowd=[False, True])
    assert find_errors(detections_of([OBJECT, FAR], [0, 0]), truth).errors == []


def test_an_image_without_boxes_has_no_errors() -> None:
    assert find_errors(Detections.empty(), record_of([], [])).errors == []


@pytest.mark.parametrize("seed", range(6))
def test_counts_equal_those_of_hotcoco(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    objects, rows, image_of_object = [], [], []
    for image in range(5):
        corners = rng.uniform(0, 200, (6, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(20, 60, (6, 2))], axis=1)
        labels = rng.integers(0, 3, 6)
        moved = boxes[rng.integers(0, 6, 12)] + rng.uniform(-9, 9, (12, 4))
        truth, found = record_of(boxes, labels), detections_of(moved, rng.integers(0, 3, 12))
        counts.update(error.kind.value for error in find_errors(found, truth).errors)
        objects.append((boxes, labels))
        image_of_object += [image] * 6
        rows.append(np.column_stack([np.full(12, image), to_xywh(found.boxes), found.scores, found.labels]))
    all_boxes = np.concatenate([boxes for boxes, _ in objects])
    ground_truth = hotcoco.COCO.from_arrays(
        [{"id": image} for image in range(5)],
        [{"id": label, "name": str(label)} for label in range(3)],
        np.array(image_of_object),
        np.concatenate([labels for _, labels in objects]).astype(np.int64),
        to_xywh(all_boxes),
        area=area(all_boxes),
        iscrowd=np.zeros(len(all_boxes), dtype=np.bool_),
    )
    evaluation = hotcoco.COCOeval(ground_truth, ground_truth.load_res(np.concatenate(rows)), "bbox")
    evaluation.evaluate()
    expected = evaluation.tide_errors(pos_thr=0.5, bg_thr=0.1)["counts"]
    names = {
        "Bkg": "background",
        "Cls": "wrong_class",
        "Loc": "loose",
        "Both": "wrong_class_and_loose",
        "Dupe": "duplicate",
        "Miss": "missed",
    }
    assert sum(counts.values()) > 20
    assert dict(counts) == {names[key]: count for key, count in expected.items() if count}
