"""Few boxes of few classes close together, for properties of matching."""

import numpy as np

from sniper.data.datasets import Category
from sniper.evaluation.pair import EvaluationPair, GroundTruth

NUM_CLASSES = 3


def random_pair(
    seed: int, num_objects: int, num_detections: int, *, has_equal_scores: bool = True
) -> EvaluationPair:
    """Return detections and objects of two images, with crowds among them."""
    generator = np.random.default_rng(seed)
    boxes = [
        np.concatenate([generator.uniform(0, 30, (n, 2)), generator.uniform(10, 20, (n, 2))], axis=1)
        for n in (num_objects, num_detections)
    ]
    truth = GroundTruth(
        image_ids=np.arange(2),
        categories=tuple(Category(category_id=i, name=str(i)) for i in range(NUM_CLASSES)),
        image_indices=generator.integers(0, 2, num_objects),
        labels=generator.integers(0, NUM_CLASSES, num_objects),
        boxes=boxes[0],
        areas=boxes[0][:, 2] * boxes[0][:, 3],
        is_crowd=generator.random(num_objects) < 0.2,
    )
    return EvaluationPair(
        truth=truth,
        image_indices=generator.integers(0, 2, num_detections),
        labels=generator.integers(0, NUM_CLASSES, num_detections),
        boxes=boxes[1],
        scores=generator.choice([0.1, 0.25, 0.3, 0.61, 0.62, 0.9], num_detections)
        if has_equal_scores
        else generator.random(num_detections),
    )
