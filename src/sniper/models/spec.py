"""Configuration of the detector; defaults are the paper's where it states them (SNIPER §4)."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import PositiveFloat, PositiveInt

from sniper.errors import ConfigError
from sniper.specs import Fraction, spec_dataclass

Precision = Literal["auto", "fp32", "bf16", "fp16"]

PYRAMID_STRIDES = (4, 8, 16, 32, 64)  # of the maps of `fpn`; the last is a subsampled copy of the one before

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
        post_nms_top_n: proposals in each window of a level at inference, at most.
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
class MaskHeadSpec:
    """The head that predicts the mask of each object (He et al. 2017); defaults are theirs.

    Attributes:
        channels: of its convolutions.
        num_convs: 3×3 convolutions before the deconvolution.
        class_agnostic: whether there is one mask for each box, or else one for each class.
        pool_size: side of the pooled grid, cells; masks have twice as many.
        loss_weight: factor of the loss of masks.
        batch_size_per_image: positive proposals with a mask that are trained on in each chip, at most; drawn by its
            seed.
    """

    channels: Annotated[PositiveInt, Le(_MAX_WIDTH)] = 256
    num_convs: Annotated[int, Ge(1), Le(16)] = 4
    class_agnostic: bool = False
    pool_size: Annotated[int, Ge(2), Le(_MAX_POOL_SIZE)] = 14
    loss_weight: PositiveFloat = 1.0
    batch_size_per_image: Annotated[PositiveInt, Le(_MAX_PROPOSALS)] = 64


@spec_dataclass
class TorchvisionSpec:
    """What only the detectors of torchvision have, with `model.kind: torchvision`.

    Attributes:
        channels: of the feature pyramid over `model.backbone`, and of the heads on it.
        num_convs: convolutions before each output of `fcos` and `retinanet` over `model.backbone`.
        anchor_sizes: square roots of the areas of the smallest anchors of each of the five maps over `model.backbone`,
            chip pixels; `retinanet` has two larger ones with each. `null` is four times the stride of each map, eight
            times for `faster_rcnn`. FCOS has no anchors.
        score_threshold: detections with a lower score are dropped.
        detections_per_window: detections in a window of a level, at most.
    """

    channels: Annotated[PositiveInt, Le(_MAX_WIDTH)] = 256
    num_convs: Annotated[int, Ge(1), Le(16)] = 4
    anchor_sizes: Annotated[tuple[PositiveFloat, ...], MinLen(5), MaxLen(5)] | None = None
    score_threshold: Annotated[float, Ge(0), Lt(1)] = 0.001
    detections_per_window: Annotated[PositiveInt, Le(_MAX_PROPOSALS)] = 300


@spec_dataclass
class TransformersSpec:
    """What only the detectors of transformers have, with `model.kind: transformers`.

    Attributes:
        pretrained: whether to start from the weights of `model.name`, or else from random ones. Layers of classes with
            the name of one of the data set are loaded, those of others made anew. Read at the start of a run only.
        config: the architecture, as JSON, like `config.json` without classes. `null` reads that of `model.name` at the
            start of a run, and writes it to the run's `config.yaml`, from which the run is continued and loaded.
        image_mean: of each channel, subtracted from values from 0 to 1; `null` is that of the image processor of
            `model.name`.
        image_std: by which each channel is then divided; `null` is that of the image processor of `model.name`.
        score_threshold: detections with a lower score are dropped.
        detections_per_window: detections in a window of a level, at most.
    """

    pretrained: bool = True
    config: str | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    score_threshold: Annotated[float, Ge(0), Lt(1)] = 0.001
    detections_per_window: Annotated[PositiveInt, Le(_MAX_PROPOSALS)] = 300


_TORCHVISION_MASK_SIDE = 28  # cells

ON_BACKBONE = ("fcos", "retinanet", "faster_rcnn")
"""Detectors of torchvision on `model.backbone`; the others are named after torchvision's builders."""

_OF_BUILDERS = ("pretrained", "batch_norm", "frozen_stages")
"""The fields of `model.backbone` that detectors with a backbone of their own have."""


@spec_dataclass
class DetectorSpec:
    """The whole detector.

    Attributes:
        kind: `two_stage` is the detector of this package, a Faster R-CNN; `torchvision` is one of torchvision's;
            `transformers` is a detector of transformers that matches queries, such as RT-DETR.
        name: of torchvision's detector: `fcos`, `retinanet` or `faster_rcnn` on `backbone`, or the name of one of
            torchvision's builders, such as `fcos_resnet50_fpn`. Of a detector of transformers: its name on the Hugging
            Face hub, such as `PekingU/rtdetr_v2_r18vd`, or a folder that `save_pretrained` has written.
        weights: of torchvision's detector to start from: their name (`COCO_V1` or `DEFAULT`), or a file. Layers of
            classes with the name of one of the data set are loaded, those of others made anew. Read at the start of a
            run only.
        labels: what a one-stage detector learns of a chip: `valid`, the boxes in the valid range of its level, with the
            others ignored; or `all` its boxes, as the second stage of a two-stage detector always does.
        weights_from: detector to start from instead of a pretrained backbone: the folder of a run, or a safetensors
            file of weights that a run has written. Read at the start of a run only.
        backbone: the feature extractor.
        rpn: the first stage.
        roi_head: the second stage.
        mask_head: predicts the mask of each object; `null` without masks. Derived settings have it where the data set
            has masks.
        focus: whether a head predicts at coarse levels where objects are that are left to finer ones; see
            `predict.focus`.
        focus_loss_weight: factor of the loss of that head.
        torchvision: what only the detectors of torchvision have.
        transformers: what only the detectors of transformers have.
    """

    kind: Literal["two_stage", "torchvision", "transformers"] = "two_stage"
    name: str | None = None
    weights: str | None = None
    labels: Literal["valid", "all"] = "valid"
    weights_from: str | None = None
    backbone: BackboneSpec = BackboneSpec()
    rpn: RPNSpec = RPNSpec()
    roi_head: RoIHeadSpec = RoIHeadSpec()
    mask_head: MaskHeadSpec | None = None
    focus: bool = False
    focus_loss_weight: PositiveFloat = 1.0
    torchvision: TorchvisionSpec = TorchvisionSpec()
    transformers: TransformersSpec = TransformersSpec()

    @property
    def has_rpn(self) -> bool:
        """Whether the detector has a region proposal network."""
        if self.kind == "torchvision":
            return (self.name or "").startswith(("faster", "mask"))
        return self.kind == "two_stage"

    @property
    def mask_side(self) -> int | None:
        """Side of the masks that the detector predicts, cells; None if it predicts none."""
        if self.kind == "torchvision":
            return _TORCHVISION_MASK_SIDE if (self.name or "").startswith("mask") else None
        return None if self.mask_head is None else 2 * self.mask_head.pool_size

    @property
    def starts_from_library(self) -> bool:
        """Whether the detector starts from weights of a whole detector of its library."""
        if self.kind == "transformers":
            return self.transformers.pretrained and self.weights_from is None
        return self.weights is not None

    @property
    def has_own_backbone(self) -> bool:
        """Whether the detector comes with a backbone, in place of that of the section."""
        if self.kind == "torchvision":
            return self.name not in ON_BACKBONE
        return self.kind == "transformers"

    @property
    def has_pyramid(self) -> bool:
        """Whether the detector has several feature maps, for objects of different sizes."""
        return self.kind != "two_stage" or self.backbone.neck == "fpn"

    @property
    def anchor_sizes(self) -> tuple[float, ...] | None:
        """The smallest anchors of each map of a detector of torchvision on a backbone of the section."""
        stride = {"retinanet": 4, "faster_rcnn": 8}.get(self.name or "")
        if self.kind != "torchvision" or stride is None:
            return None
        return self.torchvision.anchor_sizes or tuple(float(stride * side) for side in PYRAMID_STRIDES)

    def __post_init__(self) -> None:
        if self.labels == "all" and self.has_rpn:
            raise ValueError(
                "labels: must be valid for a two-stage detector: its RPN learns the valid boxes, its head all"
            )
        if self.weights is not None and self.weights_from is not None:
            raise ValueError("weights and weights_from exclude each other")
        if self.focus and self.kind != "two_stage":
            raise ValueError(f"focus: is of kind two_stage, not of {self.kind}")
        if (
            not self.focus
            and self.focus_loss_weight != type(self).__dataclass_fields__["focus_loss_weight"].default
        ):
            raise ValueError("focus_loss_weight: needs focus, which is false")
        for kind in ("torchvision", "transformers"):
            if self.kind != kind and getattr(self, kind) != type(self).__dataclass_fields__[kind].default:
                raise ValueError(f"{kind}: is a section of kind {kind}, not of {self.kind}")
        match self.kind:
            case "two_stage":
                self._check_two_stage()
            case "torchvision":
                self._check_torchvision()
            case "transformers":
                self._check_transformers()

    def _check_transformers(self) -> None:
        """Check that no field is set that a detector of transformers does not have."""
        if self.name is None:
            raise ValueError(
                "name: is missing; kind transformers needs the name of a detector on the Hugging Face hub, such as "
                "PekingU/rtdetr_v2_r18vd, or a folder"
            )
        if self.weights is not None:
            raise ValueError(
                "weights: is of kind torchvision; a detector of transformers has those of its name"
            )
        for section in ("backbone", "rpn", "roi_head", "mask_head"):
            if getattr(self, section) != type(self).__dataclass_fields__[section].default:
                raise ValueError(f"{section}: a detector of transformers does not have this section")

    def _check_torchvision(self) -> None:
        """Check that no field is set that a detector of torchvision does not have."""
        if self.name is None:
            raise ValueError(
                "name: is missing; kind torchvision needs the name of a detector, such as fcos_resnet50_fpn"
            )
        for section in ("rpn", "roi_head", "mask_head"):
            if getattr(self, section) != type(self).__dataclass_fields__[section].default:
                raise ValueError(f"{section}: is a section of kind two_stage, not of torchvision")
        defaults: tuple[tuple[str, object], ...] = ()
        if self.has_own_backbone:
            fields = type(self.backbone).__dataclass_fields__
            defaults = tuple(
                (f"backbone.{name}", field.default)
                for name, field in fields.items()
                if name not in _OF_BUILDERS
            )
            fields = type(self.torchvision).__dataclass_fields__
            defaults += tuple(
                (f"torchvision.{name}", fields[name].default)
                for name in ("channels", "num_convs", "anchor_sizes")
            )
        elif self.backbone.neck != "fpn":
            raise ValueError(f"backbone.neck: must be fpn for {self.name} of torchvision")
        elif self.weights is not None:
            raise ValueError(
                f"weights: there are none for {self.name} on another backbone (backbone.weights, weights_from)"
            )
        if self.name == "fcos":
            defaults += (("torchvision.anchor_sizes", None),)
        if self.name == "faster_rcnn":
            defaults += (("torchvision.num_convs", TorchvisionSpec().num_convs),)
        for name, default in defaults:
            section, _, field = name.partition(".")
            if getattr(getattr(self, section), field) != default:
                self._check_torchvision_name()
                raise ValueError(f"{name}: {self.name} does not have this field")

    def _check_torchvision_name(self) -> None:
        """Check that torchvision has the detector, which needs its import."""
        from sniper.models.torchvision_detectors.build import find_kind

        try:
            find_kind(self.name)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("model.")) from error

    def _check_two_stage(self) -> None:
        for field in ("name", "weights"):
            if getattr(self, field) is not None:
                hint = "; weights of a backbone belong to backbone.weights" if field == "weights" else ""
                raise ValueError(f"{field}: is of kind torchvision, not of two_stage{hint}")
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
