"""A whole detector as one graph, from the pixels of a window to its detections, for `torch.export`.

A graph takes one image, since the number of its detections depends on what is on it. It computes what `detect` of the
detector does, without Python's control flow and in the order that suits exporters: the best candidates are chosen
before those of a low score are left out, and RoIs are grouped by the feature map that they are pooled from.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import nn
from torchvision.ops import box_convert, nms, roi_align

from sniper.errors import ExportError
from sniper.models.protocol import GRID, DetectorModel
from sniper.models.spec import DetectorSpec
from sniper.models.two_stage import TwoStageDetector

_CANONICAL_SIZE, _CANONICAL_LEVEL, _LEVEL_EPSILON = (
    224,
    4,
    1e-6,
)  # of RoIs (Lin et al. 2017, §4.2), as torchvision
_MIN_BOX_SIDE = 1e-2  # of detections of Faster R-CNN of torchvision

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Boxes (n, 4) xyxy in the frame of the image, scores (n,) and labels (n,) from 0."""


class DetectionGraph(nn.Module, ABC):
    """A detector as a function of one image.

    Args:
        model: from `for_inference`, in evaluation mode, in float32.

    Attributes:
        multiple: of which the sides of images are, pixels.
        min_side: which the sides of images have at least, pixels.
        max_kept: boxes that non-maximum suppression keeps, at most; None if there is none.
    """

    multiple = GRID
    min_side = 0
    max_kept: int | None = None

    @abstractmethod
    def forward(self, image: UInt8[torch.Tensor, "1 3 h w"], sides: Int[torch.Tensor, "2"]) -> Outputs:
        """Detect objects.

        Args:
            image: RGB values, padded with black to sides that are multiples of `multiple`.
            sides: width and height before padding.

        Returns:
            Boxes, scores and labels, as `detect` of the detector has them, in any order.
        """


def build_graph(model: DetectorModel) -> DetectionGraph:
    """Return the graph of a detector; see `DetectionGraph`.

    Raises:
        ExportError: if the detector predicts masks, which are no part of a graph.
    """
    check_exportable(model.spec)
    if isinstance(model, TwoStageDetector):
        return _TwoStageGraph(model)
    if model.spec.kind == "transformers":
        return _TransformersGraph(model)
    if model.spec.has_rpn:
        return _FasterRCNNGraph(model)
    return _SSDGraph(model) if str(model.spec.name).startswith("ssd") else _OneStageGraph(model)


def check_exportable(spec: DetectorSpec) -> None:
    """Check that a detector can be exported.

    Raises:
        ExportError: if it predicts masks.
    """
    if spec.mask_side is not None:
        name = "model.mask_head" if spec.kind == "two_stage" else f"model.name: {spec.name}"
        raise ExportError(
            f"{name}: a detector that predicts masks cannot be exported; detect with torch, or train one of boxes"
        )


class _TwoStageGraph(DetectionGraph):
    """The detector of this package."""

    def __init__(self, model: TwoStageDetector) -> None:
        super().__init__()
        self.model = model
        self.max_kept = model.spec.rpn.post_nms_top_n

    def forward(self, image: UInt8[torch.Tensor, "1 3 h w"], sides: Int[torch.Tensor, "2"]) -> Outputs:
        spec, head = self.model.spec, self.model.roi_head
        maps = self.model.backbone(image)
        predictions = self.model.rpn(maps)
        boxes = _clip(self.model.rpn.decode(predictions)[0], sides)  # (n, 4)
        objectness = torch.where(_has_area(boxes), predictions.objectness[0], -torch.inf)
        scores, best = objectness.topk(torch.sym_min(spec.rpn.pre_nms_top_n, objectness.shape[0]))
        boxes = boxes[best]
        kept = nms(boxes, scores, spec.rpn.nms_iou)[: spec.rpn.post_nms_top_n]
        proposals = boxes[kept][scores[kept] > -torch.inf]
        if self.model.backbone.fpn is None:
            pooled = self._pool_single(maps[0], proposals)
        else:
            proposals, pooled = pool_pyramid(
                maps[:-1], proposals, strides=self.model.backbone.strides, side=spec.roi_head.pool_size
            )
        logits, deltas = head.classify(pooled)
        detected = _clip(head.decode(deltas, proposals), sides)
        class_scores = logits.softmax(dim=1)[:, :-1]
        is_kept = (class_scores >= spec.roi_head.score_threshold) & _has_area(detected)[:, None]
        rows, labels = torch.where(is_kept)
        return detected[rows], class_scores[rows, labels], labels

    def _pool_single(
        self, features: Float[torch.Tensor, "1 c y x"], rois: Float[torch.Tensor, "n 4"]
    ) -> Float[torch.Tensor, "n d s s"]:
        pooled: torch.Tensor = self.model.roi_head.pool([features], [rois])
        return pooled


def pool_pyramid(
    maps: Sequence[Float[torch.Tensor, "1 c _ _"]],
    rois: Float[torch.Tensor, "n 4"],
    *,
    strides: Sequence[int],
    side: int,
) -> tuple[Float[torch.Tensor, "m 4"], Float[torch.Tensor, "m c s s"]]:
    """Pool each RoI from the map that fits its size, as `MultiScaleRoIAlign` of torchvision does with 2×2 samples.

    Args:
        maps: of one image, finest first.
        rois: xyxy, frame of the image.
        strides: of the maps.
        side: of the pooled grid, cells.

    Returns:
        The RoIs ordered by map, and their features.
    """
    sizes = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
    levels = torch.floor(_CANONICAL_LEVEL + torch.log2(sizes / _CANONICAL_SIZE) + _LEVEL_EPSILON)
    finest = strides[0].bit_length() - 1
    indices = levels.clamp(finest, finest + len(maps) - 1) - finest
    grouped = [rois[indices == index] for index in range(len(maps))]
    pooled = [
        roi_align(features, [of_map], side, spatial_scale=1 / stride, sampling_ratio=2)
        for features, of_map, stride in zip(maps, grouped, strides, strict=False)
    ]
    return torch.cat(grouped), torch.cat(pooled)


class _OneStageGraph(DetectionGraph):
    """FCOS, RetinaNet or SSD of torchvision."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.multiple, self.min_side = model.stride, model.min_side
        self.max_kept = model.net.detections_per_img

    def forward(self, image: UInt8[torch.Tensor, "1 3 h w"], sides: Int[torch.Tensor, "2"]) -> Outputs:
        net = self.model.net
        batch, anchors, map_sizes = self.model._predict(image)
        outputs = {name: values[0] for name, values in batch.items()}
        decode = getattr(net.box_coder, "decode_single", net.box_coder.decode)
        boxes = _clip(decode(outputs["bbox_regression"], anchors), sides)
        boxes, scores, labels = self._best(boxes, outputs, map_sizes)
        is_kept = scores > net.score_thresh
        return suppress(
            boxes[is_kept],
            scores[is_kept],
            labels[is_kept],
            iou=net.nms_thresh,
            limit=net.detections_per_img,
        )

    def _best(
        self,
        boxes: Float[torch.Tensor, "n 4"],
        outputs: Mapping[str, torch.Tensor],
        map_sizes: Sequence[int],
    ) -> Outputs:
        """Return the best candidates of each map."""
        scores = outputs["cls_logits"].sigmoid()
        if "bbox_ctrness" in outputs:
            scores = (scores * outputs["bbox_ctrness"].sigmoid()).sqrt()
        num_anchors = [scores.shape[0] // sum(map_sizes) * size for size in map_sizes]
        return _best_of_maps(boxes, scores, num_anchors, count=self.model.net.topk_candidates)


class _SSDGraph(_OneStageGraph):
    """SSD of torchvision."""

    def _best(
        self,
        boxes: Float[torch.Tensor, "n 4"],
        outputs: Mapping[str, torch.Tensor],
        map_sizes: Sequence[int],
    ) -> Outputs:
        """Return the best candidates of each class."""
        scores = outputs["cls_logits"].softmax(-1)[:, 1:]
        count = torch.sym_min(self.model.net.topk_candidates, scores.shape[0])
        best, rows = scores.topk(count, dim=0)  # (k, c)
        labels = torch.arange(scores.shape[1]) + torch.zeros_like(rows)
        return boxes[rows.flatten()], best.flatten(), labels.flatten()


def _best_of_maps(
    boxes: Float[torch.Tensor, "n 4"],
    scores: Float[torch.Tensor, "n c"],
    num_anchors: Sequence[int],
    *,
    count: int,
) -> Outputs:
    """Return the best candidates of each map."""
    found = []
    parts = torch.split(boxes, list(num_anchors)), torch.split(scores, list(num_anchors))
    for of_boxes, of_map in zip(*parts, strict=True):
        flat = of_map.flatten()
        best, indices = flat.topk(torch.sym_min(count, flat.shape[0]))
        rows, labels = indices // scores.shape[1], indices % scores.shape[1]
        found.append((of_boxes[rows], best, labels))
    all_boxes, all_scores, all_labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return all_boxes, all_scores, all_labels


class _FasterRCNNGraph(DetectionGraph):
    """Faster R-CNN of torchvision."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.multiple, self.min_side = model.stride, model.min_side
        net = model.net
        self.max_kept = max(net.rpn.post_nms_top_n(), net.roi_heads.detections_per_img)

    def forward(self, image: UInt8[torch.Tensor, "1 3 h w"], sides: Int[torch.Tensor, "2"]) -> Outputs:
        rpn, heads = self.model.net.rpn, self.model.net.roi_heads
        maps = self.model.features(image)
        predictions = self.model._predict(image, maps)
        boxes = _clip(rpn.box_coder.decode_single(predictions.deltas[0], predictions.anchors), sides)
        boxes, logits, _ = _best_of_maps(
            boxes, predictions.objectness[0][:, None], predictions.num_anchors, count=rpn.pre_nms_top_n()
        )
        counts = [torch.sym_min(rpn.pre_nms_top_n(), count) for count in predictions.num_anchors]
        levels = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
        is_kept = _has_area(boxes, above=rpn.min_size, is_included=True)
        proposals, _, _ = suppress(
            boxes[is_kept],
            logits[is_kept].sigmoid(),
            levels[is_kept],
            iou=rpn.nms_thresh,
            limit=rpn.post_nms_top_n(),
        )
        pooler = heads.box_roi_pool
        names = [name for name in maps if name in pooler.featmap_names]
        strides = [round(image.shape[2] / maps[name].shape[2]) for name in names]
        proposals, pooled = pool_pyramid(
            [maps[name] for name in names], proposals, strides=strides, side=pooler.output_size[0]
        )
        class_logits, deltas = heads.box_predictor(heads.box_head(pooled))
        scores = class_logits.softmax(-1)[:, 1:]
        detected = heads.box_coder.decode_single(deltas, proposals).unflatten(1, (-1, 4))[:, 1:]
        detected = _clip(detected, sides)
        rows, labels = torch.where(
            (scores > heads.score_thresh) & _has_area(detected, above=_MIN_BOX_SIDE, is_included=True)
        )
        return suppress(
            detected[rows, labels],
            scores[rows, labels],
            labels,
            iou=heads.nms_thresh,
            limit=heads.detections_per_img,
        )


class _TransformersGraph(DetectionGraph):
    """A detector of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.min_side = model.min_side

    def forward(self, image: UInt8[torch.Tensor, "1 3 h w"], sides: Int[torch.Tensor, "2"]) -> Outputs:
        height, width = image.shape[2:]
        is_image = (torch.arange(height)[:, None] < sides[1]) & (torch.arange(width) < sides[0])
        outputs = self.model.net(**self.model.inputs(image, is_image[None].long()))
        frame = torch.cat([sides, sides])
        if not self.model.family.has_mask:
            frame = torch.tensor([1, 0, 1, 0]) * width + torch.tensor([0, 1, 0, 1]) * height
        boxes, scores, labels = self.model.best(outputs.logits[0].float(), outputs.pred_boxes[0].float())
        corners = _clip(box_convert(boxes, "cxcywh", "xyxy") * frame, sides)
        is_kept = _has_area(corners) & (scores >= self.model.spec.transformers.score_threshold)
        return corners[is_kept], scores[is_kept], labels[is_kept]


def suppress(
    boxes: Float[torch.Tensor, "n 4"],
    scores: Float[torch.Tensor, " n"],
    groups: Int[torch.Tensor, " n"],
    *,
    iou: float,
    limit: int,
) -> Outputs:
    """Suppress boxes that overlap a better one of their group, as `batched_nms` of torchvision does; best first."""
    # Groups are far from each other where all coordinates are shifted by more than the largest.
    shift = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).amax(dim=0) + 1
    kept = nms(boxes + (groups * shift)[:, None], scores, iou)[:limit]
    kept = kept[_has_area(boxes[kept])]
    return boxes[kept], scores[kept], groups[kept]


def _clip(boxes: Float[torch.Tensor, "*n 4"], sides: Int[torch.Tensor, "2"]) -> Float[torch.Tensor, "*n 4"]:
    """Clip xyxy boxes to an image of some width and height."""
    return torch.minimum(boxes.clamp(min=0), torch.cat([sides, sides]).to(boxes.dtype))


def _has_area(
    boxes: Float[torch.Tensor, "*n 4"], *, above: float = 0.0, is_included: bool = False
) -> torch.Tensor:
    """Check which boxes have both sides above a number of pixels, or of at least that."""
    shortest = (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1)
    return shortest >= above if is_included else shortest > above
