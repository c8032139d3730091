"""Configuration of the detector; defaults are the paper's where it states them (SNIPER §4)."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import PositiveFloat, PositiveInt

from sniper.specs import Fraction, spec_dataclass

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_MAX_WIDTH, _MAX_POOL_SIZE = 65_536, 64
_MAX_PROPOSALS = 1_000_000


@spec_dataclass
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
    frozen_stages: Annotated[int, Ge(0), Le(2)] = 1
    neck: Literal["concat", "fpn"] = "concat"
    num_feature_maps: Annotated[int, Ge(1), Le(2)] = 2
    deformable: bool = False


@spec_dataclass
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

    channels: Annotated[PositiveInt, Le(_MAX_WIDTH)] = 512
    anchor_sizes: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (32, 64, 128, 256, 384)
    aspect_ratios: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (0.5, 1.0, 2.0)
    positive_iou: Annotated[float, Gt(0), Le(1)] = 0.5
    negative_iou: Annotated[float, Gt(0), Le(1)] = 0.4
    ignored_iou: Fraction = 0.3
    batch_size_per_image: Annotated[PositiveInt, Le(_MAX_PROPOSALS)] = 256
    positive_fraction: Fraction = 0.5
    pre_nms_top_n: Annotated[PositiveInt, Le(_MAX_PROPOSALS)] = 6000
    nms_iou: Fraction = 0.7
    post_nms_top_n: Annotated[PositiveInt, Le(_MAX_PROPOSALS)] = 300
    post_nms_top_n_train: Annotated[PositiveInt, Le(_MAX_PROPOSALS)] = 300

    def __post_init__(self) -> None:
        if self.negative_iou > self.positive_iou:
            raise ValueError(
                f"negative_iou must be at most positive_iou ({self.positive_iou:g}), not {self.negative_iou:g}"
            )


@spec_dataclass
class RoIHeadSpec:
    """The second stage, which classifies proposals and regresses their boxes.

    Attributes:
        channels: of the features that are pooled.
        pool_size: side of the pooled grid, cells.
        pooling: `align` for RoIAlign, `deformable` for deformable RoI pooling.
        hidden_dim: of the two fully connected layers.
        positive_iou: a proposal with at least this IoU with an object is positive, with the label of that object.
        box_loss_weight: factor of the loss of boxes, relative to that of classes; the paper's code has 1.6.
        score_threshold: detections with a lower score are dropped.
    """

    channels: Annotated[PositiveInt, Le(_MAX_WIDTH)] = 256
    pool_size: Annotated[PositiveInt, Le(_MAX_POOL_SIZE)] = 7
    pooling: Literal["align", "deformable"] = "align"
    hidden_dim: Annotated[PositiveInt, Le(_MAX_WIDTH)] = 1024
    positive_iou: Annotated[float, Gt(0), Lt(1)] = 0.5
    box_loss_weight: PositiveFloat = 1.0
    score_threshold: Annotated[float, Ge(0), Lt(1)] = 0.001


@spec_dataclass
class DetectorSpec:
    """The whole detector.

    Attributes:
        kind: `two_stage` is the detector of this package.
        weights_from: detector to start from instead of a pretrained backbone: the folder of a run, or a safetensors
            file of weights that a run has written. Read at the start of a run only.
        backbone: the feature extractor.
        rpn: the first stage.
        roi_head: the second stage.
    """

    kind: Literal["two_stage"] = "two_stage"
    weights_from: str | None = None
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
