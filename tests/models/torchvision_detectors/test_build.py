"""Detectors of torchvision by name: what is built and frozen, and which settings are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sniper.errors import ConfigError
from sniper.models.build import build_detector
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec, TorchvisionSpec
from sniper.models.torchvision_detectors.build import find_kind, list_names
from sniper.models.torchvision_detectors.freezing import first_stages
from tests.models.torchvision_detectors.specs import SPECS, SSD, build


def test_the_names_are_those_of_builders_and_of_detectors_on_a_backbone() -> None:
    names = list_names()
    assert names[:3] == ["fcos", "retinanet", "faster_rcnn"]
    assert {
        "fcos_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "ssd300_vgg16",
        "maskrcnn_resnet50_fpn_v2",
    } < set(names)
    assert not any(name.startswith("keypoint") for name in names)
    assert all(find_kind(name) is not None for name in names)


def test_an_unknown_name_is_refused_with_similar_ones() -> None:
    spec = DetectorSpec(kind="torchvision", name="fcos_resnet_fpn")
    with pytest.raises(ConfigError, match=r"no detector 'fcos_resnet_fpn'; did you mean fcos_resnet50_fpn"):
        build_detector(spec, num_classes=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": None}, "name: is missing"),
        ({"rpn": RPNSpec(channels=8)}, "rpn: is a section of kind two_stage"),
        ({"roi_head": RoIHeadSpec(channels=8)}, "roi_head: is a section of kind two_stage"),
        (
            {"backbone": BackboneSpec(name="resnet18")},
            "backbone.name: fcos_resnet50_fpn does not have this field",
        ),
        ({"torchvision": TorchvisionSpec(channels=64)}, "torchvision.channels: fcos_resnet50_fpn does not"),
        ({"weights": "COCO_V1", "weights_from": "run"}, "weights and weights_from exclude each other"),
        ({"name": "fcos"}, "backbone.neck: must be fpn for fcos"),
        (
            {"name": "fcos", "backbone": BackboneSpec(neck="fpn"), "weights": "COCO_V1"},
            "weights: there are none",
        ),
        (
            {
                "name": "fcos",
                "backbone": BackboneSpec(neck="fpn"),
                "torchvision": TorchvisionSpec(anchor_sizes=(1, 2, 3, 4, 5)),
            },
            "torchvision.anchor_sizes: fcos does not have this field",
        ),
        (
            {"name": "fasterrcnn_resnet50_fpn", "labels": "all"},
            "labels: must be valid for a two-stage detector",
        ),
        ({"kind": "two_stage"}, "name: is of kind torchvision"),
        (
            {"kind": "two_stage", "name": None, "torchvision": TorchvisionSpec(channels=8)},
            "is a section of kind",
        ),
    ],
)
def test_fields_that_a_detector_does_not_have_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorSpec(**{"kind": "torchvision", "name": "fcos_resnet50_fpn"} | fields)


@pytest.mark.parametrize("channels", [32, 72])
def test_group_norm_decides_the_channels_of_fcos(channels: int) -> None:
    spec = replace(SPECS["fcos"], torchvision=TorchvisionSpec(channels=channels))
    with pytest.raises(ConfigError, match=f"larger multiple of 32 for fcos, .* not {channels}"):
        build_detector(spec, num_classes=2)


@pytest.mark.parametrize(("num_stages", "layers"), [(0, []), (1, [0, 1, 2, 3]), (2, [0, 1, 2, 3, 4, 5])])
def test_stages_are_frozen_up_to_their_stride(num_stages: int, layers: list[int]) -> None:
    strides = (2, 1, 2, 1, 2, 1, 2)
    convs = [nn.Conv2d(3, 3, 3, stride=stride, padding=1) for stride in strides]
    trunk = nn.Sequential(nn.Sequential(*convs[:4]), *convs[4:])
    modes = [module.training for module in trunk.modules()]
    assert first_stages(trunk, num_stages=num_stages) == [convs[layer] for layer in layers]
    assert [module.training for module in trunk.modules()] == modes


@pytest.mark.parametrize("frozen_stages", [1, 2])
def test_frozen_layers_stay_as_they_are_in_training(frozen_stages: int) -> None:
    backbone = BackboneSpec(pretrained=False, frozen_stages=frozen_stages, batch_norm="frozen")
    model = build(SSD, backbone=backbone).train()
    trained = {name.partition(".")[2] for name, p in model.trunk.named_parameters() if p.requires_grad}
    frozen = {name.partition(".")[2] for name, p in model.trunk.named_parameters() if not p.requires_grad}
    assert trained
    assert frozen
    norms = [module for module in model.trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert model.net.head.training


def test_equal_seeds_build_equal_detectors() -> None:
    first, again, other = (build("fcos", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_retinanet_has_the_anchors_that_are_configured() -> None:
    sizes = (8.0, 16.0, 32.0, 64.0, 128.0)
    options = TorchvisionSpec(channels=64, num_convs=1, anchor_sizes=sizes)
    model = build("retinanet", torchvision=options).eval()
    _, anchors, map_sizes = model._predict(torch.zeros((1, 3, 64, 64), dtype=torch.uint8))  # type: ignore[operator]
    first = anchors[: 9 * map_sizes[0]]
    areas = (first[:, 2:] - first[:, :2]).prod(dim=1).sqrt()
    assert sorted({round(area, 1) for area in areas.tolist()})[0] == pytest.approx(8, abs=0.5)
    assert len(model.net.head.classification_head.conv) == 1
