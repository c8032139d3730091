"""Images with random boxes, for the tests of chips."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from sniper.chips import LevelSpec, PyramidSpec

SMALL_PYRAMID = PyramidSpec(
    chip_size=64,
    stride=8,
    levels=(
        LevelSpec(factor=2.0, below=24),
        LevelSpec(factor=1.0, at_least=16, below=40),
        LevelSpec(long_side=64, at_least=32),
    ),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Some images and their boxes, flat."""

    widths: np.ndarray
    heights: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray

    def boxes_of(self, image: int) -> np.ndarray:
        return self.boxes[self.offsets[image] : self.offsets[image + 1]]


def build_world(seed: int, *, num_images: int = 3, most_boxes: int = 8, longest: int = 200) -> World:
    """Draw images of 1 to `longest` px and boxes of all sizes and shapes inside them."""
    rng = np.random.default_rng(seed)
    widths = rng.integers(1, longest + 1, num_images)
    heights = rng.integers(1, longest + 1, num_images)
    counts = rng.integers(0, most_boxes + 1, num_images)
    parts = []
    for width, height, count in zip(widths, heights, counts, strict=True):
        sides = np.exp(rng.uniform(0, 1, (count, 2)) * np.log([width, height]))
        low = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
        parts.append(np.concatenate([low, low + sides], axis=1))
    boxes = np.minimum(np.concatenate(parts), np.repeat(np.stack([widths, heights] * 2, 1), counts, axis=0))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return World(widths=widths, heights=heights, offsets=offsets, boxes=boxes)


worlds = st.integers(0, 100_000).map(build_world)
