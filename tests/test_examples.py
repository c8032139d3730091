"""The examples run."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_torchvision_detector_predicts_on_the_pyramid() -> None:
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=4, box_score_thresh=0.0, box_detections_per_img=20
    )
    seen: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    detector = load("torchvision_pyramid").build_detector(model.eval(), ["a", "b", "c"], torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    detections = detector.predict(image)
    assert len(detections) > 0
    assert (detections.boxes <= np.array([160, 120, 160, 120]) + 1e-6).all()
    assert set(detections.names) <= {"a", "b", "c"}
    # The sides of each level, padded to the multiple of 32 that torchvision needs.
    assert seen == [(256, 320), (128, 160), (480, 640)]
