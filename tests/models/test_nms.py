"""Suppression of proposals: against torchvision, image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import nms

from sniper.models.nms import batched_nms, fixed_point_nms


def crowd(count: int, *, seed: int, spread: float = 60.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three images, the second with half of its places empty, the third with none filled."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(3, count, 2, generator=generator) * spread
    sides = 5 + torch.rand(3, count, 2, generator=generator) * 30
    scores = torch.rand(3, count, generator=generator).sort(dim=1, descending=True).values
    scores[1, count // 2 :] = scores[2] = -torch.inf
    return torch.cat([corners, corners + sides], dim=2), scores


@given(count=st.integers(1, 60), seed=st.integers(0, 1000), iou=st.sampled_from([0.0, 0.3, 0.5, 0.7]))
def test_what_stays_is_what_torchvision_keeps(count: int, seed: int, iou: float) -> None:
    boxes, scores = crowd(count, seed=seed)
    index, is_real = batched_nms(boxes, scores, iou=iou, limit=20, waits=True)
    settled = fixed_point_nms(boxes, scores > -torch.inf, iou=iou)
    for i in range(3):
        there = scores[i] > -torch.inf
        wanted = nms(boxes[i][there], scores[i][there], iou).tolist()
        assert index[i][is_real[i]].tolist() == wanted[:20]
        assert torch.where(settled[i])[0].tolist() == wanted


def test_a_long_chain_of_overlaps_is_settled() -> None:
    # Each box hides the next one only: every second stays, down a chain of 60.
    steps = torch.arange(60.0)[:, None]
    boxes = torch.cat([steps, torch.zeros(60, 1), steps + 2.5, torch.ones(60, 1)], dim=1)[None]
    stays = fixed_point_nms(boxes, torch.ones(1, 60, dtype=torch.bool), iou=0.4)
    assert torch.where(stays[0])[0].tolist() == list(range(0, 60, 2))


def test_of_a_chain_too_long_to_be_settled_nothing_stays_that_should_go() -> None:
    steps = torch.arange(200.0)[:, None]
    boxes = torch.cat([steps, torch.zeros(200, 1), steps + 2.5, torch.ones(200, 1)], dim=1)[None]
    stays = torch.where(fixed_point_nms(boxes, torch.ones(1, 200, dtype=torch.bool), iou=0.4)[0])[0].tolist()
    assert set(stays) < set(range(0, 200, 2))
    assert stays[:30] == list(range(0, 60, 2))


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_places_are_as_many_as_the_limit_or_the_boxes(limit: int) -> None:
    boxes, scores = crowd(12, seed=0, spread=500.0)
    index, is_real = batched_nms(boxes, scores, iou=0.5, limit=limit, waits=True)
    assert index.shape == is_real.shape == (3, min(limit, 12))
    assert is_real[2].sum() == 0
