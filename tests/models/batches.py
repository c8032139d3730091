"""Small detectors and made-up batches, for the tests of models."""

from collections.abc import Sequence

import torch

from sniper.chips import Standing
from sniper.data.dataset import Batch, Target
from sniper.models.detector import Detector
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec

TINY = DetectorSpec(
    backbone=BackboneSpec(name="test_resnet", pretrained=False, frozen_stride=0),
    rpn=RPNSpec(
        channels=16,
        anchor_sizes=(16, 32, 64),
        num_candidates=200,
        num_proposals=30,
        num_training_proposals=20,
    ),
    roi_head=RoIHeadSpec(channels=8, width=32),
)


def build_tiny(spec: DetectorSpec = TINY, *, num_classes: int = 3, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return Detector(spec, num_classes=num_classes)


def build_target(
    boxes: Sequence[Sequence[float]], standing: Sequence[Standing], labels: Sequence[int] | None = None
) -> Target:
    return Target(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
        standing=torch.tensor(standing, dtype=torch.int64),
    )


def build_batch(*targets: Target, side: int = 128, seed: int = 0, largest: float = float("inf")) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(targets), 3, side, side)
    return Batch(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        targets=targets,
        valid_sizes=torch.tensor([[0.0, largest]] * len(targets)),
        file_names=tuple(f"{i}.jpg" for i in range(len(targets))),
    )
