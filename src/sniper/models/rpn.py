"""The region proposal network: anchors scored and mended into proposals, and its losses (SNIPER §3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image, nms

from sniper.models.backbone import STRIDE
from sniper.models.spec import RPNSpec
from sniper.models.targets import Match, draw_sample, match_anchors


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """The proposals of one image.

    Attributes:
        boxes: (n, 4) xyxy, frame of the image given. May be empty.
        scores: (n,) objectness from 0 to 1, best first.
    """

    boxes: Float[torch.Tensor, "n 4"]
    scores: Float[torch.Tensor, " n"]


class RPN(nn.Module):
    """Slides over the features and tells objects from background.

    Args:
        spec: its numbers.
        num_channels: of the features.
    """

    def __init__(self, spec: RPNSpec, *, num_channels: int) -> None:
        super().__init__()
        self.spec = spec
        self._anchors = AnchorGenerator(sizes=(spec.anchor_sizes,), aspect_ratios=(spec.aspect_ratios,))
        num_anchors = len(spec.anchor_sizes) * len(spec.aspect_ratios)
        self.hidden = nn.Conv2d(num_channels, spec.channels, 3, padding=1)
        self.objectness = nn.Conv2d(spec.channels, num_anchors, 1)
        self.deltas = nn.Conv2d(spec.channels, 4 * num_anchors, 1)
        self._coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        for output in (self.objectness, self.deltas):
            nn.init.normal_(output.weight, std=0.01)
        for layer in (self.hidden, self.objectness, self.deltas):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self, features: Float[torch.Tensor, "b c y x"]
    ) -> tuple[Float[torch.Tensor, "b n"], Float[torch.Tensor, "b n 4"]]:
        """Score every anchor and predict its shift: (B, n) logits and (B, n, 4) deltas."""
        hidden = functional.relu(self.hidden(features))
        objectness = self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)  # (b, y, x, a) -> (b, n)
        deltas = self.deltas(hidden).permute(0, 2, 3, 1)  # (b, y, x, 4a)
        return objectness.float(), deltas.reshape(len(features), -1, 4).float()

    def anchors(self, features: Float[torch.Tensor, "b c y x"]) -> Float[torch.Tensor, "n 4"]:
        """Lay the anchors over one image: (n, 4) xyxy in its frame, in the order of the scores."""
        rows, columns = features.shape[-2:]
        sides = (rows * STRIDE, columns * STRIDE)
        image = ImageList(torch.empty((1, 0, *sides), device=features.device), [sides])
        shape = features.new_empty((1, 0, rows, columns), dtype=torch.float32)
        anchors: torch.Tensor = self._anchors(image, [shape])[0]
        return anchors

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
    ) -> list[Proposals]:
        """Turn scores and shifts into the best proposals of each image.

        Args:
            objectness: (B, n) logits.
            deltas: (B, n, 4) shifts.
            anchors: (n, 4) xyxy, image frame.
            image_sides: height and width of each image, pixels; proposals are clipped to them.
            limit: proposals to keep for each image.
            valid_sizes: (B, 2) keep only proposals of at least the first and below the second size, pixels.

        Returns:
            For each image the best, after suppression.
        """
        spec = self.spec
        found = []
        for i, sides in enumerate(image_sides):
            boxes = clip_boxes_to_image(self._coder.decode_single(deltas[i], anchors), sides)
            extents = boxes[:, 2:] - boxes[:, :2]
            is_wanted = extents.min(dim=1).values > 0
            if valid_sizes is not None:
                box_sizes = extents.prod(dim=1).sqrt()
                is_wanted &= (box_sizes >= valid_sizes[i, 0]) & (box_sizes < valid_sizes[i, 1])
            boxes, scores = boxes[is_wanted], objectness[i][is_wanted]
            scores, best = scores.topk(min(spec.num_candidates, len(scores)))
            boxes = boxes[best]
            kept = nms(boxes, scores, spec.nms_iou)[:limit]
            found.append(Proposals(boxes=boxes[kept], scores=scores[kept].sigmoid()))
        return found

    def losses(
        self,
        objectness: Float[torch.Tensor, "b n"],
        deltas: Float[torch.Tensor, "b n 4"],
        *,
        anchors: Float[torch.Tensor, "n 4"],
        boxes: Sequence[torch.Tensor],
        standings: Sequence[torch.Tensor],
        generator: torch.Generator,
    ) -> dict[str, Float[torch.Tensor, ""]]:
        """Compare scores and shifts with the boxes of each chip.

        Args:
            objectness: (B, n) logits.
            deltas: (B, n, 4) shifts.
            anchors: (n, 4) xyxy, chip frame.
            boxes: of each chip, (m, 4) xyxy, chip frame.
            standings: of each chip, (m,) values of `Standing`.
            generator: draws the anchors that count.

        Returns:
            `rpn_objectness`, the mean over the drawn anchors of the batch, and `rpn_box`, the sum over positive ones
            divided by the number of all drawn.
        """
        spec = self.spec
        num_drawn = 0
        score_loss, box_loss = objectness.sum() * 0, deltas.sum() * 0
        for i in range(len(boxes)):
            matches = match_anchors(
                anchors,
                boxes=boxes[i],
                standing=standings[i],
                positive_iou=spec.positive_iou,
                negative_iou=spec.negative_iou,
                ignored_iou=spec.ignored_iou,
            )
            drawn = draw_sample(
                matches.state,
                count=spec.anchors_per_chip,
                positive_share=spec.positive_share,
                generator=generator,
            )
            is_positive = matches.state == Match.POSITIVE
            score_loss = score_loss + functional.binary_cross_entropy_with_logits(
                objectness[i][drawn], is_positive[drawn].float(), reduction="sum"
            )
            positive = drawn & is_positive
            wanted = self._coder.encode_single(boxes[i][matches.box_index[positive]], anchors[positive])
            box_loss = box_loss + functional.smooth_l1_loss(
                deltas[i][positive], wanted, beta=1 / 9, reduction="sum"
            )
            num_drawn += int(drawn.sum())
        count = max(num_drawn, 1)
        return {"rpn_objectness": score_loss / count, "rpn_box": box_loss / count}
