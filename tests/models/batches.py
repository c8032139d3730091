"""Small detectors and made-up batches, for the tests of models."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sniper.chips import ChipTarget, Standing
from sniper.data.batches import Batch, ChipSample, collate
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


def build_sample(
    boxes: Sequence[Sequence[float]],
    standing: Sequence[Standing],
    labels: Sequence[int] | None = None,
    *,
    side: int = 128,
    seed: int = 0,
    largest: float = float("inf"),
) -> ChipSample:
    return ChipSample(
        pixels=np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8),
        target=ChipTarget(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.array(labels if labels is not None else [0] * len(boxes), dtype=np.int64),
            standing=np.array(standing, dtype=np.int64),
        ),
        valid_sizes=(0.0, largest),
        seed=seed,
        name=f"{seed}.jpg",
    )


def build_batch(*samples: ChipSample) -> Batch:
    return collate([replace(sample, seed=sample.seed + i) for i, sample in enumerate(samples)])
