"""The backbone: features of timm models, frozen layers, pretrained weights."""

import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sniper.errors import ConfigError, WeightsError
from sniper.models.backbone import Backbone, check_available, find_download
from sniper.models.spec import BackboneSpec

# The layers of the stem and of the first stage, as timm names them.
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
def test_only_the_stem_and_the_first_stage_are_frozen(name: str) -> None:
    backbone = Backbone(BackboneSpec(name=name, pretrained=False)).train()
    first = FIRST_LAYERS[name]
    for path, parameter in backbone.trunk.named_parameters():
        is_first = any(f"{path}.".startswith(f"{layer}.") for layer in first)
        assert parameter.requires_grad != is_first, path
    norms = [(path, m) for path, m in backbone.trunk.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for path, norm in norms:
        is_first = any(f"{path}.".startswith(f"{layer}.") for layer in first)
        assert norm.training != is_first, path


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050", "test_convnext"])
def test_feature_maps_are_concatenated_at_stride_16(name: str) -> None:
    backbone = Backbone(BackboneSpec(name=name, pretrained=False)).eval()
    (features,) = backbone(torch.zeros((2, 3, 64, 96), dtype=torch.uint8))
    assert features.shape == (2, backbone.num_channels, 4, 6)
    last_map = Backbone(BackboneSpec(name=name, pretrained=False, num_feature_maps=1))
    assert last_map.num_channels < backbone.num_channels


def test_nothing_is_frozen_with_zero_frozen_stages() -> None:
    backbone = Backbone(BackboneSpec(name="test_resnet", pretrained=False, frozen_stages=0)).train()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", r"timm has no model 'resnet51'; did you mean .*resnet.*\?"),
        ("test_vit", "test_vit has no features at stride 16"),
    ],
)
def test_unsuitable_models_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(BackboneSpec(name=name, pretrained=False))


def test_weights_are_loaded_from_a_local_file(tmp_path: Path) -> None:
    source = Backbone(BackboneSpec(name="test_resnet", pretrained=False)).trunk.state_dict()
    save_file(source, tmp_path / "w.safetensors")
    loaded = Backbone(BackboneSpec(name="test_resnet", weights=str(tmp_path / "w.safetensors")))
    assert all(torch.equal(tensor, source[path]) for path, tensor in loaded.trunk.state_dict().items())


def test_weights_without_some_layers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(Backbone(BackboneSpec(name="test_resnet", pretrained=False)).trunk.state_dict(), path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("layer4")}
    save_file(tensors, path)
    with pytest.raises(
        WeightsError, match=r"w\.safetensors: lacks \d+ layers of test_resnet, for example layer4"
    ):
        Backbone(BackboneSpec(name="test_resnet", weights=str(path)))
    save_file({"foo": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="layers of test_resnet, for example conv1"):
        Backbone(BackboneSpec(name="test_resnet", weights=str(path)))


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"w\.safetensors: cannot be loaded into test_resnet"):
        Backbone(BackboneSpec(name="test_resnet", weights=str(tmp_path / "w.safetensors")))


def test_weights_that_cannot_be_downloaded_are_refused_with_the_alternatives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **options: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("timm.create_model", fail)
    monkeypatch.setattr(
        "sniper.models.backbone.check_available", lambda _: None
    )  # the connection breaks later
    with pytest.raises(
        WeightsError, match=r"no connection\); name a file \(--model.backbone.weights FILE"
    ) as caught:
        Backbone(BackboneSpec(name="test_resnet"))
    assert "--model.backbone.pretrained false" in str(caught.value)


def test_a_feature_pyramid_has_five_maps_of_halving_size() -> None:
    spec = BackboneSpec(name="test_resnet", pretrained=False, neck="fpn")
    backbone = Backbone(spec, pyramid_channels=24).eval()
    maps = backbone(torch.zeros((2, 3, 128, 192), dtype=torch.uint8))
    assert backbone.strides == (4, 8, 16, 32, 64)
    assert [features.shape for features in maps] == [
        (2, 24, 128 // stride, 192 // stride) for stride in backbone.strides
    ]


def test_models_without_the_strides_of_a_feature_pyramid_are_refused() -> None:
    with pytest.raises(ConfigError, match="a feature pyramid needs"):
        Backbone(BackboneSpec(name="test_vit", pretrained=False, neck="fpn", frozen_stages=0))


def test_weights_that_cannot_be_downloaded_are_one_sentence_with_two_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        Backbone(BackboneSpec(name="mobilenetv2_100"))
    assert time.monotonic() - started < 10
    message = str(caught.value)
    assert (
        f"timm's weights for mobilenetv2_100: must be downloaded, and http://127.0.0.1:{port} cannot"
        in message
    )
    assert "--model.backbone.weights FILE" in message
    assert "--model.backbone.pretrained false" in message


@pytest.mark.parametrize(
    "spec",
    [
        BackboneSpec(name="mobilenetv2_100", pretrained=False),
        BackboneSpec(name="mobilenetv2_100", weights="file.safetensors"),
    ],
)
def test_no_server_is_asked_where_nothing_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, spec: BackboneSpec
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    check_available(spec)
    assert find_download(spec) is None


def test_weights_to_download_have_a_size_before_they_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    assert find_download(BackboneSpec(name="mobilenetv2_100")) == "timm/mobilenetv2_100.ra_in1k, 14 MB"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path))
    assert find_download(BackboneSpec(name="mobilenetv2_100")) is None
