"""Small detectors and synthetic batches for tests."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from sniper.chips import BoxStatus, ChipTarget, ChipTargets
from sniper.data.batches import Batch, ChipSample, collate
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.models.two_stage import TwoStageDetector

TINY = DetectorSpec(
    backbone=BackboneSpec(name="test_resnet", pretrained=False, frozen_stages=0),
    rpn=RPNSpec(
        channels=16,
        anchor_sizes=(16, 32, 64),
        pre_nms_top_n=200,
        post_nms_top_n=30,
        post_nms_top_n_train=20,
    ),
    roi_head=RoIHeadSpec(channels=8, hidden_dim=32),
)


def with_pyramid(spec: DetectorSpec) -> DetectorSpec:
    """Return a detector with a feature pyramid in place of a single map."""
    return replace(
        spec,
        backbone=replace(spec.backbone, neck="fpn"),
        rpn=replace(spec.rpn, anchor_sizes=(8, 16, 32, 64, 128)),
    )


def build_tiny(spec: DetectorSpec = TINY, *, num_classes: int = 3, seed: int = 0) -> TwoStageDetector:
    torch.manual_seed(seed)
    return TwoStageDetector(spec, num_classes=num_classes)


def build_sample(
    boxes: Sequence[Sequence[float]] | torch.Tensor,
    status: Sequence[BoxStatus],
    labels: Sequence[int] | None = None,
    *,
    side: int = 128,
    seed: int = 0,
    largest: float = float("inf"),
) -> ChipSample:
    return ChipSample(
        pixels=np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8),
        target=ChipTarget(
            boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.array(labels if labels is not None else [0] * len(boxes), dtype=np.int64),
            status=np.array(status, dtype=np.int64),
        ),
        valid_sizes=(0.0, largest),
        seed=seed,
        name=f"{seed}.jpg",
    )


def build_batch(*samples: ChipSample) -> Batch:
    return collate([replace(sample, seed=sample.seed + i) for i, sample in enumerate(samples)])


def check_learns_nothing(model: TwoStageDetector, batch: Batch, *, head: nn.Module | None, loss: str) -> None:
    """Check that a batch has nothing to teach a head, all of whose layers have gradients nevertheless."""
    losses = model.losses(batch)
    assert losses[loss] == 0
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert head is not None
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def check_is_mean_over_parts(spec: DetectorSpec, batch: Batch, *, loss: str) -> None:
    """Check that a loss of a batch of two chips is the mean over both."""
    frozen = replace(spec, backbone=replace(spec.backbone, batch_norm="frozen"))
    model = build_tiny(frozen).train()
    whole = model.losses(batch)[loss]
    parts = [model.losses(batch.part(index, index + 1))[loss] for index in range(2)]
    assert whole > 0
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-6)


def build_targets(*samples: ChipSample) -> ChipTargets[torch.Tensor]:
    return build_batch(*samples).targets
