"""The detector's numbers; the defaults are the paper's where it gives them (SNIPER §4)."""

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """The trunk that turns pixels into features.

    Attributes:
        name: any timm model that suggest_pyramids features at stride 16.
        pretrained: start from timm's weights of that name.
        weights: start from this safetensors file instead.
        batch_norm: `trained` learns its scale and keeps statistics of the chips on each device, `synced` of those on
            all devices, `frozen` stays as pretrained.
        frozen_stages: this many stages are not trained, and the stem with the first of them; 0 trains all.
        neck: `concat` gives one map at stride 16, the paper's; `fpn` a feature pyramid of strides 4 to 64, whose maps
            have `roi_head.channels` channels.
        num_feature_maps: the last this many feature maps are joined (2: conv4 and conv5); a pyramid is made of four.
        deformable: whether the plain 3×3 convolutions of the last stage learn where to look (four groups of channels).
    """

    name: str = "resnet50"
    pretrained: bool = True
    weights: str | None = None
    batch_norm: Literal["trained", "synced", "frozen"] = "trained"
    frozen_stages: int = 1
    neck: Literal["concat", "fpn"] = "concat"
    num_feature_maps: int = 2
    deformable: bool = False

    def __post_init__(self) -> None:
        if self.frozen_stages not in (0, 1, 2):
            raise ValueError(f"frozen_stages must be 0, 1 or 2, not {self.frozen_stages}")
        if self.num_feature_maps not in (1, 2):
            raise ValueError(f"num_feature_maps must be 1 or 2, not {self.num_feature_maps}")


@dataclass(frozen=True, kw_only=True)
class RPNSpec:
    """The region proposal network and what it learns from.

    Attributes:
        channels: of its hidden layer.
        anchor_sizes: square root of the anchors' areas, chip pixels; with a feature pyramid one for each of its
            five maps.
        aspect_ratios: heights divided by widths of the anchors.
        positive_iou: an anchor that overlaps a valid box this much is positive.
        negative_iou: an anchor that overlaps every valid box less than this is negative.
        ignored_iou: an anchor that overlaps an invalid or ignored box more than this is ignored.
        batch_size_per_image: anchors drawn from each chip for the losses.
        positive_fraction: at most this share of them is positive.
        pre_nms_top_n: best anchors per image that enter suppression.
        nms_iou: of two proposals that overlap more, the worse is dropped.
        post_nms_top_n: proposals per image and level at test.
        post_nms_top_n_train: proposals per chip in training; fewer cost less where chips show few objects.
    """

    channels: int = 512
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 384)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    ignored_iou: float = 0.3
    batch_size_per_image: int = 256
    positive_fraction: float = 0.5
    pre_nms_top_n: int = 6000
    nms_iou: float = 0.7
    post_nms_top_n: int = 300
    post_nms_top_n_train: int = 300

    def __post_init__(self) -> None:
        for name in ("anchor_sizes", "aspect_ratios"):
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name} must be positive numbers, not {list(values)}")
        if not 0 < self.negative_iou <= self.positive_iou <= 1:
            raise ValueError(
                f"0 < negative_iou <= positive_iou <= 1 wanted, not {self.negative_iou} and {self.positive_iou}"
            )
        for name in ("ignored_iou", "nms_iou", "positive_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        for name in (
            "channels",
            "batch_size_per_image",
            "pre_nms_top_n",
            "post_nms_top_n",
            "post_nms_top_n_train",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RoIHeadSpec:
    """The second stage: it names each proposal and mends its box.

    Attributes:
        channels: features are brought to this many before pooling.
        pool_size: side of the pooled grid, cells.
        pooling: `align` (RoIAlign), or `deformable`: its cells are moved by offsets that are learnt.
        hidden_dim: of the two fully connected layers.
        positive_iou: a proposal that overlaps a box this much takes its label.
        score_threshold: detections below this score are not reported.
    """

    channels: int = 256
    pool_size: int = 7
    pooling: Literal["align", "deformable"] = "align"
    hidden_dim: int = 1024
    positive_iou: float = 0.5
    score_threshold: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.positive_iou < 1:
            raise ValueError(f"positive_iou must be between 0 and 1, not {self.positive_iou}")
        if not 0 <= self.score_threshold < 1:
            raise ValueError(f"score_threshold must be in [0, 1), not {self.score_threshold}")
        for name in ("channels", "pool_size", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DetectorSpec:
    """The whole detector.

    Attributes:
        backbone: the trunk.
        rpn: the first stage.
        roi_head: the second stage.
    """

    backbone: BackboneSpec = BackboneSpec()
    rpn: RPNSpec = RPNSpec()
    roi_head: RoIHeadSpec = RoIHeadSpec()

    def __post_init__(self) -> None:
        if self.backbone.neck == "fpn":
            if len(self.rpn.anchor_sizes) != 5:
                raise ValueError(
                    "rpn.anchor_sizes: a feature pyramid has five maps, each with anchors of one size, not "
                    f"{len(self.rpn.anchor_sizes)}"
                )
            if self.roi_head.pooling == "deformable":
                raise ValueError(
                    "roi_head.pooling: deformable pools from one map, not from a feature pyramid"
                )
