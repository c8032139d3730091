"""The trunk: pixels to one map of features at stride 16, conv4 and conv5 joined (SNIPER §4)."""

import difflib
import functools
from typing import Any, Self

import timm
import torch
from jaxtyping import Float, UInt8
from torch import nn

from sniper.errors import ConfigError, WeightsError
from sniper.models.spec import BackboneSpec

STRIDE = 16


class Backbone(nn.Module):
    """A timm model without its head, its last stage dilated so that the stride stays 16.

    Args:
        spec: which model, and which of its layers learn.
        has_weights: whether to load the pretrained weights that the spec names; a checkpoint brings its own.

    Raises:
        ConfigError: if timm does not know the model, or it has no features at stride 16.
        WeightsError: if the weights cannot be had or do not fit.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: BackboneSpec, *, has_weights: bool = True) -> None:
        super().__init__()
        self.trunk = _build_trunk(spec, has_weights=has_weights)
        self.num_channels = sum(self.trunk.feature_info.channels())
        config = self.trunk.pretrained_cfg
        self.register_buffer("mean", _as_grey_levels(config["mean"]), persistent=False)
        self.register_buffer("std", _as_grey_levels(config["std"]), persistent=False)
        self._frozen = _frozen_modules(self.trunk, stride=spec.frozen_stride)
        if spec.batch_norm == "frozen":
            self._frozen += [
                m for m in self.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
            ]
        for module in self._frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or back; frozen layers keep their statistics either way."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: UInt8[torch.Tensor, "b 3 h w"]) -> Float[torch.Tensor, "b c y x"]:
        """Compute the features of (B, 3, H, W) grey levels: (B, C, H/16, W/16), sides rounded up."""
        pixels = (images.float() - self.mean) / self.std
        maps = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        return torch.cat(maps, dim=1)


def _build_trunk(spec: BackboneSpec, *, has_weights: bool) -> Any:
    if not timm.is_model(spec.name):
        near = difflib.get_close_matches(spec.name, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ConfigError(f"model.backbone.name: timm knows no model {spec.name!r}{hint}")
    build = functools.partial(
        timm.create_model,
        spec.name,
        features_only=True,
        output_stride=STRIDE,
        out_indices=tuple(range(-spec.features, 0)),
    )
    if not has_weights or (not spec.pretrained and spec.weights is None):
        try:
            return build()
        except (TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"model.backbone.name: {spec.name} gives no features at stride {STRIDE} ({error})"
            ) from error
    overlay = None if spec.weights is None else {"file": spec.weights}
    try:
        return build(pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm, the hub, the network and the file each fail in their own way
        source = spec.weights or f"timm's weights of {spec.name}"
        raise WeightsError(f"{source}: cannot be loaded into {spec.name} ({error})") from error


def _frozen_modules(trunk: Any, *, stride: int) -> list[nn.Module]:
    """List the layers, in the order in which they are defined, up to the features of a stride."""
    stages = [entry["module"] for entry in trunk.feature_info.info if entry["reduction"] <= stride]
    if not stages:
        return []
    layers = [(name, module) for name, module in trunk.named_modules() if not list(module.children())]
    ends = [i for i, (name, _) in enumerate(layers) if f"{name}.".startswith(f"{stages[-1]}.")]
    return [module for _, module in layers[: ends[-1] + 1]]


def _as_grey_levels(channels: tuple[float, float, float]) -> Float[torch.Tensor, "1 3 1 1"]:
    return torch.tensor(channels).view(1, 3, 1, 1) * 255
