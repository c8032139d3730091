"""Non-maximum suppression of proposals: compared with torchvision, image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import nms

from sniper.models.nms import fixed_point_nms, padded_nms


def overlapping_boxes(count: int, *, seed: int, spread: float = 60.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes and scores of three images; half of the second are padding, and all of the third."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(3, count, 2, generator=generator) * spread
    sides = 5 + torch.rand(3, count, 2, generator=generator) * 30
    scores = torch.rand(3, count, generator=generator).sort(dim=1, descending=True).values
    scores[1, count // 2 :] = scores[2] = -torch.inf
    return torch.cat([corners, corners + sides], dim=2), scores


def chain_of_boxes(count: int) -> torch.Tensor:
    """Return boxes of which each overlaps the next one only, so that every second is to be kept."""
    steps = torch.arange(float(count))[:, None]
    return torch.cat([steps, torch.zeros(count, 1), steps + 2.5, torch.ones(count, 1)], dim=1)[None]


IOUS = st.sampled_from([0.0, 0.3, 0.5, 0.7])


@given(count=st.integers(1, 60), seed=st.integers(0, 1000), iou=IOUS)
def test_padded_nms_keeps_what_torchvision_keeps(count: int, seed: int, iou: float) -> None:
    boxes, scores = overlapping_boxes(count, seed=seed)
    indices, is_real = padded_nms(boxes, scores, iou=iou, limit=20, may_sync=True)
    for i in range(3):
        is_box = scores[i] > -torch.inf
        expected = nms(boxes[i][is_box], scores[i][is_box], iou).tolist()
        assert indices[i][is_real[i]].tolist() == expected[:20]


@given(count=st.integers(1, 60), seed=st.integers(0, 1000), iou=IOUS)
def test_fixed_point_nms_keeps_what_torchvision_keeps(count: int, seed: int, iou: float) -> None:
    boxes, scores = overlapping_boxes(count, seed=seed)
    is_kept = fixed_point_nms(boxes, scores > -torch.inf, iou=iou)
    for i in range(3):
        is_box = scores[i] > -torch.inf
        expected = nms(boxes[i][is_box], scores[i][is_box], iou).tolist()
        assert torch.where(is_kept[i])[0].tolist() == expected


def test_fixed_point_nms_in_parts_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores = overlapping_boxes(40, seed=0)
    whole = fixed_point_nms(boxes, scores > -torch.inf, iou=0.3)
    monkeypatch.setattr("sniper.models.nms._MAX_PAIRS", 300)
    assert torch.equal(fixed_point_nms(boxes, scores > -torch.inf, iou=0.3), whole)


def test_fixed_point_nms_is_exact_for_a_long_chain_of_overlaps() -> None:
    is_kept = fixed_point_nms(chain_of_boxes(60), torch.ones(1, 60, dtype=torch.bool), iou=0.4)
    assert torch.where(is_kept[0])[0].tolist() == list(range(0, 60, 2))


def test_fixed_point_nms_never_keeps_too_many_of_a_longer_chain() -> None:
    is_kept = fixed_point_nms(chain_of_boxes(200), torch.ones(1, 200, dtype=torch.bool), iou=0.4)
    kept = torch.where(is_kept[0])[0].tolist()
    assert set(kept) < set(range(0, 200, 2))
    assert kept[:30] == list(range(0, 60, 2))


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_the_output_is_padded_to_the_limit_or_all_boxes(limit: int) -> None:
    boxes, scores = overlapping_boxes(12, seed=0, spread=500.0)
    indices, is_real = padded_nms(boxes, scores, iou=0.5, limit=limit, may_sync=True)
    assert indices.shape == is_real.shape == (3, min(limit, 12))
    assert is_real[2].sum() == 0
