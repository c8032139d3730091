"""Merging of detections against plain references, and its invariants."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from sniper.geometry import Detections
from sniper.geometry.boxes import area, intersections, iou
from sniper.geometry.nms import Decay, drop_duplicates, is_mostly_contained, soft_nms, weighted_box_fusion


def drawn(seed: int, *, count: int, num_classes: int = 3) -> Detections:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (count, 2))], axis=1)
    return Detections(
        boxes=boxes, scores=rng.uniform(0.01, 1, count), labels=rng.integers(0, num_classes, count)
    )


def plain_soft_nms(
    detections: Detections, *, score_threshold: float, factor: Callable[[float], float]
) -> dict[int, float]:
    """The algorithm of the paper, one class and one box at a time: the score of each kept index."""
    kept: dict[int, float] = {}
    for label in np.unique(detections.labels):
        scores = {int(i): float(detections.scores[i]) for i in np.flatnonzero(detections.labels == label)}
        while scores:
            best = max(scores, key=lambda i: (scores[i], -i))
            kept[best] = scores.pop(best)
            for other in list(scores):
                pair = detections.boxes[[best]], detections.boxes[[other]]
                scores[other] *= factor(float(iou(*pair)[0, 0]))
                if scores[other] < score_threshold:
                    del scores[other]
    return {i: score for i, score in kept.items() if score >= score_threshold}


seeds = st.integers(0, 10_000)


FACTORS: dict[Decay, Callable[[float], float]] = {
    "gaussian": lambda overlap: math.exp(-(overlap**2) / 0.5),
    "linear": lambda overlap: 1 - overlap if overlap > 0.3 else 1.0,
    "hard": lambda overlap: 0.0 if overlap > 0.3 else 1.0,
}


@given(st.sampled_from(sorted(FACTORS)), seeds, st.integers(0, 40), st.sampled_from([0.01, 0.05, 0.3]))
def test_soft_nms_is_the_plain_algorithm(decay: Decay, seed: int, count: int, score_threshold: float) -> None:
    detections = drawn(seed, count=count)
    merged = soft_nms(detections, decay=decay, sigma=0.5, iou_threshold=0.3, score_threshold=score_threshold)
    expected = plain_soft_nms(detections, score_threshold=score_threshold, factor=FACTORS[decay])
    ranked = sorted(expected, key=lambda i: (-expected[i], i))
    np.testing.assert_allclose(merged.scores, [expected[i] for i in ranked], rtol=1e-12)
    np.testing.assert_array_equal(merged.boxes, detections.boxes[ranked])
    np.testing.assert_array_equal(merged.labels, detections.labels[ranked])


@given(seeds, st.integers(0, 60))
def test_hard_nms_is_torchvisions(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    merged = soft_nms(detections, decay="hard", iou_threshold=0.4, score_threshold=0.0)
    kept = batched_nms(
        torch.from_numpy(detections.boxes),
        torch.from_numpy(detections.scores),
        torch.from_numpy(detections.labels),
        0.4,
    )
    np.testing.assert_array_equal(merged.boxes, detections.boxes[kept.numpy()])


def plain_fusion(detections: Detections, *, iou_threshold: float) -> list[tuple[float, list[float]]]:
    """Keep the members of every cluster, and average them anew each time."""
    clusters: list[list[int]] = []

    def mean_of(members: list[int]) -> np.ndarray:
        return np.average(detections.boxes[members], axis=0, weights=detections.scores[members])

    for index in np.argsort(-detections.scores, kind="stable").tolist():
        overlaps = [
            iou(mean_of(members)[None], detections.boxes[[index]])[0, 0]
            if detections.labels[members[0]] == detections.labels[index]
            else 0.0
            for members in clusters
        ]
        if overlaps and max(overlaps) > iou_threshold:
            clusters[int(np.argmax(overlaps))].append(index)
        else:
            clusters.append([index])
    return [(float(detections.scores[members[0]]), mean_of(members).tolist()) for members in clusters]


@given(seeds, st.integers(0, 40))
def test_fusion_is_the_plain_algorithm(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    fused = weighted_box_fusion(detections, iou_threshold=0.4, score_threshold=0.0)
    expected = plain_fusion(detections, iou_threshold=0.4)
    np.testing.assert_allclose(fused.scores, [score for score, _ in expected])
    np.testing.assert_allclose(fused.boxes, np.array([box for _, box in expected]).reshape(-1, 4))


@given(seeds, st.integers(0, 20))
def test_fusion_of_disjoint_boxes_changes_nothing(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    apart = detections.boxes + 1000.0 * np.arange(count)[:, None]
    fused = weighted_box_fusion(Detections(boxes=apart, scores=detections.scores, labels=detections.labels))
    order = np.argsort(-detections.scores, kind="stable")
    np.testing.assert_array_equal(fused.boxes, apart[order])


@given(seeds, st.integers(0, 40))
def test_contained_boxes_are_those_of_brute_force(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    is_candidate = np.random.default_rng(seed).random(count) < 0.5
    expected = np.zeros(count, dtype=bool)
    for one in np.flatnonzero(is_candidate):
        for other in np.flatnonzero(~is_candidate):
            shared = intersections(detections.boxes[[one]], detections.boxes[[other]])[0, 0]
            expected[one] |= bool(
                detections.labels[one] == detections.labels[other]
                and detections.scores[other] >= 0.5 * detections.scores[one]
                and shared >= 0.7 * area(detections.boxes[[one]])[0]
            )
    np.testing.assert_array_equal(is_mostly_contained(detections, is_candidate), expected)


def test_scores_below_the_threshold_or_not_finite_are_dropped() -> None:
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 50.0, 10.0]])
    some = Detections(boxes=boxes, scores=np.array([np.nan, 0.2, 0.0005]), labels=np.zeros(3, dtype=np.int64))
    assert soft_nms(some).scores.tolist() == [0.2]
    assert weighted_box_fusion(some).scores.tolist() == [0.2]
    nothing = Detections(boxes=boxes[:2], scores=np.zeros(2), labels=np.zeros(2, dtype=np.int64))
    assert len(weighted_box_fusion(nothing, score_threshold=0.0)) == 0


@given(seeds, st.integers(0, 20))
def test_the_order_of_detections_does_not_matter(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    order = np.random.default_rng(seed + 1).permutation(count)
    merged, shuffled = soft_nms(detections), soft_nms(detections[order])
    np.testing.assert_allclose(merged.scores, shuffled.scores)
    np.testing.assert_array_equal(merged.boxes, shuffled.boxes)


@given(seeds, st.integers(0, 20))
def test_scores_never_rise_and_come_best_first(seed: int, count: int) -> None:
    detections = drawn(seed, count=count, num_classes=1)
    merged = soft_nms(detections)
    before = {tuple(box): score for box, score in zip(detections.boxes, detections.scores, strict=True)}
    assert all(score <= before[tuple(box)] for box, score in zip(merged.boxes, merged.scores, strict=True))
    assert (np.diff(merged.scores) <= 0).all()


def test_classes_are_merged_apart() -> None:
    box = np.array([[0.0, 0.0, 10.0, 10.0]] * 2)
    both = Detections(boxes=box, scores=np.array([0.9, 0.8]), labels=np.array([0, 1]))
    assert soft_nms(both).scores.tolist() == [0.9, 0.8]


def test_the_maximum_keeps_the_best_of_all_classes() -> None:
    detections = drawn(0, count=30)
    limited = soft_nms(detections, max_detections=5)
    assert limited.scores.tolist() == soft_nms(detections).scores[:5].tolist()


def test_class_names_are_kept() -> None:
    named = replace(drawn(0, count=9), class_names=("a", "b", "c"))
    assert soft_nms(named).class_names == weighted_box_fusion(named).class_names == ("a", "b", "c")


def test_no_detections_merge_to_none() -> None:
    assert len(soft_nms(Detections.empty())) == 0
    assert len(weighted_box_fusion(Detections.empty())) == 0


def test_a_sigma_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma must be positive, not 0"):
        soft_nms(Detections.empty(), sigma=0.0)


@given(seeds, st.integers(0, 60))
def test_no_duplicate_is_left_and_every_dropped_box_was_one(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    kept = drop_duplicates(detections)
    assert (np.diff(kept.scores) <= 0).all()
    overlaps = np.triu(iou(kept.boxes, kept.boxes), 1)
    is_same = kept.labels[:, None] == kept.labels
    assert (overlaps[is_same] <= 0.5).all()
    assert (overlaps <= 0.6).all()
    dropped = detections[~np.isin(detections.scores, kept.scores)]
    within = drop_duplicates(detections, any_class_iou_threshold=1.0)  # these drop a box of another class
    for each in dropped:
        is_better = within.scores > each.scores
        overlap = iou(within.boxes, each.boxes)[:, 0]
        assert (is_better & (overlap > np.where(within.labels == each.labels, 0.5, 0.6))).any()


@given(seeds, st.floats(0, 1))
def test_duplicates_above_a_score_do_not_depend_on_those_below(seed: int, score: float) -> None:
    detections = drawn(seed, count=40)
    above = drop_duplicates(detections[detections.scores >= score])
    kept = drop_duplicates(detections)
    np.testing.assert_array_equal(above.boxes, kept.boxes[kept.scores >= score])


@pytest.mark.parametrize(
    ("width", "label", "is_kept"),
    [(4.9, 0, True), (5.1, 0, False), (5.9, 1, True), (6.1, 1, False)],
)
def test_a_box_of_another_class_may_overlap_more(width: float, label: int, is_kept: bool) -> None:
    detections = Detections(
        boxes=np.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, width, 10.0]]),
        scores=np.array([0.9, 0.8]),
        labels=np.array([0, label]),
    )
    assert len(drop_duplicates(detections)) == 1 + is_kept
