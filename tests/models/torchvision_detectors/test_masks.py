"""Mask R-CNN of torchvision on chips: the loss of masks and the masks of detections, against torchvision's own."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss

from sniper.data.batches import Batch
from sniper.models.build import build_detector
from sniper.models.mask_head import rasterize_targets
from sniper.models.spec import BackboneSpec, DetectorSpec
from sniper.models.torchvision_detectors.rcnn import RCNNModel
from tests.models.batches import build_batch
from tests.models.test_mask_head import masked_sample, rectangle

SPEC = DetectorSpec(
    kind="torchvision",
    name="maskrcnn_resnet50_fpn",
    backbone=BackboneSpec(pretrained=False, frozen_stages=0, batch_norm="frozen"),
)


@pytest.fixture(scope="module")
def model() -> RCNNModel:
    built = build_detector(SPEC, num_classes=3)
    assert isinstance(built, RCNNModel)
    return built


def masked_batch() -> Batch:
    first = masked_sample(
        [[20, 20, 60, 60], [70, 70, 110, 110]],
        [rectangle(20, 20, 40, 60), []],
        labels=[1, 2],
    )
    return build_batch(first, masked_sample([[10, 10, 50, 90]], [rectangle(10, 10, 50, 50)], labels=[2]))


def test_the_loss_equals_that_of_torchvision(model: RCNNModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On targets that are rasterised exactly; torchvision's come from rasters of the image."""
    seen: list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []
    logits_of = model._mask_logits

    def spy(padded: torch.Tensor, maps: object, boxes: list[torch.Tensor]) -> torch.Tensor:
        logits = logits_of(padded, maps, boxes)  # type: ignore[arg-type]
        seen.append((logits, torch.cat(boxes), boxes))
        return logits

    monkeypatch.setattr(model, "_mask_logits", spy)
    batch = masked_batch()
    losses = model.train().losses(batch)
    ((logits, boxes, of_chips),) = seen
    targets = batch.targets
    chips = torch.arange(2).repeat_interleave(torch.tensor([len(each) for each in of_chips]))
    objects = torch.zeros_like(chips)  # the only one of each chip with a mask
    for chip, each in enumerate(of_chips):  # valid boxes come first
        has_ring = targets.masks.rings[chip, :, 1] > targets.masks.rings[chip, :, 0]  # type: ignore[union-attr]
        (index,) = torch.where(has_ring)
        objects[chips == chip] = index[0]
        assert len(each)  # its valid box is a proposal
    cells = rasterize_targets(targets, boxes, chips, objects, side=28)
    whole = torch.tensor([[-0.5, -0.5, 27.5, 27.5]])  # torchvision samples at the corners of cells
    expected = maskrcnn_loss(
        logits,
        [whole for _ in cells],
        list(cells[:, None]),
        [targets.labels[chip, row][None] + 1 for chip, row in zip(chips, objects, strict=True)],
        [torch.zeros(1, dtype=torch.int64) for _ in cells],
    )
    torch.testing.assert_close(losses["mask"], expected, rtol=1e-3, atol=1e-4)


def test_all_layers_have_gradients_with_and_without_masks(model: RCNNModel) -> None:
    empty = build_batch(masked_sample([], []), masked_sample([[20, 20, 60, 60]], [[]]))
    for batch, is_positive in ((masked_batch(), True), (empty, False)):
        model.zero_grad()
        losses = model.train().losses(batch)
        assert (losses["mask"] > 0) == is_positive
        losses["mask"].backward()  # type: ignore[no-untyped-call]
        head = model.net.roi_heads.mask_predictor.mask_fcn_logits
        assert head.weight.grad is not None
        assert bool(head.weight.grad.any()) == is_positive


def test_detections_have_the_masks_that_torchvision_predicts(model: RCNNModel) -> None:
    image = torch.randint(256, (3, 96, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = model.eval()
    (found,) = model.detect_masks([image], lambda _, each: each[:7])
    assert found.masks is not None
    assert 0 < len(found) <= 7
    heads, (padded, _) = model.net.roi_heads, model.pad([image])
    boxes, labels = torch.from_numpy(found.boxes).float(), torch.from_numpy(found.labels) + 1
    with torch.no_grad():
        pooled = heads.mask_roi_pool(model.features(padded), [boxes], [tuple(padded.shape[2:])])
        logits = heads.mask_predictor(heads.mask_head(pooled))
    (expected,) = maskrcnn_inference(logits, [labels])
    assert np.abs(expected[:, 0].numpy() * 255 - found.masks.grids).max() <= 1


def test_faster_rcnn_predicts_no_masks() -> None:
    assert dataclasses.replace(SPEC, name="fasterrcnn_resnet50_fpn").mask_side is None
