"""The region proposal network: anchors scored and mended into proposals, and its losses (SNIPER §3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import clip_boxes_to_image

from sniper.models.box_coder import BoxCoder
from sniper.models.nms import batched_nms
from sniper.models.spec import RPNSpec
from sniper.models.targets import Match, match_anchors, sample_anchors


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """The proposals of one image.

    Attributes:
        boxes: (n, 4) xyxy, frame of the image given. May be empty.
        scores: (n,) objectness from 0 to 1, best first.
    """

    boxes: Float[torch.Tensor, "n 4"]
    scores: Float[torch.Tensor, " n"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProposalBatch:
    """The proposals of a batch, the same number of places for each image, so that nothing waits to know how many.

    Attributes:
        boxes: (B, p, 4) xyxy, frame of each image; zeros where there is none.
        scores: (B, p) objectness from 0 to 1, best first.
        is_real: (B, p) whether a proposal is there.
    """

    boxes: Float[torch.Tensor, "b p 4"]
    scores: Float[torch.Tensor, "b p"]
    is_real: Bool[torch.Tensor, "b p"]

    def split(self) -> list[Proposals]:
        """Give those of each image."""
        return [
            Proposals(boxes=boxes[is_real], scores=scores[is_real])
            for boxes, scores, is_real in zip(self.boxes, self.scores, self.is_real, strict=True)
        ]


class RPN(nn.Module):
    """Slides over the features and tells objects from background.

    Args:
        spec: its numbers.
        num_channels: of each map of features.
        strides: of the maps, finest first. One map has anchors of all sizes; of several, each has one size.
    """

    def __init__(self, spec: RPNSpec, *, num_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self._strides = tuple(strides)
        sizes = (spec.anchor_sizes,) if len(strides) == 1 else tuple((size,) for size in spec.anchor_sizes)
        self._anchors = AnchorGenerator(sizes=sizes, aspect_ratios=(spec.aspect_ratios,) * len(sizes))
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

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]]
    ) -> tuple[Float[torch.Tensor, "b n"], Float[torch.Tensor, "b n 4"]]:
        """Score every anchor and predict its shift: (B, n) logits and (B, n, 4) deltas, map after map."""
        scores, shifts = [], []
        for features in maps:
            hidden = functional.relu(self.hidden(features))
            scores.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))  # (b, y, x, a) -> (b, n)
            deltas = self.deltas(hidden).permute(0, 2, 3, 1)  # (b, y, x, 4a)
            shifts.append(deltas.reshape(len(features), -1, 4))
        return torch.cat(scores, dim=1).float(), torch.cat(shifts, dim=1).float()

    def anchors(self, maps: Sequence[Float[torch.Tensor, "b c _ _"]]) -> Float[torch.Tensor, "n 4"]:
        """Lay the anchors over one image: (n, 4) xyxy in its frame, in the order of the scores."""
        # Its own call would guess the strides from the sides of the image, which they need not divide.
        self._anchors.set_cell_anchors(torch.float32, maps[0].device)
        grids = [list(features.shape[-2:]) for features in maps]
        return torch.cat(self._anchors.grid_anchors(grids, [[stride, stride] for stride in self._strides]))

    @torch.no_grad()
    def propose(
        self,
        objectness: Float[torch.Tensor, "b n"],
        deltas: Float[torch.Tensor, "b n 4"],
        *,
        anchors: Float[torch.Tensor, "n 4"],
        image_sides: Sequence[tuple[int, int]],
        limit: int,
        valid_sizes: Float[torch.Tensor, "b 2"] | None = None,
    ) -> ProposalBatch:
        """Turn scores and shifts into the best proposals of each image.

        Args:
            objectness: (B, n) logits.
            deltas: (B, n, 4) shifts.
            anchors: (n, 4) xyxy, image frame.
            image_sides: height and width of each image, pixels; proposals are clipped to them.
            limit: proposals to keep for each image.
            valid_sizes: (B, 2) keep only proposals of at least the first and below the second size, pixels.

        Returns:
            The best of each image, after suppression.
        """
        spec = self.spec
        boxes = self._coder.decode(deltas, anchors)
        boxes = torch.stack(
            [clip_boxes_to_image(own, sides) for own, sides in zip(boxes, image_sides, strict=True)]
        )
        extents = boxes[..., 2:] - boxes[..., :2]  # (b, n, 2)
        is_wanted = extents.amin(dim=2) > 0
        if valid_sizes is not None:
            sizes = extents.prod(dim=2).sqrt()
            is_wanted &= (sizes >= valid_sizes[:, :1]) & (sizes < valid_sizes[:, 1:])
        scores, best = objectness.masked_fill(~is_wanted, -torch.inf).topk(
            min(spec.pre_nms_top_n, objectness.shape[1]), dim=1
        )
        boxes = _taken(boxes, best)
        kept, is_real = batched_nms(boxes, scores, iou=spec.nms_iou, limit=limit, waits=not self.training)
        return ProposalBatch(
            boxes=_taken(boxes, kept).masked_fill(~is_real[..., None], 0),  # also what is no number
            scores=scores.gather(1, kept).sigmoid().masked_fill(~is_real, 0),
            is_real=is_real,
        )

    def losses(
        self,
        objectness: Float[torch.Tensor, "b n"],
        deltas: Float[torch.Tensor, "b n 4"],
        *,
        anchors: Float[torch.Tensor, "n 4"],
        boxes: Float[torch.Tensor, "b m 4"],
        status: Int[torch.Tensor, "b m"],
        num_boxes: Sequence[int],
        seeds: Sequence[int],
    ) -> dict[str, Float[torch.Tensor, ""]]:
        """Compare scores and shifts with the boxes of each chip.

        Args:
            objectness: (B, n) logits.
            deltas: (B, n, 4) shifts.
            anchors: (n, 4) xyxy, chip frame.
            boxes: (B, M, 4) xyxy, chip frame.
            status: (B, M) values of `BoxStatus`.
            num_boxes: how many boxes each of the B chips has.
            seeds: of the B chips; they draw the anchors that count.

        Returns:
            `rpn_objectness`, the mean over the drawn anchors of a chip, and `rpn_box`, the sum over its positive ones
            divided by the number of all drawn; both as the mean over chips.
        """
        spec = self.spec
        matches = match_anchors(
            anchors,
            boxes=boxes,
            status=status,
            num_boxes=num_boxes,
            positive_iou=spec.positive_iou,
            negative_iou=spec.negative_iou,
            ignored_iou=spec.ignored_iou,
        )
        is_drawn = sample_anchors(
            matches.state,
            count=spec.batch_size_per_image,
            positive_fraction=spec.positive_fraction,
            seeds=seeds,
        )
        weights = is_drawn / is_drawn.sum(dim=1, keepdim=True).clamp(min=1) / len(boxes)  # (b, n)
        is_positive = matches.state == Match.POSITIVE
        score_losses = functional.binary_cross_entropy_with_logits(
            objectness, is_positive.float(), reduction="none"
        )
        # A box for every anchor; where there is none to learn, its own, which is a shift of zero.
        learnt = torch.where(is_positive[..., None], _taken(boxes, matches.box_index), anchors)
        wanted = self._coder.encode(learnt, anchors)
        box_losses = functional.smooth_l1_loss(deltas, wanted, beta=1 / 9, reduction="none").sum(dim=2)
        return {
            "rpn_objectness": torch.where(is_drawn, score_losses * weights, 0).sum(),
            "rpn_box": torch.where(is_drawn & is_positive, box_losses * weights, 0).sum(),
        }


def _taken(
    boxes: Float[torch.Tensor, "b m 4"], index: Int[torch.Tensor, "b n"]
) -> Float[torch.Tensor, "b n 4"]:
    """Take boxes of each image by their index."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))
