"""Encode boxes as deltas against reference boxes, and decode them (Faster R-CNN, Ren et al. 2015, §3.1.2).

torchvision's `BoxCoder` computes the same, but copies its weights to the device at every call, which forces a sync.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float

_MAX_LOG_RATIO = math.log(
    1000 / 16
)  # of a side to that of the reference: keeps extreme deltas from overflowing


@dataclass(frozen=True, kw_only=True)
class BoxCoder:
    """Deltas (dx, dy, dw, dh): offsets of the centre in sides of the reference box, and logarithms of side ratios.

    Attributes:
        center_weight: factor of dx and dy; torchvision's `weights[:2]`.
        size_weight: factor of dw and dh; torchvision's `weights[2:]`.
    """

    center_weight: float = 1.0
    size_weight: float = 1.0

    def encode(
        self, boxes: Float[torch.Tensor, "*n 4"], references: Float[torch.Tensor, "*#n 4"]
    ) -> Float[torch.Tensor, "*n 4"]:
        """Return the deltas of boxes against reference boxes; both xyxy, in the same frame and with a positive area."""
        sides, reference_sides = boxes[..., 2:] - boxes[..., :2], references[..., 2:] - references[..., :2]
        centers = boxes[..., :2] + sides / 2
        reference_centers = references[..., :2] + reference_sides / 2
        return torch.cat(
            [
                (centers - reference_centers) / reference_sides * self.center_weight,
                (sides / reference_sides).log() * self.size_weight,
            ],
            dim=-1,
        )

    def decode(
        self, deltas: Float[torch.Tensor, "*n 4"], references: Float[torch.Tensor, "*#n 4"]
    ) -> Float[torch.Tensor, "*n 4"]:
        """Return the xyxy boxes of deltas against reference boxes, in the frame of the references."""
        reference_sides = references[..., 2:] - references[..., :2]
        reference_centers = references[..., :2] + reference_sides / 2
        centers = reference_centers + deltas[..., :2] / self.center_weight * reference_sides
        half = reference_sides * (deltas[..., 2:] / self.size_weight).clamp(max=_MAX_LOG_RATIO).exp() / 2
        return torch.cat([centers - half, centers + half], dim=-1)
