"""Deformable parts: with offsets of zero they are their plain kin, and their gradients are right."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import roi_align

from sniper.errors import ConfigError
from sniper.models.deformable import DeformableConv, DeformableRoIPool, make_deformable, sample_cells


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def boxes_in(width: float, height: float, *, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    return (corners * torch.tensor([width, height])).reshape(count, 4)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_deformable_convolution_starts_out_as_the_plain_one(dilation: int) -> None:
    plain = nn.Conv2d(8, 12, 3, padding=dilation, dilation=dilation, bias=False)
    features = drawn(2, 8, 9, 11)
    found = DeformableConv(plain, num_groups=4)(features)
    torch.testing.assert_close(found, plain(features), atol=1e-5, rtol=1e-5)


def test_offsets_of_a_deformable_convolution_learn() -> None:
    conv = DeformableConv(nn.Conv2d(8, 8, 3, padding=1), num_groups=4)
    conv(drawn(1, 8, 7, 7)).square().sum().backward()
    for parameter in conv.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_a_deformable_convolution_keeps_to_the_precision_it_is_given() -> None:
    conv = DeformableConv(nn.Conv2d(8, 8, 3, padding=1), num_groups=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(drawn(1, 8, 7, 7).bfloat16()).dtype == torch.bfloat16


def test_the_last_stage_of_a_resnet_becomes_deformable_and_computes_the_same() -> None:
    torch.manual_seed(0)
    trunk = timm.create_model("test_resnet", features_only=True).eval()
    pixels = drawn(1, 3, 64, 64)
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
def test_cells_that_are_not_moved_are_those_of_roi_align(seed: int, count: int) -> None:
    features = drawn(5, 13, 9, seed=seed)
    rois = boxes_in(9 * 1.2, 13 * 1.2, count=count, seed=seed)  # some reach over the border
    wanted = roi_align(features[None], [rois], output_size=7, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(sample_cells(features, rois, side=7), wanted, atol=1e-4, rtol=1e-4)


def test_cells_that_are_moved_see_what_lies_there() -> None:
    features = drawn(3, 20, 20)
    rois = torch.tensor([[4.0, 6.0, 11.0, 13.0]])
    moves = torch.zeros(1, 7, 7, 2)
    moves[..., 0], moves[..., 1] = 1 / 7, 2 / 7  # by one cell to the right and two down
    moved = sample_cells(features, rois, side=7, moves=moves)
    shifted = rois + torch.tensor([[1.0, 2.0, 1.0, 2.0]])
    torch.testing.assert_close(moved, sample_cells(features, shifted, side=7), atol=1e-5, rtol=1e-5)


def test_gradients_of_moved_cells_agree_with_finite_differences() -> None:
    features = drawn(2, 6, 6, dtype=torch.float64).requires_grad_()
    rois = torch.tensor([[0.7, 1.1, 4.9, 5.3]], dtype=torch.float64)
    moves = (0.05 * drawn(1, 2, 2, 2, seed=1, dtype=torch.float64)).requires_grad_()

    def sample(features: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
        return sample_cells(features, rois, side=2, moves=moves)

    assert torch.autograd.gradcheck(sample, (features, moves))


def test_deformable_pooling_starts_out_as_roi_align_and_its_offsets_learn() -> None:
    pool = DeformableRoIPool(4, side=7, scale=1 / 16)
    features = drawn(2, 4, 12, 12)
    rois = [boxes_in(192, 192, count=3, seed=1), boxes_in(192, 192, count=0, seed=2)]
    wanted = roi_align(features, rois, output_size=7, spatial_scale=1 / 16, sampling_ratio=2, aligned=True)
    found = pool(features, rois)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found.square().sum().backward()
    assert pool.offsets.weight.grad is not None
    assert pool.offsets.weight.grad.abs().sum() > 0
