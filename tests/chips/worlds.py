"""Images with random boxes, for the tests of chips."""

import numpy as np
from hypothesis import strategies as st

from sniper.chips import ImageBoxes, LevelSpec, PyramidSpec

SMALL_PYRAMID = PyramidSpec(
    chip_size=64,
    stride=8,
    levels=(
        LevelSpec(factor=2.0, below=24),
        LevelSpec(factor=1.0, at_least=16, below=40),
        LevelSpec(long_side=64, at_least=32),
    ),
)


def build_world(seed: int, *, num_images: int = 3, most_boxes: int = 8, longest: int = 200) -> ImageBoxes:
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
    return ImageBoxes(
        widths=widths,
        heights=heights,
        offsets=offsets,
        boxes=boxes,
        is_required=np.ones(len(boxes), dtype=bool),
    )


def one_image(width: int, height: int, boxes: np.ndarray) -> ImageBoxes:
    """Build one image with (n, 4) boxes, all required."""
    return ImageBoxes(
        widths=np.array([width]),
        heights=np.array([height]),
        offsets=np.array([0, len(boxes)]),
        boxes=boxes,
        is_required=np.ones(len(boxes), dtype=bool),
    )


def boxes_of(world: ImageBoxes, image: int) -> np.ndarray:
    """Return the boxes of one image."""
    return world.boxes[world.offsets[image] : world.offsets[image + 1]]


worlds = st.integers(0, 100_000).map(build_world)
