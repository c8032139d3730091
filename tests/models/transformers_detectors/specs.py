"""Small random detectors of transformers, by the type of their model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sniper.models.build import build_detector
from sniper.models.spec import DetectorSpec, TransformersSpec
from sniper.models.transformers_detectors.adapter import TransformersModel
from sniper.models.transformers_detectors.hub import quiet

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

_DROPOUT = {"dropout": 0.1}
_SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 20,
    "auxiliary_loss": True,
}


def _resnet(stages: list[str]) -> Any:
    return transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=stages,
    )


def _rt_backbone() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _rt_detr(kind: Any, **fields: Any) -> Any:
    return kind(
        **_SMALL,
        encoder_in_channels=[16, 24, 32],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_denoising=10,
        **fields,
    )


def _d_fine() -> Any:
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        hidden_sizes=[16, 16, 16, 16],
        depths=[1, 1, 1, 1],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return transformers.DFineConfig(
        **_SMALL,
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_denoising=10,
    )


def _deformable_detr() -> Any:
    return transformers.DeformableDetrConfig(
        **_SMALL,
        **_DROPOUT,
        backbone_config=_resnet(["stage2", "stage3", "stage4"]),
        num_feature_levels=3,
        with_box_refine=True,
    )


def _dab_detr() -> Any:
    small = {("hidden_size" if key == "d_model" else key): value for key, value in _SMALL.items()}
    return transformers.DabDetrConfig(**small, backbone_config=_resnet(["stage4"]))


def _yolos() -> Any:
    return transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[128, 128],
        patch_size=16,
        num_detection_tokens=20,
    )


_CONFIGS: dict[str, Callable[[], Any]] = {
    "rt_detr_v2": lambda: _rt_detr(transformers.RTDetrV2Config, backbone_config=_rt_backbone()),
    "rt_detr": lambda: _rt_detr(transformers.RTDetrConfig, backbone_config=_rt_backbone()),
    "d_fine": _d_fine,
    "deformable_detr": _deformable_detr,
    "conditional_detr": lambda: transformers.ConditionalDetrConfig(
        **_SMALL, backbone_config=_resnet(["stage4"])
    ),
    "dab-detr": _dab_detr,
    "detr": lambda: transformers.DetrConfig(**_SMALL, **_DROPOUT, backbone_config=_resnet(["stage4"])),
    "table-transformer": lambda: transformers.TableTransformerConfig(
        **_SMALL, **_DROPOUT, backbone_config=_resnet(["stage4"])
    ),
    "yolos": _yolos,
}

ALL = tuple(_CONFIGS)
SOME = ("rt_detr_v2", "deformable_detr", "yolos")
"""One with noisy queries, one with masks, one with a softmax."""


def save(name: str, folder: Path, *, names: tuple[str, ...] = ("a", "b", "c"), **fields: Any) -> Path:
    """Write a small random detector as transformers does."""
    config = _CONFIGS[name]()
    for field, value in fields.items():
        setattr(config, field, value)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: index for index, label in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with quiet():
            transformers.AutoModelForObjectDetection.from_config(config).save_pretrained(folder)
    return folder


def spec_of(folder: Path, *, labels: Any = "valid", **options: Any) -> DetectorSpec:
    """Return the spec of a detector that is saved in a folder."""
    return DetectorSpec(
        kind="transformers", name=str(folder), labels=labels, transformers=TransformersSpec(**options)
    )


def build(
    name: str, folder: Path, *, num_classes: int = 3, seed: int = 0, labels: Any = "valid", **fields: Any
) -> TransformersModel:
    """Build a small detector with random weights, in training mode.

    Args:
        name: type of its model.
        folder: to write its configuration to.
        num_classes: without background.
        seed: of the weights.
        labels: what a chip teaches.
        fields: of the section `transformers`, or of the configuration.
    """
    options = {key: fields.pop(key) for key in ("detections_per_window", "score_threshold") if key in fields}
    path = save(name, folder / name, **fields)
    spec = spec_of(path, labels=labels, pretrained=False, **options)
    model = build_detector(spec, num_classes=num_classes, seed=seed)
    assert isinstance(model, TransformersModel)
    return model
