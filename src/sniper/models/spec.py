"""Configuration of the detector; defaults are the paper's where it states them (SNIPER §4)."""

import math
from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """The backbone.

    Attributes:
        name: a timm model with features at stride 16.
        pretrained: whether to start from timm's weights of that name.
        weights: safetensors file to start from instead.
        batch_norm: `trained` trains batch norm with statistics over the chips on each device, `synced` over those on
            all devices; `frozen` keeps it as pretrained.
        frozen_stages: number of first stages that are not trained, the stem included; 0 trains everything.
        neck: `concat` for one feature map at stride 16, as in the paper; `fpn` for a feature pyramid of strides 4 to
            64, whose maps have `roi_head.channels` channels.
        num_feature_maps: number of last feature maps to concatenate (2: conv4 and conv5). Not used by `fpn`, which
            takes four.
        deformable: whether to make the plain 3×3 convolutions of the last stage deformable, with four groups.
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
    """The region proposal network, and the sampling of its anchors.

    Attributes:
        channels: of its hidden layer.
        anchor_sizes: square roots of the anchors' areas, chip pixels; with a feature pyramid, one for each of its five
            maps.
        aspect_ratios: heights of the anchors divided by their widths.
        positive_iou: an anchor with at least this IoU with a valid box is positive.
        negative_iou: an anchor with a lower IoU with every valid box is negative.
        ignored_iou: an anchor with a higher IoU with a box that is not valid is ignored.
        batch_size_per_image: anchors sampled in each chip for the losses.
        positive_fraction: maximum share of positives among them.
        pre_nms_top_n: best anchors of each image that enter non-maximum suppression.
        nms_iou: of two proposals with a higher IoU, the worse is dropped.
        post_nms_top_n: proposals per image and level at inference.
        post_nms_top_n_train: proposals per chip in training; fewer are faster where chips show few objects.
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
    """The second stage, which classifies proposals and regresses their boxes.

    Attributes:
        channels: of the features that are pooled.
        pool_size: side of the pooled grid, cells.
        pooling: `align` for RoIAlign, `deformable` for deformable RoI pooling.
        hidden_dim: of the two fully connected layers.
        positive_iou: a proposal with at least this IoU with an object is positive, with the label of that object.
        score_threshold: detections with a lower score are dropped.
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
        backbone: the feature extractor.
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
