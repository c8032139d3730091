"""Small detectors of torchvision, by name."""

from dataclasses import replace
from typing import Any

from sniper.models.build import build_detector
from sniper.models.spec import BackboneSpec, DetectorSpec, TorchvisionSpec
from sniper.models.torchvision_detectors.adapter import TorchvisionModel

SSD = "ssdlite320_mobilenet_v3_large"

_PYRAMID = BackboneSpec(name="test_resnet", pretrained=False, frozen_stages=0, neck="fpn")

SPECS = {
    name: DetectorSpec(
        kind="torchvision",
        name=name,
        backbone=_PYRAMID,
        torchvision=TorchvisionSpec(channels=64, num_convs=4 if name == "faster_rcnn" else 1),
    )
    for name in ("fcos", "retinanet", "faster_rcnn")
} | {
    SSD: DetectorSpec(kind="torchvision", name=SSD, backbone=BackboneSpec(pretrained=False, frozen_stages=0))
}

ONE_STAGE = ("fcos", "retinanet", SSD)


def build(name: str, *, num_classes: int = 3, seed: int = 0, **fields: Any) -> TorchvisionModel:
    """Build a small detector, in training mode."""
    model = build_detector(replace(SPECS[name], **fields), num_classes=num_classes, seed=seed)
    assert isinstance(model, TorchvisionModel)
    return model
