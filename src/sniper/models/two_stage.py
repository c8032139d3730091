"""The detector: chips to losses, images to detections."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import nn
from torchvision.ops import clip_boxes_to_image

from sniper.geometry import Detections
from sniper.models.backbone import Backbone
from sniper.models.roi_head import RoIHead
from sniper.models.rpn import RPN, Proposals
from sniper.models.spec import DetectorSpec

_GRID = 64  # pixels


@runtime_checkable
class BatchLike(Protocol):
    """A batch of chips, as the detector reads it."""

    @property
    def images(self) -> UInt8[torch.Tensor, "b 3 h w"]:
        """(B, 3, H, W) grey levels."""

    @property
    def boxes(self) -> Float[torch.Tensor, "b m 4"]:
        """(B, M, 4) xyxy, chip frame, clipped to the chip, the valid ones of each chip first; M at least 1."""

    @property
    def labels(self) -> Int[torch.Tensor, "b m"]:
        """(B, M) 0..C-1."""

    @property
    def status(self) -> Int[torch.Tensor, "b m"]:
        """(B, M) values of `BoxStatus`."""

    @property
    def num_boxes(self) -> Sequence[int]:
        """How many boxes each of the B chips has; numbers rather than tensors, so that nothing waits."""

    @property
    def num_valid(self) -> Sequence[int]:
        """How many of them are valid."""

    @property
    def valid_sizes(self) -> Float[torch.Tensor, "b 2"]:
        """(B, 2) valid box sizes in chip pixels: at least the first, below the second."""

    @property
    def seeds(self) -> Sequence[int]:
        """Of the B chips; what is drawn when a chip is learnt from depends on its own."""


class TwoStageDetector(nn.Module):
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
        self.backbone = Backbone(
            spec.backbone, pyramid_channels=spec.roi_head.channels, has_weights=has_weights
        )
        num_channels, strides = self.backbone.num_channels, self.backbone.strides
        self.rpn = RPN(spec.rpn, num_channels=num_channels, strides=strides)
        self.roi_head = RoIHead(
            spec.roi_head, num_channels=num_channels, strides=strides, num_classes=num_classes
        )

    def losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of a batch of chips.

        Each is a mean over chips, of what that chip alone says: the losses of a batch are the mean of those of its
        parts, on however many devices those are computed (batch norm's statistics apart).

        Args:
            batch: chips and what they teach, on the detector's device.

        Returns:
            Four losses by name; their sum is what training lowers. A chip without valid boxes adds nothing to the box
            loss of the RPN, one without any box nothing to either.
        """
        maps, objectness, deltas, anchors = self._judge_anchors(batch)
        losses = self._rpn_losses(batch, objectness, deltas, anchors)
        found = self.rpn.propose(
            objectness,
            deltas,
            anchors=anchors,
            image_sides=[(batch.images.shape[2], batch.images.shape[3])] * len(batch.seeds),
            limit=self.spec.rpn.post_nms_top_n_train,
            valid_sizes=batch.valid_sizes,
        )
        own = [boxes[:count] for boxes, count in zip(batch.boxes, batch.num_valid, strict=True)]
        head = self.roi_head.losses(
            maps,
            [torch.cat(parts) for parts in zip(found.boxes, own, strict=True)],
            is_real=[
                torch.cat([flags, flags.new_ones(len(boxes))])
                for flags, boxes in zip(found.is_real, own, strict=True)
            ],
            boxes=batch.boxes,
            labels=batch.labels,
            status=batch.status,
        )
        return losses | head

    def rpn_losses(self, batch: BatchLike) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the losses of the RPN alone; the second stage is not run. See `losses`."""
        _, objectness, deltas, anchors = self._judge_anchors(batch)
        return self._rpn_losses(batch, objectness, deltas, anchors)

    def _judge_anchors(
        self, batch: BatchLike
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give features, and of all anchors scores, shifts and places."""
        maps = self.backbone(batch.images)
        objectness, deltas = self.rpn(maps)
        return maps, objectness, deltas, self.rpn.anchors(maps)

    def _rpn_losses(
        self,
        batch: BatchLike,
        objectness: Float[torch.Tensor, "b n"],
        deltas: Float[torch.Tensor, "b n 4"],
        anchors: Float[torch.Tensor, "n 4"],
    ) -> dict[str, Float[torch.Tensor, ""]]:
        return self.rpn.losses(
            objectness,
            deltas,
            anchors=anchors,
            boxes=batch.boxes,
            status=batch.status,
            num_boxes=batch.num_boxes,
            seeds=batch.seeds,
        )

    @torch.no_grad()
    def propose(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Proposals]:
        """Give the class-less proposals of some images, each in its own frame."""
        maps, sides = self._features(images)
        return self._propose(maps, sides)

    @torch.no_grad()
    def detect(self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]) -> list[Detections]:
        """Find objects.

        Args:
            images: (3, H, W) grey levels each, on the detector's device; sides may differ.

        Returns:
            For each image its detections, in that image's frame, not yet merged: one for each proposal and class whose
            score reaches the floor.
        """
        maps, sides = self._features(images)
        proposals = [found.boxes for found in self._propose(maps, sides)]
        results = []
        for (mended, scores), side in zip(self.roi_head.detect(maps, proposals), sides, strict=True):
            boxes = clip_boxes_to_image(mended, side)
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            rows, labels = torch.where((scores >= self.spec.roi_head.score_threshold) & has_area[:, None])
            results.append(
                Detections(
                    boxes=boxes[rows].double().cpu().numpy(),
                    scores=scores[rows, labels].double().cpu().numpy(),
                    labels=labels.cpu().numpy(),
                )
            )
        return results

    def _propose(self, maps: Sequence[torch.Tensor], sides: list[tuple[int, int]]) -> list[Proposals]:
        objectness, deltas = self.rpn(maps)
        found = self.rpn.propose(
            objectness,
            deltas,
            anchors=self.rpn.anchors(maps),
            image_sides=sides,
            limit=self.spec.rpn.post_nms_top_n,
        )
        return found.split()

    def _features(
        self, images: Sequence[UInt8[torch.Tensor, "3 _ _"]]
    ) -> tuple[Sequence[torch.Tensor], list[tuple[int, int]]]:
        """Fill images up with black, right and below as chips are, to one size on a grid, and compute their features.

        All strides divide the grid. It is the same for all networks, so that images that fill up to the same sides are
        searched together as they are alone.
        """
        sides = [(image.shape[1], image.shape[2]) for image in images]
        height = -(-max(side[0] for side in sides) // _GRID) * _GRID
        width = -(-max(side[1] for side in sides) // _GRID) * _GRID
        padded = torch.zeros((len(images), 3, height, width), dtype=torch.uint8, device=images[0].device)
        for i, image in enumerate(images):
            padded[i, :, : image.shape[1], : image.shape[2]] = image
        return self.backbone(padded), sides
