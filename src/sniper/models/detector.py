"""The detector: chips to losses, images to detections."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import nn
from torchvision.ops import clip_boxes_to_image

from sniper.chips import Standing
from sniper.geometry import Detections
from sniper.models.backbone import STRIDE, Backbone
from sniper.models.roi_head import RoIHead
from sniper.models.rpn import RPN, Proposals
from sniper.models.spec import DetectorSpec


@runtime_checkable
class TargetLike(Protocol):
    """The ground truth of one chip, as the detector reads it."""

    @property
    def boxes(self) -> Float[torch.Tensor, "n 4"]:
        """(n, 4) xyxy, chip frame, clipped to the chip."""

    @property
    def labels(self) -> Int[torch.Tensor, " n"]:
        """(n,) 0..C-1."""

    @property
    def standing(self) -> Int[torch.Tensor, " n"]:
        """(n,) values of `Standing`."""


@runtime_checkable
class BatchLike(Protocol):
    """A batch of chips, as the detector reads it."""

    @property
    def images(self) -> UInt8[torch.Tensor, "b 3 k k"]:
        """(B, 3, K, K) grey levels."""

    @property
    def targets(self) -> Sequence[TargetLike]:
        """B ground truths."""

    @property
    def valid_sizes(self) -> Float[torch.Tensor, "b 2"]:
        """(B, 2) valid box sizes in chip pixels: at least the first, below the second."""


class Detector(nn.Module):
    """SNIPER's two-stage detector (SNIPER §3.3, §4).

    Args:
        spec: its numbers.
        num_classes: without background.
        has_weights: whether to load the backbone's pretrained weights; a checkpoint brings its own.

    Raises:
        ConfigError: if timm does not know the backbone, or it has no features at stride 16.
        WeightsError: if its weights cannot be had or do not fit.
    """

    def __init__(self, spec: DetectorSpec, *, num_classes: int, has_weights: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.num_classes = num_classes
        self.backbone = Backbone(spec.backbone, has_weights=has_weights)
        self.rpn = RPN(spec.rpn, num_channels=self.backbone.num_channels)
        self.roi_head = RoIHead(
            spec.roi_head, num_channels=self.backbone.num_channels, num_classes=num_classes
        )

    def losses(self, batch: BatchLike, *, generator: torch.Generator) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of a batch of chips.

        Args:
            batch: chips and what they teach, on the detector's device.
            generator: draws the RPN's anchors, on that device.

        Returns:
            Four losses by name; their sum is what training lowers. A chip without valid boxes adds nothing to the box
            loss of the RPN, one without any box nothing to either.
        """
        features, objectness, deltas = self._judge_anchors(batch)
        losses = self._rpn_losses(batch, features, objectness, deltas, generator=generator)
        found = self.rpn.propose(
            objectness,
            deltas,
            anchors=self.rpn.anchors(features),
            image_sides=[(batch.images.shape[2], batch.images.shape[3])] * len(batch.targets),
            limit=self.spec.rpn.num_training_proposals,
            valid_sizes=batch.valid_sizes,
        )
        proposals = [
            torch.cat([one.boxes, target.boxes[target.standing == Standing.VALID]])
            for one, target in zip(found, batch.targets, strict=True)
        ]
        head = self.roi_head.losses(
            features,
            proposals,
            boxes=[target.boxes for target in batch.targets],
            labels=[target.labels for target in batch.targets],
            standings=[target.standing for target in batch.targets],
        )
        return losses | head

    def rpn_losses(
        self, batch: BatchLike, *, generator: torch.Generator
    ) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of the RPN alone; the second stage is not run. See `losses`."""
        features, objectness, deltas = self._judge_anchors(batch)
        return self._rpn_losses(batch, features, objectness, deltas, generator=generator)

    def _judge_anchors(self, batch: BatchLike) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give features, scores and shifts of a batch."""
        features = self.backbone(batch.images)
        objectness, deltas = self.rpn(features)
        return features, objectness, deltas

    def _rpn_losses(
        self,
        batch: BatchLike,
        features: Float[torch.Tensor, "b c y x"],
        objectness: Float[torch.Tensor, "b n"],
        deltas: Float[torch.Tensor, "b n 4"],
        *,
        generator: torch.Generator,
    ) -> dict[str, Float[torch.Tensor, ""]]:
        return self.rpn.losses(
            objectness,
            deltas,
            anchors=self.rpn.anchors(features),
            boxes=[target.boxes for target in batch.targets],
            standings=[target.standing for target in batch.targets],
            generator=generator,
        )

    @torch.no_grad()
    def propose(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Proposals]:
        """Give the class-less proposals of some images, each in its own frame."""
        features, sides = self._features(images)
        return self._propose(features, sides)

    @torch.no_grad()
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Find objects.

        Args:
            images: (3, H, W) grey levels each, on the detector's device; sides may differ.

        Returns:
            For each image its detections, in that image's frame, not yet merged: one for each proposal and class whose
            score reaches the floor.
        """
        features, sides = self._features(images)
        proposals = [found.boxes for found in self._propose(features, sides)]
        results = []
        for (mended, scores), side in zip(self.roi_head.detect(features, proposals), sides, strict=True):
            boxes = clip_boxes_to_image(mended, side)
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            rows, labels = torch.where((scores >= self.spec.roi_head.score_floor) & has_area[:, None])
            results.append(
                Detections(
                    boxes=boxes[rows].double().cpu().numpy(),
                    scores=scores[rows, labels].double().cpu().numpy(),
                    labels=labels.cpu().numpy(),
                )
            )
        return results

    def _propose(
        self, features: Float[torch.Tensor, "b c y x"], sides: list[tuple[int, int]]
    ) -> list[Proposals]:
        objectness, deltas = self.rpn(features)
        return self.rpn.propose(
            objectness,
            deltas,
            anchors=self.rpn.anchors(features),
            image_sides=sides,
            limit=self.spec.rpn.num_proposals,
        )

    def _features(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]
    ) -> tuple[Float[torch.Tensor, "b c y x"], list[tuple[int, int]]]:
        """Pad images on the right and below to one size that the stride divides, and compute their features."""
        sides = [(image.shape[1], image.shape[2]) for image in images]
        height = -(-max(side[0] for side in sides) // STRIDE) * STRIDE
        width = -(-max(side[1] for side in sides) // STRIDE) * STRIDE
        padded = torch.zeros((len(images), 3, height, width), dtype=torch.uint8, device=images[0].device)
        for i, image in enumerate(images):
            padded[i, :, : image.shape[1], : image.shape[2]] = image
        return self.backbone(padded), sides
