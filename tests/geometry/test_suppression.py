"""Soft suppression against a plain reference, and its laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.geometry import Detections
from sniper.geometry.boxes import iou
from sniper.geometry.suppression import soft_nms


def drawn(seed: int, *, count: int, num_classes: int = 3) -> Detections:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (count, 2))], axis=1)
    return Detections(
        boxes=boxes, scores=rng.uniform(0.01, 1, count), labels=rng.integers(0, num_classes, count)
    )


def plain_soft_nms(detections: Detections, *, sigma: float, floor: float) -> dict[int, float]:
    """The algorithm as the paper tells it, one class and one box at a time: score by index of what is left."""
    left: dict[int, float] = {}
    for label in np.unique(detections.labels):
        scores = {int(i): float(detections.scores[i]) for i in np.flatnonzero(detections.labels == label)}
        while scores:
            best = max(scores, key=lambda i: (scores[i], -i))
            left[best] = scores.pop(best)
            for other in list(scores):
                pair = detections.boxes[[best]], detections.boxes[[other]]
                scores[other] *= float(np.exp(-(iou(*pair)[0, 0] ** 2) / sigma))
                if scores[other] < floor:
                    del scores[other]
    return {i: score for i, score in left.items() if score >= floor}


seeds = st.integers(0, 10_000)


@given(seeds, st.integers(0, 30))
def test_soft_nms_is_the_plain_algorithm(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    merged = soft_nms(detections, sigma=0.5, floor=0.05)
    expected = plain_soft_nms(detections, sigma=0.5, floor=0.05)
    np.testing.assert_allclose(merged.scores, sorted(expected.values(), reverse=True), rtol=1e-12)


@given(seeds, st.integers(0, 20))
def test_the_order_of_detections_does_not_matter(seed: int, count: int) -> None:
    detections = drawn(seed, count=count)
    order = np.random.default_rng(seed + 1).permutation(count)
    merged, shuffled = soft_nms(detections), soft_nms(detections.select(order))
    np.testing.assert_allclose(merged.scores, shuffled.scores)
    np.testing.assert_array_equal(merged.boxes, shuffled.boxes)


@given(seeds, st.integers(0, 20))
def test_scores_never_grow_and_come_best_first(seed: int, count: int) -> None:
    detections = drawn(seed, count=count, num_classes=1)
    merged = soft_nms(detections)
    before = {tuple(box): score for box, score in zip(detections.boxes, detections.scores, strict=True)}
    assert all(score <= before[tuple(box)] for box, score in zip(merged.boxes, merged.scores, strict=True))
    assert (np.diff(merged.scores) <= 0).all()


def test_classes_do_not_touch_each_other() -> None:
    box = np.array([[0.0, 0.0, 10.0, 10.0]] * 2)
    both = Detections(boxes=box, scores=np.array([0.9, 0.8]), labels=np.array([0, 1]))
    assert soft_nms(both).scores.tolist() == [0.9, 0.8]


def test_the_limit_keeps_the_best_of_all_classes() -> None:
    detections = drawn(0, count=30)
    limited = soft_nms(detections, limit=5)
    assert limited.scores.tolist() == soft_nms(detections).scores[:5].tolist()


def test_nothing_merges_to_nothing() -> None:
    assert len(soft_nms(Detections.empty())) == 0
    assert len(Detections.join([])) == 0


def test_a_width_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma must be positive, not 0"):
        soft_nms(Detections.empty(), sigma=0.0)
