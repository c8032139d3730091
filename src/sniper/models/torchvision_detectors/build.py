"""Build a detector of torchvision by its name."""

import difflib
import inspect
from typing import Any, cast

import torchvision
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from sniper.errors import ConfigError, WeightsError
from sniper.models.spec import ON_BACKBONE, PYRAMID_STRIDES, DetectorSpec
from sniper.models.torchvision_detectors.adapter import PyramidBackbone, TorchvisionModel
from sniper.models.torchvision_detectors.one_stage import ChipFCOSHead, FCOSModel, RetinaNetModel, SSDModel
from sniper.models.torchvision_detectors.rcnn import RCNNModel

_MODELS: dict[str, type[TorchvisionModel]] = {
    "fcos": FCOSModel,
    "retinanet": RetinaNetModel,
    "ssd": SSDModel,
    "faster": RCNNModel,
    "mask": RCNNModel,
}
"""The adapter of each kind of detector, by the beginning of its name."""

_CHANNELS = 256  # of the feature pyramids of torchvision's builders


def list_names() -> list[str]:
    """Return the names of the detectors that can be built."""
    builders = torchvision.models.list_models(module=torchvision.models.detection)
    return [*ON_BACKBONE, *(name for name in builders if name.startswith(tuple(_MODELS)))]


def build_torchvision(spec: DetectorSpec, *, num_classes: int, has_weights: bool = True) -> TorchvisionModel:
    """Build a detector of torchvision.

    Args:
        spec: the configuration.
        num_classes: without background.
        has_weights: whether to load the backbone's pretrained weights; those of the whole detector are loaded by
            `sniper.runs.initial`.

    Raises:
        ConfigError: if there is no such detector, or timm does not know the backbone.
        WeightsError: if the weights of the backbone cannot be loaded.
    """
    kind = find_kind(spec.name)
    num_outputs = num_classes + kind.first_label
    if spec.name in ON_BACKBONE:
        backbone = PyramidBackbone(
            spec.backbone, pyramid_channels=spec.torchvision.channels, has_weights=has_weights
        )
        net = _on_backbone(spec, backbone, num_outputs=num_outputs)
    else:
        net = build_net(spec.name, num_outputs=num_outputs)
        if has_weights and spec.backbone.pretrained:
            _load_backbone(net, spec)
    _set_limits(net, spec)
    return kind(spec, net, num_classes=num_classes)


def find_kind(name: str | None) -> type[TorchvisionModel]:
    """Return the adapter of a detector.

    Raises:
        ConfigError: if there is no such detector.
    """
    known = list_names()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise ConfigError(f"model.name: torchvision has no detector {name!r}; {hint}")
    return next(model for start, model in _MODELS.items() if name.startswith(start))


def build_net(name: str | None, *, num_outputs: int, **options: Any) -> Any:
    """Build torchvision's detector without weights.

    Args:
        name: of the builder.
        num_outputs: number of classes as torchvision counts them.
        options: of the builder.
    """
    options = {"weights": None, "weights_backbone": None} | options
    if str(name).startswith("fcos"):
        options["head"] = ChipFCOSHead(_CHANNELS, 1, num_outputs)
    return torchvision.models.get_model(str(name), num_classes=num_outputs, **options)


def backbone_weights(name: str | None) -> Any:
    """Return the weights that torchvision's builder starts its backbone from, as its entry."""
    builder = torchvision.models.get_model_builder(str(name))
    return inspect.signature(builder).parameters["weights_backbone"].default


def _on_backbone(spec: DetectorSpec, backbone: PyramidBackbone, *, num_outputs: int) -> nn.Module:
    """Build a detector on a feature pyramid of strides 4 to 64."""
    options = spec.torchvision
    if spec.name == "fcos":
        _check_groups(options.channels)
        strides = AnchorGenerator(
            sizes=tuple((stride,) for stride in PYRAMID_STRIDES), aspect_ratios=((1.0,),) * 5
        )
        head = ChipFCOSHead(options.channels, 1, num_outputs, num_convs=options.num_convs)
        return cast(nn.Module, FCOS(backbone, num_outputs, anchor_generator=strides, head=head))
    sizes = spec.anchor_sizes
    assert sizes is not None  # FCOS alone has none
    if spec.name == "faster_rcnn":
        anchors = AnchorGenerator(
            sizes=tuple((size,) for size in sizes), aspect_ratios=((0.5, 1.0, 2.0),) * 5
        )
        return cast(nn.Module, FasterRCNN(backbone, num_outputs, rpn_anchor_generator=anchors))
    octaves = tuple(tuple(size * 2 ** (third / 3) for third in range(3)) for size in sizes)
    anchors = AnchorGenerator(sizes=octaves, aspect_ratios=((0.5, 1.0, 2.0),) * 5)
    head = RetinaNetHead(options.channels, anchors.num_anchors_per_location()[0], num_outputs)
    for part in (head.classification_head, head.regression_head):
        part.conv = part.conv[: options.num_convs]
    return cast(nn.Module, RetinaNet(backbone, num_outputs, anchor_generator=anchors, head=head))


def _check_groups(channels: int) -> None:
    if channels % 32 or channels == 32:  # a group needs two values, also where a map is a single place
        raise ConfigError(
            "model.torchvision.channels: must be 64 or a larger multiple of 32 for fcos, whose heads have group norm, "
            f"not {channels}"
        )


def _set_limits(net: Any, spec: DetectorSpec) -> None:
    """Set which detections are kept; torchvision's own limits are for whole images, and for people."""
    part = net.roi_heads if hasattr(net, "roi_heads") else net
    part.score_thresh = spec.torchvision.score_threshold
    part.detections_per_img = spec.torchvision.detections_per_window


def _load_backbone(net: Any, spec: DetectorSpec) -> None:
    """Load torchvision's weights for image classification into the backbone; new layers are initialised as usual."""
    from sniper.models.torchvision_detectors.weights import check_available

    weights = backbone_weights(spec.name)
    if str(spec.name).startswith("ssdlite"):
        raise ConfigError(
            f"model.backbone.pretrained: {spec.name} has fewer channels than torchvision's weights for image "
            "classification; start from those of the detector (--model.weights COCO_V1), or from random weights "
            "(--model.backbone.pretrained false)"
        )
    check_available(spec)
    try:
        trained = build_net(spec.name, num_outputs=2, weights_backbone=weights)
    except Exception as error:  # the network, the file and torch raise unrelated exceptions
        raise WeightsError(f"torchvision's weights {weights}: cannot be loaded ({error})") from error
    loaded = net.backbone.load_state_dict(trained.backbone.state_dict(), strict=False)
    missing = [name for name in loaded.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or loaded.unexpected_keys:
        raise WeightsError(
            f"torchvision's weights {weights}: do not fit {spec.name} ({(missing or loaded.unexpected_keys)[0]})"
        )
