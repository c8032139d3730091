"""One chip: a window of a level, and the transforms between its frame and the image frame."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from sniper.chips.pyramid import Level
from sniper.geometry.boxes import Sides, clip


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A window of a level; the part beyond the level image is padding.

    Attributes:
        level: the level that it is cut from, bound to an image.
        x: left edge of the window, level pixels.
        y: top edge of the window, level pixels.
        width: width of the window and of the chip, level pixels.
        height: height of the window and of the chip, level pixels.
    """

    level: Level
    x: int
    y: int
    width: int
    height: int

    @property
    def window(self) -> Float[np.ndarray, "4"]:
        """The window as xyxy in the level frame, padding included."""
        return np.array([self.x, self.y, self.x + self.width, self.y + self.height], dtype=np.float64)

    @property
    def visible(self) -> Sides:
        """The sides of the part that shows the image; the rest, right and below, is padding."""
        return Sides(min(self.width, self.level.width - self.x), min(self.height, self.level.height - self.y))

    def to_chip(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Transform boxes from the image frame to the chip frame, without clipping.

        Args:
            boxes: (n, 4) xyxy, image frame, pixels. May be empty.

        Returns:
            (n, 4) xyxy, chip frame, pixels.

        Example:
            >>> from sniper.chips.pyramid import LevelSpec
            >>> level = LevelSpec(factor=2.0).at(width=100, height=100)
            >>> chip = Chip(level=level, x=32, y=0, width=64, height=64)
            >>> chip.to_chip(np.array([[20.0, 0.0, 40.0, 30.0]])).tolist()
            [[8.0, 0.0, 48.0, 60.0]]
        """
        return self.level.to_level(boxes) - self._origin()

    def to_image(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Transform (n, 4) xyxy boxes from the chip frame to the image frame."""
        return self.level.to_image(boxes + self._origin())

    def clip(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Clip (n, 4) xyxy boxes of the chip frame to the chip."""
        return clip(boxes, width=self.width, height=self.height)

    def rescaled(self, factor: float) -> "Chip":
        """Return a chip of the same sides about the same centre, cut from the level enlarged by a factor.

        The window is moved into the level image where it can be. The level keeps its valid range of image pixels.
        """
        width, height = (max(round(side * factor), 1) for side in (self.level.width, self.level.height))
        level = replace(self.level, width=width, height=height)
        x = round((self.x + self.width / 2) * width / self.level.width - self.width / 2)
        y = round((self.y + self.height / 2) * height / self.level.height - self.height / 2)
        return replace(
            self,
            level=level,
            x=min(max(x, 0), max(width - self.width, 0)),
            y=min(max(y, 0), max(height - self.height, 0)),
        )

    def describe(self) -> str:
        """Return the scale of the level and the window as text, in image pixels."""
        x1, y1, x2, y2 = self.level.to_image(self.window[None])[0].round().astype(int).tolist()
        return f"×{self.level.scale:.3g}, x {x1} to {x2}, y {y1} to {y2}"

    def _origin(self) -> Float[np.ndarray, "4"]:
        return np.array([self.x, self.y, self.x, self.y], dtype=np.float64)
