"""Shifts of boxes: against torchvision, there and back."""

import torch
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder

from sniper.models.box_coder import BoxCoder


def some_boxes(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(50, 2, generator=generator) * 100
    return torch.cat([corners, corners + 1 + torch.rand(50, 2, generator=generator) * 60], dim=1)


def test_shifts_are_those_of_torchvision_there_and_back() -> None:
    theirs, ours = TorchvisionCoder(weights=(10.0, 10.0, 5.0, 5.0)), BoxCoder(place=10.0, side=5.0)
    boxes, others = some_boxes(0), some_boxes(1)
    shifts = ours.encode(boxes, others)
    torch.testing.assert_close(shifts, theirs.encode_single(boxes, others))
    torch.testing.assert_close(ours.decode(shifts, others), boxes, rtol=1e-5, atol=1e-4)
    wild = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) * 30
    torch.testing.assert_close(ours.decode(wild, others), theirs.decode_single(wild, others))


def test_a_batch_of_shifts_is_of_the_same_boxes() -> None:
    shifts = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    others = some_boxes(0)
    batch = BoxCoder().decode(shifts, others)
    assert torch.equal(batch[1], BoxCoder().decode(shifts[1], others))
