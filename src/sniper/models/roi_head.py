"""The second stage: each proposal named and its box mended, all of them trained on (SNIPER §3.3, §4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import RoIAlign

from sniper.models.backbone import STRIDE
from sniper.models.deformable import DeformableRoIPool
from sniper.models.spec import RoIHeadSpec
from sniper.models.targets import Match, match_proposals


class RoIHead(nn.Module):
    """Looks at the features inside each proposal.

    Args:
        spec: its numbers.
        num_channels: of the features.
        num_classes: without background.
    """

    def __init__(self, spec: RoIHeadSpec, *, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.spec = spec
        self.reduce = nn.Conv2d(num_channels, spec.channels, 1)
        self.pool: nn.Module
        if spec.pooling == "deformable":
            self.pool = DeformableRoIPool(spec.channels, side=spec.pooled_side, scale=1 / STRIDE)
        else:
            self.pool = RoIAlign(spec.pooled_side, spatial_scale=1 / STRIDE, sampling_ratio=2, aligned=True)
        self.first = nn.Linear(spec.channels * spec.pooled_side**2, spec.width)
        self.second = nn.Linear(spec.width, spec.width)
        self.classes = nn.Linear(spec.width, num_classes + 1)
        self.deltas = nn.Linear(spec.width, 4)
        self._coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        for hidden in (self.reduce, self.first, self.second):
            nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
            nn.init.zeros_(hidden.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for output in (self.classes, self.deltas):
            nn.init.zeros_(output.bias)

    def forward(
        self, features: Float[torch.Tensor, "b c y x"], proposals: Sequence[torch.Tensor]
    ) -> tuple[Float[torch.Tensor, "r k"], Float[torch.Tensor, "r 4"]]:
        """Judge the proposals of all images.

        Args:
            features: (B, C, y, x).
            proposals: B arrays (n, 4) xyxy, image frame; r in all.

        Returns:
            (r, C + 1) class logits, background last, and (r, 4) shifts, in the order given.
        """
        reduced = functional.relu(self.reduce(features))
        pooled = self.pool(reduced, list(proposals))  # (r, c, 7, 7)
        hidden = functional.relu(self.first(pooled.flatten(1)))
        hidden = functional.relu(self.second(hidden))
        return self.classes(hidden).float(), self.deltas(hidden).float()

    def losses(
        self,
        features: Float[torch.Tensor, "b c y x"],
        proposals: Sequence[torch.Tensor],
        *,
        boxes: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        standings: Sequence[torch.Tensor],
    ) -> dict[str, Float[torch.Tensor, ""]]:
        """Compare the judgement of all proposals with the boxes of each chip, valid or not.

        Args:
            features: (B, C, y, x).
            proposals: of each chip, (n, 4) xyxy, chip frame.
            boxes: of each chip, (m, 4) xyxy, chip frame.
            labels: of each chip, (m,) 0..C-1.
            standings: of each chip, (m,) values of `Standing`.

        Returns:
            `head_class`, the mean over all proposals that are not ignored, and `head_box`, the sum over positive ones
            divided by the same number.
        """
        logits, deltas = self(features, proposals)
        background = logits.shape[1] - 1
        wanted_labels, wanted_deltas, states = [], [], []
        for i, candidates in enumerate(proposals):
            matches = match_proposals(
                candidates, boxes=boxes[i], standing=standings[i], positive_iou=self.spec.positive_iou
            )
            label = torch.full_like(matches.state, background)
            positive = matches.state == Match.POSITIVE
            matched = matches.box_index[positive]
            label[positive] = labels[i][matched]
            wanted_labels.append(label)
            wanted_deltas.append(self._coder.encode_single(boxes[i][matched], candidates[positive]))
            states.append(matches.state)
        state = torch.cat(states)
        counts = state != Match.IGNORED
        count = counts.sum().clamp(min=1)
        class_loss = functional.cross_entropy(
            logits[counts], torch.cat(wanted_labels)[counts], reduction="sum"
        )
        box_loss = functional.smooth_l1_loss(
            deltas[state == Match.POSITIVE], torch.cat(wanted_deltas), reduction="sum"
        )
        return {"head_class": class_loss / count, "head_box": box_loss / count}

    def detect(
        self, features: Float[torch.Tensor, "b c y x"], proposals: Sequence[torch.Tensor]
    ) -> list[tuple[Float[torch.Tensor, "_ 4"], Float[torch.Tensor, "_ k"]]]:
        """Judge proposals at test: for each image (n, 4) mended boxes and (n, C) scores, background left out."""
        logits, deltas = self(features, proposals)
        scores = logits.softmax(dim=1)[:, :-1]
        boxes = self._coder.decode_single(deltas, torch.cat(list(proposals)))
        counts = [len(candidates) for candidates in proposals]
        return list(zip(boxes.split(counts), scores.split(counts), strict=True))
