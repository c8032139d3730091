"""The backbone: features of images.

Either one feature map at stride 16, conv4 and conv5 concatenated (SNIPER §4), or a feature pyramid of strides 4 to 64
(Lin et al. 2017).
"""

import difflib
import functools
import urllib.error
import urllib.request
from typing import Any, Self

import huggingface_hub
import timm
import torch
from jaxtyping import Float, UInt8
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sniper.errors import ConfigError, WeightsError, counted
from sniper.files import check_regular
from sniper.models.deformable import make_deformable
from sniper.models.spec import PYRAMID_STRIDES, BackboneSpec

CONCAT_STRIDE = 16
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of timm's weights
_SECONDS_TO_ANSWER = 5.0
_WAYS_OUT = (
    "name a file (--model.backbone.weights FILE), or start from random weights "
    "(--model.backbone.pretrained false)"
)


class Backbone(nn.Module):
    """A timm model without its classifier, and the normalization of its input.

    For a single feature map, the last stage is dilated so that its stride stays 16.

    Args:
        spec: the configuration.
        pyramid_channels: channels of each map of a feature pyramid.
        has_weights: whether to load the pretrained weights that the spec names; not needed if a checkpoint is loaded
            afterwards.

    Raises:
        ConfigError: if timm does not know the model, or it has no features at the required strides.
        WeightsError: if the weights cannot be loaded or do not fit.
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
                    f"{self.trunk.feature_info.reduction()}; a feature pyramid needs {list(PYRAMID_STRIDES[:-1])} "
                    "(model.backbone.neck: concat needs one of stride 16)"
                )
            self.fpn = FeaturePyramidNetwork(channels, pyramid_channels, extra_blocks=LastLevelMaxPool())
        self.num_channels = sum(channels) if self.fpn is None else pyramid_channels
        self.strides = (CONCAT_STRIDE,) if self.fpn is None else PYRAMID_STRIDES
        config = self.trunk.pretrained_cfg
        self.register_buffer("mean", _as_pixel_values(config["mean"]), persistent=False)
        self.register_buffer("std", _as_pixel_values(config["std"]), persistent=False)
        self._frozen = _frozen_modules(self.trunk, name=spec.name, num_stages=spec.frozen_stages)
        if spec.batch_norm == "frozen":
            self._frozen += [
                m for m in self.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
            ]
        for module in self._frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen layers stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: UInt8[torch.Tensor, "b 3 h w"]) -> list[Float[torch.Tensor, "b c _ _"]]:
        """Compute the feature maps of images.

        Args:
            images: (B, 3, H, W) RGB values 0..255.

        Returns:
            (B, C, H / s, W / s) for each stride s, finest first; sides are rounded up.
        """
        pixels = (images.float() - self.mean) / self.std
        maps = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        if self.fpn is None:
            return [torch.cat(maps, dim=1)]
        return list(self.fpn({str(i): features for i, features in enumerate(maps)}).values())


def check_available(spec: BackboneSpec) -> None:
    """Check that timm's weights are on this machine, or that the server that has them answers.

    Downloads retry for minutes without a connection, and name none of the ways out.

    Raises:
        WeightsError: if they must be downloaded and the server does not answer within a few seconds.
    """
    if _missing_weights(spec) is None:
        return
    try:
        with urllib.request.urlopen(
            urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD"),
            timeout=_SECONDS_TO_ANSWER,
        ):
            pass
    except urllib.error.HTTPError:  # it answers
        pass
    except OSError as error:
        raise WeightsError(
            f"timm's weights for {spec.name}: must be downloaded, and {huggingface_hub.constants.ENDPOINT} cannot be "
            f"reached ({getattr(error, 'reason', error)}); {_WAYS_OUT}"
        ) from error


def find_download(spec: BackboneSpec) -> str | None:
    """Describe timm's weights that must be downloaded, with their size; None if there are none. Uses no network."""
    hub = _missing_weights(spec)
    if hub is None:
        return None
    with torch.device("meta"):
        model = timm.create_model(spec.name)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return f"{hub}, {num_bytes / 1e6:.0f} MB"


def _missing_weights(spec: BackboneSpec) -> str | None:
    """Return the name of timm's weights on the hub if they are needed and not on this machine."""
    if spec.weights is not None or not spec.pretrained or not timm.is_model(spec.name):
        return None
    config = timm.models.get_pretrained_cfg(spec.name)
    hub = config and config.hf_hub_id
    if not hub or any(
        isinstance(huggingface_hub.try_to_load_from_cache(hub, name), str) for name in _HUB_FILES
    ):
        return None
    return str(hub)


def _build_trunk(spec: BackboneSpec, *, has_weights: bool) -> Any:
    if not timm.is_model(spec.name):
        similar = difflib.get_close_matches(spec.name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(similar)}?" if similar else ""
        raise ConfigError(f"model.backbone.name: timm has no model {spec.name!r}{hint}")
    options = (
        {"output_stride": CONCAT_STRIDE, "out_indices": tuple(range(-spec.num_feature_maps, 0))}
        if spec.neck == "concat"
        else {"out_indices": (-4, -3, -2, -1)}
    )
    build = functools.partial(timm.create_model, spec.name, features_only=True, **options)
    if not has_weights or (not spec.pretrained and spec.weights is None):
        try:
            return build()
        except (TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
            strides = f"at stride {CONCAT_STRIDE}" if spec.neck == "concat" else "of four strides"
            raise ConfigError(
                f"model.backbone.name: {spec.name} has no features {strides} ({error})"
            ) from error
    check_available(spec)
    overlay = None if spec.weights is None else {"file": spec.weights}
    rng_state = torch.get_rng_state()
    try:
        if spec.weights is not None:
            check_regular(spec.weights)
        trunk = build(pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm, the hub, the network and the file raise unrelated exceptions
        source = spec.weights or f"timm's weights for {spec.name}"
        ways = "" if spec.weights else f"; {_WAYS_OUT}"
        raise WeightsError(f"{source}: cannot be loaded into {spec.name} ({error}){ways}") from error
    if spec.weights is not None:
        torch.set_rng_state(rng_state)
        _check_all_loaded(trunk, spec, initial=build())
    return trunk


def _check_all_loaded(trunk: Any, spec: BackboneSpec, *, initial: Any) -> None:
    """Refuse a file that left layers at their initial values: timm silently skips tensors whose names do not match."""
    tensors = trunk.state_dict()
    missing = [
        name
        for name, tensor in initial.state_dict().items()
        if tensor.dim() > 1 and torch.equal(tensor, tensors[name])
    ]
    if missing:
        raise WeightsError(
            f"{spec.weights}: lacks {counted(len(missing), 'layer')} of {spec.name}, for example {missing[0]}"
        )


def _last_stage(trunk: Any) -> nn.Module:
    """Return the module whose output is the last feature map."""
    name = trunk.feature_info.info[-1]["module"].replace(".", "_")
    return next(module for path, module in trunk.named_modules() if path.replace(".", "_") == name)


def _frozen_modules(trunk: Any, *, name: str, num_stages: int) -> list[nn.Module]:
    """Return the layers of the stem and of the first stages, in the order of their definition."""
    if num_stages == 0:
        return []
    stride = 2 ** (num_stages + 1)
    stages = [entry["module"] for entry in trunk.feature_info.info if entry["reduction"] <= stride]
    if not stages:
        raise ConfigError(
            f"model.backbone.frozen_stages: {name} has no features of stride {stride} or below to freeze"
        )
    # timm flattens some models, which turns stages.0 into stages_0: compare names without dots.
    last = stages[-1].replace(".", "_")
    layers = [
        (path.replace(".", "_"), module)
        for path, module in trunk.named_modules()
        if module._parameters or module._buffers
    ]
    ends = [i for i, (path, _) in enumerate(layers) if f"{path}_".startswith(f"{last}_")]
    if ends:
        return [module for _, module in layers[: ends[-1] + 1]]
    # The stage has no parameters, for example an activation: freeze all that is defined before it.
    names = [path.replace(".", "_") for path, _ in trunk.named_modules()]
    before = set(names[: names.index(last)])
    return [module for path, module in layers if path in before]


def _as_pixel_values(channels: tuple[float, float, float]) -> Float[torch.Tensor, "1 3 1 1"]:
    return torch.tensor(channels).view(1, 3, 1, 1) * 255
