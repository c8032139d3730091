"""What the detectors of torchvision have in common: padding and normalization of chips, frozen layers, copies.

Their own `forward` is not used, since it rescales images and knows no ignored boxes. Their parts are: backbone, heads,
anchors, matchers, losses and the selection of detections.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float, UInt8
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torchvision.models.detection.image_list import ImageList

from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.models.backbone import Backbone
from sniper.models.folding import fold_batch_norm
from sniper.models.protocol import DetectorModel, pad_images, to_detections
from sniper.models.spec import DetectorSpec
from sniper.models.torchvision_detectors.freezing import first_stages

_TRAINED_WITHOUT_EPSILON = (
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)
"""Builders whose weights were trained with batch norm that adds nothing to the variance."""


class PyramidBackbone(Backbone):
    """A feature pyramid over a timm model, as torchvision's detectors take it."""

    @property
    def out_channels(self) -> int:
        """Channels of each map."""
        return self.num_channels

    def forward(  # type: ignore[override]
        self, images: UInt8[torch.Tensor, "b 3 h w"]
    ) -> dict[str, Float[torch.Tensor, "b c _ _"]]:
        """Compute the feature maps of images by name, finest first; see `Backbone`."""
        return {str(index): features for index, features in enumerate(super().forward(images))}


class TorchvisionModel(DetectorModel):
    """A detector of torchvision.

    Args:
        spec: the configuration.
        net: torchvision's detector.
        num_classes: without background.
    """

    mean: torch.Tensor
    std: torch.Tensor

    first_label = 0
    """Torchvision's label of the first class: 1 after a background."""

    min_side = 0
    """Smallest side of an image that the layers allow, pixels."""

    def __init__(self, spec: DetectorSpec, net: Any, *, num_classes: int) -> None:
        super().__init__(spec, num_classes=num_classes)
        self.net = net
        self._frozen: list[nn.Module] = []
        for name in ("mean", "std"):
            values = torch.tensor(getattr(net.transform, f"image_{name}"))
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)
        if spec.has_own_backbone:
            self._prepare_backbone()

    @property
    def trunk(self) -> nn.Module:
        """The convolutions of the backbone, without a feature pyramid."""
        backbone = self.net.backbone
        trunk: nn.Module = next(
            (getattr(backbone, name) for name in ("trunk", "body") if hasattr(backbone, name)), backbone
        )
        return trunk

    @property
    def stride(self) -> int:
        """The largest stride of the feature maps, of which sides are multiples; at least that of the search."""
        return 128 if self.spec.has_own_backbone and self.spec.name in _STRIDE_128 else 64

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen layers stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def for_inference(self) -> Self:
        """Return a copy for inference; batch norm of a timm model is folded into the convolutions before it."""
        model = super().for_inference()
        if isinstance(model.net.backbone, PyramidBackbone):
            model.net.backbone.trunk = fold_batch_norm(model.net.backbone.trunk)
        return model

    def features(self, images: UInt8[torch.Tensor, "b 3 h w"]) -> dict[str, Float[torch.Tensor, "b c _ _"]]:
        """Compute the feature maps of padded images, (B, 3, H, W) RGB values, by name, finest first."""
        if isinstance(self.net.backbone, PyramidBackbone):
            return self.net.backbone(images)
        pixels = (images.float() / 255 - self.mean) / self.std
        maps: dict[str, torch.Tensor] = self.net.backbone(
            pixels.contiguous(memory_format=torch.channels_last)
        )
        return maps

    def pad(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]
    ) -> tuple[UInt8[torch.Tensor, "b 3 h w"], list[Sides]]:
        """Pad images to one size that the layers allow; see `pad_images`."""
        return pad_images(images, multiple=self.stride, min_side=self.min_side)

    def to_detections(self, output: Mapping[str, torch.Tensor]) -> Detections:
        """Return torchvision's detections of one image without those that lie in its padding."""
        boxes = output["boxes"]
        is_kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return to_detections(
            boxes[is_kept], output["scores"][is_kept], output["labels"][is_kept] - self.first_label
        )

    def _prepare_backbone(self) -> None:
        """Freeze the first stages of torchvision's backbone, and batch norm as configured."""
        backbone = self.spec.backbone
        if backbone.batch_norm == "synced":
            self.net = convert_sync_batchnorm(self.net)  # type: ignore[no-untyped-call]
        norms = [each for each in self.trunk.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        if backbone.batch_norm == "frozen":
            self._frozen += norms
            if self.spec.name in _TRAINED_WITHOUT_EPSILON:
                for norm in norms:
                    norm.eps = 0.0
        self._frozen += first_stages(self.trunk, num_stages=backbone.frozen_stages)
        for module in self._frozen:
            module.requires_grad_(False)


_STRIDE_128 = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
"""Builders with a feature pyramid of strides 8 to 128."""


def image_list(padded: torch.Tensor, image_sides: Sequence[Sides]) -> ImageList:
    """Return padded images, and the sides before, as torchvision's anchors take them."""
    return ImageList(padded, [sides.hw for sides in image_sides])


def shapes_of(maps: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return float32 tensors with the shapes of feature maps; anchors have their type, which may be bfloat16."""
    return [features.new_zeros((), dtype=torch.float32).expand(features.shape) for features in maps.values()]
