"""The second stage: classifies proposals and regresses their boxes; trained without sampling (SNIPER §3.4, §4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.nn import functional
from torchvision.ops import MultiScaleRoIAlign, RoIAlign

from sniper.chips import ChipTargets
from sniper.models.box_coder import BoxCoder
from sniper.models.deformable import DeformableRoIPool
from sniper.models.matching import Match, match_proposals
from sniper.models.spec import RoIHeadSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Positives:
    """The proposals of a batch, and which of them are on an object.

    Attributes:
        proposals: (r, 4) xyxy, chip frame, those of one chip after those of another.
        chips: (r,) the chip of each, ascending.
        box_index: (r,) for each positive, the index of its object in its chip; undefined for the others.
        is_positive: (r,) whether each is on an object, and no padding.
    """

    proposals: Float[torch.Tensor, "r 4"]
    chips: Int[torch.Tensor, " r"]
    box_index: Int[torch.Tensor, " r"]
    is_positive: Bool[torch.Tensor, " r"]


class RoIHead(nn.Module):
    """Two fully connected layers over the pooled features of each proposal.

    Args:
        spec: the configuration.
        num_channels: channels of each feature map.
        strides: strides of the feature maps, finest first. With a feature pyramid, RoIs are pooled from all maps
            except the last, chosen by their size.
        num_classes: without background.
    """

    def __init__(
        self, spec: RoIHeadSpec, *, num_channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pool, _ = build_pool(
            spec.channels,
            pool_size=spec.pool_size,
            num_channels=num_channels,
            strides=strides,
            pooling=spec.pooling,
        )
        self.first = nn.Linear(spec.channels * spec.pool_size**2, spec.hidden_dim)
        self.second = nn.Linear(spec.hidden_dim, spec.hidden_dim)
        self.classes = nn.Linear(spec.hidden_dim, num_classes + 1)
        self.deltas = nn.Linear(spec.hidden_dim, 4)
        self._coder = BoxCoder(center_weight=10.0, size_weight=5.0)
        for hidden in (self.first, self.second):
            nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
            nn.init.zeros_(hidden.bias)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for output in (self.classes, self.deltas):
            nn.init.zeros_(output.bias)

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], proposals: Float[torch.Tensor, "b n 4"]
    ) -> tuple[Float[torch.Tensor, "r k"], Float[torch.Tensor, "r 4"]]:
        """Predict the classes and box deltas of the proposals of all images.

        Args:
            maps: feature maps, (B, C, y, x) each.
            proposals: (B, n, 4) xyxy, image frame; r in total.

        Returns:
            (r, C + 1) class logits, background last, and (r, 4) class-agnostic deltas, image by image.
        """
        return self.classify(self.pool(maps, list(proposals)))

    def classify(
        self, pooled: Float[torch.Tensor, "r c s s"]
    ) -> tuple[Float[torch.Tensor, "r k"], Float[torch.Tensor, "r 4"]]:
        """Predict the classes and box deltas of proposals from their pooled features; see `forward`."""
        hidden = functional.relu(self.first(pooled.flatten(1)))
        hidden = functional.relu(self.second(hidden))
        return self.classes(hidden).float(), self.deltas(hidden).float()

    def decode(
        self, deltas: Float[torch.Tensor, "r 4"], proposals: Float[torch.Tensor, "r 4"]
    ) -> Float[torch.Tensor, "r 4"]:
        """Return the boxes of deltas against proposals, both (r, 4), in the frame of the proposals."""
        return self._coder.decode(deltas, proposals)

    def losses(
        self,
        maps: Sequence[Float[torch.Tensor, "b c _ _"]],
        proposals: Float[torch.Tensor, "b n 4"],
        *,
        is_real: Bool[torch.Tensor, "b n"],
        targets: ChipTargets[torch.Tensor],
    ) -> tuple[
        dict[str, Float[torch.Tensor, ""]],
        dict[str, Float[torch.Tensor, ""]],
        Float[torch.Tensor, " b"],
        Positives,
    ]:
        """Compute the losses of all proposals against the objects of each chip, and count how many are right.

        Args:
            maps: feature maps, (B, C, y, x) each.
            proposals: (B, n, 4) xyxy, chip frame.
            is_real: (B, n) False for padding.
            targets: the ground truth of the chips.

        Returns:
            `head_class`, the mean over the proposals of a chip that are not ignored, and `head_box`, the sum over its
            positives divided by the same number and times `box_loss_weight`; both averaged over chips. And two counts
            over all chips: `positives`, the positive proposals, and `correct`, those whose most probable class is that
            of their object. And (B,) what each chip adds to `head_class`, without gradient; and the positives.
        """
        logits, deltas = self(maps, proposals)
        boxes, labels = targets.boxes, targets.labels
        all_proposals = proposals.flatten(0, 1)  # (r, 4)
        chips = torch.arange(len(targets), device=boxes.device).repeat_interleave(proposals.shape[1])
        matches = match_proposals(all_proposals, targets, chips=chips, positive_iou=self.spec.positive_iou)
        is_positive = matches.state == Match.POSITIVE
        is_counted = (matches.state != Match.IGNORED) & is_real.flatten()
        num_counted = torch.zeros(len(targets), device=boxes.device).index_add_(0, chips, is_counted.float())
        weights = is_counted / num_counted.clamp(min=1)[chips] / len(targets)  # (r,)

        background = logits.shape[1] - 1
        target_labels = torch.where(is_positive, labels[chips, matches.box_index], background)
        class_losses = functional.cross_entropy(logits, target_labels, reduction="none")
        # Proposals without a box encode a unit box against itself, for finite deltas; their loss is masked.
        has_box = is_positive & is_counted
        unit_box = torch.ones_like(all_proposals)
        unit_box[:, :2] = 0
        target_boxes = torch.where(has_box[:, None], boxes[chips, matches.box_index], unit_box)
        references = torch.where(has_box[:, None], all_proposals, unit_box)
        target_deltas = self._coder.encode(target_boxes, references)
        box_losses = functional.smooth_l1_loss(deltas, target_deltas, reduction="none").sum(dim=1)
        of_proposals = torch.where(is_counted, class_losses * weights, 0)
        losses = {
            "head_class": of_proposals.sum(),
            "head_box": torch.where(has_box, box_losses * weights, 0).sum() * self.spec.box_loss_weight,
        }
        is_correct = has_box & (logits.argmax(dim=1) == target_labels)
        counts = {"positives": has_box.float().sum(), "correct": is_correct.float().sum()}
        of_chips = of_proposals.new_zeros(len(targets)).index_add_(0, chips, of_proposals.detach())
        positives = Positives(
            proposals=all_proposals, chips=chips, box_index=matches.box_index, is_positive=has_box
        )
        return losses, counts, of_chips, positives

    def detect(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], proposals: Float[torch.Tensor, "b n 4"]
    ) -> tuple[Float[torch.Tensor, "b n 4"], Float[torch.Tensor, "b n k"]]:
        """Return (B, n, 4) regressed boxes and (B, n, C) class probabilities, without background."""
        logits, deltas = self(maps, proposals)
        boxes = self.decode(deltas, proposals.flatten(0, 1))
        scores = logits.softmax(dim=1)[:, :-1]
        return boxes.view_as(proposals), scores.view(*proposals.shape[:2], -1)


class _SingleMapPool(nn.Module):
    """A 1×1 convolution that reduces channels, then RoIAlign or deformable RoI pooling."""

    def __init__(
        self,
        channels: int,
        *,
        pool_size: int,
        num_channels: int,
        stride: int,
        pooling: Literal["align", "deformable"],
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(num_channels, channels, 1)
        nn.init.kaiming_normal_(self.reduce.weight, nonlinearity="relu")
        nn.init.zeros_(self.reduce.bias)  # type: ignore[arg-type]
        self.cells: nn.Module
        if pooling == "deformable":
            self.cells = DeformableRoIPool(channels, output_size=pool_size, spatial_scale=1 / stride)
        else:
            self.cells = RoIAlign(pool_size, spatial_scale=1 / stride, sampling_ratio=2, aligned=True)

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c y x"]], rois: list[torch.Tensor]
    ) -> Float[torch.Tensor, "r d s s"]:
        (features,) = maps
        pooled: torch.Tensor = self.cells(functional.relu(self.reduce(features)), rois)
        return pooled


class _PyramidPool(nn.Module):
    """RoIAlign from the feature map that fits the size of each RoI (Lin et al. 2017, §4.2)."""

    def __init__(self, *, pool_size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self._strides = tuple(strides[:-1])
        names = [str(stride) for stride in self._strides]
        self.cells = MultiScaleRoIAlign(names, output_size=pool_size, sampling_ratio=2)

    def forward(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], rois: list[torch.Tensor]
    ) -> Float[torch.Tensor, "r c s s"]:
        features = {str(stride): features for stride, features in zip(self._strides, maps, strict=False)}
        image_hw = tuple(side * self._strides[0] for side in maps[0].shape[-2:])
        pooled: torch.Tensor = self.cells(features, rois, [image_hw] * len(rois))
        return pooled


def build_pool(
    channels: int,
    *,
    pool_size: int,
    num_channels: int,
    strides: Sequence[int],
    pooling: Literal["align", "deformable"] = "align",
) -> tuple[nn.Module, int]:
    """Build the pooling of the features of RoIs from all feature maps.

    Args:
        channels: to which a single map is reduced before; not used with a feature pyramid.
        pool_size: side of the pooled grid, cells.
        num_channels: channels of each feature map.
        strides: strides of the feature maps, finest first.
        pooling: of a single map.

    Returns:
        A module of maps and RoIs, and the channels that it returns.
    """
    if len(strides) > 1:
        return _PyramidPool(pool_size=pool_size, strides=strides), num_channels
    pool = _SingleMapPool(
        channels, pool_size=pool_size, num_channels=num_channels, stride=strides[0], pooling=pooling
    )
    return pool, channels
