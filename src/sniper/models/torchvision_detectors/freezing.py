"""The first stages of torchvision's backbones."""

from typing import Any

import torch
from torch import nn

_SIDE = 64  # of the sample that strides are measured with, pixels


class _Measured(Exception):
    """All stages that are asked for have been computed."""


def first_stages(trunk: nn.Module, *, num_stages: int) -> list[nn.Module]:
    """Return the layers of the stem and of the first stages: those up to a stride of 4, or of 8.

    Args:
        trunk: maps (B, 3, H, W) pixels to features.
        num_stages: number of stages, the stem included.
    """
    if num_stages == 0:
        return []
    smallest = _SIDE // 2 ** (num_stages + 1)
    stages: list[nn.Module] = []

    def measure(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        if output.shape[-1] < smallest:
            raise _Measured
        stages.append(module)

    hooks = [unit.register_forward_hook(measure) for unit in _units(trunk)]
    modes = {module: module.training for module in trunk.modules()}
    sample = torch.zeros((1, 3, _SIDE, _SIDE), device=next(trunk.parameters()).device)
    try:
        with torch.no_grad():
            trunk.eval()(sample)
    except _Measured:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return stages


def _units(module: nn.Module) -> list[nn.Module]:
    """Return the layers and blocks of a backbone: what is neither a sequence of others nor the backbone itself."""
    units = []
    for child in module.children():
        units += _units(child) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    return units
