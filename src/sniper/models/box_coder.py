"""Boxes as shifts of other boxes (Faster R-CNN, Ren et al. 2015, §3.1.2).

torchvision's own coder does the same, but moves numbers to the device each time, for which the processor waits.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float

_LARGEST_GROWTH = math.log(1000 / 16)  # of a side, as a logarithm: keeps a wild shift from overflowing


@dataclass(frozen=True, kw_only=True)
class BoxCoder:
    """How shifts are written: places in widths and heights of the other box, sides as logarithms.

    Attributes:
        place: factor of the shifts of the centre.
        side: factor of the shifts of the sides.
    """

    place: float = 1.0
    side: float = 1.0

    def encode(
        self, boxes: Float[torch.Tensor, "*n 4"], others: Float[torch.Tensor, "*#n 4"]
    ) -> Float[torch.Tensor, "*n 4"]:
        """Write boxes as shifts of others: both xyxy, the same frame, with areas."""
        sides, other_sides = boxes[..., 2:] - boxes[..., :2], others[..., 2:] - others[..., :2]
        places, other_places = boxes[..., :2] + sides / 2, others[..., :2] + other_sides / 2
        return torch.cat(
            [
                (places - other_places) / other_sides * self.place,
                (sides / other_sides).log() * self.side,
            ],
            dim=-1,
        )

    def decode(
        self, shifts: Float[torch.Tensor, "*n 4"], others: Float[torch.Tensor, "*#n 4"]
    ) -> Float[torch.Tensor, "*n 4"]:
        """Give the xyxy boxes that shifts of other boxes mean."""
        other_sides = others[..., 2:] - others[..., :2]
        places = others[..., :2] + other_sides / 2 + shifts[..., :2] / self.place * other_sides
        half = other_sides * (shifts[..., 2:] / self.side).clamp(max=_LARGEST_GROWTH).exp() / 2
        return torch.cat([places - half, places + half], dim=-1)
