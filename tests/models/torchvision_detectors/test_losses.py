"""The losses are torchvision's where every box is valid; other boxes are neither objects nor background."""

from typing import Any

import pytest
import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from sniper.chips import BoxStatus
from sniper.data.batches import Batch
from sniper.models.chip_boxes import ChipBoxes
from sniper.models.protocol import ProposingModel
from sniper.models.torchvision_detectors.one_stage import OneStageModel, is_centre_inside
from sniper.models.torchvision_detectors.rcnn import RCNNModel
from tests.models.batches import build_batch, build_sample
from tests.models.test_two_stage import check_overfitting
from tests.models.torchvision_detectors.specs import ONE_STAGE, SPECS, SSD, build

VALID, OUT_OF_RANGE, IGNORE = BoxStatus.VALID, BoxStatus.OUT_OF_RANGE, BoxStatus.IGNORE

SIDES = {name: 320 if name == SSD else 192 for name in SPECS}
BOXES = [
    [[20.0, 30.0, 80.0, 70.0], [70.0, 80.0, 190.0, 180.0], [120.0, 20.0, 150.0, 60.0]],
    [[0.0, 0.0, 50.0, 90.0]],
]


def valid_batch(name: str) -> Batch:
    side = SIDES[name]
    return build_batch(
        build_sample(BOXES[0], [VALID] * 3, [0, 2, 1], side=side),
        build_sample(BOXES[1], [VALID], [1], side=side, seed=5),
    )


def torchvision_targets(batch: Batch, *, first_label: int) -> list[dict[str, torch.Tensor]]:
    _, targets = batch.to_torchvision()
    return [{"boxes": each["boxes"], "labels": each["labels"] - 1 + first_label} for each in targets]


def own_losses_of_torchvision(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Compute the losses of a batch by torchvision's functions."""
    net, targets = model.net, torchvision_targets(batch, first_label=model.first_label)
    maps = model.features(batch.images)
    images = ImageList(batch.images.float(), [(batch.images.shape[2], batch.images.shape[3])] * len(batch))
    if isinstance(model, RCNNModel):
        net.rpn.fg_bg_sampler.seeds = net.roi_heads.fg_bg_sampler.seeds = batch.targets.seeds
        proposals, rpn_losses = net.rpn(images, maps, targets)
        _, head_losses = net.roi_heads(maps, proposals, images.image_sizes, targets)
        return {
            "rpn_objectness": rpn_losses["loss_objectness"],
            "rpn_box": rpn_losses["loss_rpn_box_reg"],
            "head_class": head_losses["loss_classifier"],
            "head_box": head_losses["loss_box_reg"],
        }
    outputs = net.head(list(maps.values()))
    anchors = net.anchor_generator(images, list(maps.values()))
    if isinstance(net, FCOS):
        net.head = FCOSHead(64, 1, 3, num_convs=1)  # whose losses are torchvision's
        sizes = [each.shape[2] * each.shape[3] for each in maps.values()]
        losses = net.compute_loss(targets, outputs, anchors, sizes)
    elif model.spec.name == SSD:
        matched = [
            net.proposal_matcher(box_iou(target["boxes"], of_image))
            for target, of_image in zip(targets, anchors, strict=True)
        ]
        losses = net.compute_loss(targets, outputs, anchors, matched)
    else:
        losses = net.compute_loss(targets, outputs, anchors)
    names = {"classification": "head_class", "bbox_regression": "head_box", "bbox_ctrness": "head_centerness"}
    return {names[name]: loss for name, loss in losses.items()}


@pytest.mark.parametrize("name", SPECS)
def test_losses_equal_those_of_torchvision_where_all_boxes_are_valid(name: str) -> None:
    model, batch = build(name), valid_batch(name)
    model.eval() if name != "faster_rcnn" else freeze_statistics(model)
    losses = model.losses(batch)
    expected = own_losses_of_torchvision(model, batch)
    assert losses.keys() == expected.keys()
    for loss_name, loss in losses.items():
        torch.testing.assert_close(loss, expected[loss_name])
    assert all(loss > 0 for loss in losses.values())


def freeze_statistics(model: torch.nn.Module) -> None:
    """Keep the losses of the training mode, which batch norm would change with every call."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def test_a_whole_training_step_of_torchvision_has_the_same_losses() -> None:
    # Its transform, which is not used otherwise, leaves chips of 320 pixels as they are.
    model, batch = build(SSD), valid_batch(SSD)
    losses = model.losses(batch)
    expected = model.net(
        [image.float() / 255 for image in batch.images], torchvision_targets(batch, first_label=1)
    )
    torch.testing.assert_close(losses["head_class"], expected["classification"])
    torch.testing.assert_close(losses["head_box"], expected["bbox_regression"])


def gradients(model: OneStageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the absolute gradient of the classification loss at the anchors of a chip, and the anchors."""
    outputs, anchors, sizes = model._predict(model.pad(list(batch.images))[0])
    logits = outputs["cls_logits"].detach().requires_grad_()
    boxes = ChipBoxes.of(batch.targets, 0, model.spec.labels)
    losses, _ = model._chip_losses(outputs | {"cls_logits": logits}, anchors, boxes, map_sizes=sizes)
    losses["classification"].backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad[0].abs().sum(dim=1), anchors


BOX = [100.0, 100.0, 228.0, 228.0]


@pytest.mark.parametrize("name", ONE_STAGE)
@pytest.mark.parametrize("status", [OUT_OF_RANGE, IGNORE])
def test_anchors_on_a_box_that_is_not_valid_learn_nothing(name: str, status: BoxStatus) -> None:
    model = build(name)
    assert isinstance(model, OneStageModel)
    valid = [10.0, 10.0, 60.0, 60.0]
    sample = build_sample([valid, BOX], [VALID, status], side=256 if name != SSD else 320)
    gradient, anchors = gradients(model, build_batch(sample))
    box = torch.tensor([BOX])
    is_on_box = box_iou(anchors, box)[:, 0] > 0.3
    if name == "fcos":
        # The points that would learn the box: near its centre, at the stride of its size.
        small = torch.tensor([[148.0, 148.0, 180.0, 180.0]])
        is_on_box = is_centre_inside(anchors, small) & (anchors[:, 2] - anchors[:, 0] == 16)
        if status == IGNORE:
            is_on_box = is_centre_inside(anchors, box)
    assert is_on_box.any()
    assert (gradient[is_on_box] == 0).all()
    far = box_iou(anchors, torch.tensor([valid, BOX])).amax(dim=1) == 0
    if name != SSD:  # which learns the hardest negatives only
        assert (gradient[far] > 0).all()
    assert (gradient > 0).any()


@pytest.mark.parametrize("name", ONE_STAGE)
def test_all_objects_are_learnt_where_the_labels_are_all(name: str) -> None:
    boxes, classes = BOXES[0], [0, 2, 1]
    statuses = [VALID, OUT_OF_RANGE, OUT_OF_RANGE]
    mixed = build_batch(build_sample(boxes, statuses, classes, side=SIDES[name]))
    valid = build_batch(build_sample(boxes, [VALID] * 3, classes, side=SIDES[name]))
    as_all, as_valid = build(name, labels="all").eval(), build(name).eval()
    for loss, expected in zip(as_all.losses(mixed).values(), as_valid.losses(valid).values(), strict=True):
        assert torch.equal(loss, expected)
    assert not torch.equal(as_valid.losses(mixed)["head_class"], as_valid.losses(valid)["head_class"])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("boxes", [[], [BOX]])
def test_a_chip_without_valid_boxes_teaches_background(name: str, boxes: list[list[float]]) -> None:
    model = build(name)
    batch = build_batch(build_sample(boxes, [OUT_OF_RANGE] * len(boxes), side=192))
    losses, counts = model.losses_and_counts(batch)
    total = torch.stack(list(losses.values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(total)
    class_losses = [
        loss for loss_name, loss in losses.items() if "class" in loss_name or "objectness" in loss_name
    ]
    assert sum(class_losses) > 0
    assert counts["negative_chips"] == 1
    torch.testing.assert_close(counts["negative_loss"], torch.stack(class_losses).sum().detach())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_samples_depend_on_the_seeds_of_chips_and_on_no_global_generator() -> None:
    model, batch = build("faster_rcnn"), valid_batch("faster_rcnn")
    freeze_statistics(model)
    first = model.losses(batch)
    torch.manual_seed(1)
    again = model.losses(batch)
    assert all(torch.equal(loss, again[name]) for name, loss in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_detector_overfits_to_one_chip(name: str) -> None:
    sample = build_sample([[16, 16, 48, 48], [70, 60, 120, 100]], [VALID, VALID], [0, 1])
    check_overfitting(build(name, num_classes=2), sample)


def test_proposals_out_of_the_valid_range_are_dropped() -> None:
    model = build("faster_rcnn")
    assert isinstance(model, RCNNModel)
    padded, sides = model.pad(list(valid_batch("faster_rcnn").images))
    predictions = model._predict(padded, model.features(padded))
    valid_sizes = torch.tensor([[30.0, 60.0], [0.0, torch.inf]])
    limited, free = model._propose(predictions, sides, valid_sizes=valid_sizes)
    sizes = (limited.boxes[:, 2:] - limited.boxes[:, :2]).prod(dim=1).sqrt()
    assert len(sizes) > 0
    assert ((sizes > 29.99) & (sizes < 60.01)).all()
    unlimited = model._propose(predictions, sides)[1]
    assert torch.equal(free.boxes, unlimited.boxes)


def test_the_head_learns_objects_out_of_range_and_the_rpn_does_not() -> None:
    model = build("faster_rcnn")
    freeze_statistics(model)
    nothing = build_batch(build_sample([], [], side=192))
    other = build_batch(build_sample([[*BOX[:2], 180.0, 180.0]], [OUT_OF_RANGE], [1], side=192))
    assert isinstance(model, ProposingModel)
    assert model.rpn_losses(other)["rpn_box"].item() == 0
    assert model.losses_and_counts(nothing)[1]["positives"].item() == 0
    assert model.losses_and_counts(other)[1]["positives"].item() > 0


def test_a_batch_without_any_proposal_has_losses() -> None:
    model = build("faster_rcnn")
    sample = build_sample([[*BOX[:2], 180.0, 180.0]], [OUT_OF_RANGE], [1], side=192, largest=1e-3)
    losses = model.losses(build_batch(sample))
    assert losses["head_class"].item() == 0
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_rpn_losses_alone_equal_those_with_the_head() -> None:
    model, batch = build("faster_rcnn"), valid_batch("faster_rcnn")
    freeze_statistics(model)
    assert isinstance(model, ProposingModel)
    alone, losses = model.rpn_losses(batch), model.losses(batch)
    assert alone.keys() == {"rpn_objectness", "rpn_box"}
    assert all(torch.equal(loss, losses[loss_name]) for loss_name, loss in alone.items())
