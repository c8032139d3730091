"""How likely each cell of an image shows an object that is too small for its level."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sniper.geometry.boxes import Sides


@dataclass(frozen=True, kw_only=True, eq=False)
class FocusCells:
    """The probabilities of the cells of a level image, or of a window of it.

    Attributes:
        probabilities: (y, x) from 0 to 1, row by row.
        stride: side of a cell, pixels.
    """

    probabilities: Float[np.ndarray, "y x"]
    stride: int

    @classmethod
    def none(cls, sides: Sides, *, stride: int) -> "FocusCells":
        """Return cells of probability 0 that cover an image of some sides, pixels."""
        shape = [-(-side // stride) for side in sides.hw]
        return cls(probabilities=np.zeros(shape, dtype=np.float32), stride=stride)

    def boxes(self) -> Float[np.ndarray, "n 4"]:
        """Return the cells as xyxy, pixels, row by row; those at the right and lower border may reach beyond it."""
        rows, columns = np.indices(self.probabilities.shape).reshape(2, -1)
        corners = np.stack([columns, rows, columns + 1, rows + 1], axis=1)
        return (corners * self.stride).astype(np.float64)

    def joined(self, part: "FocusCells", *, x: int, y: int) -> "FocusCells":
        """Return the cells with those of a window; where both have one, the higher probability counts.

        Args:
            part: of a window; those beyond the last cell are left out.
            x: left edge of the window, pixels, a multiple of the stride.
            y: upper edge.

        Example:
            >>> whole = FocusCells.none(Sides(40, 24), stride=8)
            >>> part = FocusCells(probabilities=np.full((2, 2), 0.5, dtype=np.float32), stride=8)
            >>> whole.joined(part, x=32, y=0).probabilities.tolist()
            [[0.0, 0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]]
        """
        column, row = x // self.stride, y // self.stride
        joined = self.probabilities.copy()
        shared = joined[row : row + len(part.probabilities), column : column + part.probabilities.shape[1]]
        np.maximum(shared, part.probabilities[: len(shared), : shared.shape[1]], out=shared)
        return FocusCells(probabilities=joined, stride=self.stride)
