"""Faster R-CNN and Mask R-CNN of torchvision, with SNIPER's labels.

The RPN learns the valid boxes: anchors on other boxes are ignored. Proposals out of the valid range are dropped; the
head learns all objects, as in the paper, and so does that of masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers

from sniper.chips import ChipTargets
from sniper.geometry import Detections, SelectDetections
from sniper.geometry.boxes import Sides
from sniper.models.chip_boxes import ChipBoxes
from sniper.models.mask_head import choose_masked, predict_masks, rasterize_targets
from sniper.models.matching import Match, sample_anchors
from sniper.models.protocol import (
    BatchLike,
    ClassLayout,
    Proposals,
    ProposingModel,
    count_chips,
    is_taught,
)
from sniper.models.roi_head import Positives
from sniper.models.torchvision_detectors.adapter import TorchvisionModel, shapes_of


class RCNNModel(TorchvisionModel, ProposingModel):
    """A two-stage detector of torchvision."""

    first_label = 1

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        heads = self.net.roi_heads
        for stage in (self.net.rpn, heads):
            stage.fg_bg_sampler = ChipSampler(
                count=stage.fg_bg_sampler.batch_size_per_image,
                positive_fraction=stage.fg_bg_sampler.positive_fraction,
            )

    @property
    def second_stage(self) -> tuple[nn.Module, ...]:
        """The heads of classes, boxes and masks."""
        return (self.net.roi_heads,)

    @property
    def class_layouts(self) -> Mapping[str, ClassLayout]:
        """The classifier and the regressor of the second stage, and the masks of classes."""
        name = "net.roi_heads.box_predictor"
        classes = ClassLayout(background="first")
        deltas = ClassLayout(background="first", rows_per_class=4)
        masks = {}
        if self.spec.mask_side is not None:
            logits = "net.roi_heads.mask_predictor.mask_fcn_logits"
            masks = dict.fromkeys((f"{logits}.weight", f"{logits}.bias"), classes)
        return masks | {
            f"{name}.cls_score.weight": classes,
            f"{name}.cls_score.bias": classes,
            f"{name}.bbox_pred.weight": deltas,
            f"{name}.bbox_pred.bias": deltas,
        }

    def losses_and_counts(
        self, batch: BatchLike
    ) -> tuple[dict[str, Float[torch.Tensor, ""]], dict[str, Float[torch.Tensor, ""]]]:
        """Compute the losses of a batch of chips, and the counts of `DetectorModel.losses_and_counts`.

        Returns:
            `rpn_objectness`, `rpn_box`, `head_class` and `head_box`, to be added up, and `mask` of Mask R-CNN. Those of
            the RPN are means over chips, those of the head means over the sampled proposals of all chips, or over those
            of them that are positive and whose object has a mask.
        """
        targets = batch.targets
        padded, image_sides = self.pad(list(batch.images))
        maps = self.features(padded)
        predictions = self._predict(padded, maps)
        rpn_losses, objectness_of_chips = self._rpn_losses(predictions, targets)
        proposals = [
            each.boxes for each in self._propose(predictions, image_sides, valid_sizes=targets.valid_sizes)
        ]
        head_losses, counts, class_of_chips = self._head_losses(padded, maps, proposals, targets)
        of_chips = (objectness_of_chips + class_of_chips) * len(targets)
        return rpn_losses | head_losses, counts | count_chips(targets, of_chips)

    def rpn_losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of the RPN alone, without running the second stage. See `losses`."""
        padded, _ = self.pad(list(batch.images))
        return self._rpn_losses(self._predict(padded, self.features(padded)), batch.targets)[0]

    @torch.no_grad()
    def propose(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Proposals]:
        """Return the class-less proposals of each image, in its own frame."""
        padded, image_sides = self.pad(images)
        return self._propose(self._predict(padded, self.features(padded)), image_sides)

    @torch.no_grad()
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Detect objects; see `DetectorModel.detect`. Detections of one class have passed torchvision's NMS."""
        padded, image_sides = self.pad(images)
        return self._detect(padded, self.features(padded), image_sides)

    @torch.no_grad()
    def detect_masks(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]], select: SelectDetections
    ) -> list[Detections]:
        """Detect objects, and predict the masks of those that are selected; see `DetectorModel.detect_masks`."""
        side = self.spec.mask_side
        if side is None:
            return super().detect_masks(images, select)
        padded, image_sides = self.pad(images)
        maps = self.features(padded)
        detections = self._detect(padded, maps, image_sides)
        return [
            predict_masks(
                select(image, each),
                lambda boxes, image=image: self._mask_logits(  # type: ignore[misc]
                    padded[image : image + 1],
                    {name: of_map[image : image + 1] for name, of_map in maps.items()},
                    [boxes],
                )[:, self.first_label :],
                side=side,
                device=padded.device,
            )
            for image, each in enumerate(detections)
        ]

    def _detect(
        self,
        padded: UInt8[torch.Tensor, "b 3 h w"],
        maps: Mapping[str, torch.Tensor],
        image_sides: Sequence[Sides],
    ) -> list[Detections]:
        proposals = [each.boxes for each in self._propose(self._predict(padded, maps), image_sides)]
        logits, deltas = self._head(padded, maps, proposals)
        boxes, scores, labels = self.net.roi_heads.postprocess_detections(
            logits, deltas, proposals, [sides.hw for sides in image_sides]
        )
        return [
            self.to_detections({"boxes": of_image, "scores": scores[index], "labels": labels[index]})
            for index, of_image in enumerate(boxes)
        ]

    def _predict(
        self, padded: UInt8[torch.Tensor, "b 3 h w"], maps: Mapping[str, torch.Tensor]
    ) -> "_AnchorPredictions":
        """Predict objectness and deltas of all anchors."""
        objectness, deltas = self.net.rpn.head(list(maps.values()))
        (anchors,) = self.net.rpn.anchor_generator(ImageList(padded[:1], [(0, 0)]), shapes_of(maps))
        num_anchors = [scores[0].numel() for scores in objectness]
        flat_objectness, flat_deltas = concat_box_prediction_layers(objectness, deltas)
        return _AnchorPredictions(
            objectness=flat_objectness.float().reshape(len(padded), -1),
            deltas=flat_deltas.float().reshape(len(padded), -1, 4),
            anchors=anchors,
            num_anchors=num_anchors,
        )

    def _rpn_losses(
        self, predictions: "_AnchorPredictions", targets: ChipTargets[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], Float[torch.Tensor, " b"]]:
        """Compute the losses of the RPN, and what each chip adds to the objectness loss, without gradient."""
        rpn, anchors = self.net.rpn, predictions.anchors
        of_chips = []
        for index, seed in enumerate(targets.seeds):
            boxes = ChipBoxes.of(targets, index, "valid")
            rpn.fg_bg_sampler.seeds = (seed,)
            (labels,), (matched,) = rpn.assign_targets_to_anchors([anchors], [boxes.target(first_label=1)])
            is_ignored = boxes.is_on_other(anchors) | (boxes.is_in_ignored(anchors) & (labels != 1))
            labels[is_ignored] = -1
            objectness, deltas = predictions.objectness[index], predictions.deltas[index]
            if (labels < 0).all():
                of_chips.append((objectness.sum() * 0, deltas.sum() * 0))
                continue
            regression_targets = rpn.box_coder.encode([matched], [anchors])
            of_chips.append(rpn.compute_loss(objectness[:, None], deltas, [labels], list(regression_targets)))
        objectness_losses, box_losses = (torch.stack(losses) for losses in zip(*of_chips, strict=True))
        losses = {"rpn_objectness": objectness_losses.mean(), "rpn_box": box_losses.mean()}
        return losses, objectness_losses.detach() / len(targets)

    @torch.no_grad()
    def _propose(
        self,
        predictions: "_AnchorPredictions",
        image_sides: Sequence[Sides],
        *,
        valid_sizes: Float[torch.Tensor, "b 2"] | None = None,
    ) -> list[Proposals]:
        """Return the best proposals of each image; those whose size is not in a half-open range are left out."""
        rpn, anchors = self.net.rpn, predictions.anchors
        num_images = len(image_sides)
        boxes = rpn.box_coder.decode(predictions.deltas.reshape(-1, 4), [anchors] * num_images)
        boxes, objectness = boxes.reshape(num_images, -1, 4), predictions.objectness
        if valid_sizes is not None:
            limits = boxes.new_tensor([[sides.width, sides.height] for sides in image_sides])[:, None]
            clipped = boxes.reshape(num_images, -1, 2, 2).clamp(min=0).minimum(limits[:, :, None])
            sizes = (clipped[:, :, 1] - clipped[:, :, 0]).prod(dim=2).sqrt()
            is_valid = (sizes >= valid_sizes[:, :1]) & (sizes < valid_sizes[:, 1:])
            # Without area, they are dropped before the NMS.
            boxes = torch.where(is_valid[..., None], boxes, 0.0)
            objectness = objectness.masked_fill(~is_valid, -torch.inf)
        kept = rpn.filter_proposals(
            boxes, objectness, [sides.hw for sides in image_sides], predictions.num_anchors
        )
        return [Proposals(boxes=boxes, scores=scores) for boxes, scores in zip(*kept, strict=True)]

    def _head(
        self,
        padded: UInt8[torch.Tensor, "b 3 h w"],
        maps: Mapping[str, torch.Tensor],
        proposals: Sequence[torch.Tensor],
    ) -> tuple[Float[torch.Tensor, "r k"], Float[torch.Tensor, "r d"]]:
        """Predict the classes and the deltas of the proposals of all images."""
        heads, hw = self.net.roi_heads, (padded.shape[2], padded.shape[3])
        # The strides are derived from the sides, which must be those of the maps.
        pooled = heads.box_roi_pool(dict(maps), list(proposals), [hw] * len(proposals))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return logits.float(), deltas.float()

    def _mask_logits(
        self,
        padded: UInt8[torch.Tensor, "b 3 h w"],
        maps: Mapping[str, torch.Tensor],
        boxes: Sequence[torch.Tensor],
    ) -> Float[torch.Tensor, "r k s s"]:
        """Predict the masks in the boxes of all images, for each class, background first."""
        heads, hw = self.net.roi_heads, (padded.shape[2], padded.shape[3])
        pooled = heads.mask_roi_pool(dict(maps), list(boxes), [hw] * len(boxes))
        logits: torch.Tensor = heads.mask_predictor(heads.mask_head(pooled))
        return logits.float()

    def _mask_loss(
        self,
        padded: UInt8[torch.Tensor, "b 3 h w"],
        maps: Mapping[str, torch.Tensor],
        positives: Positives,
        targets: ChipTargets[torch.Tensor],
    ) -> Float[torch.Tensor, ""]:
        """Compute the mean binary cross entropy of the masks of positive proposals whose object has a mask."""
        assert self.spec.mask_side is not None
        rows = choose_masked(positives, targets, count=max(len(positives.chips), 1))
        chips, boxes, objects = positives.chips[rows], positives.proposals[rows], positives.box_index[rows]
        logits = self._mask_logits(padded, maps, [boxes[chips == chip] for chip in range(len(targets))])
        labels = targets.labels[chips, objects] + self.first_label
        of_class = logits[torch.arange(len(rows), device=rows.device), labels]
        masks = rasterize_targets(targets, boxes, chips, objects, side=self.spec.mask_side)
        loss = functional.binary_cross_entropy_with_logits(of_class, masks, reduction="sum")
        return loss / max(masks.numel(), 1) + logits.sum() * 0

    def _head_losses(
        self,
        padded: UInt8[torch.Tensor, "b 3 h w"],
        maps: Mapping[str, torch.Tensor],
        proposals: Sequence[torch.Tensor],
        targets: ChipTargets[torch.Tensor],
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Float[torch.Tensor, " b"]]:
        """Compute the losses of sampled proposals, counts, and what each chip adds to the loss of classes."""
        heads = self.net.roi_heads
        sampled, labels, target_boxes, chips, objects_of = [], [], [], [], []
        for index, of_chip in enumerate(proposals):
            valid = targets.boxes[index, : targets.num_valid[index]]
            boxes = ChipBoxes.of(targets, index, "all")
            candidates = torch.cat([of_chip, valid])
            # A chip without proposals has no boxes to match either, as far as torchvision is concerned.
            objects = boxes.objects if len(candidates) else boxes.objects[:0]
            (matched,), (classes,) = heads.assign_targets_to_proposals(
                [candidates], [objects], [boxes.labels + self.first_label]
            )
            classes[boxes.is_in_ignored(candidates) & (classes == 0)] = -1
            heads.fg_bg_sampler.seeds = (targets.seeds[index],)
            (rows,) = heads.subsample([classes])
            sampled.append(candidates[rows])
            labels.append(classes[rows])
            references = objects if len(objects) else candidates.new_zeros((1, 4))
            target_boxes.append(references[matched[rows]])
            chips.append(torch.full_like(rows, index))
            (index_of,) = torch.where(is_taught(targets.status[index, : targets.num_boxes[index]], "all"))
            objects_of.append(index_of[matched[rows]] if len(objects) else torch.zeros_like(rows))
        has_none = not any(len(rows) for rows in chips)
        if has_none:  # all layers must take part in the losses
            sampled[0] = padded.new_tensor([[0, 0, 1, 1]], dtype=torch.float32)
            labels[0], target_boxes[0], chips[0] = chips[0].new_zeros(1), sampled[0], chips[0].new_zeros(1)
            objects_of[0] = chips[0].new_zeros(1)
        logits, deltas = self._head(padded, maps, sampled)
        regression_targets = heads.box_coder.encode(target_boxes, sampled)
        class_loss, box_loss = fastrcnn_loss(logits, deltas, labels, regression_targets)
        all_labels, all_chips = torch.cat(labels), torch.cat(chips)
        of_proposals = functional.cross_entropy(logits.detach(), all_labels, reduction="none")
        of_chips = of_proposals.new_zeros(len(targets)).index_add_(0, all_chips, of_proposals)
        is_positive = all_labels > 0
        counts = {
            "positives": is_positive.float().sum(),
            "correct": (is_positive & (logits.argmax(dim=1) == all_labels)).float().sum(),
        }
        factor = 0.0 if has_none else 1.0
        losses = {"head_class": class_loss * factor, "head_box": box_loss * factor}
        if self.spec.mask_side is not None:
            positives = Positives(
                proposals=torch.cat(sampled),
                chips=all_chips,
                box_index=torch.cat(objects_of),
                is_positive=is_positive,
            )
            losses["mask"] = self._mask_loss(padded, maps, positives, targets)
        return losses, counts, of_chips * factor / len(all_labels)


class _AnchorPredictions:
    """The outputs of the RPN for all anchors of a batch.

    Attributes:
        objectness: (B, n) logits.
        deltas: (B, n, 4) box deltas against the anchors.
        anchors: (n, 4) xyxy, frame of the images, the same for all.
        num_anchors: of each feature map.
    """

    def __init__(
        self,
        *,
        objectness: Float[torch.Tensor, "b n"],
        deltas: Float[torch.Tensor, "b n 4"],
        anchors: Float[torch.Tensor, "n 4"],
        num_anchors: list[int],
    ) -> None:
        self.objectness, self.deltas = objectness, deltas
        self.anchors, self.num_anchors = anchors, num_anchors


class ChipSampler:
    """Samples anchors and proposals as torchvision does, by the seed of their chip instead of a global generator.

    Args:
        count: to sample in each chip.
        positive_fraction: maximum share of positives.

    Attributes:
        seeds: of the chips that are sampled next.
    """

    def __init__(self, *, count: int, positive_fraction: float) -> None:
        self._count = count
        self._positive_fraction = positive_fraction
        self.seeds: tuple[int, ...] = ()

    def __call__(self, labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return for each chip which positives and which negatives are sampled.

        Args:
            labels: for each chip (n,), above 0 for positives, 0 for negatives, below for ignored ones.
        """
        positives, negatives = [], []
        for of_chip, seed in zip(labels, self.seeds, strict=True):
            state = torch.full_like(of_chip, Match.NEGATIVE, dtype=torch.int64)
            state[of_chip > 0] = Match.POSITIVE
            state[of_chip < 0] = Match.IGNORED
            (is_sampled,) = sample_anchors(
                state[None], count=self._count, positive_fraction=self._positive_fraction, seeds=(seed,)
            )
            positives.append(is_sampled & (state == Match.POSITIVE))
            negatives.append(is_sampled & (state == Match.NEGATIVE))
        return positives, negatives
