"""The focus head: predicts which cells of a coarse level show objects that are left to finer levels.

It is the FocusPixel branch of AutoFocus (Najibi et al. 2019, §3.1), trained on the chips that are cut anyway. Their
sizes follow from the levels: an object is left to finer levels if it is below the valid range of the level. In the
paper, that is 5 to 64 chip pixels at every level.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.nn import functional

from sniper.chips import BoxStatus, ChipTargets
from sniper.geometry.boxes import Sides
from sniper.geometry.focus_cells import FocusCells
from sniper.models.matching import Match

_MIN_STRIDE = 8  # pixels; a finer map costs four times as much, and windows lie on a grid of 64 pixels
_IGNORED_RATIO = math.sqrt(2)  # of sizes: the paper ignores 64 to 90 px
_PRIOR = 0.01  # first probability of a cell (Lin et al. 2017, focal loss, §4.1)


class FocusHead(nn.Module):
    """Two convolutions over one feature map, with a logit for each cell.

    Args:
        channels: of the hidden layer.
        num_channels: of each feature map.
        strides: of the feature maps, finest first; the first of at least 8 pixels is used.
        loss_weight: factor of the loss.
    """

    def __init__(
        self, *, channels: int, num_channels: int, strides: Sequence[int], loss_weight: float
    ) -> None:
        super().__init__()
        self._map = next(index for index, stride in enumerate(strides) if stride >= _MIN_STRIDE)
        self.stride = strides[self._map]
        self._loss_weight = loss_weight
        self.hidden = nn.Conv2d(num_channels, channels, 3, padding=1)
        self.logit = nn.Conv2d(channels, 1, 1)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        nn.init.zeros_(self.hidden.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.logit.weight, std=0.01)
        nn.init.constant_(self.logit.bias, -math.log((1 - _PRIOR) / _PRIOR))  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Float[torch.Tensor, "b c _ _"]]) -> Float[torch.Tensor, "b y x"]:
        """Predict the logits of all cells.

        Args:
            maps: feature maps, (B, C, y, x) each.
        """
        logits: torch.Tensor = self.logit(functional.relu(self.hidden(maps[self._map])))
        return logits[:, 0].float()

    def losses(
        self,
        maps: Sequence[Float[torch.Tensor, "b c _ _"]],
        targets: ChipTargets[torch.Tensor],
        *,
        sides: Sides,
    ) -> dict[str, Float[torch.Tensor, ""]]:
        """Compute the loss of the cells of chips of coarse levels.

        Args:
            maps: feature maps, (B, C, y, x) each.
            targets: the ground truth of the B chips.
            sides: of the chips, pixels.

        Returns:
            `focus`, the mean binary cross entropy over the cells of a chip that are not ignored, averaged over chips,
            times the weight of the loss. Chips of the finest level add nothing: nothing is left to finer levels.
        """
        logits = self(maps)
        state = match_cells(targets, sides=sides, stride=self.stride, shape=logits.shape[1:])
        is_taught = state != Match.IGNORED
        weights = is_taught / is_taught.sum(dim=(1, 2), keepdim=True).clamp(min=1) / len(targets)
        of_cells = functional.binary_cross_entropy_with_logits(
            logits, (state == Match.POSITIVE).float(), reduction="none"
        )
        return {"focus": torch.where(is_taught, of_cells * weights, 0).sum() * self._loss_weight}

    def predict(
        self, maps: Sequence[Float[torch.Tensor, "b c _ _"]], image_sides: Sequence[Sides]
    ) -> list[FocusCells]:
        """Predict the cells of images.

        Args:
            maps: feature maps, (B, C, y, x) each.
            image_sides: of the B images before padding, pixels; cells that lie in padding are left out.
        """
        probabilities = self(maps).sigmoid().cpu().numpy()
        counts = [[-(-side // self.stride) for side in sides.hw] for sides in image_sides]
        return [
            FocusCells(probabilities=each[:rows, :columns], stride=self.stride)
            for each, (rows, columns) in zip(probabilities, counts, strict=True)
        ]


def match_cells(
    targets: ChipTargets[torch.Tensor], *, sides: Sides, stride: int, shape: Sequence[int]
) -> Int[torch.Tensor, "b y x"]:
    """Return how the loss treats each cell of chips.

    A cell that overlaps an object below the valid range of its level is positive. Otherwise it is ignored if it
    overlaps an ignored region, an object up to √2 times as large, or one that the border of the chip truncates and
    whose visible part is not larger: its size is unknown. All cells of a chip of the finest level are ignored.

    Args:
        targets: the ground truth of the B chips.
        sides: of the chips, pixels.
        stride: side of a cell, pixels.
        shape: number of rows and columns of cells.

    Returns:
        (B, y, x) values of `Match`.
    """
    boxes, status = targets.boxes, targets.status
    least = targets.valid_sizes[:, :1]  # (b, 1)
    box_sizes = (boxes[..., 2:] - boxes[..., :2]).prod(dim=2).sqrt()  # (b, m)
    border = boxes.new_tensor([sides.width, sides.height])
    is_truncated = (boxes[..., :2] <= 0).any(dim=2) | (boxes[..., 2:] >= border).any(dim=2)
    is_object = (status == BoxStatus.VALID) | (status == BoxStatus.OUT_OF_RANGE)
    is_small = is_object & (box_sizes < least) & ~is_truncated
    is_ignored = (status == BoxStatus.IGNORE) | (is_object & (box_sizes < least * _IGNORED_RATIO) & ~is_small)
    rows, columns = (
        _overlaps(boxes[..., axis], boxes[..., axis + 2], stride=stride, count=count)
        for axis, count in ((1, shape[0]), (0, shape[1]))
    )
    state = torch.full((len(targets), *shape), Match.NEGATIVE, device=boxes.device)
    state[_any_box(rows, columns, is_ignored)] = Match.IGNORED
    state[_any_box(rows, columns, is_small)] = Match.POSITIVE
    return state.masked_fill((least <= 0)[..., None], Match.IGNORED)


def _overlaps(
    low: Float[torch.Tensor, "b m"], high: Float[torch.Tensor, "b m"], *, stride: int, count: int
) -> Bool[torch.Tensor, "b m n"]:
    """Check which cells of an axis the intervals overlap."""
    starts = torch.arange(count, device=low.device) * stride
    return (low[..., None] < starts + stride) & (high[..., None] > starts)


def _any_box(
    rows: Bool[torch.Tensor, "b m y"],
    columns: Bool[torch.Tensor, "b m x"],
    is_counted: Bool[torch.Tensor, "b m"],
) -> Bool[torch.Tensor, "b y x"]:
    """Check which cells one of the counted boxes overlaps."""
    counted = (rows & is_counted[..., None]).float()
    with torch.autocast(rows.device.type, enabled=False):
        return torch.einsum("bmy,bmx->byx", counted, columns.float()) > 0
