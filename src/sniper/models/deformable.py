"""Convolution and pooling that learn where to look: deformable conv5 and deformable RoI pooling (SNIPER §4).

Both start out as their plain kin, since their offsets start from zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional
from torchvision.ops import DeformConv2d

from sniper.errors import ConfigError


class DeformableConv(nn.Module):
    """A 3×3 convolution whose taps are moved by offsets that a second convolution predicts.

    Args:
        plain: the convolution whose weights and geometry it takes over.
        num_groups: groups of input channels, each with offsets of its own.
    """

    def __init__(self, plain: nn.Conv2d, *, num_groups: int) -> None:
        super().__init__()
        geometry: dict[str, Any] = {
            "stride": plain.stride,
            "padding": plain.padding,
            "dilation": plain.dilation,
        }
        rows, columns = plain.kernel_size
        self.offsets = nn.Conv2d(
            plain.in_channels, 2 * num_groups * rows * columns, (rows, columns), **geometry
        )
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]
        self.taps = DeformConv2d(
            plain.in_channels, plain.out_channels, (rows, columns), bias=plain.bias is not None, **geometry
        )
        self.taps.load_state_dict(plain.state_dict())

    def forward(self, features: Float[torch.Tensor, "b c y x"]) -> Float[torch.Tensor, "b d v u"]:
        """Convolve; the taps are computed in 32 bits, for the operator knows no others on every device."""
        offsets = self.offsets(features)
        with torch.autocast(features.device.type, enabled=False):
            moved: torch.Tensor = self.taps(features.float(), offsets.float())
        return moved.to(features.dtype)


def make_deformable(stage: nn.Module, *, name: str, num_groups: int = 4) -> int:
    """Put deformable convolutions in the place of a stage's plain 3×3 ones; gives how many.

    Args:
        stage: changed in place.
        name: of the model, for the error.
        num_groups: groups of channels with offsets of their own.

    Raises:
        ConfigError: if the stage has no plain 3×3 convolution, or its channels cannot be grouped so.
    """
    plain = [
        (path, module)
        for path, module in stage.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.groups == 1
    ]
    if not plain or any(conv.in_channels % num_groups for _, conv in plain):
        raise ConfigError(
            f"model.backbone.deformable: the last stage of {name} has no plain 3×3 convolution over channels that "
            f"divide into {num_groups} groups"
        )
    for path, conv in plain:
        parent, _, last = path.rpartition(".")
        setattr(stage.get_submodule(parent), last, DeformableConv(conv, num_groups=num_groups))
    return len(plain)


class DeformableRoIPool(nn.Module):
    """RoI pooling whose cells are moved by offsets that depend on what a first pooling saw.

    A cell is moved by its offset times the width and height of the RoI times `reach`. Cells are sampled as RoIAlign
    samples them: `aligned`, at 2×2 points, bilinearly; with offsets of zero the result is that of RoIAlign.

    Args:
        num_channels: of the features.
        side: of the pooled grid, cells.
        scale: from the RoIs' frame to the features' frame.
        width: of the hidden layer that predicts the offsets.
        reach: see above (0.1 in deformable convolutional networks, Dai et al. 2017, §2.2).
    """

    def __init__(
        self, num_channels: int, *, side: int, scale: float, width: int = 256, reach: float = 0.1
    ) -> None:
        super().__init__()
        self.side, self.scale, self.reach = side, scale, reach
        self.hidden = nn.Linear(num_channels * side**2, width)
        self.offsets = nn.Linear(width, 2 * side**2)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)

    def forward(
        self, features: Float[torch.Tensor, "b c y x"], rois: Sequence[torch.Tensor]
    ) -> Float[torch.Tensor, "r c s s"]:
        """Pool the RoIs of all images.

        Args:
            features: (B, C, y, x).
            rois: B arrays (n, 4) xyxy, image frame; r in all.

        Returns:
            (r, C, side, side), in the order given.
        """
        still = [
            sample_cells(maps, own * self.scale, side=self.side)
            for maps, own in zip(features, rois, strict=True)
        ]
        first = torch.cat(still)  # (r, c, s, s)
        hidden = functional.relu(self.hidden(first.flatten(1)))
        moves = self.offsets(hidden).reshape(-1, self.side, self.side, 2).float() * self.reach
        parts = [
            sample_cells(maps, own * self.scale, side=self.side, moves=own_moves)
            for maps, own, own_moves in zip(
                features, rois, moves.split([len(own) for own in rois]), strict=True
            )
        ]
        return torch.cat(parts)


def sample_cells(
    features: Float[torch.Tensor, "c y x"],
    rois: Float[torch.Tensor, "n 4"],
    *,
    side: int,
    moves: Float[torch.Tensor, "n s s 2"] | None = None,
) -> Float[torch.Tensor, "n c s s"]:
    """Average each cell of each RoI over 2×2 points, as torchvision's RoIAlign with `aligned` does.

    Args:
        features: (C, y, x) of one image.
        rois: (n, 4) xyxy, features' frame. May be empty.
        side: cells along each axis of a RoI.
        moves: (n, side, side, 2) how far each cell is moved, x and y, in widths and heights of its RoI.

    Returns:
        (n, C, side, side).
    """
    rows, columns = features.shape[1:]
    low, extent = rois[:, :2] - 0.5, rois[:, 2:] - rois[:, :2]  # (n, 2); pixel centres at whole numbers
    steps = (torch.arange(2 * side, device=rois.device, dtype=rois.dtype) + 0.5) / (2 * side)
    points = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)  # (2s, 2s, 2) as x, y
    places = points[None].expand(len(rois), -1, -1, -1)
    if moves is not None:
        places = places + moves.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    places = low[:, None, None] + places * extent[:, None, None]  # (n, 2s, 2s, 2)
    x, y = places.unbind(dim=-1)
    is_near = (x >= -1) & (x <= columns) & (y >= -1) & (y <= rows)  # beyond that RoIAlign sees zeros
    scaled = torch.stack([2 * x / max(columns - 1, 1) - 1, 2 * y / max(rows - 1, 1) - 1], dim=-1)
    flat = scaled.reshape(1, -1, 2 * side, 2)  # (1, n * 2s, 2s, 2)
    with torch.autocast(features.device.type, enabled=False):
        sampled = functional.grid_sample(
            features[None].to(flat.dtype), flat, mode="bilinear", padding_mode="border", align_corners=True
        )
    sampled = sampled.reshape(features.shape[0], len(rois), 2 * side, 2 * side).transpose(0, 1)
    return functional.avg_pool2d(sampled * is_near[:, None], 2).to(features.dtype)  # (n, c, s, s)
