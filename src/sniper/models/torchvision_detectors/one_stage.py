"""FCOS, RetinaNet and SSD of torchvision, with SNIPER's labels.

Anchors (points, default boxes) on a box that is not to be learned are neither positive nor negative. Where every box is
learned, the losses are torchvision's. The losses of a batch are computed chip by chip: those of RetinaNet are the mean
over chips, those of FCOS and SSD the sum divided by the positives of all.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import nn
from torch.nn import functional
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from sniper.geometry import Detections
from sniper.models.chip_boxes import ChipBoxes
from sniper.models.protocol import BatchLike, ClassLayout, count_chips
from sniper.models.torchvision_detectors.adapter import TorchvisionModel, shapes_of

_NO_SCORE = -1e4  # a logit that stands for 0 in every precision

_LOSS_NAMES = {
    "classification": "head_class",
    "bbox_regression": "head_box",
    "bbox_ctrness": "head_centerness",
}


class OneStageModel(TorchvisionModel):
    """A detector that classifies its anchors."""

    def losses_and_counts(
        self, batch: BatchLike
    ) -> tuple[dict[str, Float[torch.Tensor, ""]], dict[str, Float[torch.Tensor, ""]]]:
        """Compute the losses of a batch of chips, and the counts of `count_chips`.

        Returns:
            `head_class`, `head_box` and, of FCOS, `head_centerness`, to be added up; and the counts.
        """
        targets = batch.targets
        padded, _ = self.pad(list(batch.images))
        outputs, anchors, map_sizes = self._predict(padded)
        of_chips: list[dict[str, torch.Tensor]] = []
        num_positives: list[torch.Tensor] = []
        for index in range(len(targets)):
            boxes = ChipBoxes.of(targets, index, self.spec.labels)
            of_chip = {name: values[index : index + 1] for name, values in outputs.items()}
            losses, count = self._chip_losses(of_chip, anchors, boxes, map_sizes=map_sizes)
            of_chips.append(losses)
            num_positives.append(count)
        weights = self._weights(torch.stack(num_positives))  # (b,)
        stacked = {name: torch.stack([losses[name] for losses in of_chips]) for name in of_chips[0]}
        losses = {_LOSS_NAMES[name]: (values * weights).sum() for name, values in stacked.items()}
        class_losses = (stacked["classification"].detach() * weights) * len(targets)
        return losses, count_chips(targets, class_losses)

    @torch.no_grad()
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Detect objects; see `DetectorModel.detect`. Detections of one class have passed torchvision's NMS."""
        padded, image_sides = self.pad(images)
        outputs, anchors, map_sizes = self._predict(padded)
        image_anchors = [anchors] * len(images)
        results = self._postprocess(
            outputs, image_anchors, [sides.hw for sides in image_sides], map_sizes=map_sizes
        )
        return [self.to_detections(result) for result in results]

    def _predict(
        self, padded: UInt8[torch.Tensor, "b 3 h w"]
    ) -> tuple[dict[str, Float[torch.Tensor, "b n _"]], Float[torch.Tensor, "n 4"], list[int]]:
        """Return the outputs of the heads, the anchors of an image, and the number of places of each map."""
        maps = self.features(padded)
        outputs = {name: values.float() for name, values in self.net.head(list(maps.values())).items()}
        (anchors,) = self.net.anchor_generator(ImageList(padded[:1], [(0, 0)]), shapes_of(maps))
        return outputs, anchors, [features.shape[2] * features.shape[3] for features in maps.values()]

    @abstractmethod
    def _chip_losses(
        self,
        outputs: dict[str, torch.Tensor],
        anchors: Float[torch.Tensor, "n 4"],
        boxes: ChipBoxes,
        *,
        map_sizes: list[int],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return torchvision's losses of one chip, divided by its positives, and the number of these."""

    def _weights(self, num_positives: Int[torch.Tensor, " b"]) -> Float[torch.Tensor, " b"]:
        """Return the factors of the losses of chips, which are divided by the positives of each instead of all."""
        return num_positives.clamp(min=1) / num_positives.sum().clamp(min=1)

    def _postprocess(
        self,
        outputs: Mapping[str, torch.Tensor],
        anchors: Sequence[torch.Tensor],
        image_shapes: Sequence[tuple[int, int]],
        *,
        map_sizes: list[int],
    ) -> list[dict[str, torch.Tensor]]:
        """Return torchvision's detections of images."""
        num_anchors = len(anchors[0]) // sum(map_sizes)
        sizes = [num_anchors * size for size in map_sizes]
        split = {name: list(torch.split(values, sizes, dim=1)) for name, values in outputs.items()}
        results: list[dict[str, torch.Tensor]] = self.net.postprocess_detections(
            split, [list(torch.split(each, sizes)) for each in anchors], image_shapes
        )
        return results


class RetinaNetModel(OneStageModel):
    """RetinaNet, whose anchors are matched by `match`."""

    @property
    def class_layouts(self) -> Mapping[str, ClassLayout]:
        """The last layer of the classifier."""
        name = "net.head.classification_head.cls_logits"
        layout = ClassLayout(num_groups=self.net.anchor_generator.num_anchors_per_location()[0])
        return {f"{name}.weight": layout, f"{name}.bias": layout}

    def _chip_losses(
        self,
        outputs: dict[str, torch.Tensor],
        anchors: Float[torch.Tensor, "n 4"],
        boxes: ChipBoxes,
        *,
        map_sizes: list[int],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        matched = match(self.net.proposal_matcher, anchors, boxes)
        target = boxes.target(first_label=self.first_label)
        losses = self.net.head.compute_loss([target], outputs, [anchors], [matched])
        return losses, (matched >= 0).sum()

    def _weights(self, num_positives: Int[torch.Tensor, " b"]) -> Float[torch.Tensor, " b"]:
        return torch.full_like(num_positives, 1, dtype=torch.float32) / len(num_positives)


class FCOSModel(OneStageModel):
    """FCOS: the points that would learn a box if it were to be learned are ignored, and those in ignored boxes."""

    @property
    def class_layouts(self) -> Mapping[str, ClassLayout]:
        """The last layer of the classifier."""
        name = "net.head.classification_head.cls_logits"
        return {f"{name}.weight": ClassLayout(), f"{name}.bias": ClassLayout()}

    def _chip_losses(
        self,
        outputs: dict[str, torch.Tensor],
        anchors: Float[torch.Tensor, "n 4"],
        boxes: ChipBoxes,
        *,
        map_sizes: list[int],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rest = boxes.out_of_range
        target = {
            "boxes": torch.cat([boxes.objects, boxes.others[rest]]),
            "labels": torch.cat([boxes.labels, boxes.other_labels[rest]]),
            "num_objects": torch.tensor(len(boxes.objects), device=anchors.device),
            "is_in_ignored": is_centre_inside(anchors, boxes.others[~rest]),
        }
        losses = self.net.compute_loss([target], outputs, [anchors], map_sizes)
        return losses, losses.pop("num_positives")


class ChipFCOSHead(FCOSHead):  # type: ignore[misc]
    """The head of FCOS, whose targets may have boxes that are not learned, after the others."""

    def compute_loss(
        self,
        targets: list[dict[str, torch.Tensor]],
        head_outputs: dict[str, torch.Tensor],
        anchors: list[torch.Tensor],
        matched_idxs: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Compute torchvision's losses without the points on boxes that are not learned.

        Args:
            targets: one, with `num_objects`, the number of boxes that are learned, and `is_in_ignored`, whether each
                point is in a box of status `IGNORE`.
            head_outputs: of one chip.
            anchors: of one chip.
            matched_idxs: for each point the index of its box, -1 for none.

        Returns:
            The losses, and `num_positives`, the number of points that learn a box.
        """
        (target,), (matched,) = targets, matched_idxs
        is_other = matched >= target["num_objects"]
        is_ignored = is_other | (target["is_in_ignored"] & (matched < 0))
        # Neither loss nor gradient comes from a constant that is right.
        outputs = head_outputs | {
            "cls_logits": head_outputs["cls_logits"].masked_fill(is_ignored[None, :, None], _NO_SCORE)
        }
        matched = matched.masked_fill(is_other, -1)
        losses = super().compute_loss(targets, outputs, anchors, [matched])
        return losses | {"num_positives": (matched >= 0).sum()}


class SSDModel(OneStageModel):
    """SSD and SSDLite, whose default boxes are matched by `match`.

    Default boxes have the sizes that they have in images of 300 or 320 pixels, in chips and windows of any size. In a
    chip without positives the three worst negatives count, as if it had one: torchvision would learn nothing there.
    """

    first_label = 1
    min_side = 300

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        side = min(self.net.transform.fixed_size)
        self.net.anchor_generator = FixedDefaultBoxes(self.net.anchor_generator, side=side)

    @property
    def class_layouts(self) -> Mapping[str, ClassLayout]:
        """The last layer of the classifier of each map."""
        layouts: dict[str, ClassLayout] = {}
        head = self.net.head.classification_head
        counts = self.net.anchor_generator.num_anchors_per_location()
        for index, (module, count) in enumerate(zip(head.module_list, counts, strict=True)):
            # SSDLite's classifiers are sequences, whose last layer is the classifier.
            last = f".{len(module) - 1}" if isinstance(module, nn.Sequential) else ""
            name = f"net.head.classification_head.module_list.{index}{last}"
            layout = ClassLayout(num_groups=count, background="first")
            layouts |= {f"{name}.weight": layout, f"{name}.bias": layout}
        return layouts

    def _predict(
        self, padded: UInt8[torch.Tensor, "b 3 h w"]
    ) -> tuple[dict[str, Float[torch.Tensor, "b n _"]], Float[torch.Tensor, "n 4"], list[int]]:
        # The last map of a small chip is a single place, of which batch norm has no statistics in a batch of one chip.
        is_doubled = self.training and len(padded) == 1
        outputs, anchors, map_sizes = super()._predict(padded.expand(2, -1, -1, -1) if is_doubled else padded)
        if is_doubled:
            outputs = {name: values[:1] for name, values in outputs.items()}
        return outputs, anchors, map_sizes

    def _chip_losses(
        self,
        outputs: dict[str, torch.Tensor],
        anchors: Float[torch.Tensor, "n 4"],
        boxes: ChipBoxes,
        *,
        map_sizes: list[int],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        matched = match(self.net.proposal_matcher, anchors, boxes)
        is_ignored = matched == Matcher.BETWEEN_THRESHOLDS
        logits = outputs["cls_logits"]  # (1, n, c)
        # Ignored default boxes are certain background: neither loss nor gradient, and the last to be chosen.
        certain = torch.full_like(logits[0, 0], _NO_SCORE)
        certain[0] = 0.0
        logits = torch.where(is_ignored[None, :, None], certain, logits)
        target = boxes.target(first_label=self.first_label)
        losses = self.net.compute_loss([target], outputs | {"cls_logits": logits}, [anchors], [matched])
        num_positives = (matched >= 0).sum()
        if not len(boxes.objects) or not num_positives:
            background = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
            worst = functional.cross_entropy(logits[0], background, reduction="none")
            losses["classification"] = worst.topk(math.ceil(self.net.neg_to_pos_ratio)).values.sum()
        return losses, num_positives

    def _postprocess(
        self,
        outputs: Mapping[str, torch.Tensor],
        anchors: Sequence[torch.Tensor],
        image_shapes: Sequence[tuple[int, int]],
        *,
        map_sizes: list[int],
    ) -> list[dict[str, torch.Tensor]]:
        results: list[dict[str, torch.Tensor]] = self.net.postprocess_detections(
            dict(outputs), list(anchors), list(image_shapes)
        )
        return results


class FixedDefaultBoxes(nn.Module):
    """The default boxes of SSD, with their sizes in pixels whatever the image.

    Those of torchvision grow with the image. Their centres are at a map's stride; on the last maps of SSD300, whose
    convolutions have no padding, they are spread over the image, which is the same in images of 300 pixels.

    Args:
        generator: torchvision's.
        side: of the images that it is for, pixels.
    """

    def __init__(self, generator: DefaultBoxGenerator, *, side: int) -> None:
        super().__init__()
        self._generator = generator
        self._side = side

    def num_anchors_per_location(self) -> list[int]:
        """Return the number of default boxes at a place of each map."""
        return self._generator.num_anchors_per_location()

    def forward(self, images: ImageList, maps: list[torch.Tensor]) -> list[Float[torch.Tensor, "n 4"]]:
        """Return the default boxes of each image, (n, 4) xyxy, map by map, place by place."""
        height, width = images.tensors.shape[-2:]
        boxes = [
            self._of_map(index, features, width=width, height=height) for index, features in enumerate(maps)
        ]
        return [torch.cat(boxes)] * len(images.image_sizes)

    def _of_map(
        self, index: int, features: torch.Tensor, *, width: int, height: int
    ) -> Float[torch.Tensor, "n 4"]:
        rows, columns = features.shape[-2:]
        options: dict[str, Any] = {"dtype": features.dtype, "device": features.device}
        steps = self._generator.steps
        is_stride = steps is not None and math.log2(steps[index]).is_integer()
        x_step, y_step = (steps[index],) * 2 if is_stride else (width / columns, height / rows)
        y, x = torch.meshgrid(
            (torch.arange(rows, **options) + 0.5) * y_step,
            (torch.arange(columns, **options) + 0.5) * x_step,
            indexing="ij",
        )
        centres = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)  # (places, 1, 2)
        shares = self._generator._wh_pairs[index].to(**options)
        sides = self._side * (shares.clamp(0, 1) if self._generator.clip else shares)  # (a, 2)
        return torch.cat([centres - sides / 2, centres + sides / 2], dim=-1).reshape(-1, 4)


def match(matcher: Matcher, anchors: Float[torch.Tensor, "n 4"], boxes: ChipBoxes) -> Int[torch.Tensor, " n"]:
    """Match anchors to the objects of a chip by a matcher of torchvision.

    A positive that has a higher IoU with a box that is not learned is ignored. So is a negative that has an IoU above
    0.3 with such a box, or lies at least half inside a box of status `IGNORE`.

    Returns:
        (n,) the index of an object; or `BELOW_LOW_THRESHOLD` of the matcher for a negative, and `BETWEEN_THRESHOLDS`
        for an anchor that is ignored.
    """
    iou = box_iou(boxes.objects, anchors)  # (m, n)
    matched = torch.full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
    matched_iou = anchors.new_zeros(len(anchors))
    if len(boxes.objects):
        matched = matcher(iou)
        matched_iou = iou.gather(0, matched.clamp(min=0)[None])[0]
    other_iou = boxes.other_iou(anchors)
    is_negative = matched < 0
    is_ignored = torch.where(is_negative, boxes.is_on_other(anchors), other_iou > matched_iou)
    is_ignored |= is_negative & boxes.is_in_ignored(anchors)
    return matched.masked_fill(is_ignored, matcher.BETWEEN_THRESHOLDS)


def is_centre_inside(anchors: Float[torch.Tensor, "n 4"], boxes: Float[torch.Tensor, "m 4"]) -> torch.Tensor:
    """Check which anchors have their centre in one of some boxes, all xyxy in one frame."""
    centres = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2  # (n, 1, 2)
    is_inside = (centres >= boxes[:, :2]) & (centres <= boxes[:, 2:])  # (n, m, 2)
    return is_inside.all(dim=2).any(dim=1)
