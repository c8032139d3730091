"""Detections and ground truth: ids, and categories by name."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from sniper.errors import AnnotationError, DetectionsError
from sniper.evaluation.coco import score
from sniper.evaluation.duplicates import without_duplicates
from sniper.evaluation.pair import EvaluationPair, look_up_ids
from sniper.geometry import Detections
from sniper.geometry.nms import drop_duplicates
from tests.evaluation.entries import entry, ground_truth_of

IDS = st.integers(-20, 20) | st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None)
@given(st.lists(IDS), st.lists(IDS, unique=True))
def test_ids_are_looked_up_whatever_their_range(ids: list[int], known: list[int]) -> None:
    indices = look_up_ids(np.array(ids, dtype=np.int64), np.array(known, dtype=np.int64))
    assert indices.tolist() == [known.index(each) if each in known else -1 for each in ids]


def truth_of(categories: dict[int | str, str]) -> dict[str, Any]:
    """Return a box of each category, side by side in image 1."""
    return {
        "images": [{"id": 1}],
        "categories": [{"id": category_id, "name": name} for category_id, name in categories.items()],
        "annotations": [
            entry(category_id=category_id, bbox=[50 * index, 0, 40, 40])
            for index, category_id in enumerate(categories)
        ],
    }


def found(*pairs: tuple[int | str, str | None]) -> list[dict[str, Any]]:
    """Return detections of these category ids and names, side by side in image 1."""
    return [
        entry(category_id=category_id, bbox=[50 * index, 0, 40, 40])
        | ({} if name is None else {"category_name": name})
        for index, (category_id, name) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        (
            [entry(image_id=5), entry(image_id=5), entry(image_id=4)],
            r": no image has id 5, 4 \(3 detections\); are they of another split \(--split\)\?$",
        ),
        ([entry(category_id=9)], r": no category has id 9 \(1 detection\)$"),
        ([entry(image_id=5, category_id=9)], "no image has id 5 .*; no category has id 9 "),
        ([entry(image_id=10 + i) for i in range(23)], r" 28, 29, and 3 more \(23 detections\); are they"),
        ([entry(image_id="1x"), entry(image_id="1")], r"no image has id 1x \(1 detection\)$"),
        ([entry(image_id="9" * 5000)], "no image has id 999"),
    ],
)
def test_unknown_image_and_category_ids_are_listed(detections: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DetectionsError, match=message):
        EvaluationPair.of(detections, ground_truth_of())


def test_an_id_unknown_to_a_file_without_images_is_refused() -> None:
    nothing: dict[str, Any] = {"images": [], "categories": [], "annotations": []}
    assert len(EvaluationPair.of([], nothing)) == 0
    with pytest.raises(DetectionsError, match=r"no image has id 1 .*; no category has id 1"):
        EvaluationPair.of([entry()], nothing)


@pytest.mark.parametrize(
    ("of_file", "of_detection"),
    [(12, "12"), (12, "0012"), (12, 12.0), ("a", "a"), ("7", 7), ("007", "007"), (-3, "-3")],
)
def test_digits_in_text_are_the_integer(of_file: Any, of_detection: Any) -> None:
    truth = ground_truth_of() | {"images": [{"id": of_file}, {"id": "other"}]}
    if isinstance(of_file, int):
        truth["images"][1]["id"] = 5
    pair = EvaluationPair.of([entry(image_id=of_detection)], truth)
    assert pair.image_indices.tolist() == [0]


def test_detections_with_names_are_matched_by_name_whatever_their_ids() -> None:
    pair = EvaluationPair.of(found((2, "disc"), (1, "square")), truth_of({1: "disc", 2: "square"}))
    assert pair.labels.tolist() == [0, 1]
    assert score(pair).ap == pytest.approx(1.0)
    (warning,) = pair.warnings
    assert "matched by name: 'square' is 2, not 1; 'disc' is 1, not 2" in warning


def test_detections_without_names_are_matched_by_id() -> None:
    pair = EvaluationPair.of(found((2, None), (1, None)), truth_of({1: "disc", 2: "square"}))
    assert (pair.labels.tolist(), pair.warnings) == ([1, 0], ())
    pair = EvaluationPair.of(found((2, ""), (1, "disc")), truth_of({1: "disc", 2: "square"}))
    assert pair.labels.tolist() == [1, 0]


def test_long_ids_are_shortened_in_errors() -> None:
    with pytest.raises(DetectionsError, match=r"no category has id x{60}\.\.\. \(1 detection\)"):
        EvaluationPair.of(found(("x" * 5000, None)), truth_of({1: "disc"}))


def test_equal_names_and_ids_give_no_warning() -> None:
    pair = EvaluationPair.of(found((1, "disc"), (2, None)), truth_of({1: "disc", 2: "square"}))
    assert pair.labels.tolist() == [0, 1]
    assert pair.warnings == ()  # a category without a detection is not unknown to the detector


def test_detections_of_categories_that_the_file_lacks_are_left_out_with_a_count() -> None:
    pair = EvaluationPair.of(found((1, "disc"), (5, "ring"), (5, "ring")), truth_of({1: "disc"}))
    assert (len(pair), score(pair).num_detections) == (1, 1)
    assert any("lacks 1 category of the detections: 'ring'" in warning for warning in pair.warnings)
    assert any("2 detections of those categories left out" in warning for warning in pair.warnings)


def test_detections_without_a_common_name_are_refused() -> None:
    with pytest.raises(AnnotationError, match="no category name in common: 'vehicle' and 'disc'"):
        EvaluationPair.of(found((1, "vehicle")), truth_of({1: "disc"}))


@pytest.mark.parametrize("limit", [0, 10_000_000])
def test_detections_are_counted_by_image_and_class(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("sniper.evaluation.pair._MAX_KEYS", limit)
    truth = truth_of({1: "disc", 2: "square"}) | {"images": [{"id": 1}, {"id": 2}]}
    detections = [entry(image_id=image_id, category_id=label) for image_id, label in [(1, 1), (1, 2), (1, 2)]]
    assert EvaluationPair.of(detections, truth).num_per_image_and_class.tolist() == [1, 2]
    assert EvaluationPair.of([], truth).num_per_image_and_class.tolist() == []


def test_the_first_images_keep_their_objects_and_detections() -> None:
    truth = ground_truth_of(entry(), entry(image_id=2), entry(image_id=2))
    pair = EvaluationPair.of([entry(image_id=2), entry()], truth)
    first = pair.first_images(1)
    assert (first.truth.num_images, len(first.truth.boxes), len(first)) == (1, 1, 1)
    assert pair.first_images(5).truth.num_images == 2


def test_duplicates_are_left_out_of_each_image() -> None:
    box = [10.0, 10.0, 20.0, 20.0]
    shifted = [12.0, 10.0, 20.0, 20.0]
    detections = [
        entry(bbox=shifted, score=0.4),
        entry(bbox=box, score=0.9),
        entry(image_id=2, bbox=shifted, score=0.3),
        entry(bbox=[60.0, 10.0, 20.0, 20.0], score=0.2),
    ]
    pair = EvaluationPair.of(detections, ground_truth_of())
    assert without_duplicates(pair).scores.tolist() == [0.9, 0.3, 0.2]
    assert len(without_duplicates(EvaluationPair.of([], ground_truth_of()))) == 0


@pytest.mark.parametrize("height", [11.0, 12.0, 13.0, 14.0, 16.0, 18.0])
def test_duplicates_of_results_are_those_that_pictures_leave_out(height: float) -> None:
    boxes = [[0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 20.0, height]]  # IoU 0.55 to 0.9, of two classes
    detections = [
        entry(bbox=box, score=score, category_id=category)
        for box, score, category in zip(boxes, (0.9, 0.8), (1, 2), strict=True)
    ]
    truth = truth_of({1: "ship", 2: "boat"})
    shown = drop_duplicates(
        Detections(boxes=np.array(boxes), scores=np.array([0.9, 0.8]), labels=np.array([0, 1]))
    )
    assert len(without_duplicates(EvaluationPair.of(detections, truth))) == len(shown)
