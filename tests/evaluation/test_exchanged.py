"""Category ids that stand for other classes are recognised, and confusions of a detector are not."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.evaluation.coco import evaluate
from sniper.evaluation.exchanged import find_exchanged_classes
from sniper.evaluation.pair import EvaluationPair


def world(
    confusion: np.ndarray, *, seed: int = 0, num_objects: int = 400, num_images: int = 20
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw objects on a grid and a detection near each, whose class is drawn from the row of its object's class."""
    rng = np.random.default_rng(seed)
    num_classes = len(confusion)
    annotations, detections = [], []
    for index in range(num_objects):
        image_id, place = index % num_images + 1, index // num_images
        label = int(rng.integers(num_classes))
        box = [60.0 * place, 0.0, 50.0, 50.0]
        moved = (np.array(box) + rng.uniform(-5, 5, 4)).tolist()
        seen = int(rng.choice(num_classes, p=confusion[label]))
        annotations.append({"image_id": image_id, "category_id": label + 1, "bbox": box})
        detections.append(
            {"image_id": image_id, "category_id": seen + 1, "bbox": moved, "score": float(rng.random())}
        )
    truth = {
        "images": [{"id": number + 1} for number in range(num_images)],
        "categories": [{"id": number + 1, "name": f"class {number}"} for number in range(num_classes)],
        "annotations": annotations,
    }
    return detections, truth


def exchanged(confusion: np.ndarray, **options: Any) -> tuple[str, ...]:
    return find_exchanged_classes(EvaluationPair.of(*world(confusion, **options)))


@pytest.mark.parametrize("order", [(1, 0), (1, 2, 0), (0, 2, 1), (0, 1, 4, 2, 3), tuple(reversed(range(8)))])
def test_exchanged_ids_are_reported(order: tuple[int, ...]) -> None:
    (warning,) = exchanged(0.9 * np.eye(len(order))[list(order)] + 0.1 / len(order))
    assert "categories of the detections look exchanged" in warning
    assert "lie on objects of" in warning


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), num_classes=st.integers(1, 6), own=st.floats(0.0, 1.0))
def test_confusion_of_classes_is_not_reported(seed: int, num_classes: int, own: float) -> None:
    others = np.random.default_rng(seed).dirichlet(np.ones(num_classes), size=num_classes)
    assert exchanged(own * np.eye(num_classes) + (1 - own) / num_classes, seed=seed) == ()
    assert exchanged(0.5 * np.eye(num_classes) + 0.5 * others, seed=seed) == ()


def test_a_detector_of_a_single_class_is_not_reported() -> None:
    assert exchanged(np.array([[0.0, 1.0, 0.0]] * 3)) == ()


def test_few_matches_are_no_evidence() -> None:
    assert exchanged(np.eye(2)[::-1], num_objects=20) == ()


def test_many_images_are_sampled() -> None:
    assert exchanged(np.eye(2)[::-1], num_objects=2400, num_images=1200) != ()


def test_evaluate_warns_of_exchanged_ids() -> None:
    detections, truth = world(np.eye(2)[::-1])
    with pytest.warns(UserWarning, match="look exchanged"):
        assert evaluate(detections, truth).ap == 0.0
