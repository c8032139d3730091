"""Non-maximum suppression of proposals: compared with torchvision, image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import nms

from sniper.models import nms as suppression
from sniper.models.nms import padded_nms
from tests.devices import DEVICES


def overlapping_boxes(count: int, *, seed: int, spread: float = 60.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes and scores of three images; half of the second are padding without numbers, and all of the third."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(3, count, 2, generator=generator) * spread
    sides = 5 + torch.rand(3, count, 2, generator=generator) * 30
    scores = torch.rand(3, count, generator=generator).sort(dim=1, descending=True).values
    scores[1, count // 2 :] = scores[2] = -torch.inf
    boxes = torch.cat([corners, corners + sides], dim=2)
    boxes[scores == -torch.inf] = torch.nan
    return boxes, scores


def expected_of(boxes: torch.Tensor, scores: torch.Tensor, iou: float) -> list[int]:
    is_box = scores > -torch.inf
    expected: list[int] = nms(boxes[is_box], scores[is_box], iou).tolist()
    return expected


@pytest.mark.parametrize("device", DEVICES)
@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 1000),
    iou=st.sampled_from([0.0, 0.3, 0.5, 0.7]),
    limit=st.sampled_from([1, 7, 100]),
)
def test_padded_nms_keeps_what_torchvision_keeps(
    device: str, count: int, seed: int, iou: float, limit: int
) -> None:
    boxes, scores = overlapping_boxes(count, seed=seed)
    indices, is_real = padded_nms(boxes.to(device), scores.to(device), iou=iou, limit=limit)
    assert indices.shape == is_real.shape == (3, min(limit, count))
    for i in range(3):
        assert indices[i][is_real[i]].tolist() == expected_of(boxes[i], scores[i], iou)[:limit]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iou", [0.5, 0.7])
def test_padded_nms_of_thousands_of_boxes_keeps_what_torchvision_keeps(iou: float, device: str) -> None:
    boxes, scores = overlapping_boxes(4000, seed=0, spread=300.0)
    scores = (scores * 50).round() / 50  # many are equal
    indices, is_real = padded_nms(boxes.to(device), scores.to(device), iou=iou, limit=4000)
    for i in range(3):
        assert indices[i][is_real[i]].tolist() == expected_of(boxes[i], scores[i], iou)


@given(seed=st.integers(0, 1000), limit=st.sampled_from([1, 7, 100]), first=st.sampled_from([5, 20, 40]))
def test_suppressing_the_best_candidates_first_changes_nothing(seed: int, limit: int, first: int) -> None:
    boxes, scores = overlapping_boxes(40, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suppression, "_FIRST", first)
        kept = suppression._suppress_on_gpu(boxes[0], scores[0], iou=0.5, limit=limit)
    assert kept.tolist() == expected_of(boxes[0], scores[0], 0.5)[:limit]
