"""Detection on a GPU: the same objects as on a CPU."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec
from sniper.data.datasets import Category
from sniper.geometry import Detections
from sniper.inference.detector import Detector
from tests.devices import DEVICES, full_precision
from tests.models.batches import TINY, build_tiny

LEVELS = (LevelSpec(factor=2.0, below=40), LevelSpec(long_side=128, at_least=20))
CATEGORIES = tuple(Category(category_id=i, name=f"class {i}") for i in range(3))


def build_detector(device: str) -> Detector:
    spec = ExperimentSpec(model=TINY, predict=PredictSpec(levels=LEVELS, precision="fp32"))
    model = build_tiny().eval()
    torch.nn.init.normal_(model.roi_head.classes.weight, generator=torch.Generator().manual_seed(0))
    return Detector.from_model(
        model.to(device), spec=spec, categories=CATEGORIES, device=torch.device(device)
    )


def share_found(expected: Detections, detections: Detections) -> float:
    """Return the share of detections that are also among others, with the same class and about the same score."""
    overlap = box_iou(torch.from_numpy(expected.boxes), torch.from_numpy(detections.boxes)).numpy()
    is_equal = (
        (overlap > 0.95)
        & (expected.labels[:, None] == detections.labels)
        & (np.abs(expected.scores[:, None] - detections.scores) < 0.01)
    )
    return float(is_equal.any(axis=1).mean())


@pytest.mark.parametrize("device", DEVICES)
def test_a_detector_finds_the_same_objects_on_every_device(device: str) -> None:
    images = [
        np.random.default_rng(seed).integers(256, size=(150, 200, 3), dtype=np.uint8) for seed in (0, 1)
    ]
    with full_precision():
        on_cpu, on_device = (list(build_detector(name).predict_many(images)) for name in ("cpu", device))
    for expected, detections in zip(on_cpu, on_device, strict=True):
        assert expected is not None
        assert detections is not None
        assert len(expected) > 20
        assert share_found(expected, detections) > 0.95
        assert share_found(detections, expected) > 0.95
