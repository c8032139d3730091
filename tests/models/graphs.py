"""Small random detectors of all kinds, and their graphs run by torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.models.build import build_detector
from sniper.models.graphs import DetectionGraph
from sniper.models.protocol import DetectorModel
from tests.models.batches import TINY
from tests.models.torchvision_detectors.specs import SSD, build

_FPN = replace(
    TINY,
    backbone=replace(TINY.backbone, neck="fpn"),
    rpn=replace(TINY.rpn, anchor_sizes=(16, 32, 64, 96, 128)),
)
_TWO_STAGE = {
    "concat": TINY,
    "fpn": _FPN,
    "deformable": replace(TINY, backbone=replace(TINY.backbone, deformable=True)),
    "deformable pooling": replace(TINY, roi_head=replace(TINY.roi_head, pooling="deformable")),
}
_TRANSFORMERS = ("rt_detr_v2", "detr", "yolos")

DETECTORS = (*_TWO_STAGE, "fcos", "retinanet", SSD, "faster_rcnn", *_TRANSFORMERS)
"""Names of detectors of every kind of graph."""


def build_random(name: str, folder: Path) -> Any:
    """Build a small detector whose random weights tell images and places apart, in evaluation mode.

    Args:
        name: one of `DETECTORS`.
        folder: for the configuration of one of transformers.
    """
    model: DetectorModel
    if name in _TWO_STAGE:
        model = build_detector(_TWO_STAGE[name], num_classes=3)
    elif name in _TRANSFORMERS:
        from tests.models.transformers_detectors.specs import build as build_transformers

        model = build_transformers(name, folder)
    else:
        model = build(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            # Outputs start with weights near zero, and their scores are all alike.
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.std() < 0.04:
                layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
    return model.eval()


def draw_noise(sides: Sides, *, seed: int) -> np.ndarray:
    """Draw an (h, w, 3) image of noise."""
    return np.random.default_rng(seed).integers(0, 256, (sides.height, sides.width, 3), dtype=np.uint8)


def pad_for(graph: DetectionGraph, image: np.ndarray) -> np.ndarray:
    """Return an image as the graph takes it."""
    height, width = (
        -(-max(side, graph.min_side) // graph.multiple) * graph.multiple for side in image.shape[:2]
    )
    padded = np.zeros((1, 3, height, width), dtype=np.uint8)
    padded[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return padded


def detect_in_graph(graph: DetectionGraph, image: np.ndarray) -> Detections:
    """Run a graph by torch."""
    sides = torch.tensor([image.shape[1], image.shape[0]])
    with torch.inference_mode():
        boxes, scores, labels = graph.eval()(torch.from_numpy(pad_for(graph, image)), sides)
    return Detections(boxes=boxes.double().numpy(), scores=scores.double().numpy(), labels=labels.numpy())
