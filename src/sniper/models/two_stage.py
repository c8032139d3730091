"""The two-stage detector: losses from chips, detections from images."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import nn
from torchvision.ops import clip_boxes_to_image

from sniper.chips import BoxStatus, ChipTargets
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.models.backbone import Backbone
from sniper.models.roi_head import RoIHead
from sniper.models.rpn import RPN, Proposals
from sniper.models.spec import DetectorSpec

CLASS_TENSORS = ("roi_head.classes.weight", "roi_head.classes.bias")
"""Names of the tensors with a row for each class, and one for the background after them."""

_GRID = 64  # pixels; a multiple of all strides


@runtime_checkable
class BatchLike(Protocol):
    """A batch of chips, as the detector reads it."""

    @property
    def images(self) -> UInt8[torch.Tensor, "b 3 h w"]:
        """(B, 3, H, W) RGB values."""

    @property
    def targets(self) -> ChipTargets[torch.Tensor]:
        """The ground truth of the B chips."""


class TwoStageDetector(nn.Module):
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
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.backbone = Backbone(
            spec.backbone, pyramid_channels=spec.roi_head.channels, has_weights=has_weights
        )
        num_channels, strides = self.backbone.num_channels, self.backbone.strides
        self.rpn = RPN(spec.rpn, num_channels=num_channels, strides=strides)
        self.roi_head = RoIHead(
            spec.roi_head, num_channels=num_channels, strides=strides, num_classes=num_classes
        )

    def losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of a batch of chips; see `losses_and_counts`."""
        return self.losses_and_counts(batch)[0]

    def losses_and_counts(
        self, batch: BatchLike
    ) -> tuple[dict[str, Float[torch.Tensor, ""]], dict[str, Float[torch.Tensor, ""]]]:
        """Compute the losses of a batch of chips, and count the proposals that the second stage classifies correctly.

        Each is a mean over chips, and that of a chip does not depend on the others (except through batch norm). The
        losses of a batch are therefore the mean over equal parts of it, on whatever devices those are computed.

        Args:
            batch: on the detector's device.

        Returns:
            Four losses by name, to be added up. A chip without valid boxes contributes nothing to `rpn_box`, one
            without any box nothing to `head_box` either. And counts that are no losses: `positives`, the positive
            proposals of the second stage; `correct`, those of them whose most probable class is right;
            `negative_chips`, the chips without a valid box; and the sums of the classification losses of both stages
            over these chips, `negative_loss`, and over the others, `positive_loss`.
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
        valid_boxes = [boxes[:count] for boxes, count in zip(targets.boxes, targets.num_valid, strict=True)]
        head_losses, counts, class_of_chips = self.roi_head.losses(
            maps,
            [torch.cat(boxes) for boxes in zip(proposals.boxes, valid_boxes, strict=True)],
            is_real=[
                torch.cat([is_real, is_real.new_ones(len(boxes))])
                for is_real, boxes in zip(proposals.is_real, valid_boxes, strict=True)
            ],
            targets=targets,
        )
        is_negative = ~(targets.status == BoxStatus.VALID).any(dim=1)
        of_chips = (objectness_of_chips + class_of_chips) * len(targets)
        counts |= {
            "negative_chips": is_negative.float().sum(),
            "negative_loss": (of_chips * is_negative).sum(),
            "positive_loss": (of_chips * ~is_negative).sum(),
        }
        return rpn_losses | head_losses, counts

    def rpn_losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of the RPN alone, without running the second stage. See `losses`."""
        return self.rpn.losses(self.rpn(self.backbone(batch.images)), batch.targets)[0]

    @torch.no_grad()
    def propose(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Proposals]:
        """Return the class-less proposals of each image, in its own frame."""
        maps, image_sides = self._features(images)
        return self._propose(maps, image_sides)

    @torch.no_grad()
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Detect objects.

        Args:
            images: (3, H, W) RGB values each, on the detector's device; sides may differ.

        Returns:
            The detections of each image, in its own frame, before non-maximum suppression: one for each proposal and
            class whose score is at least `roi_head.score_threshold`.
        """
        maps, image_sides = self._features(images)
        proposals = [proposals.boxes for proposals in self._propose(maps, image_sides)]
        detections = []
        for (boxes, scores), sides in zip(self.roi_head.detect(maps, proposals), image_sides, strict=True):
            clipped = clip_boxes_to_image(boxes, sides.hw)
            has_area = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
            rows, labels = torch.where((scores >= self.spec.roi_head.score_threshold) & has_area[:, None])
            detections.append(
                Detections(
                    boxes=clipped[rows].double().cpu().numpy(),
                    scores=scores[rows, labels].double().cpu().numpy(),
                    labels=labels.cpu().numpy(),
                )
            )
        return detections

    def _propose(self, maps: Sequence[torch.Tensor], image_sides: Sequence[Sides]) -> list[Proposals]:
        limit = self.spec.rpn.post_nms_top_n
        return self.rpn.propose(self.rpn(maps), image_sides=image_sides, limit=limit).split()

    def _features(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]
    ) -> tuple[Sequence[torch.Tensor], list[Sides]]:
        """Pad images with black, right and below, to one size, and compute their features.

        The size is a multiple of the same grid for all backbones, so that images which are padded to the same size have
        the same features in a batch as alone.

        Returns:
            Feature maps, and the sides of each image before padding.
        """
        image_sides = [Sides(width=image.shape[2], height=image.shape[1]) for image in images]
        height = -(-max(sides.height for sides in image_sides) // _GRID) * _GRID
        width = -(-max(sides.width for sides in image_sides) // _GRID) * _GRID
        padded = torch.zeros((len(images), 3, height, width), dtype=torch.uint8, device=images[0].device)
        for i, image in enumerate(images):
            padded[i, :, : image.shape[1], : image.shape[2]] = image
        return self.backbone(padded), image_sides
