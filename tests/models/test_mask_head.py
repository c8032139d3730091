"""The mask head: its loss against plain sums and finite differences, and the masks that it predicts."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional

from sniper.chips import BoxStatus
from sniper.data.batches import Batch, ChipSample
from sniper.geometry import Detections
from sniper.geometry.masks import MaskArrays
from sniper.models.mask_head import MaskHead, choose_masked, rasterize_targets
from sniper.models.roi_head import Positives
from sniper.models.spec import DetectorSpec, MaskHeadSpec
from sniper.models.two_stage import TwoStageDetector
from tests.models.batches import (
    TINY,
    build_batch,
    build_sample,
    build_tiny,
    check_is_mean_over_parts,
    check_learns_nothing,
    with_pyramid,
)

V, OUT, IGN = BoxStatus.VALID, BoxStatus.OUT_OF_RANGE, BoxStatus.IGNORE
HEAD = MaskHeadSpec(channels=8, num_convs=1, pool_size=4, batch_size_per_image=16)
CONCAT = dataclasses.replace(TINY, mask_head=HEAD)
FPN = with_pyramid(CONCAT)


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[list[list[float]]]:
    return [[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]]


def masked_sample(
    boxes: Sequence[Sequence[float]],
    masks: Sequence[Sequence[Sequence[Sequence[float]]]],
    *,
    status: Sequence[BoxStatus] | None = None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
) -> ChipSample:
    sample = build_sample(boxes, status or [V] * len(boxes), labels, seed=seed)
    return dataclasses.replace(
        sample, target=dataclasses.replace(sample.target, masks=MaskArrays.from_rings(masks))
    )


def two_chips() -> Batch:
    first = masked_sample([[20, 20, 60, 60], [70, 70, 110, 110]], [rectangle(20, 20, 40, 60), []])
    second = masked_sample([[10, 10, 50, 90]], [rectangle(10, 10, 50, 50)], labels=[2], seed=7)
    return build_batch(first, second)


def positives_on(batch: Batch, offset: float = 2.0) -> Positives:
    """Return proposals that are near the objects of each chip, and one on nothing."""
    boxes, chips, objects, is_positive = [], [], [], []
    for chip, count in enumerate(batch.targets.num_boxes):
        for index in range(count):
            boxes.append(batch.targets.boxes[chip, index] + offset)
            chips.append(chip)
            objects.append(index)
            is_positive.append(True)
        boxes.append(torch.tensor([0.0, 0, 9, 9]))
        chips.append(chip)
        objects.append(0)
        is_positive.append(False)
    return Positives(
        proposals=torch.stack(boxes),
        chips=torch.tensor(chips),
        box_index=torch.tensor(objects),
        is_positive=torch.tensor(is_positive),
    )


def build_head(spec: MaskHeadSpec = HEAD, *, num_classes: int = 3) -> MaskHead:
    torch.manual_seed(0)
    return MaskHead(spec, num_channels=6, strides=(16,), num_classes=num_classes)


def maps_of(batch: Batch) -> list[torch.Tensor]:
    return [torch.randn(len(batch), 6, 8, 8, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_the_loss_is_the_mean_over_chips_and_positives_with_a_mask(class_agnostic: bool) -> None:
    spec = dataclasses.replace(HEAD, class_agnostic=class_agnostic, loss_weight=1.5)
    head, batch = build_head(spec), two_chips()
    losses = head.losses(maps_of(batch), positives_on(batch), batch.targets)
    logits = head(maps_of(batch), [torch.tensor([[22.0, 22, 62, 62]]), torch.tensor([[12.0, 12, 52, 92]])])
    assert logits.shape == (2, 1 if class_agnostic else 3, 8, 8)
    first, second = torch.zeros(8, 8), torch.zeros(8, 8)
    first[:, :4] = 1  # cells of 5 px, centred at 24.5, 29.5, ...; the mask ends at 40
    second[:4] = 1  # cells of 10 px along y, centred at 17, 27, ...; the mask ends at 50
    first[7] = first[7] * (22 + 7.5 * 5 < 60)
    expected = [
        functional.binary_cross_entropy_with_logits(logits[0, 0], first),
        functional.binary_cross_entropy_with_logits(logits[1, 0 if class_agnostic else 2], second),
    ]
    torch.testing.assert_close(losses["mask"], 1.5 * torch.stack(expected).mean())


def test_gradients_equal_finite_differences() -> None:
    batch, positives = two_chips(), positives_on(two_chips())
    head = build_head().double()
    maps = [each.double().requires_grad_() for each in maps_of(batch)]
    parameters = dict(head.named_parameters())

    def loss(features: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        double = dataclasses.replace(positives, proposals=positives.proposals.double())
        return torch.func.functional_call(
            _LossOf(head, double, batch), dict(zip(names, values, strict=True)), (features,)
        )

    names = [f"head.{name}" for name in parameters]
    assert torch.autograd.gradcheck(
        loss, (maps[0], *parameters.values()), eps=1e-6, atol=1e-6, fast_mode=True
    )


class _LossOf(torch.nn.Module):
    """The loss as a module, in double precision throughout."""

    def __init__(self, head: MaskHead, positives: Positives, batch: Batch) -> None:
        super().__init__()
        self.head, self.positives, self.batch = head, positives, batch

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head.losses([features], self.positives, self.batch.targets)["mask"]


@pytest.mark.parametrize("spec", [CONCAT, FPN])
def test_all_layers_have_gradients_without_any_mask(spec: DetectorSpec) -> None:
    """As DistributedDataParallel requires."""
    model = build_tiny(spec).train()
    chips = [masked_sample([], []), masked_sample([[20, 20, 60, 60]], [[]])]
    check_learns_nothing(model, build_batch(*chips), head=model.mask_head, loss="mask")


@pytest.mark.parametrize("spec", [CONCAT, FPN])
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(spec: DetectorSpec) -> None:
    check_is_mean_over_parts(spec, two_chips(), loss="mask")


def test_masks_of_objects_out_of_range_are_learnt_and_those_of_ignored_ones_not() -> None:
    chip = masked_sample(
        [[20, 20, 60, 60], [70, 70, 110, 110]],
        [rectangle(20, 20, 40, 60), rectangle(70, 70, 90, 110)],
        status=[OUT, IGN],
    )
    batch = build_batch(chip)
    model = build_tiny(CONCAT).train()
    chosen: list[torch.Tensor] = []
    head = model.mask_head
    assert head is not None
    forward = head.forward

    def spy(maps: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        chosen.extend(boxes)
        return forward(maps, boxes)

    head.forward = spy  # type: ignore[method-assign]
    positives = positives_on(batch, offset=0.0)
    is_object = batch.targets.status[positives.chips, positives.box_index] != IGN
    positives = dataclasses.replace(positives, is_positive=positives.is_positive & is_object)
    maps = model.backbone(batch.images)
    assert head.losses(maps, positives, batch.targets)["mask"] > 0
    assert chosen[0].tolist() == [[20, 20, 60, 60]]


def test_the_sample_of_a_chip_depends_on_its_seed_alone() -> None:
    batch = build_batch(
        *(masked_sample([[0, 0, 64, 64]], [rectangle(0, 0, 64, 64)], seed=3) for _ in range(2))
    )
    targets = dataclasses.replace(batch.targets, seeds=(5, 5))
    many = Positives(
        proposals=torch.rand(40, 4),
        chips=torch.arange(2).repeat_interleave(20),
        box_index=torch.zeros(40, dtype=torch.int64),
        is_positive=torch.arange(40) % 2 == 0,
    )
    rows = choose_masked(many, targets, count=4)
    assert len(rows) == 8
    assert (rows[4:] - 20).tolist() == rows[:4].tolist()
    assert (rows % 2 == 0).all()
    assert len(choose_masked(many, targets, count=100)) == 20


def test_targets_without_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="needs targets with masks"):
        build_tiny(CONCAT).losses(build_batch(build_sample([[20, 20, 60, 60]], [V])))


def test_the_targets_of_a_proposal_are_the_part_of_the_mask_inside_it() -> None:
    batch = build_batch(masked_sample([[0, 0, 64, 64]], [rectangle(-40, -40, 32, 200)]))
    masks = rasterize_targets(
        batch.targets, torch.tensor([[16.0, 0, 48, 64]]), torch.tensor([0]), torch.tensor([0]), side=4
    )
    assert masks[0].tolist() == [[1, 1, 0, 0]] * 4


@pytest.mark.parametrize("spec", [CONCAT, FPN])
def test_selected_detections_have_the_masks_of_their_class_and_box(spec: DetectorSpec) -> None:
    model = build_tiny(spec).eval()
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(256, (3, *hw), dtype=torch.uint8, generator=generator) for hw in ((96, 80), (80, 96))
    ]
    detected = model.detect(images)
    kept = model.detect_masks(images, lambda index, each: each[: 300 if index else 5])
    assert [len(each) for each in kept] == [5, min(len(detected[1]), 300)]
    assert model.mask_head is not None
    maps, _ = model._features(images)
    for image, each in enumerate(kept):
        assert each.masks is not None
        np.testing.assert_array_equal(each.boxes, detected[image].boxes[: len(each)])
        np.testing.assert_array_equal(each.masks.boxes, each.boxes)
        boxes = [torch.zeros(0, 4), torch.zeros(0, 4)]
        boxes[image] = torch.from_numpy(each.boxes).float()
        with torch.no_grad():
            logits = model.mask_head(maps, boxes)
        of_class = logits[torch.arange(len(each)), torch.from_numpy(each.labels)].sigmoid() * 255
        assert np.abs(of_class.numpy() - each.masks.grids).max() <= 1
    empty = model.detect_masks(images, lambda _, each: each[:0])
    assert [len(each) for each in empty] == [0, 0]
    assert all(each.masks is not None and len(each.masks) == 0 for each in empty)


def test_a_detector_without_a_mask_head_predicts_no_masks() -> None:
    with pytest.raises(ValueError, match="predicts no masks"):
        build_tiny().detect_masks([torch.zeros(3, 64, 64, dtype=torch.uint8)], lambda _, each: each)


def test_a_detector_overfits_to_the_masks_of_one_chip() -> None:
    torch.manual_seed(0)
    spec = dataclasses.replace(FPN, backbone=dataclasses.replace(FPN.backbone, batch_norm="trained"))
    model = TwoStageDetector(spec, num_classes=1).train()
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[20:60, 20:40] = 255
    pixels[40:60, 20:60] = 255  # an L
    ring: list[list[float]] = [[20, 20], [40, 20], [40, 40], [60, 40], [60, 60], [20, 60]]
    sample = dataclasses.replace(masked_sample([[20.0, 20, 60, 60]], [[ring]]), pixels=pixels)
    batch = build_batch(sample, sample)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        losses = model.losses(batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses["mask"] < 0.2
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    with torch.no_grad():  # in training mode: running means have not followed so few steps
        (found,) = model.detect_masks([image], lambda _, each: best(each))
    assert found.masks is not None
    grid = found.masks.grids[0] >= 128
    x1, y1, x2, y2 = found.boxes[0].tolist()
    np.testing.assert_allclose([x1, y1, x2, y2], [20, 20, 60, 60], atol=6)
    assert not grid[1, 6]  # the corner without an object
    assert grid[6, 1]
    assert grid[6, 6]
    assert grid[1, 1]


def best(detections: Detections) -> Detections:
    return detections[np.array([detections.scores.argmax()])]
