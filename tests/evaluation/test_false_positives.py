"""False positives per image at a recall, against counting one detection after the other."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.evaluation import blocks
from sniper.evaluation.coco import score
from sniper.evaluation.false_positives import RECALLS, FalsePositiveCurve, count_false_positives
from sniper.evaluation.matching import match_pair
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry.boxes import area, from_xywh, intersections, iou
from tests.evaluation.entries import entry, ground_truth_of
from tests.evaluation.random_pairs import random_pair

_FAR = [500.0, 500.0, 9.0, 9.0]


def judge_slowly(pair: EvaluationPair, limit: int) -> list[tuple[float, int, bool]]:
    """Return score, image and truth of the detections that count, matched one after the other by the rules of COCO."""
    truth, judged = pair.truth, []
    boxes, objects = from_xywh(pair.boxes), from_xywh(truth.boxes)
    is_free, num_seen = ~truth.is_crowd, dict[tuple[int, int], int]()
    for index in np.argsort(-pair.scores, kind="stable").tolist():
        image, label = int(pair.image_indices[index]), int(pair.labels[index])
        num_seen[image, label] = num_seen.get((image, label), 0) + 1
        if num_seen[image, label] > limit:
            continue
        same = (truth.image_indices == image) & (truth.labels == label)
        box = boxes[index : index + 1]
        overlaps = np.where(same & is_free, iou(box, objects)[0], -1.0)
        if len(overlaps) and overlaps.max() >= 0.5:
            is_free[len(overlaps) - 1 - np.argmax(overlaps[::-1])] = False
            judged.append((float(pair.scores[index]), image, True))
        elif not (same & truth.is_crowd & (intersections(box, objects)[0] / area(box)[0] >= 0.5)).any():
            judged.append((float(pair.scores[index]), image, False))
    return judged


def count_slowly(
    pair: EvaluationPair, recall: float, limit: int
) -> tuple[float | None, float | None, float | None]:
    """Return the threshold, and the false positives per image and per clean image."""
    judged = judge_slowly(pair, limit)
    with_objects = {
        int(image)
        for image, is_crowd in zip(pair.truth.image_indices, pair.truth.is_crowd, strict=True)
        if not is_crowd
    }
    clean = set(range(pair.truth.num_images)) - with_objects
    num_objects = int((~pair.truth.is_crowd).sum())
    for threshold in sorted({value for value, _, _ in judged}, reverse=True):
        kept = [(image, is_true) for value, image, is_true in judged if value >= threshold]
        if num_objects and sum(is_true for _, is_true in kept) / num_objects >= recall:
            false = [image for image, is_true in kept if not is_true]
            on_clean = sum(image in clean for image in false)
            return (
                threshold,
                len(false) / pair.truth.num_images,
                on_clean / len(clean) if clean else None,
            )
    return None, None, None


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.integers(0, 30), st.sampled_from([10, 11, 100]))
def test_counts_equal_those_of_one_detection_after_the_other(
    seed: int, num_objects: int, num_detections: int, limit: int
) -> None:
    pair = random_pair(seed, num_objects, num_detections)
    if seed % 2:  # two detections of each object, so that high recalls are reached
        pair = EvaluationPair(
            truth=pair.truth,
            image_indices=np.concatenate([pair.image_indices, *[pair.truth.image_indices] * 2]),
            labels=np.concatenate([pair.labels, *[pair.truth.labels] * 2]),
            boxes=np.concatenate([pair.boxes, *[pair.truth.boxes] * 2]),
            scores=np.concatenate([pair.scores, np.full(2 * num_objects, 0.3)]),
        )
    expected = [count_slowly(pair, recall, limit) for recall in RECALLS]
    for counts in (
        score(pair, max_detections=limit).false_positives,
        score(pair, max_detections=limit, matches=match_pair(pair)).false_positives,
        count_false_positives(match_pair(pair, max_detections=limit)),
    ):
        assert [(row.score, row.per_image, row.per_clean_image) for row in counts.points] == expected
        is_object = ~pair.truth.is_crowd
        assert counts.num_clean_images == 2 - len(np.unique(pair.truth.image_indices[is_object]))
    with patch.object(blocks, "MAX_OVERLAPS", 0), patch.object(blocks, "_BLOCK_SIZE", 1):
        assert score(pair, max_detections=limit).false_positives == counts


def repeat(pair: EvaluationPair, copies: list[int]) -> EvaluationPair:
    """Return copies of images, each an image of its own."""
    parts = [pair.select_images(np.array([image])) for image in copies]

    def join(values: Iterable[Any], name: str) -> Any:
        return np.concatenate([getattr(value, name) for value in values])

    truths = [part.truth for part in parts]
    truth = replace(
        pair.truth,
        image_ids=np.arange(len(copies)),
        image_indices=np.repeat(np.arange(len(copies)), [len(each.labels) for each in truths]),
        labels=join(truths, "labels"),
        boxes=join(truths, "boxes"),
        areas=join(truths, "areas"),
        is_crowd=join(truths, "is_crowd"),
    )
    return EvaluationPair(
        truth=truth,
        image_indices=np.repeat(np.arange(len(copies)), list(map(len, parts))),
        labels=join(parts, "labels"),
        boxes=join(parts, "boxes"),
        scores=join(parts, "scores"),
    )


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
    st.lists(st.integers(0, 1), min_size=1, max_size=5),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_weights_equal_repeated_images(seed: int, num_objects: int, copies: list[int], recall: float) -> None:
    pair = random_pair(seed, num_objects, 30)
    weights = np.bincount(copies, minlength=2)
    expected = FalsePositiveCurve(match_pair(repeat(pair, copies))).at_recall(recall)
    assert FalsePositiveCurve(match_pair(pair)).at_recall(recall, weights) == expected


def counts_of(detections: list[dict[str, Any]], *objects: dict[str, Any]) -> dict[str, float | int | None]:
    return score(EvaluationPair.of(detections, ground_truth_of(*objects))).false_positives.as_dict()


def test_without_objects_all_images_are_clean_and_no_recall_is_reached() -> None:
    counts = counts_of([entry()])
    assert counts.pop("num_clean_images") == 2
    assert set(counts.values()) == {None}
    assert score(EvaluationPair.of([entry()], ground_truth_of())).as_dict()["num_clean_images"] == 2


def test_without_detections_no_recall_is_reached() -> None:
    counts = counts_of([], entry())
    assert counts.pop("num_clean_images") == 1
    assert set(counts.values()) == {None}


def test_without_clean_images_only_those_counts_are_undefined() -> None:
    objects = [entry(), entry(image_id=2)]
    counts = counts_of([*objects, entry(bbox=_FAR, score=0.9)], *objects)
    assert counts["fp_per_image_at_90"] == 0.5
    assert counts["fp_per_clean_image_at_90"] is None
    names = score(EvaluationPair.of(objects, ground_truth_of(*objects))).as_dict()
    assert "fp_per_image_at_50" in names
    assert "fp_per_clean_image_at_50" not in names


def test_an_image_of_crowds_is_clean_and_what_they_cover_is_ignored() -> None:
    crowd = entry(image_id=2, iscrowd=1, bbox=[0.0, 0.0, 90.0, 90.0])
    in_crowd, outside = entry(image_id=2, score=0.9), entry(image_id=2, bbox=_FAR, score=0.8)
    counts = counts_of([entry(), in_crowd, outside, outside], entry(), crowd)
    assert counts["num_clean_images"] == 1
    assert counts["fp_per_clean_image_at_80"] == 2.0
    assert counts["fp_per_image_at_80"] == 1.0


@pytest.mark.parametrize("order", [1, -1])
def test_detections_of_equal_scores_count_together_in_any_order(order: int) -> None:
    detections = [entry(score=0.7, bbox=[x, 0.0, 9.0, 9.0]) for x in (0.0, 50.0, 90.0)]
    detections.append(entry(score=0.7, image_id=2))
    counts = counts_of(detections[::order], entry())
    assert (counts["fp_per_image_at_50"], counts["fp_per_clean_image_at_50"]) == (1.5, 1.0)
    assert counts["score_at_recall_50"] == 0.7


def test_recall_is_of_the_objects_of_all_classes_together() -> None:
    truth = ground_truth_of(*(entry(bbox=[20.0 * i, 0.0, 9.0, 9.0]) for i in range(9)))
    truth["categories"].append({"id": 2, "name": "rare"})
    truth["annotations"].append(entry(category_id=2))
    detections = [{**row, "score": 0.9} for row in truth["annotations"][:9]]
    false = entry(category_id=2, image_id=2, score=0.95)
    points = score(EvaluationPair.of([*detections, false], truth)).false_positives.points
    assert [point.per_image for point in points] == [0.5, 0.5, 0.5]  # 9 of 10 objects
    assert all(point.score is not None and math.isclose(point.score, 0.9) for point in points)
