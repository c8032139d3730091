"""The trunk: pixels to features.

Either one map at stride 16, conv4 and conv5 joined (SNIPER §4), or a feature pyramid of strides 4 to 64 (Lin et al.
2017), which most detectors use today.
"""

import difflib
import functools
from typing import Any, Self

import timm
import torch
from jaxtyping import Float, UInt8
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sniper.errors import ConfigError, WeightsError
from sniper.models.deformable import make_deformable
from sniper.models.spec import BackboneSpec

CONCAT_STRIDE = 16
PYRAMID_STRIDES = (4, 8, 16, 32, 64)  # the last is the one before it, halved


class Backbone(nn.Module):
    """A timm model without its head. For one map, its last stage is dilated so that the stride stays 16.

    Args:
        spec: which model, and which of its layers learn.
        pyramid_channels: of each map of a feature pyramid.
        has_weights: whether to load the pretrained weights that the spec names; a checkpoint brings its own.

    Raises:
        ConfigError: if timm does not know the model, or it has no features at the strides wanted.
        WeightsError: if the weights cannot be had or do not fit.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: BackboneSpec, *, pyramid_channels: int = 256, has_weights: bool = True) -> None:
        super().__init__()
        self.trunk = _build_trunk(spec, has_weights=has_weights)
        if spec.batch_norm == "synced":
            self.trunk = convert_sync_batchnorm(self.trunk)  # type: ignore[no-untyped-call]
        if spec.deformable:
            make_deformable(_last_stage(self.trunk), name=spec.name)
        channels = self.trunk.feature_info.channels()
        self.fpn: nn.Module | None = None
        if spec.neck == "fpn":
            if tuple(self.trunk.feature_info.reduction()) != PYRAMID_STRIDES[:-1]:
                raise ConfigError(
                    f"model.backbone.neck: {spec.name} has features of strides "
                    f"{self.trunk.feature_info.reduction()}; a pyramid is made of {list(PYRAMID_STRIDES[:-1])}"
                )
            self.fpn = FeaturePyramidNetwork(channels, pyramid_channels, extra_blocks=LastLevelMaxPool())
        self.num_channels = sum(channels) if self.fpn is None else pyramid_channels
        self.strides = (CONCAT_STRIDE,) if self.fpn is None else PYRAMID_STRIDES
        config = self.trunk.pretrained_cfg
        self.register_buffer("mean", _as_grey_levels(config["mean"]), persistent=False)
        self.register_buffer("std", _as_grey_levels(config["std"]), persistent=False)
        self._frozen = _frozen_modules(self.trunk, name=spec.name, num_stages=spec.frozen_stages)
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

    def forward(self, images: UInt8[torch.Tensor, "b 3 h w"]) -> list[Float[torch.Tensor, "b c _ _"]]:
        """Compute the features of (B, 3, H, W) grey levels: (B, C, H/s, W/s) for each stride s, sides rounded up."""
        pixels = (images.float() - self.mean) / self.std
        maps = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        if self.fpn is None:
            return [torch.cat(maps, dim=1)]
        return list(self.fpn({str(i): features for i, features in enumerate(maps)}).values())


def _build_trunk(spec: BackboneSpec, *, has_weights: bool) -> Any:
    if not timm.is_model(spec.name):
        near = difflib.get_close_matches(spec.name, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ConfigError(f"model.backbone.name: timm knows no model {spec.name!r}{hint}")
    shape = (
        {"output_stride": CONCAT_STRIDE, "out_indices": tuple(range(-spec.num_feature_maps, 0))}
        if spec.neck == "concat"
        else {"out_indices": (-4, -3, -2, -1)}
    )
    build = functools.partial(timm.create_model, spec.name, features_only=True, **shape)
    if not has_weights or (not spec.pretrained and spec.weights is None):
        try:
            return build()
        except (TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
            wanted = f"at stride {CONCAT_STRIDE}" if spec.neck == "concat" else "of four strides"
            raise ConfigError(
                f"model.backbone.name: {spec.name} gives no features {wanted} ({error})"
            ) from error
    overlay = None if spec.weights is None else {"file": spec.weights}
    before_drawing = torch.get_rng_state()
    try:
        trunk = build(pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm, the hub, the network and the file each fail in their own way
        source = spec.weights or f"timm's weights of {spec.name}"
        raise WeightsError(f"{source}: cannot be loaded into {spec.name} ({error})") from error
    if spec.weights is not None:
        torch.set_rng_state(before_drawing)
        _check_filled(trunk, spec, drawn=build())
    return trunk


def _check_filled(trunk: Any, spec: BackboneSpec, *, drawn: Any) -> None:
    """Refuse a file that left layers as they were drawn: timm passes over tensors whose names it does not know."""
    values = trunk.state_dict()
    unfilled = [
        name
        for name, tensor in drawn.state_dict().items()
        if tensor.dim() > 1 and torch.equal(tensor, values[name])
    ]
    if unfilled:
        raise WeightsError(
            f"{spec.weights}: lacks {len(unfilled)} layers of {spec.name}, such as {unfilled[0]}"
        )


def _last_stage(trunk: Any) -> nn.Module:
    """Find the layers that make the last feature map."""
    name = trunk.feature_info.info[-1]["module"].replace(".", "_")
    return next(module for path, module in trunk.named_modules() if path.replace(".", "_") == name)


def _frozen_modules(trunk: Any, *, name: str, num_stages: int) -> list[nn.Module]:
    """List the layers of the stem and the first stages, in the order in which they are defined."""
    if num_stages == 0:
        return []
    stride = 2 ** (num_stages + 1)
    stages = [entry["module"] for entry in trunk.feature_info.info if entry["reduction"] <= stride]
    if not stages:
        raise ConfigError(
            f"model.backbone.frozen_stages: {name} has no features of stride {stride} or less to freeze"
        )
    # timm flattens some models, so that stages.0 becomes stages_0; dots are told apart from no other sign here.
    last = stages[-1].replace(".", "_")
    layers = [
        (path.replace(".", "_"), module)
        for path, module in trunk.named_modules()
        if module._parameters or module._buffers
    ]
    ends = [i for i, (path, _) in enumerate(layers) if f"{path}_".startswith(f"{last}_")]
    if ends:
        return [module for _, module in layers[: ends[-1] + 1]]
    # A stage without numbers of its own, such as an activation: up to what comes before the next stage.
    names = [path.replace(".", "_") for path, _ in trunk.named_modules()]
    before = set(names[: names.index(last)])
    return [module for path, module in layers if path in before]


def _as_grey_levels(channels: tuple[float, float, float]) -> Float[torch.Tensor, "1 3 1 1"]:
    return torch.tensor(channels).view(1, 3, 1, 1) * 255
