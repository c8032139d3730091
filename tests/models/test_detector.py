"""Chips to losses and images to detections, down to the odd cases."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from sniper.chips import Standing
from sniper.data.dataset import Batch, Target
from sniper.models.detector import Detector
from sniper.models.spec import BackboneSpec
from sniper.models.targets import Match, match_anchors, match_proposals
from tests.models.batches import TINY, build_batch, build_target, build_tiny

V, INV, IGN = Standing.VALID, Standing.INVALID, Standing.IGNORED


def losses_of(model: Detector, batch: Batch) -> dict[str, torch.Tensor]:
    return model.losses(batch, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "target",
    [
        build_target([], []),
        build_target([[10, 10, 40, 40]], [INV]),
        build_target([[0, 0, 128, 128]], [IGN]),
        build_target([[10, 10, 10.5, 60]], [V]),
        build_target([[0, 0, 128, 128]], [V]),
    ],
)
def test_losses_are_finite_and_so_are_their_gradients(target: Target) -> None:
    model = build_tiny().train()
    losses = losses_of(model, build_batch(target, target))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_chip_without_boxes_has_box_losses_of_exactly_zero() -> None:
    losses = losses_of(build_tiny().train(), build_batch(build_target([], [])))
    assert losses["rpn_box"] == 0
    assert losses["head_box"] == 0
    assert losses["rpn_objectness"] > 0
    assert losses["head_class"] > 0


def test_a_negative_chip_teaches_no_box_and_spares_what_overlaps_an_object() -> None:
    model = build_tiny()
    aside = build_target([[20, 20, 60, 60]], [Standing.ASIDE])
    batch = build_batch(aside, build_target([], []))
    losses = losses_of(model, batch)
    assert losses["rpn_box"] == losses["head_box"] == 0.0
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["rpn_objectness"] > 0

    anchors = torch.tensor([[20.0, 20, 60, 60], [30.0, 20, 70, 60], [25.0, 25, 35, 35], [90.0, 90, 120, 120]])
    matches = match_anchors(
        anchors,
        boxes=aside.boxes,
        standing=aside.standing,
        positive_iou=0.5,
        negative_iou=0.4,
        ignored_iou=0.3,
    )
    assert matches.state.tolist() == [Match.IGNORED, Match.IGNORED, Match.NEGATIVE, Match.NEGATIVE]
    matches = match_proposals(anchors, boxes=aside.boxes, standing=aside.standing, positive_iou=0.5)
    assert matches.state.tolist() == [Match.IGNORED, Match.IGNORED, Match.NEGATIVE, Match.NEGATIVE]


def test_the_rpn_alone_has_the_losses_it_has_with_the_head() -> None:
    model = build_tiny()
    batch = build_batch(build_target([[20, 20, 60, 60]], [Standing.VALID]))
    both = model.losses(batch, generator=torch.Generator().manual_seed(1))
    alone = model.rpn_losses(batch, generator=torch.Generator().manual_seed(1))
    assert alone.keys() == {"rpn_objectness", "rpn_box"}
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_nine_hundred_boxes_in_a_chip_are_learnt_from() -> None:
    corners = torch.rand(900, 2, generator=torch.Generator().manual_seed(0)) * 100
    boxes = torch.cat([corners, corners + 20], dim=1).tolist()
    losses = losses_of(build_tiny().train(), build_batch(build_target(boxes, [V] * 900)))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_every_proposal_is_trained_on_and_valid_boxes_are_among_them() -> None:
    model = build_tiny().train()
    seen: list[list[torch.Tensor]] = []
    forward = model.roi_head.forward

    def spy(features: torch.Tensor, proposals: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(proposals)
        return forward(features, proposals)

    model.roi_head.forward = spy  # type: ignore[method-assign, assignment]
    losses_of(model, build_batch(build_target([[10, 10, 40, 40], [50, 50, 90, 90]], [V, INV]), largest=60.0))
    (proposals,) = seen[0]
    assert proposals[-1].tolist() == [10, 10, 40, 40]
    assert len(proposals) == TINY.rpn.num_training_proposals + 1
    sizes = (proposals[:, 2:] - proposals[:, :2]).prod(dim=1).sqrt()
    assert sizes.max() < 60


def test_the_same_generator_gives_the_same_losses() -> None:
    model = build_tiny().eval()
    batch = build_batch(build_target([[10, 10, 40, 40]], [V], [2]))
    one, other = losses_of(model, batch), losses_of(model, batch)
    assert all(one[name] == other[name] for name in one)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 200), (33, 17), (640, 32)])
def test_images_of_any_sides_are_searched_and_boxes_stay_inside(height: int, width: int) -> None:
    model = build_tiny().eval()
    image = torch.full((3, height, width), 128, dtype=torch.uint8)
    (found,) = model.detect([image])
    assert (found.boxes >= 0).all()
    assert (found.boxes <= np.array([width, height, width, height])).all()
    assert set(found.labels.tolist()) <= {0, 1, 2}


def test_proposals_keep_to_the_image_and_come_best_first() -> None:
    model = build_tiny().eval()
    (found,) = model.propose([torch.zeros((3, 100, 70), dtype=torch.uint8)])
    assert len(found.boxes) <= TINY.rpn.num_proposals
    assert (found.scores.diff() <= 0).all()
    assert found.boxes[:, 2].max() <= 70
    assert found.boxes[:, 3].max() <= 100


def test_learning_one_chip_by_heart_finds_its_boxes() -> None:
    model = build_tiny(num_classes=2).train()
    target = build_target([[16, 16, 48, 48], [70, 60, 120, 100]], [V, V], [0, 1])
    batch = build_batch(target)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(120):
        losses = model.losses(batch, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.detect([batch.images[0]])  # batch norm still uses the chip's own statistics
    for box, label in zip(target.boxes.numpy(), target.labels.tolist(), strict=True):
        own = found.select(found.labels == label)
        best = own.boxes[own.scores.argmax()]
        assert np.abs(best - box).max() < 4
        assert own.scores.max() > 0.5


def test_stem_and_first_stage_are_frozen_and_the_rest_learns() -> None:
    spec = dataclasses.replace(TINY, backbone=BackboneSpec(name="test_resnet", pretrained=False))
    model = build_tiny(spec).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = losses_of(model, build_batch(build_target([[10, 10, 40, 40]], [V])))
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    after = model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    frozen = {name for name in after if name.startswith(("backbone.trunk.conv1", "backbone.trunk.layer1"))}
    assert frozen
    assert not changed & frozen
    assert any(name.startswith("backbone.trunk.layer2") and "running_mean" in name for name in changed)
    assert any(name.startswith("backbone.trunk.layer4") and "weight" in name for name in changed)


def test_frozen_batch_norm_keeps_its_statistics_and_its_weights() -> None:
    backbone = BackboneSpec(name="test_resnet", pretrained=False, batch_norm="frozen", frozen_stride=0)
    model = build_tiny(dataclasses.replace(TINY, backbone=backbone)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    losses_of(model, build_batch(build_target([], [])))
    assert before
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())


def test_a_deformable_detector_starts_out_as_the_plain_one_and_learns() -> None:
    spec = dataclasses.replace(
        TINY,
        backbone=dataclasses.replace(TINY.backbone, deformable=True),
        roi_head=dataclasses.replace(TINY.roi_head, pooling="deformable"),
    )
    batch = build_batch(build_target([[20, 20, 60, 60]], [Standing.VALID]))
    plain, deformable = build_tiny(), build_tiny(spec)
    weights = {
        re.sub(r"(layer4\..*conv\d)\.weight", r"\1.taps.weight", name): value
        for name, value in plain.state_dict().items()
    }
    missing, strange = deformable.load_state_dict(weights, strict=False)
    assert not strange
    assert all(".offsets." in name or "pool.hidden" in name for name in missing)
    wanted, found = losses_of(plain, batch), losses_of(deformable, batch)
    for name, loss in found.items():
        torch.testing.assert_close(loss, wanted[name], atol=1e-4, rtol=1e-4)
    sum(found.values()).backward()
    assert deformable.roi_head.pool.offsets.weight.grad is not None
