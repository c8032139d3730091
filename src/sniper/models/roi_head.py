"""The second stage: each proposal named and its box mended, all of them trained on (SNIPER §3.3, §4)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.nn import functional
from torchvision.ops import MultiScaleRoIAlign, RoIAlign

from sniper.models.box_coder import BoxCoder
from sniper.models.deformable import DeformableRoIPool
from sniper.models.spec import RoIHeadSpec
from sniper.models.targets import Match, match_proposals


class RoIHead(nn.Module):
    """Looks at the features inside each proposal.

    Args:
        spec: its numbers.
        num_channels: of each map of features.
        strides: of the maps, finest first; of several, all but the last are pooled from, each its sizes.
        num_classes: without background.
    """

    def __init__(
        self, spec: RoIHeadSpec, *, num_channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pool = _build_pool(spec, num_channels=num_channels, strides=strides)
        self.first = nn.Linear(spec.channels * spec.pool_size**2, spec.hidden_dim)
        self.second = nn.Linear(spec.hidden_dim, spec.hidden_dim)
        self.classes = nn.Linear(spec.hidden_dim, num_classes + 1)
        self.deltas = nn.Linear(spec.hidden_dim, 4)
        self._coder = BoxCoder(place=10.0, side=5.0)
        for hidden in (self.first, self.second):
            nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
            nn.init.zeros_(hidden.bias)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for output in (self.classes, self.deltas):
            nn.init.zeros_(output.bias)

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], proposals: Sequence[torch.Tensor]
    ) -> tuple[Float[torch.Tensor, "r k"], Float[torch.Tensor, "r 4"]]:
        """Judge the proposals of all images.

        Args:
            maps: of features, (B, C, y, x) each.
            proposals: B arrays (n, 4) xyxy, image frame; r in all.

        Returns:
            (r, C + 1) class logits, background last, and (r, 4) shifts, in the order given.
        """
        pooled = self.pool(maps, list(proposals))  # (r, c, 7, 7)
        hidden = functional.relu(self.first(pooled.flatten(1)))
        hidden = functional.relu(self.second(hidden))
        return self.classes(hidden).float(), self.deltas(hidden).float()

    def losses(
        self,
        maps: Sequence[Float[torch.Tensor, "b c _ _"]],
        proposals: Sequence[torch.Tensor],
        *,
        is_real: Sequence[Bool[torch.Tensor, " _"]],
        boxes: Float[torch.Tensor, "b m 4"],
        labels: Int[torch.Tensor, "b m"],
        status: Int[torch.Tensor, "b m"],
    ) -> dict[str, Float[torch.Tensor, ""]]:
        """Compare the judgement of all proposals with the boxes of each chip, valid or not.

        Args:
            maps: of features, (B, C, y, x) each.
            proposals: of each chip, (n, 4) xyxy, chip frame.
            is_real: of each chip, (n,) whether a proposal is there.
            boxes: (B, M, 4) xyxy, chip frame.
            labels: (B, M) 0..C-1.
            status: (B, M) values of `BoxStatus`.

        Returns:
            `head_class`, the mean over all proposals of a chip that are not ignored, and `head_box`, the sum over
            positive ones divided by the same number; both as the mean over chips.
        """
        logits, deltas = self(maps, proposals)
        candidates = torch.cat(list(proposals))
        chips = torch.cat([labels.new_full((len(one),), i) for i, one in enumerate(proposals)])
        matches = match_proposals(
            candidates, chips=chips, boxes=boxes, status=status, positive_iou=self.spec.positive_iou
        )
        is_positive = matches.state == Match.POSITIVE
        counts = (matches.state != Match.IGNORED) & torch.cat(list(is_real))
        num_counted = torch.zeros(len(boxes), device=boxes.device).index_add_(0, chips, counts.float())
        weights = counts / num_counted.clamp(min=1)[chips] / len(boxes)  # (r,)

        background = logits.shape[1] - 1
        wanted_labels = torch.where(is_positive, labels[chips, matches.box_index], background)
        class_losses = functional.cross_entropy(logits, wanted_labels, reduction="none")
        # A box for every proposal; where there is none to learn, any with an area does.
        is_learnt = is_positive & counts
        unit = torch.ones_like(candidates)
        unit[:, :2] = 0
        learnt = torch.where(is_learnt[:, None], boxes[chips, matches.box_index], unit)
        wanted = self._coder.encode(learnt, torch.where(is_learnt[:, None], candidates, unit))
        box_losses = functional.smooth_l1_loss(deltas, wanted, reduction="none").sum(dim=1)
        return {
            "head_class": torch.where(counts, class_losses * weights, 0).sum(),
            "head_box": torch.where(is_learnt, box_losses * weights, 0).sum(),
        }

    def detect(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], proposals: Sequence[torch.Tensor]
    ) -> list[tuple[Float[torch.Tensor, "_ 4"], Float[torch.Tensor, "_ k"]]]:
        """Judge proposals at test: for each image (n, 4) mended boxes and (n, C) scores, background left out."""
        logits, deltas = self(maps, proposals)
        scores = logits.softmax(dim=1)[:, :-1]
        boxes = self._coder.decode(deltas, torch.cat(list(proposals)))
        counts = [len(candidates) for candidates in proposals]
        return list(zip(torch.split(boxes, counts), torch.split(scores, counts), strict=True))


class _OneMapPool(nn.Module):
    """A 1×1 convolution to fewer channels, then RoIAlign or its deformable kin."""

    def __init__(self, spec: RoIHeadSpec, *, num_channels: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(num_channels, spec.channels, 1)
        nn.init.kaiming_normal_(self.reduce.weight, nonlinearity="relu")
        nn.init.zeros_(self.reduce.bias)  # type: ignore[arg-type]
        self.cells: nn.Module
        if spec.pooling == "deformable":
            self.cells = DeformableRoIPool(spec.channels, side=spec.pool_size, scale=1 / stride)
        else:
            self.cells = RoIAlign(spec.pool_size, spatial_scale=1 / stride, sampling_ratio=2, aligned=True)

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c y x"]], rois: list[torch.Tensor]
    ) -> Float[torch.Tensor, "r d s s"]:
        (features,) = maps
        pooled: torch.Tensor = self.cells(functional.relu(self.reduce(features)), rois)
        return pooled


class _PyramidPool(nn.Module):
    """RoIAlign from the map that suits the size of each RoI (Lin et al. 2017, §4.2)."""

    def __init__(self, spec: RoIHeadSpec, *, strides: Sequence[int]) -> None:
        super().__init__()
        self._strides = tuple(strides[:-1])
        names = [str(stride) for stride in self._strides]
        self.cells = MultiScaleRoIAlign(names, output_size=spec.pool_size, sampling_ratio=2)

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], rois: list[torch.Tensor]
    ) -> Float[torch.Tensor, "r c s s"]:
        used = {str(stride): features for stride, features in zip(self._strides, maps, strict=False)}
        sides = tuple(side * self._strides[0] for side in maps[0].shape[-2:])
        pooled: torch.Tensor = self.cells(used, rois, [sides] * len(rois))
        return pooled


def _build_pool(spec: RoIHeadSpec, *, num_channels: int, strides: Sequence[int]) -> nn.Module:
    if len(strides) > 1:
        return _PyramidPool(spec, strides=strides)
    return _OneMapPool(spec, num_channels=num_channels, stride=strides[0])
