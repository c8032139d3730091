"""Batch norm folded into convolutions: the same features from fewer layers."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sniper.models.folding import fold_batch_norm


def with_statistics(trunk: nn.Module) -> nn.Module:
    """Set random statistics and weights in every norm, as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    for module in trunk.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.bias):
                assert tensor is not None
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            for tensor in (module.running_var, module.weight):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return trunk.eval()


def count_norms(trunk: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in trunk.modules())


@pytest.mark.parametrize(
    "name", ["mobilenetv2_100", "resnet18", "resnet50", "mobilenetv3_small_100", "regnety_002"]
)
def test_a_folded_backbone_computes_the_same_features(name: str) -> None:
    torch.manual_seed(0)
    trunk = with_statistics(timm.create_model(name, features_only=True))
    before = {key: tensor.clone() for key, tensor in trunk.state_dict().items()}
    folded = fold_batch_norm(trunk)
    assert count_norms(trunk) > 10
    assert count_norms(folded) == 0
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        for expected, features in zip(trunk(image), folded(image), strict=True):
            atol = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(expected, features, rtol=1e-3, atol=atol)
    assert all(torch.equal(tensor, before[key]) for key, tensor in trunk.state_dict().items())


class OutputUsedTwice(nn.Module):
    """The output of the convolution also bypasses the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.conv(x)
        return [self.norm(features) + features]


class NormUsedTwice(nn.Module):
    """One norm follows two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.norm(self.first(x)) * self.norm(self.second(x))]


@pytest.mark.parametrize("kind", [OutputUsedTwice, NormUsedTwice])
def test_a_backbone_that_cannot_be_folded_is_returned_unchanged(kind: type[nn.Module]) -> None:
    trunk = with_statistics(kind())
    folded = fold_batch_norm(trunk)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = trunk(image)
        (features,) = folded(image)
    assert count_norms(folded) == 1
    assert torch.equal(expected, features)
