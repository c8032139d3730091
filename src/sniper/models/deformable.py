"""Deformable convolution and deformable RoI pooling (Dai et al. 2017), as in SNIPER §4.

Offsets are initialised to zero, so both start out equal to a plain convolution and to RoIAlign.
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
    """A convolution whose sampling points are moved by offsets that a second convolution predicts.

    Args:
        plain: the convolution to copy weights and geometry from.
        num_groups: number of groups of input channels with separate offsets.
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
        """Convolve, in 32 bits: not every device has the operator in other precisions."""
        offsets = self.offsets(features)
        with torch.autocast(features.device.type, enabled=False):
            convolved: torch.Tensor = self.taps(features.float(), offsets.float())
        return convolved.to(features.dtype)


def make_deformable(stage: nn.Module, *, name: str, num_groups: int = 4) -> int:
    """Replace the plain 3×3 convolutions of a stage by deformable ones, and return their number.

    Args:
        stage: changed in place.
        name: of the model, for the error message.
        num_groups: number of groups of input channels with separate offsets.

    Raises:
        ConfigError: if the stage has no plain 3×3 convolution, or `num_groups` does not divide its channels.
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
    """RoI pooling whose cells are moved by offsets, predicted from a first pooling without offsets.

    Offsets are in widths and heights of the RoI, times `gamma`. Cells are sampled like torchvision's
    `RoIAlign(sampling_ratio=2, aligned=True)`, whose result this equals where all offsets are zero.

    Args:
        num_channels: of the features.
        output_size: side of the pooled grid, cells.
        spatial_scale: factor from the frame of the RoIs to that of the features.
        hidden_dim: of the layer that predicts the offsets.
        gamma: see above (Dai et al. 2017, §2.2).
    """

    def __init__(
        self,
        num_channels: int,
        *,
        output_size: int,
        spatial_scale: float,
        hidden_dim: int = 256,
        gamma: float = 0.1,
    ) -> None:
        super().__init__()
        self.output_size, self.spatial_scale, self.gamma = output_size, spatial_scale, gamma
        self.hidden = nn.Linear(num_channels * output_size**2, hidden_dim)
        self.offsets = nn.Linear(hidden_dim, 2 * output_size**2)
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
            rois: for each of the B images (n, 4) xyxy, image frame, as many for each; r in total.

        Returns:
            (r, C, output_size, output_size), in the order given.
        """
        size = self.output_size
        scaled_rois = torch.stack(list(rois)) * self.spatial_scale  # (b, n, 4)
        plain = sample_cells(features, scaled_rois, output_size=size)
        hidden = functional.relu(self.hidden(plain.flatten(1)))
        offsets = self.offsets(hidden).reshape(-1, size, size, 2).float() * self.gamma
        return sample_cells(features, scaled_rois, output_size=size, offsets=offsets)


def sample_cells(
    features: Float[torch.Tensor, "b c y x"],
    rois: Float[torch.Tensor, "b n 4"],
    *,
    output_size: int,
    offsets: Float[torch.Tensor, "r s s 2"] | None = None,
) -> Float[torch.Tensor, "r c s s"]:
    """Average each cell of each RoI over 2×2 points, like torchvision's `RoIAlign(sampling_ratio=2, aligned=True)`.

    Args:
        features: (B, C, y, x).
        rois: (B, n, 4) xyxy, frame of the features. May be empty; r in total.
        output_size: cells along each axis of a RoI.
        offsets: (r, output_size, output_size, 2) added to the x and y of each cell, in widths and heights of its RoI.

    Returns:
        (r, C, output_size, output_size), image by image.
    """
    num_images, num_rois = rois.shape[:2]
    rows, columns = features.shape[2:]
    rois = rois.flatten(0, 1)
    low, extent = rois[:, :2] - 0.5, rois[:, 2:] - rois[:, :2]  # (r, 2); pixel centres at integers
    num_points = 2 * output_size
    steps = (torch.arange(num_points, device=rois.device, dtype=rois.dtype) + 0.5) / num_points
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)  # (2s, 2s, 2) as x, y
    points = grid[None].expand(rois.shape[0], -1, -1, -1)  # len() would fix the number in an exported graph
    if offsets is not None:
        points = points + offsets.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    points = low[:, None, None] + points * extent[:, None, None]  # (r, 2s, 2s, 2)
    x, y = points.unbind(dim=-1)
    is_near = (x >= -1) & (x <= columns) & (y >= -1) & (y <= rows)  # RoIAlign samples zeros elsewhere
    normalized = torch.stack([2 * x / max(columns - 1, 1) - 1, 2 * y / max(rows - 1, 1) - 1], dim=-1)
    flat = normalized.reshape(num_images, num_rois * num_points, num_points, 2)  # (b, n * 2s, 2s, 2)
    with torch.autocast(features.device.type, enabled=False):
        sampled = functional.grid_sample(
            features.to(flat.dtype), flat, mode="bilinear", padding_mode="border", align_corners=True
        )
    sampled = sampled.reshape(*features.shape[:2], num_rois, num_points, num_points)
    sampled = sampled.transpose(1, 2).flatten(0, 1)  # (r, c, 2s, 2s)
    return functional.avg_pool2d(sampled * is_near[:, None], 2).to(features.dtype)  # (r, c, s, s)
