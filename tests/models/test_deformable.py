"""Deformable convolution and pooling: equal to the plain operations at first, with correct gradients."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import roi_align

from sniper.errors import ConfigError
from sniper.models.deformable import DeformableConv, DeformableRoIPool, make_deformable, sample_cells


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_boxes(width: float, height: float, *, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    return (corners * torch.tensor([width, height])).reshape(count, 4)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_deformable_convolution_initially_equals_the_plain_one(dilation: int) -> None:
    plain = nn.Conv2d(8, 12, 3, padding=dilation, dilation=dilation, bias=False)
    features = random_tensor(2, 8, 9, 11)
    deformable = DeformableConv(plain, num_groups=4)
    torch.testing.assert_close(deformable(features), plain(features), atol=1e-5, rtol=1e-5)


def test_all_parameters_of_a_deformable_convolution_have_gradients() -> None:
    conv = DeformableConv(nn.Conv2d(8, 8, 3, padding=1), num_groups=4)
    conv(random_tensor(1, 8, 7, 7)).square().sum().backward()
    for parameter in conv.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_a_deformable_convolution_keeps_the_precision_of_its_input() -> None:
    conv = DeformableConv(nn.Conv2d(8, 8, 3, padding=1), num_groups=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(random_tensor(1, 8, 7, 7).bfloat16()).dtype == torch.bfloat16


def test_a_resnet_made_deformable_computes_the_same() -> None:
    torch.manual_seed(0)
    trunk: Any = timm.create_model("test_resnet", features_only=True).eval()
    pixels = random_tensor(1, 3, 64, 64)
    before = trunk(pixels)[-1]
    assert make_deformable(trunk["layer4"], name="test_resnet", num_groups=4) > 0
    torch.testing.assert_close(trunk(pixels)[-1], before, atol=1e-4, rtol=1e-4)


def test_a_stage_without_plain_convolutions_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.backbone\.deformable: the last stage of other has no plain 3×3"
    ):
        make_deformable(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), name="other")
    with pytest.raises(ConfigError, match="divide into 4 groups"):
        make_deformable(nn.Sequential(nn.Conv2d(6, 8, 3)), name="other")


@given(st.integers(0, 1000), st.integers(0, 6))
def test_sampling_without_offsets_equals_roi_align(seed: int, count: int) -> None:
    features = random_tensor(2, 5, 13, 9, seed=seed)
    rois = [
        random_boxes(9 * 1.2, 13 * 1.2, count=count, seed=seed + i) for i in range(2)
    ]  # some over the border
    expected = roi_align(features, rois, output_size=7, sampling_ratio=2, aligned=True)
    sampled = sample_cells(features, torch.stack(rois), output_size=7)
    torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=1e-4)


def test_offsets_move_the_sampled_cells() -> None:
    features = random_tensor(1, 3, 20, 20)
    rois = torch.tensor([[[4.0, 6.0, 11.0, 13.0]]])
    offsets = torch.zeros(1, 7, 7, 2)
    offsets[..., 0], offsets[..., 1] = 1 / 7, 2 / 7  # by one cell to the right and two down
    moved = sample_cells(features, rois, output_size=7, offsets=offsets)
    shifted = rois + torch.tensor([[1.0, 2.0, 1.0, 2.0]])
    torch.testing.assert_close(moved, sample_cells(features, shifted, output_size=7), atol=1e-5, rtol=1e-5)


def test_gradients_of_offsets_equal_finite_differences() -> None:
    features = random_tensor(1, 2, 6, 6, dtype=torch.float64).requires_grad_()
    rois = torch.tensor([[[0.7, 1.1, 4.9, 5.3]]], dtype=torch.float64)
    offsets = (0.05 * random_tensor(1, 2, 2, 2, seed=1, dtype=torch.float64)).requires_grad_()

    def sample(features: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return sample_cells(features, rois, output_size=2, offsets=offsets)

    assert torch.autograd.gradcheck(sample, (features, offsets))


def test_deformable_pooling_initially_equals_roi_align_and_trains_its_offsets() -> None:
    pool = DeformableRoIPool(4, output_size=7, spatial_scale=1 / 16)
    features = random_tensor(2, 4, 12, 12)
    rois = [random_boxes(192, 192, count=3, seed=seed) for seed in (1, 2)]
    expected = roi_align(features, rois, output_size=7, spatial_scale=1 / 16, sampling_ratio=2, aligned=True)
    pooled = pool(features, rois)
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)
    pooled.square().sum().backward()
    assert pool.offsets.weight.grad is not None
    assert pool.offsets.weight.grad.abs().sum() > 0
