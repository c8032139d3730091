"""A trunk without its batch norms computes what it did."""

import pytest
import timm
import torch
from torch import nn

from sniper.models.folding import fold_batch_norm


def with_statistics(trunk: nn.Module) -> nn.Module:
    """Give every norm statistics and weights of its own, as if it had learnt."""
    generator = torch.Generator().manual_seed(0)
    for module in trunk.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                assert tensor is not None
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            for tensor in (module.running_var, module.weight):
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return trunk.eval()


def count_norms(module: nn.Module) -> int:
    return sum(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in module.modules())


@pytest.mark.parametrize(
    "name", ["mobilenetv2_100", "resnet18", "resnet50", "mobilenetv3_small_100", "regnety_002"]
)
def test_a_folded_trunk_gives_the_same_maps(name: str) -> None:
    torch.manual_seed(0)
    trunk = with_statistics(timm.create_model(name, features_only=True))
    before = {key: tensor.clone() for key, tensor in trunk.state_dict().items()}
    quick = fold_batch_norm(trunk)
    assert count_norms(trunk) > 10
    assert count_norms(quick) == 0
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        for one, other in zip(trunk(image), quick(image), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in trunk.state_dict().items())


class UsedTwice(nn.Module):
    """What comes out of the convolution goes around the norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        given = self.conv(x)
        return [self.norm(given) + given]


class NormTwice(nn.Module):
    """One norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.norm(self.one(x)) * self.norm(self.other(x))]


@pytest.mark.parametrize("kind", [UsedTwice, NormTwice])
def test_a_trunk_that_cannot_be_folded_stays(kind: type[nn.Module]) -> None:
    trunk = with_statistics(kind())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (wanted,) = trunk(image)
        (given,) = fold_batch_norm(trunk)(image)
    assert count_norms(fold_batch_norm(trunk)) == 1
    assert torch.equal(wanted, given)
