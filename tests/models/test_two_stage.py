"""Chips to losses and images to detections, down to the odd cases."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from sniper.chips import BoxStatus
from sniper.data.batches import Batch, ChipSample
from sniper.models.spec import BackboneSpec, DetectorSpec
from sniper.models.targets import Match, match_anchors, match_proposals
from sniper.models.two_stage import TwoStageDetector
from tests.models.batches import TINY, build_batch, build_sample, build_tiny

V, INV, IGN = BoxStatus.VALID, BoxStatus.OUT_OF_RANGE, BoxStatus.IGNORE


def losses_of(model: TwoStageDetector, batch: Batch) -> dict[str, torch.Tensor]:
    return model.losses(batch)


@pytest.mark.parametrize(
    "target",
    [
        build_sample([], []),
        build_sample([[10, 10, 40, 40]], [INV]),
        build_sample([[0, 0, 128, 128]], [IGN]),
        build_sample([[10, 10, 10.5, 60]], [V]),
        build_sample([[0, 0, 128, 128]], [V]),
    ],
)
def test_losses_are_finite_and_so_are_their_gradients(target: ChipSample) -> None:
    model = build_tiny().train()
    losses = losses_of(model, build_batch(target, target))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_chip_without_boxes_has_box_losses_of_exactly_zero() -> None:
    losses = losses_of(build_tiny().train(), build_batch(build_sample([], [])))
    assert losses["rpn_box"] == 0
    assert losses["head_box"] == 0
    assert losses["rpn_objectness"] > 0
    assert losses["head_class"] > 0


def test_a_negative_chip_teaches_no_box_and_spares_what_overlaps_an_object() -> None:
    model = build_tiny()
    aside = build_sample([[20, 20, 60, 60]], [BoxStatus.IN_NEGATIVE_CHIP])
    batch = build_batch(aside, build_sample([], []))
    losses = losses_of(model, batch)
    assert losses["rpn_box"] == losses["head_box"] == 0.0
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["rpn_objectness"] > 0

    anchors = torch.tensor([[20.0, 20, 60, 60], [30.0, 20, 70, 60], [25.0, 25, 35, 35], [90.0, 90, 120, 120]])
    matches = match_anchors(
        anchors,
        boxes=batch.boxes[:1],
        status=batch.status[:1],
        num_boxes=batch.num_boxes[:1],
        positive_iou=0.5,
        negative_iou=0.4,
        ignored_iou=0.3,
    )
    assert matches.state[0].tolist() == [Match.IGNORED, Match.IGNORED, Match.NEGATIVE, Match.NEGATIVE]
    matches = match_proposals(
        anchors,
        chips=torch.zeros(4, dtype=torch.int64),
        boxes=batch.boxes,
        status=batch.status,
        positive_iou=0.5,
    )
    assert matches.state.tolist() == [Match.IGNORED, Match.IGNORED, Match.NEGATIVE, Match.NEGATIVE]


def test_the_rpn_alone_has_the_losses_it_has_with_the_head() -> None:
    model = build_tiny()
    batch = build_batch(build_sample([[20, 20, 60, 60]], [BoxStatus.VALID]))
    both = model.losses(batch)
    alone = model.rpn_losses(batch)
    assert alone.keys() == {"rpn_objectness", "rpn_box"}
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_nine_hundred_boxes_in_a_chip_are_learnt_from() -> None:
    corners = torch.rand(900, 2, generator=torch.Generator().manual_seed(0)) * 100
    boxes = torch.cat([corners, corners + 20], dim=1).tolist()
    losses = losses_of(build_tiny().train(), build_batch(build_sample(boxes, [V] * 900)))
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_every_proposal_is_trained_on_and_valid_boxes_are_among_them() -> None:
    model = build_tiny().train()
    seen: list[list[torch.Tensor]] = []
    forward = model.roi_head.forward

    def spy(features: torch.Tensor, proposals: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(proposals)
        return forward(features, proposals)

    model.roi_head.forward = spy  # type: ignore[method-assign_targets, assignment]
    losses_of(model, build_batch(build_sample([[10, 10, 40, 40], [50, 50, 90, 90]], [V, INV], largest=60.0)))
    (proposals,) = seen[0]
    assert proposals[-1].tolist() == [10, 10, 40, 40]
    assert len(proposals) == TINY.rpn.post_nms_top_n_train + 1
    sizes = (proposals[:, 2:] - proposals[:, :2]).prod(dim=1).sqrt()
    assert sizes.max() < 60


def test_the_same_generator_gives_the_same_losses() -> None:
    model = build_tiny().eval()
    batch = build_batch(build_sample([[10, 10, 40, 40]], [V], [2]))
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
    assert len(found.boxes) <= TINY.rpn.post_nms_top_n
    assert (found.scores.diff() <= 0).all()
    assert found.boxes[:, 2].max() <= 70
    assert found.boxes[:, 3].max() <= 100


def learns_by_heart(model: TwoStageDetector, sample: ChipSample) -> None:
    model.train()
    batch = build_batch(sample)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(120):
        losses = model.losses(dataclasses.replace(batch, seeds=(step,)))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = model.detect([batch.images[0]])  # batch norm still uses the chip's own statistics
    for box, label in zip(sample.target.boxes, sample.target.labels.tolist(), strict=True):
        own = found.select(found.labels == label)
        best = own.boxes[own.scores.argmax()]
        assert np.abs(best - box).max() < 4
        assert own.scores.max() > 0.5


def test_learning_one_chip_by_heart_finds_its_boxes() -> None:
    sample = build_sample([[16, 16, 48, 48], [70, 60, 120, 100]], [V, V], [0, 1])
    learns_by_heart(build_tiny(num_classes=2), sample)


def test_stem_and_first_stage_are_frozen_and_the_rest_learns() -> None:
    spec = dataclasses.replace(TINY, backbone=BackboneSpec(name="test_resnet", pretrained=False))
    model = build_tiny(spec).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = losses_of(model, build_batch(build_sample([[10, 10, 40, 40]], [V])))
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
    backbone = BackboneSpec(name="test_resnet", pretrained=False, batch_norm="frozen", frozen_stages=0)
    model = build_tiny(dataclasses.replace(TINY, backbone=backbone)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    losses_of(model, build_batch(build_sample([], [])))
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
    batch = build_batch(build_sample([[20, 20, 60, 60]], [BoxStatus.VALID]))
    plain, deformable = build_tiny(), build_tiny(spec)
    weights = {
        re.sub(r"(layer4\..*conv\d)\.weight", r"\1.taps.weight", name): value
        for name, value in plain.state_dict().items()
    }
    missing, strange = deformable.load_state_dict(weights, strict=False)
    assert not strange
    assert all(".offsets." in name or "cells.hidden" in name for name in missing)
    wanted, found = losses_of(plain, batch), losses_of(deformable, batch)
    for name, loss in found.items():
        torch.testing.assert_close(loss, wanted[name], atol=1e-4, rtol=1e-4)
    sum(found.values()).backward()
    assert deformable.roi_head.pool.cells.offsets.weight.grad is not None


PYRAMID = dataclasses.replace(
    TINY,
    backbone=dataclasses.replace(TINY.backbone, neck="fpn"),
    rpn=dataclasses.replace(TINY.rpn, anchor_sizes=(8, 16, 32, 64, 96)),
)


def test_a_detector_on_a_feature_pyramid_learns_one_chip_by_heart() -> None:
    sample = build_sample([[16, 16, 48, 48], [70, 60, 120, 100]], [V, V], [0, 1])
    learns_by_heart(build_tiny(PYRAMID, num_classes=2), sample)


@pytest.mark.parametrize("sides", [(1, 1), (33, 17), (65, 200)])
def test_a_feature_pyramid_is_searched_whatever_the_sides(sides: tuple[int, int]) -> None:
    (found,) = build_tiny(PYRAMID).eval().detect([torch.full((3, *sides), 128, dtype=torch.uint8)])
    assert (found.boxes <= np.array([sides[1], sides[0]] * 2)).all()


@pytest.mark.parametrize("spec", [TINY, PYRAMID])
def test_the_losses_of_a_batch_are_the_mean_of_those_of_its_parts(spec: DetectorSpec) -> None:
    frozen = dataclasses.replace(spec, backbone=dataclasses.replace(spec.backbone, batch_norm="frozen"))
    model = build_tiny(frozen).train()
    batch = build_batch(
        build_sample([[16, 16, 48, 48], [70, 60, 120, 100]], [V, INV]),
        build_sample([], []),
        build_sample([[10, 10, 40, 40]] * 5, [IGN, V, V, BoxStatus.IN_NEGATIVE_CHIP, V]),
        build_sample([[0, 0, 128, 128]], [V], largest=20.0),
    )
    whole = model.losses(batch)
    parts = [model.losses(batch.part(start, start + 2)) for start in (0, 2)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss, (parts[0][name] + parts[1][name]) / 2)


def test_places_without_a_box_or_a_proposal_change_nothing() -> None:
    model = build_tiny().eval()
    alone = build_batch(build_sample([[20, 20, 60, 60]], [V], largest=24.0))
    crowded = build_sample([[float(i), 5.0, i + 30.0, 40.0] for i in range(40)], [INV] * 40)
    beside = build_batch(build_sample([[20, 20, 60, 60]], [V], largest=24.0), crowded)
    assert beside.boxes.shape[1] == 40
    wanted, found = model.losses(alone), model.losses(beside.part(0, 1))
    for name, loss in wanted.items():
        torch.testing.assert_close(found[name], loss)


def test_invalid_boxes_and_crowds_change_the_loss_of_no_anchor_that_stays_negative() -> None:
    """The gradient of each score tells what the anchor learns: without them it is background, with them nothing."""
    spec = dataclasses.replace(TINY, rpn=dataclasses.replace(TINY.rpn, batch_size_per_image=10_000))
    model = build_tiny(spec)
    boxes = [[20.0, 20.0, 60.0, 60.0], [70.0, 70.0, 100.0, 100.0], [10.0, 80.0, 40.0, 120.0]]

    def gradients(status: list[BoxStatus]) -> torch.Tensor:
        batch = build_batch(build_sample(boxes, status))
        maps = model.backbone(batch.images)
        objectness, deltas = (one.detach().requires_grad_() for one in model.rpn(maps))
        losses = model.rpn.losses(
            objectness,
            deltas,
            anchors=model.rpn.anchors(maps),
            boxes=batch.boxes,
            status=batch.status,
            num_boxes=batch.num_boxes,
            seeds=batch.seeds,
        )
        (gradient,) = torch.autograd.grad(losses["rpn_objectness"], objectness)
        return gradient[0]

    absent = gradients([V, BoxStatus.PADDING, BoxStatus.PADDING])
    present = gradients([V, INV, IGN])
    is_spared = (present == 0) & (absent > 0)
    assert 0 < int(is_spared.sum()) < 100
    # All others learn the same, up to the number of anchors that each chip's mean is taken over.
    ratio = present[~is_spared & (absent != 0)] / absent[~is_spared & (absent != 0)]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0])))
    assert torch.equal(torch.sign(present[~is_spared]), torch.sign(absent[~is_spared]))


@pytest.mark.parametrize("side", [96, 100, 120])
def test_anchors_lie_at_the_strides_of_their_maps_whatever_the_side_of_the_chip(side: int) -> None:
    model = build_tiny(PYRAMID).eval()
    maps = model.backbone(torch.zeros((1, 3, side, side), dtype=torch.uint8))
    anchors = model.rpn.anchors(maps)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    start = 0
    for features, stride in zip(maps, model.backbone.strides, strict=True):
        rows, columns = features.shape[-2:]
        own = centres[start : start + rows * columns * 3].reshape(rows, columns, 3, 2)
        assert torch.equal(own[-1, -1, 0], torch.tensor([(columns - 1.0) * stride, (rows - 1.0) * stride]))
        start += rows * columns * 3
    assert start == len(anchors)
