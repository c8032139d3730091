"""Crowded images that are split into blocks have the scores of whole images."""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.data.datasets import Category
from sniper.errors import DetectionsError
from sniper.evaluation import blocks, confusion
from sniper.evaluation.blocks import split_crowded
from sniper.evaluation.coco import score
from sniper.evaluation.comparison import ResampledAP
from sniper.evaluation.confusion import count_confusions, count_pairs
from sniper.evaluation.diagnosis import diagnose
from sniper.evaluation.matching import match_pair
from sniper.evaluation.pair import EvaluationPair, GroundTruth
from sniper.evaluation.proposals import score_proposals
from tests.evaluation.random_pairs import random_pair


def scattered_pair(seed: int, num_objects: int, num_detections: int) -> EvaluationPair:
    """Return a random pair with its boxes moved to a few clusters, so that there are several components."""
    pair = random_pair(seed, num_objects, num_detections)
    generator = np.random.default_rng(seed)
    truth_boxes, boxes = pair.truth.boxes.copy(), pair.boxes.copy()
    truth_boxes[:, :2] += 60 * generator.integers(0, 4, (num_objects, 2))
    boxes[:, :2] += 60 * generator.integers(0, 4, (num_detections, 2))
    truth_boxes[pair.truth.is_crowd, 2:] *= 6
    is_near = generator.random(num_detections) < 0.7 * (num_objects > 0)
    near = generator.integers(0, max(num_objects, 1), num_detections)[is_near]
    if num_objects:
        boxes[is_near] = truth_boxes[near] + generator.choice([0.0, 1.0, 3.0], (len(near), 4))
    return EvaluationPair(
        truth=GroundTruth(
            image_ids=np.array([9, 2]),
            categories=pair.truth.categories,
            image_indices=pair.truth.image_indices,
            labels=pair.truth.labels,
            boxes=truth_boxes,
            areas=truth_boxes[:, 2] * truth_boxes[:, 3],
            is_crowd=pair.truth.is_crowd,
        ),
        image_indices=pair.image_indices,
        labels=pair.labels,
        boxes=boxes,
        scores=pair.scores,
    )


@contextmanager
def splitting() -> Iterator[None]:
    """Split all images, into the smallest blocks."""
    with patch.object(blocks, "MAX_OVERLAPS", 0), patch.object(blocks, "_BLOCK_SIZE", 1):
        yield


def compute_all(pair: EvaluationPair, max_detections: int) -> dict[str, Any]:
    """Return all numbers that are computed from matches."""
    matches = match_pair(pair)
    matrix = count_confusions(matches, 0.28)
    assert matrix is not None
    resampled = ResampledAP(pair, max_detections=max_detections)
    diagnosis = diagnose(pair, max_detections=max_detections, sizes=(0.0, 14.0, 17.0, math.inf))
    return {
        "scores": score(pair, max_detections=max_detections),
        "sizes": diagnosis.sizes,
        "proposals": score_proposals(pair, limits=(3, 10, max_detections + 1)),
        "curves": diagnosis.precisions.tolist(),
        "matches": (matches.is_true_positive.tolist(), matches.is_false_positive.tolist()),
        "confusion": matrix.counts.tolist(),
        "best of each image": count_pairs(pair, iou=0.5, max_detections=7).tolist(),
        "resampled": [resampled(np.array(weights)) for weights in ((1, 1), (0, 2), (2, 0))],
    }


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(0, 60), st.sampled_from([10, 13, 100]))
def test_blocks_have_the_numbers_of_whole_images(
    seed: int, num_objects: int, num_detections: int, max_detections: int
) -> None:
    pair = scattered_pair(seed, num_objects, num_detections)
    expected = compute_all(pair, max_detections)
    with splitting():
        assert compute_all(pair, max_detections) == expected


def test_separate_boxes_become_separate_blocks() -> None:
    pair = row_of_boxes(5)
    with splitting():
        split = split_crowded(pair, max_detections=100, iou=0.5)
    assert split.is_split
    assert len(split.images) == 5
    assert split.images.tolist() == [0] * 5
    assert (np.bincount(split.pair.image_indices) == 1).all()
    assert (np.bincount(split.pair.truth.image_indices) == 1).all()


def test_small_components_share_a_block() -> None:
    pair = row_of_boxes(500)
    split = split_crowded(pair, max_detections=1000, iou=0.5, max_overlaps=0)
    assert len(split.images) == 1000 // blocks._BLOCK_SIZE + 1


def test_images_whose_best_detections_fit_are_not_split() -> None:
    pair = row_of_boxes(20)
    kept = split_crowded(pair, max_detections=10, iou=0.5, max_overlaps=200)
    assert not kept.is_split
    assert kept.rows.tolist() == list(range(10))
    assert split_crowded(pair, max_detections=10, iou=0.5, max_overlaps=400).pair is pair


def test_boxes_that_all_overlap_are_refused() -> None:
    pair = row_of_boxes(40, step=0.0)
    message = "image 7: 40 detections and 40 objects that are connected by their overlaps .* 1,600 overlaps, expected"
    with (
        splitting(),
        patch.object(blocks, "_MOST_OVERLAPS", 1599),
        pytest.raises(DetectionsError, match=message),
    ):
        match_pair(pair)


def test_confusions_of_many_classes_are_counted_in_parts() -> None:
    pair = scattered_pair(3, 40, 60)
    expected = count_pairs(pair, iou=0.5, max_detections=100)
    with patch.object(confusion, "_MAX_CELLS", 1):
        assert (count_pairs(pair, iou=0.5, max_detections=100) == expected).all()


def test_a_confusion_matrix_of_too_many_classes_is_not_computed() -> None:
    with patch.object(confusion, "MAX_CLASSES", 2):
        assert count_confusions(match_pair(scattered_pair(3, 4, 6)), 0.1) is None


@pytest.mark.slow
def test_a_crowded_image_takes_little_memory() -> None:
    """Overlaps of all detections with all objects would take 8 GB, and twice that while they are computed."""
    script = """
import numpy as np, resource
from tests.evaluation.test_blocks import crowded_pair
from sniper.evaluation.coco import score
from sniper.evaluation.confusion import count_confusions
from sniper.evaluation.diagnosis import diagnose
from sniper.evaluation.matching import match_pair
pair = crowded_pair(50_000, 20_000)
scores = score(pair, max_detections=50_000)
diagnose(pair, max_detections=50_000)
count_confusions(match_pair(pair), 0.0)
assert 0.1 < scores.ap < 0.9
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True, timeout=600
    )
    assert float(done.stdout) < 2.0


def row_of_boxes(count: int, *, step: float = 30.0) -> EvaluationPair:
    """Return an image with a row of objects, and a detection on each."""
    boxes = np.full((count, 4), 20.0)
    boxes[:, 0] = step * np.arange(count)
    zeros = np.zeros(count, dtype=np.int64)
    truth = GroundTruth(
        image_ids=np.array([7]),
        categories=(Category(category_id=0, name="a"),),
        image_indices=zeros,
        labels=zeros,
        boxes=boxes,
        areas=np.full(count, 400.0),
        is_crowd=zeros.astype(np.bool_),
    )
    scores = np.linspace(0.9, 0.1, count)
    return EvaluationPair(truth=truth, image_indices=zeros, labels=zeros, boxes=boxes, scores=scores)


def crowded_pair(num_detections: int, num_objects: int) -> EvaluationPair:
    """Return one image with many objects, and several detections near each."""
    generator = np.random.default_rng(0)
    objects = np.concatenate(
        [generator.uniform(0, 20_000, (num_objects, 2)), generator.uniform(20, 60, (num_objects, 2))], axis=1
    )
    zeros = np.zeros(num_objects, dtype=np.int64)
    truth = GroundTruth(
        image_ids=np.array([7]),
        categories=(Category(category_id=0, name="a"),),
        image_indices=zeros,
        labels=zeros,
        boxes=objects,
        areas=objects[:, 2] * objects[:, 3],
        is_crowd=generator.random(num_objects) < 0.01,
    )
    near = objects[generator.integers(0, num_objects, num_detections)]
    zeros = np.zeros(num_detections, dtype=np.int64)
    return EvaluationPair(
        truth=truth,
        image_indices=zeros,
        labels=zeros,
        boxes=np.abs(near + generator.normal(0, 3, near.shape)),
        scores=generator.random(num_detections),
    )
