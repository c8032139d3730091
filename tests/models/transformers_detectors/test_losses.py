"""The losses are those of transformers where every box is valid; queries on other boxes lose nothing."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

from sniper.chips import BoxStatus
from sniper.data.batches import Batch
from sniper.models.chip_boxes import ChipBoxes
from sniper.models.transformers_detectors.adapter import TransformersModel
from sniper.models.transformers_detectors.losses import CHIPS, to_labels
from tests.models.batches import build_batch, build_sample
from tests.models.transformers_detectors.specs import ALL, SOME, build

VALID, OUT_OF_RANGE, IGNORE = BoxStatus.VALID, BoxStatus.OUT_OF_RANGE, BoxStatus.IGNORE

SIDE = 128
BOXES = [[20.0, 30.0, 60.0, 50.0], [70.0, 60.0, 120.0, 110.0], [90.0, 10.0, 110.0, 40.0]]


def batch_of(*status: BoxStatus) -> Batch:
    """Return two chips, the first with boxes of some status."""
    return build_batch(
        build_sample(BOXES[: len(status)], list(status), [0, 2, 1][: len(status)], side=SIDE),
        build_sample([[0.0, 0.0, 50.0, 90.0]], [VALID], [1], side=SIDE, seed=5),
    )


def loss_of_library(model: TransformersModel, batch: Batch) -> torch.Tensor:
    """Compute the loss of a batch as transformers does, of all boxes."""
    net = copy.deepcopy(model.net)
    del net._loss_function
    pixels = (batch.images.float() / 255 - model.mean) / model.std
    targets = batch.targets
    labels = [
        {
            "class_labels": targets.labels[index, :count],
            "boxes": box_convert(targets.boxes[index, :count], "xyxy", "cxcywh") / SIDE,
        }
        for index, count in enumerate(targets.num_boxes)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence(targets.seeds).generate_state(1)[0]))
        loss: torch.Tensor = net(pixel_values=pixels, labels=labels).loss
    return loss


@pytest.mark.parametrize("name", ALL)
def test_losses_equal_those_of_transformers_where_all_boxes_are_valid(name: str, tmp_path: Path) -> None:
    model, batch = build(name, tmp_path), batch_of(VALID, VALID, VALID)
    expected = loss_of_library(model, batch)
    losses = model.losses(batch)
    assert losses.keys() == {"head_class", "head_box"}
    assert all(loss > 0 for loss in losses.values())
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), expected)


@pytest.mark.parametrize("name", SOME)
def test_other_boxes_change_neither_matches_nor_losses_of_boxes(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    alone = copy.deepcopy(model).losses(batch_of(VALID))
    beside = model.losses(batch_of(VALID, OUT_OF_RANGE, IGNORE))
    torch.testing.assert_close(beside["head_box"], alone["head_box"])
    assert beside["head_class"] < alone["head_class"]


@pytest.mark.parametrize("name", SOME)
def test_objects_out_of_range_are_objects_if_all_are_learned(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path, labels="all")
    expected = loss_of_library(model, batch_of(VALID, VALID, VALID))
    losses = model.losses(batch_of(VALID, OUT_OF_RANGE, OUT_OF_RANGE))
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), expected)


ROWS = {
    "on the valid box": [0.1, 0.1, 0.4, 0.4],
    "nearest to the box out of range": [0.5, 0.5, 0.9, 0.9],
    "on the box out of range": [0.55, 0.55, 0.92, 0.92],
    "far, but nearest to the ignored region": [0.62, 0.02, 0.98, 0.08],
    "half in the ignored region": [0.72, 0.21, 0.78, 0.29],
    "elsewhere": [0.05, 0.6, 0.2, 0.9],
}
IS_IGNORED = [False, True, True, True, True, False]


def labels_of_chip() -> dict[str, Any]:
    boxes = ChipBoxes(
        objects=torch.tensor([[0.1, 0.1, 0.4, 0.45]]),
        labels=torch.tensor([1]),
        others=torch.tensor([[0.5, 0.5, 0.9, 0.9], [0.6, 0.1, 1.0, 0.3]]),
        other_labels=torch.tensor([0, 2]),
        other_status=torch.tensor([OUT_OF_RANGE, IGNORE]),
    )
    return to_labels(boxes)


@pytest.mark.parametrize("name", SOME)
def test_queries_on_other_boxes_have_no_gradient_in_any_layer(name: str, tmp_path: Path) -> None:
    net = build(name, tmp_path).net
    config = copy.copy(net.config)
    config.auxiliary_loss = name != "yolos"
    generator = torch.Generator().manual_seed(0)
    num_outputs = 4 if name == "yolos" else 3
    boxes = box_convert(torch.tensor(list(ROWS.values())), "xyxy", "cxcywh")[None].requires_grad_()
    layers = [
        torch.randn((1, len(ROWS), num_outputs), generator=generator).requires_grad_() for _ in range(3)
    ]
    axis = 1 if name == "rt_detr_v2" else 0
    stacked = torch.stack(layers[:2], dim=axis)
    options = {"enc_topk_logits": layers[2], "enc_topk_bboxes": boxes} if axis else {}
    loss, parts, _ = net.loss_function(
        layers[1],
        [labels_of_chip()],
        torch.device("cpu"),
        boxes,
        config,
        stacked,
        torch.stack([boxes, boxes], dim=axis),
        **options,
    )
    loss.backward()
    assert boxes.grad is not None
    assert (boxes.grad[0].abs().sum(dim=1) > 0).tolist() == [True, *[False] * 5]
    used = [layers[1]] if name == "yolos" else layers if axis else layers[:2]
    for logits in used:
        assert logits.grad is not None
        assert (logits.grad[0].abs().sum(dim=1) < 1e-12).tolist() == IS_IGNORED
    assert parts[CHIPS].shape == (1,)


@pytest.mark.parametrize("name", SOME)
def test_more_objects_than_queries_are_learned_beside_other_boxes(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 100, (40, 2))
    boxes = np.concatenate([low, low + 20], axis=1).tolist()
    batch = build_batch(build_sample(boxes, [VALID] * 25 + [OUT_OF_RANGE] * 15, side=SIDE))
    losses = model.losses(batch)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", SOME)
def test_a_chip_without_valid_boxes_teaches_the_class_of_no_object(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    batch = build_batch(
        build_sample([], [], side=SIDE), build_sample(BOXES[:1], [OUT_OF_RANGE], [2], side=SIDE, seed=3)
    )
    losses, counts = model.losses_and_counts(batch)
    assert losses["head_class"] > 0
    assert losses["head_box"] == 0
    assert counts["negative_chips"] == 2
    assert counts["negative_loss"] > 0
    assert counts["positive_loss"] == 0
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_losses_of_chips_are_split_between_negative_and_positive_ones(tmp_path: Path) -> None:
    model = build("deformable_detr", tmp_path, dropout=0.0)
    model.eval()
    chips = [build_sample(BOXES, [VALID] * 3, side=SIDE), build_sample([], [], side=SIDE, seed=4)]
    _, counts = model.losses_and_counts(build_batch(*chips))
    alone, _ = model.losses_and_counts(build_batch(chips[1]))
    # Three objects divide the loss of the batch, and none that of the chip; two layers have about the same.
    torch.testing.assert_close(counts["negative_loss"], alone["head_class"] / 3, rtol=0.1, atol=0)
    assert counts["positive_loss"] > 0


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2"])
def test_random_draws_depend_on_the_seeds_of_chips_alone(name: str, tmp_path: Path) -> None:
    model, batch = build(name, tmp_path), batch_of(VALID, OUT_OF_RANGE)
    torch.manual_seed(1)
    first = copy.deepcopy(model).losses(batch)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert copy.deepcopy(model).losses(batch) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    other = dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, seeds=(8, 9)))
    assert copy.deepcopy(model).losses(other) != first


@pytest.mark.parametrize("name", SOME)
def test_outputs_that_are_not_finite_make_losses_that_are_not(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert all(loss.isnan() for loss in model.losses(batch_of(VALID)).values())


@pytest.mark.parametrize("name", SOME)
def test_losses_are_computed_in_single_precision(name: str, tmp_path: Path) -> None:
    model, batch = build(name, tmp_path), batch_of(VALID, OUT_OF_RANGE, IGNORE)
    expected = copy.deepcopy(model).losses(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for loss_name, loss in losses.items():
        torch.testing.assert_close(loss, expected[loss_name], rtol=0.3, atol=0)
