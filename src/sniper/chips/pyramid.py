"""The levels of the image pyramid: how each resizes an image, and which box sizes are valid there."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Le, MaxLen, MinLen
from jaxtyping import Bool, Float, Int
from pydantic import AllowInfNan, NonNegativeFloat, PositiveFloat, PositiveInt

from sniper.errors import ConfigError
from sniper.geometry.boxes import size
from sniper.specs import spec_dataclass

MAX_LEVEL_SIDE = 1 << 24
"""The longest side of an image at a level, pixels: up to here, float32 holds every whole coordinate."""

MAX_CHIP_SIZE = 16_384
"""The longest side of a chip, pixels: a network computes all of it at once."""

MAX_LEVELS = 32
"""The most levels of a pyramid."""

MAX_FACTOR = 100.0
"""The largest factor by which a level enlarges images."""


@dataclass(frozen=True, kw_only=True)
class ValidRange:
    """The box sizes that a level learns from: half-open, `[at_least, below)`, in image pixels (SNIPER §3.2).

    Attributes:
        at_least: the smallest valid size, image pixels.
        below: the smallest size that is too large, image pixels; `math.inf` for no bound.
    """

    at_least: float = 0.0
    below: float = math.inf

    def contains(self, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
        """Check which boxes have a size in this range.

        Args:
            boxes: (n, 4) xyxy, image frame, pixels. May be empty.

        Returns:
            (n,) one flag for each box, in the order given.

        Example:
            >>> boxes = np.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 80.0, 80.0]])
            >>> ValidRange(below=80).contains(boxes).tolist()
            [True, False]
        """
        sizes = size(boxes)
        return (sizes >= self.at_least) & (sizes < self.below)

    def describe(self) -> str:
        """Return the range as text.

        Example:
            >>> [ValidRange(at_least=low, below=high).describe() for low, high in ((0, 80), (32, 150), (120, math.inf))]
            ['up to 80 px', '32 to 150 px', '120 px and more']
        """
        if math.isinf(self.below):
            return "all sizes" if self.at_least == 0 else f"{self.at_least:g} px and more"
        return f"up to {self.below:g} px" if self.at_least == 0 else f"{self.at_least:g} to {self.below:g} px"


@spec_dataclass
class LevelSpec:
    """One level: exactly one rule for resizing, and the range of box sizes that are valid there.

    Attributes:
        factor: resize by this factor.
        long_side: resize so that the longer side has this many pixels.
        short_side: resize so that the shorter side has this many pixels.
        max_long_side: with `short_side`: resize less if the longer side would exceed this, pixels.
        at_least: smallest valid box size, image pixels.
        below: smallest box size that is too large to be valid, image pixels.
    """

    factor: Annotated[PositiveFloat, Le(MAX_FACTOR)] | None = None
    long_side: Annotated[PositiveInt, Le(MAX_LEVEL_SIDE)] | None = None
    short_side: Annotated[PositiveInt, Le(MAX_LEVEL_SIDE)] | None = None
    max_long_side: Annotated[PositiveInt, Le(MAX_LEVEL_SIDE)] | None = None
    at_least: NonNegativeFloat = 0.0
    below: Annotated[float, AllowInfNan(True)] = math.inf

    def __post_init__(self) -> None:
        rules = {"factor": self.factor, "long_side": self.long_side, "short_side": self.short_side}
        given = [name for name, value in rules.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"a level needs exactly one of factor, long_side, short_side; got {given or 'none'}"
            )
        if self.max_long_side is not None and self.short_side is None:
            raise ValueError("max_long_side goes with short_side only")
        if not self.at_least < self.below:
            raise ValueError(f"no size lies in the range [{self.at_least:g}, {self.below:g})")

    @property
    def valid_range(self) -> ValidRange:
        """The box sizes that this level learns from."""
        return ValidRange(at_least=self.at_least, below=self.below)

    def resized(
        self, widths: Int[np.ndarray, " m"], heights: Int[np.ndarray, " m"]
    ) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Compute the sides of many images at this level, rounded to whole pixels, at least 1.

        Args:
            widths: (m,) widths of the images, pixels.
            heights: (m,) heights of the images, pixels.

        Returns:
            Two (m,) arrays: widths and heights of the level images, pixels.

        Raises:
            ConfigError: if a level image has a side of more than `MAX_LEVEL_SIDE`.

        Example:
            >>> LevelSpec(long_side=512).resized(np.array([640]), np.array([480]))
            (array([512]), array([384]))
        """
        long = np.maximum(widths, heights).astype(np.float64)
        short = np.minimum(widths, heights).astype(np.float64)
        if self.factor is not None:
            scale = np.full(len(long), self.factor)
        elif self.long_side is not None:
            scale = self.long_side / long
        else:
            assert self.short_side is not None
            scale = np.minimum(self.short_side / short, (self.max_long_side or math.inf) / long)
        sides = _rounded(widths * scale), _rounded(heights * scale)
        longest = int(np.maximum(*sides).argmax()) if len(long) else 0
        if len(long) and max(side[longest] for side in sides) > MAX_LEVEL_SIDE:
            raise ConfigError(
                f"levels: {self._rule()} makes an image of {widths[longest]}x{heights[longest]} pixels "
                f"{max(side[longest] for side in sides):,} pixels long, expected at most {MAX_LEVEL_SIDE:,}"
                + (" (max_long_side limits it)" if self.short_side else "")
            )
        return sides

    def _rule(self) -> str:
        for name in ("factor", "long_side", "short_side"):
            value = getattr(self, name)
            if value is not None:
                return f"{name}: {value:g}"
        raise AssertionError

    def at(self, *, width: int, height: int, index: int = 0) -> "Level":
        """Bind this level to one image.

        Args:
            width: width of the image, pixels.
            height: height of the image, pixels.
            index: the index of this level in its pyramid, 0 is the finest.
        """
        widths, heights = self.resized(np.array([width]), np.array([height]))
        return Level(
            index=index,
            image_width=width,
            image_height=height,
            width=int(widths[0]),
            height=int(heights[0]),
            valid_range=self.valid_range,
        )


@dataclass(frozen=True, kw_only=True)
class Level:
    """One image at one level: the transforms between the image frame and the level frame.

    The sides of the level image are whole pixels. The scale of each axis is therefore the ratio of the sides, for boxes
    as for pixels.

    Attributes:
        index: the index of the level in its pyramid, 0 is the finest.
        image_width: width of the image, pixels.
        image_height: height of the image, pixels.
        width: width of the resized image, pixels.
        height: height of the resized image, pixels.
        valid_range: the box sizes that this level learns from, image pixels.
    """

    index: int
    image_width: int
    image_height: int
    width: int
    height: int
    valid_range: ValidRange

    @property
    def scale(self) -> float:
        """Factor from sizes in the image frame to sizes in the level frame; above 1 enlarges."""
        return math.sqrt(self.width / self.image_width * self.height / self.image_height)

    @property
    def valid_sizes(self) -> tuple[float, float]:
        """The valid range in level pixels: at least the first, below the second."""
        return self.valid_range.at_least * self.scale, self.valid_range.below * self.scale

    def to_level(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Transform (n, 4) xyxy boxes from the image frame to the level frame."""
        return boxes * self._scales()

    def to_image(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Transform (n, 4) xyxy boxes from the level frame to the image frame."""
        return boxes / self._scales()

    def _scales(self) -> Float[np.ndarray, "4"]:
        x, y = self.width / self.image_width, self.height / self.image_height
        return np.array([x, y, x, y])


def check_ranges(levels: Sequence[LevelSpec]) -> None:
    """Check that levels are ordered from the finest to the coarsest, and that every size is valid at some level.

    Raises:
        ValueError: if they are not.
    """
    covered_up_to = 0.0
    for finer, coarser in itertools.pairwise(levels):
        if finer.at_least > coarser.at_least or finer.below > coarser.below:
            raise ValueError(
                "levels must be ordered from the finest to the coarsest, but the range "
                f"[{finer.at_least:g}, {finer.below:g}) comes before [{coarser.at_least:g}, {coarser.below:g})"
            )
    for level in levels:
        if level.at_least > covered_up_to:
            raise ValueError(
                f"boxes of size {covered_up_to:g} to {level.at_least:g} are in no level's range; they would be lost"
            )
        covered_up_to = max(covered_up_to, level.below)
    if covered_up_to < math.inf:
        raise ValueError(
            f"boxes of size {covered_up_to:g} and above are in no level's range; they would be lost"
        )


PAPER_LEVELS = (
    LevelSpec(factor=3.0, below=80),
    LevelSpec(factor=1.667, at_least=32, below=150),
    LevelSpec(long_side=512, at_least=120),
)


@spec_dataclass
class PyramidSpec:
    """The pyramid that chips are cut from; the defaults are the paper's (SNIPER §4).

    Attributes:
        chip_size: side of a chip, level pixels.
        stride: spacing of the grid that windows are placed on, level pixels.
        random_offset: shift the grid at random each epoch.
        levels: the levels, finest first. Every box size must be valid at some level, and the coarsest level must fit
            any image into one chip (`long_side` at most `chip_size`), so that no box is ever lost.
    """

    chip_size: Annotated[PositiveInt, Le(MAX_CHIP_SIZE)] = 512
    stride: PositiveInt = 32
    random_offset: bool = False
    levels: Annotated[tuple[LevelSpec, ...], MinLen(1), MaxLen(MAX_LEVELS)] = PAPER_LEVELS

    def __post_init__(self) -> None:
        if self.stride > self.chip_size:
            raise ValueError(f"stride must be at most chip_size ({self.chip_size}), not {self.stride}")
        last = self.levels[-1]
        if last.long_side is None or last.long_side > self.chip_size:
            raise ValueError(
                "the coarsest level must fit every image into one chip: "
                f"give it a long_side of at most {self.chip_size}"
            )
        check_ranges(self.levels)

    def at(self, *, width: int, height: int) -> tuple[Level, ...]:
        """Bind every level to an image of this width and height in pixels."""
        return tuple(
            level.at(width=width, height=height, index=index) for index, level in enumerate(self.levels)
        )


def _rounded(sides: Float[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    return np.maximum(np.rint(sides), 1).astype(np.int64)
