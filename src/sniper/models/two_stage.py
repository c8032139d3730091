"""The two-stage detector: losses from chips, detections from images."""

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from jaxtyping import Float, UInt8
from torch import nn
from torchvision.ops import clip_boxes_to_image

from sniper.chips import BoxStatus
from sniper.chips.targets import padded_count
from sniper.geometry import Detections, SelectDetections
from sniper.geometry.boxes import Sides
from sniper.geometry.focus_cells import FocusCells
from sniper.models.backbone import Backbone
from sniper.models.focus_head import FocusHead
from sniper.models.folding import fold_batch_norm
from sniper.models.mask_head import MaskHead
from sniper.models.protocol import (
    BatchLike,
    ClassLayout,
    Proposals,
    ProposingModel,
    count_chips,
    pad_images,
    to_detections,
)
from sniper.models.roi_head import RoIHead
from sniper.models.rpn import RPN, ProposalBatch
from sniper.models.spec import DetectorSpec

CLASS_TENSORS = ("roi_head.classes.weight", "roi_head.classes.bias")
"""Names of the tensors with a row for each class, and one for the background after them."""

MASK_TENSORS = ("mask_head.predictor.mask_fcn_logits.weight", "mask_head.predictor.mask_fcn_logits.bias")
"""Names of the tensors with a row for each class, if masks are of classes."""


class TwoStageDetector(ProposingModel):
    """SNIPER's detector, a Faster R-CNN (SNIPER §3.4, §4).

    Args:
        spec: the configuration.
        num_classes: without background.
        has_weights: whether to load the backbone's pretrained weights; not needed if a checkpoint is loaded afterwards.

    Raises:
        ConfigError: if timm does not know the backbone, or it has no features at stride 16.
        WeightsError: if its weights cannot be loaded.
    """

    def __init__(self, spec: DetectorSpec, *, num_classes: int, has_weights: bool = True) -> None:
        super().__init__(spec, num_classes=num_classes)
        self.backbone = Backbone(
            spec.backbone, pyramid_channels=spec.roi_head.channels, has_weights=has_weights
        )
        num_channels, strides = self.backbone.num_channels, self.backbone.strides
        self.rpn = RPN(spec.rpn, num_channels=num_channels, strides=strides)
        self.roi_head = RoIHead(
            spec.roi_head, num_channels=num_channels, strides=strides, num_classes=num_classes
        )
        self.mask_head = None
        if spec.mask_head is not None:
            self.mask_head = MaskHead(
                spec.mask_head, num_channels=num_channels, strides=strides, num_classes=num_classes
            )
        self.focus_head = None
        if spec.focus:
            self.focus_head = FocusHead(
                channels=spec.rpn.channels,
                num_channels=num_channels,
                strides=strides,
                loss_weight=spec.focus_loss_weight,
            )

    @property
    def trunk(self) -> nn.Module:
        """The convolutions of the backbone."""
        trunk: nn.Module = self.backbone.trunk
        return trunk

    @property
    def class_layouts(self) -> Mapping[str, ClassLayout]:
        """The classifier of the second stage, and the masks of classes."""
        layouts = dict.fromkeys(CLASS_TENSORS, ClassLayout(background="last"))
        if self.spec.mask_head is None or self.spec.mask_head.class_agnostic:
            return layouts
        return layouts | dict.fromkeys(MASK_TENSORS, ClassLayout())

    @property
    def second_stage(self) -> tuple[nn.Module, ...]:
        """The head of classes and boxes, and those of masks and of the focus."""
        heads = (self.roi_head, self.mask_head, self.focus_head)
        return tuple(head for head in heads if head is not None)

    def for_inference(self) -> Self:
        """Return a copy for inference, whose batch norm is folded into the convolutions before it."""
        model = copy.deepcopy(self)
        model.backbone.trunk = fold_batch_norm(model.backbone.trunk)
        return model.to(memory_format=torch.channels_last)

    def losses_and_counts(
        self, batch: BatchLike
    ) -> tuple[dict[str, Float[torch.Tensor, ""]], dict[str, Float[torch.Tensor, ""]]]:
        """Compute the losses of a batch of chips, and count the proposals that the second stage classifies correctly.

        Each is a mean over chips, and that of a chip does not depend on the others (except through batch norm). The
        losses of a batch are therefore the mean over equal parts of it, on whatever devices those are computed.

        Args:
            batch: on the detector's device.

        Returns:
            Four losses by name, to be added up, and `mask` and `focus` if there are such heads. A chip without valid
            boxes contributes nothing to `rpn_box`, one without any box nothing to `head_box` and `mask` either. And
            counts that are no losses: `positives`, the positive proposals of the second stage; `correct`, those of
            them whose most probable class is right; `negative_chips`, the chips without a valid box; and the sums of
            the classification losses of both stages over these chips, `negative_loss`, and over the others,
            `positive_loss`.
        """
        targets = batch.targets
        maps = self.backbone(batch.images)
        predictions = self.rpn(maps)
        rpn_losses, objectness_of_chips = self.rpn.losses(predictions, targets)
        height, width = batch.images.shape[2:]
        proposals = self.rpn.propose(
            predictions,
            image_sides=[Sides(width, height)] * len(targets),
            limit=self.spec.rpn.post_nms_top_n_train,
            valid_sizes=targets.valid_sizes,
        )
        num_valid = padded_count(max(targets.num_valid))  # so that few shapes occur
        is_valid = targets.status[:, :num_valid] == BoxStatus.VALID
        head_losses, counts, class_of_chips, positives = self.roi_head.losses(
            maps,
            torch.cat([proposals.boxes, targets.boxes[:, :num_valid]], dim=1),
            is_real=torch.cat([proposals.is_real, is_valid], dim=1),
            targets=targets,
        )
        if self.mask_head is not None:
            head_losses |= self.mask_head.losses(maps, positives, targets)
        if self.focus_head is not None:
            head_losses |= self.focus_head.losses(maps, targets, sides=Sides(width, height))
        of_chips = (objectness_of_chips + class_of_chips) * len(targets)
        return rpn_losses | head_losses, counts | count_chips(targets, of_chips)

    def rpn_losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of the RPN alone, without running the second stage. See `losses`."""
        return self.rpn.losses(self.rpn(self.backbone(batch.images)), batch.targets)[0]

    @torch.no_grad()
    def propose(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Proposals]:
        """Return the class-less proposals of each image, in its own frame."""
        maps, image_sides = self._features(images)
        return self._propose(maps, image_sides).split()

    @torch.no_grad()
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Detect objects.

        Args:
            images: (3, H, W) RGB values each, on the detector's device; sides may differ.

        Returns:
            The detections of each image, in its own frame, before non-maximum suppression: one for each proposal and
            class whose score is at least `roi_head.score_threshold`.
        """
        return self._detect(*self._features(images))

    @torch.no_grad()
    def detect_masks(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]], select: SelectDetections
    ) -> list[Detections]:
        """Detect objects, and predict the masks of those that are selected; see `DetectorModel.detect_masks`."""
        if self.mask_head is None:
            return super().detect_masks(images, select)
        return self._detect_selected(*self._features(images), select)

    @torch.no_grad()
    def detect_focused(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]], select: SelectDetections | None
    ) -> tuple[list[Detections], list[FocusCells]]:
        """Detect objects, and predict where those are that are left to finer levels; see `DetectorModel`."""
        if self.focus_head is None:
            return super().detect_focused(images, select)
        maps, image_sides = self._features(images)
        if select is None:
            detections = self._detect(maps, image_sides)
        else:
            detections = self._detect_selected(maps, image_sides, select)
        return detections, self.focus_head.predict(maps, image_sides)

    def _detect_selected(
        self, maps: Sequence[torch.Tensor], image_sides: Sequence[Sides], select: SelectDetections
    ) -> list[Detections]:
        """Detect objects, and predict the masks of those that are selected."""
        assert self.mask_head is not None
        detections = self._detect(maps, image_sides)
        return self.mask_head.predict(maps, [select(index, each) for index, each in enumerate(detections)])

    def _detect(self, maps: Sequence[torch.Tensor], image_sides: Sequence[Sides]) -> list[Detections]:
        proposals = self._propose(maps, image_sides)
        num_proposals = int(proposals.is_real.sum(dim=1).amax())
        boxes_and_scores = self.roi_head.detect(maps, proposals.boxes[:, :num_proposals])
        detections = []
        for boxes, scores, is_real, sides in zip(
            *boxes_and_scores, proposals.is_real[:, :num_proposals], image_sides, strict=True
        ):
            clipped = clip_boxes_to_image(boxes, sides.hw)
            is_box = (clipped[:, 2:] > clipped[:, :2]).all(dim=1) & is_real
            rows, labels = torch.where((scores >= self.spec.roi_head.score_threshold) & is_box[:, None])
            detections.append(to_detections(clipped[rows], scores[rows, labels], labels))
        return detections

    def _propose(self, maps: Sequence[torch.Tensor], image_sides: Sequence[Sides]) -> ProposalBatch:
        limit = self.spec.rpn.post_nms_top_n
        return self.rpn.propose(self.rpn(maps), image_sides=image_sides, limit=limit)

    def _features(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]
    ) -> tuple[Sequence[torch.Tensor], list[Sides]]:
        """Compute the features of padded images.

        Returns:
            Feature maps, and the sides of each image before padding.
        """
        padded, image_sides = pad_images(images)
        return self.backbone(padded), image_sides
