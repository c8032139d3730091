"""The trunk: one map of stride 16 from many timm models, and just its first layers frozen."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sniper.errors import ConfigError, WeightsError
from sniper.models.backbone import Backbone
from sniper.models.spec import BackboneSpec

# For each model the names of the stem and the first stage, as timm defines them.
FIRST_LAYERS = {
    "test_resnet": ("conv1", "bn1", "layer1"),
    "resnet10t": ("conv1", "bn1", "layer1"),
    "mobilenetv2_050": ("conv_stem", "bn1", "blocks.0", "blocks.1"),
    "mobilenetv3_small_050": ("conv_stem", "bn1", "blocks.0"),
    "test_efficientnet": ("conv_stem", "bn1", "blocks.0", "blocks.1"),
    "regnetx_002": ("stem", "s1"),
    "test_convnext": ("stem_0", "stem_1", "stages_0"),
    "resnetv2_50": ("stem_conv", "stages_0"),
    "test_byobnet": ("stem", "stages_0"),
}


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_stem_and_first_stage_are_frozen_and_nothing_else(name: str) -> None:
    backbone = Backbone(BackboneSpec(name=name, pretrained=False)).train()
    first = FIRST_LAYERS[name]
    for path, parameter in backbone.trunk.named_parameters():
        is_first = any(f"{path}.".startswith(f"{layer}.") for layer in first)
        assert parameter.requires_grad != is_first, path
    norms = {p: m for p, m in backbone.trunk.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for path, norm in norms.items():
        is_first = any(f"{path}.".startswith(f"{layer}.") for layer in first)
        assert norm.training != is_first, path


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050", "test_convnext"])
def test_features_are_joined_at_stride_16(name: str) -> None:
    backbone = Backbone(BackboneSpec(name=name, pretrained=False)).eval()
    (features,) = backbone(torch.zeros((2, 3, 64, 96), dtype=torch.uint8))
    assert features.shape == (2, backbone.num_channels, 4, 6)
    one = Backbone(BackboneSpec(name=name, pretrained=False, num_feature_maps=1))
    assert one.num_channels < backbone.num_channels


def test_nothing_is_frozen_when_nothing_shall_be() -> None:
    backbone = Backbone(BackboneSpec(name="test_resnet", pretrained=False, frozen_stages=0)).train()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "timm knows no model 'resnet51'; near: .*resnet"),
        ("test_vit", "test_vit gives no features at stride 16"),
    ],
)
def test_a_model_that_will_not_do_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(BackboneSpec(name=name, pretrained=False))


def test_weights_come_from_a_local_file(tmp_path: Path) -> None:
    source = Backbone(BackboneSpec(name="test_resnet", pretrained=False)).trunk.state_dict()
    save_file(source, tmp_path / "w.safetensors")
    loaded = Backbone(BackboneSpec(name="test_resnet", weights=str(tmp_path / "w.safetensors")))
    assert all(torch.equal(tensor, source[path]) for path, tensor in loaded.trunk.state_dict().items())


def test_weights_that_leave_layers_unfilled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(Backbone(BackboneSpec(name="test_resnet", pretrained=False)).trunk.state_dict(), path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("layer4")}
    save_file(tensors, path)
    with pytest.raises(
        WeightsError, match=r"w\.safetensors: lacks \d+ layers of test_resnet, such as layer4"
    ):
        Backbone(BackboneSpec(name="test_resnet", weights=str(path)))
    save_file({"foo": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="layers of test_resnet, such as conv1"):
        Backbone(BackboneSpec(name="test_resnet", weights=str(path)))


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"w\.safetensors: cannot be loaded into test_resnet"):
        Backbone(BackboneSpec(name="test_resnet", weights=str(tmp_path / "w.safetensors")))


def test_a_feature_pyramid_has_five_maps_each_half_the_one_before() -> None:
    spec = BackboneSpec(name="test_resnet", pretrained=False, neck="fpn")
    backbone = Backbone(spec, pyramid_channels=24).eval()
    maps = backbone(torch.zeros((2, 3, 128, 192), dtype=torch.uint8))
    assert backbone.strides == (4, 8, 16, 32, 64)
    assert [features.shape for features in maps] == [
        (2, 24, 128 // stride, 192 // stride) for stride in backbone.strides
    ]


def test_a_model_without_the_strides_of_a_pyramid_is_refused() -> None:
    with pytest.raises(ConfigError, match="a pyramid is made of"):
        Backbone(BackboneSpec(name="test_vit", pretrained=False, neck="fpn", frozen_stages=0))
