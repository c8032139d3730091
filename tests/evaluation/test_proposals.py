"""The recall of proposals, against pycocotools without regard to categories."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sniper.evaluation.pair import EvaluationPair
from sniper.evaluation.proposals import LIMITS, score_proposals
from tests.evaluation.entries import entry, ground_truth_of
from tests.evaluation.test_diagnosis import random_results


def recall_by_pycocotools(
    proposals: list[dict[str, Any]], ground_truth: dict[str, Any], limits: list[int]
) -> np.ndarray:
    """Return recall by IoU, area and number of proposals."""
    reference = COCO()
    reference.dataset = {**ground_truth, "info": {}}
    reference.createIndex()
    evaluation = COCOeval(reference, reference.loadRes(proposals), "bbox")
    evaluation.params.useCats = 0
    evaluation.params.maxDets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    recall: np.ndarray = evaluation.eval["recall"][:, 0]
    return recall


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([[1, 2, 4], list(LIMITS)]))
def test_recall_equals_that_of_pycocotools(seed: int, limits: list[int]) -> None:
    proposals, ground_truth = random_results(seed)
    if not proposals:
        return
    expected = recall_by_pycocotools(proposals, ground_truth, limits)
    scores = score_proposals(EvaluationPair.of(proposals, ground_truth), limits=limits)
    assert [size.size for size in scores.sizes] == ["all", "small", "medium", "large"]
    for a, size in enumerate(scores.sizes):
        assert [row.max_proposals for row in size.recalls] == limits
        for m, row in enumerate(size.recalls):
            assert row.ar == pytest.approx(expected[:, a, m].mean(), abs=1e-9)
            assert row.recall_50 == pytest.approx(expected[0, a, m], abs=1e-9)


def test_the_best_proposals_of_each_image_count() -> None:
    boxes = [[20.0 * (i % 40), 20.0 * (i // 40), 9.0, 9.0] for i in range(1200)]
    truth = ground_truth_of(*(entry(bbox=box, id=i, area=81.0, iscrowd=0) for i, box in enumerate(boxes, 1)))
    proposals = [entry(bbox=box, score=1 - i / 2000) for i, box in enumerate(boxes)]
    sizes = score_proposals(EvaluationPair.of(proposals, truth)).as_dict()["sizes"]
    expected = {"size": "all", "num_objects": 1200}
    for limit in (100, 300, 1000):
        expected |= {f"ar_{limit}": limit / 1200, f"recall_50_{limit}": limit / 1200}
    assert sizes[0] == pytest.approx(expected)
    assert sizes[1] == {**sizes[0], "size": "small"}
    assert sizes[3]["ar_100"] is sizes[3]["recall_50_1000"] is None
    assert sizes[3]["num_objects"] == 0


def test_without_proposals_recall_is_zero_and_without_objects_undefined() -> None:
    (every, *_) = score_proposals(EvaluationPair.of([], ground_truth_of(entry()))).sizes
    assert [(row.ar, row.recall_50) for row in every.recalls] == [(0.0, 0.0)] * 3
    (every, *_) = score_proposals(EvaluationPair.of([entry()], ground_truth_of())).sizes
    assert [(row.ar, row.recall_50) for row in every.recalls] == [(-1.0, -1.0)] * 3
