"""Non-maximum suppression of proposals: compared with torchvision, image by image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import nms

from sniper.models.nms import fixed_point_nms, padded_nms
from tests.devices import DEVICES


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


@pytest.mark.parametrize("device", DEVICES)
@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 1000),
    iou=IOUS,
    limit=st.sampled_from([1, 7, 100]),
    block=st.sampled_from([1, 8, 16, 512]),
)
def test_fixed_point_nms_keeps_what_torchvision_keeps(
    device: str, count: int, seed: int, iou: float, limit: int, block: int
) -> None:
    boxes, scores = overlapping_boxes(count, seed=seed)
    boxes[scores == -torch.inf] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sniper.models.nms._BLOCK", block)
        indices, is_kept = fixed_point_nms(
            boxes.to(device), (scores > -torch.inf).to(device), iou=iou, limit=limit
        )
    assert indices.shape == is_kept.shape == (3, min(limit, count))
    for i in range(3):
        is_box = scores[i] > -torch.inf
        expected = nms(boxes[i][is_box], scores[i][is_box], iou).tolist()
        assert indices[i][is_kept[i]].tolist() == expected[:limit]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iou", [0.5, 0.7])
def test_fixed_point_nms_of_thousands_of_boxes_keeps_what_torchvision_keeps(iou: float, device: str) -> None:
    boxes, scores = (tensor.to(device) for tensor in overlapping_boxes(2000, seed=0, spread=300.0))
    indices, is_kept = fixed_point_nms(boxes, scores > -torch.inf, iou=iou, limit=2000)
    expected, is_expected = padded_nms(boxes, scores, iou=iou, limit=2000, may_sync=True)
    assert torch.equal(is_kept, is_expected)
    assert torch.equal(indices[is_kept], expected[is_expected])


def test_fixed_point_nms_in_parts_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores = overlapping_boxes(40, seed=0)
    whole = fixed_point_nms(boxes, scores > -torch.inf, iou=0.3, limit=20)
    monkeypatch.setattr("sniper.models.nms._MAX_PAIRS", 300)
    parts = fixed_point_nms(boxes, scores > -torch.inf, iou=0.3, limit=20)
    assert all(torch.equal(part, all_at_once) for part, all_at_once in zip(parts, whole, strict=True))


def kept_of_chain(count: int) -> list[int]:
    is_real = torch.ones(1, count, dtype=torch.bool)
    indices, is_kept = fixed_point_nms(chain_of_boxes(count), is_real, iou=0.4, limit=count)
    return indices[is_kept].tolist()


def test_fixed_point_nms_is_exact_for_a_chain_of_33_overlaps() -> None:
    assert kept_of_chain(34) == list(range(0, 34, 2))


def test_fixed_point_nms_drops_boxes_at_the_end_of_a_longer_chain() -> None:
    assert kept_of_chain(200) == list(range(0, 34, 2))


def test_fixed_point_nms_is_exact_for_a_long_chain_that_many_blocks_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sniper.models.nms._BLOCK", 30)
    assert kept_of_chain(600) == list(range(0, 600, 2))


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_the_output_is_padded_to_the_limit_or_all_boxes(limit: int) -> None:
    boxes, scores = overlapping_boxes(12, seed=0, spread=500.0)
    indices, is_real = padded_nms(boxes, scores, iou=0.5, limit=limit, may_sync=True)
    assert indices.shape == is_real.shape == (3, min(limit, 12))
    assert is_real[2].sum() == 0
