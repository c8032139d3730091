"""The region proposal network: anchors, proposals and the losses of both its outputs (SNIPER §3.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator

from sniper.chips import ChipTargets
from sniper.geometry.boxes import Sides
from sniper.models.box_coder import BoxCoder
from sniper.models.matching import Match, match_anchors, sample_anchors
from sniper.models.nms import padded_nms
from sniper.models.protocol import Proposals
from sniper.models.spec import RPNSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class AnchorPredictions:
    """The outputs of the RPN for all anchors of a batch.

    Attributes:
        objectness: (B, n) logits.
        deltas: (B, n, 4) box deltas against the anchors.
        anchors: (n, 4) xyxy, frame of the images, the same for all.
    """

    objectness: Float[torch.Tensor, "b n"]
    deltas: Float[torch.Tensor, "b n 4"]
    anchors: Float[torch.Tensor, "n 4"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProposalBatch:
    """The proposals of a batch, padded to one number for all images, so that no sync is needed to count them.

    Attributes:
        boxes: (B, p, 4) xyxy, frame of each image; zeros for padding.
        scores: (B, p) objectness from 0 to 1, descending; zeros for padding.
        is_real: (B, p) False for padding.
    """

    boxes: Float[torch.Tensor, "b p 4"]
    scores: Float[torch.Tensor, "b p"]
    is_real: Bool[torch.Tensor, "b p"]

    def split(self) -> list[Proposals]:
        """Return the proposals of each image without padding; on a GPU this forces a sync."""
        return [
            Proposals(boxes=boxes[is_real], scores=scores[is_real])
            for boxes, scores, is_real in zip(self.boxes, self.scores, self.is_real, strict=True)
        ]


class RPN(nn.Module):
    """Predicts objectness and a box for every anchor.

    Args:
        spec: the configuration.
        num_channels: channels of each feature map.
        strides: of the feature maps, finest first. A single map has anchors of all sizes; of several maps, each has
            anchors of one size.
    """

    def __init__(self, spec: RPNSpec, *, num_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self._strides = tuple(strides)
        sizes = (spec.anchor_sizes,) if len(strides) == 1 else tuple((size,) for size in spec.anchor_sizes)
        self._anchor_generator = AnchorGenerator(
            sizes=sizes, aspect_ratios=(spec.aspect_ratios,) * len(sizes)
        )
        num_anchors = len(sizes[0]) * len(spec.aspect_ratios)
        self.hidden = nn.Conv2d(num_channels, spec.channels, 3, padding=1)
        self.objectness = nn.Conv2d(spec.channels, num_anchors, 1)
        self.deltas = nn.Conv2d(spec.channels, 4 * num_anchors, 1)
        self._coder = BoxCoder()
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        for output in (self.objectness, self.deltas):
            nn.init.normal_(output.weight, std=0.01)
        for layer in (self.hidden, self.objectness, self.deltas):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Float[torch.Tensor, "b c _ _"]]) -> AnchorPredictions:
        """Predict objectness and deltas of all anchors, feature map by feature map."""
        objectness, deltas = [], []
        for features in maps:
            hidden = functional.relu(self.hidden(features))
            scores = self.objectness(hidden).permute(0, 2, 3, 1)  # (b, y, x, a)
            objectness.append(scores.flatten(1))
            box_deltas = self.deltas(hidden).permute(0, 2, 3, 1)  # (b, y, x, 4a)
            deltas.append(box_deltas.reshape(len(features), -1, 4))
        return AnchorPredictions(
            objectness=torch.cat(objectness, dim=1).float(),
            deltas=torch.cat(deltas, dim=1).float(),
            anchors=self.anchors(maps),
        )

    def anchors(self, maps: Sequence[Float[torch.Tensor, "b c _ _"]]) -> Float[torch.Tensor, "n 4"]:
        """Return the anchors of one image, (n, 4) xyxy in its frame, in the order of the predictions."""
        # The generator's own call derives strides from the sides of the image, which they need not divide.
        self._anchor_generator.set_cell_anchors(torch.float32, maps[0].device)
        grids = [list(features.shape[-2:]) for features in maps]
        strides = [[stride, stride] for stride in self._strides]
        return torch.cat(self._anchor_generator.grid_anchors(grids, strides))

    def decode(self, predictions: AnchorPredictions) -> Float[torch.Tensor, "b n 4"]:
        """Return the box of every anchor, (B, n, 4) xyxy in the frame of the images, not clipped."""
        return self._coder.decode(predictions.deltas, predictions.anchors)

    @torch.no_grad()
    def propose(
        self,
        predictions: AnchorPredictions,
        *,
        image_sides: Sequence[Sides],
        limit: int,
        valid_sizes: Float[torch.Tensor, "b 2"] | None = None,
    ) -> ProposalBatch:
        """Return the best proposals of each image after non-maximum suppression.

        Args:
            predictions: for all anchors.
            image_sides: of the B images, pixels; proposals are clipped to them.
            limit: maximum number of proposals for each image.
            valid_sizes: (B, 2) keep only proposals whose size lies in this half-open range, pixels.
        """
        spec = self.spec
        boxes = self.decode(predictions)
        ends = boxes.new_tensor([(width, height) * 2 for width, height in image_sides])  # (b, 4)
        boxes = torch.minimum(boxes.clamp(min=0), ends[:, None])
        extents = boxes[..., 2:] - boxes[..., :2]  # (b, n, 2)
        is_candidate = extents.amin(dim=2) > 0
        if valid_sizes is not None:
            sizes = extents.prod(dim=2).sqrt()
            is_candidate &= (sizes >= valid_sizes[:, :1]) & (sizes < valid_sizes[:, 1:])
        objectness = predictions.objectness.masked_fill(~is_candidate, -torch.inf)
        scores, best = objectness.topk(min(spec.pre_nms_top_n, objectness.shape[1]), dim=1)
        boxes = _gather_boxes(boxes, best)
        kept, is_real = padded_nms(boxes, scores, iou=spec.nms_iou, limit=limit)
        return ProposalBatch(
            boxes=_gather_boxes(boxes, kept).masked_fill(~is_real[..., None], 0),  # padding may be NaN
            scores=scores.gather(1, kept).sigmoid().masked_fill(~is_real, 0),
            is_real=is_real,
        )

    def losses(
        self, predictions: AnchorPredictions, targets: ChipTargets[torch.Tensor]
    ) -> tuple[dict[str, Float[torch.Tensor, ""]], Float[torch.Tensor, " b"]]:
        """Compute the losses of sampled anchors.

        Args:
            predictions: for all anchors of the B chips.
            targets: the ground truth of the chips.

        Returns:
            `rpn_objectness`, the mean over the sampled anchors of a chip, and `rpn_box`, the sum over its sampled
            positives divided by the number of all sampled anchors; both averaged over chips. And (B,) what each chip
            adds to `rpn_objectness`, without gradient.
        """
        spec, anchors = self.spec, predictions.anchors
        matches = match_anchors(
            anchors,
            targets,
            positive_iou=spec.positive_iou,
            negative_iou=spec.negative_iou,
            ignored_iou=spec.ignored_iou,
        )
        is_sampled = sample_anchors(
            matches.state,
            count=spec.batch_size_per_image,
            positive_fraction=spec.positive_fraction,
            seeds=targets.seeds,
        )
        weights = is_sampled / is_sampled.sum(dim=1, keepdim=True).clamp(min=1) / len(targets)  # (b, n)
        is_positive = matches.state == Match.POSITIVE
        objectness_losses = functional.binary_cross_entropy_with_logits(
            predictions.objectness, is_positive.float(), reduction="none"
        )
        # Anchors without a box encode themselves, for finite deltas; their loss is masked.
        boxes = torch.where(is_positive[..., None], _gather_boxes(targets.boxes, matches.box_index), anchors)
        target_deltas = self._coder.encode(boxes, anchors)
        box_losses = functional.smooth_l1_loss(
            predictions.deltas, target_deltas, beta=1 / 9, reduction="none"
        ).sum(dim=2)
        of_anchors = torch.where(is_sampled, objectness_losses * weights, 0)
        losses = {
            "rpn_objectness": of_anchors.sum(),
            "rpn_box": torch.where(is_sampled & is_positive, box_losses * weights, 0).sum(),
        }
        return losses, of_anchors.detach().sum(dim=1)


def _gather_boxes(
    boxes: Float[torch.Tensor, "b m 4"], indices: Int[torch.Tensor, "b n"]
) -> Float[torch.Tensor, "b n 4"]:
    """Return the boxes at the given indices of each image."""
    return boxes.gather(1, indices[..., None].expand(-1, -1, 4))
