"""The boxes of many images as flat arrays: the input of choosing chips."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.geometry.boxes import ragged_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBoxes:
    """The sides and boxes of many images, image after image.

    Attributes:
        widths: (m,) widths of the images, pixels.
        heights: (m,) heights of the images, pixels.
        offsets: (m + 1,) where the boxes of each image begin; the last is the number of boxes.
        boxes: (n, 4) xyxy, image frame, pixels, inside their images. May be empty.
        is_required: (n,) which boxes chips must cover.
    """

    widths: Int[np.ndarray, " m"]
    heights: Int[np.ndarray, " m"]
    offsets: Int[np.ndarray, " m_plus_1"]
    boxes: Float[np.ndarray, "n 4"]
    is_required: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def image_of_box(self) -> Int[np.ndarray, " n"]:
        """The image of each box, as an index."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def has_required(self) -> Bool[np.ndarray, " m"]:
        """Which images have a box that chips must cover."""
        return np.bincount(self.image_of_box[self.is_required], minlength=len(self)) > 0

    def select(self, indices: Int[np.ndarray, " k"]) -> "ImageBoxes":
        """Return some images with their boxes.

        Args:
            indices: (k,) the images, in any order. May be empty.

        Example:
            >>> images = ImageBoxes(
            ...     widths=np.array([8, 9]),
            ...     heights=np.array([8, 9]),
            ...     offsets=np.array([0, 1, 2]),
            ...     boxes=np.array([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 5.0, 5.0]]),
            ...     is_required=np.array([True, True]),
            ... )
            >>> images.select(np.array([1])).boxes.tolist()
            [[2.0, 2.0, 5.0, 5.0]]
        """
        offsets, rows = ragged_rows(self.offsets, indices)
        return ImageBoxes(
            widths=self.widths[indices],
            heights=self.heights[indices],
            offsets=offsets,
            boxes=self.boxes[rows],
            is_required=self.is_required[rows],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredBoxes:
    """Boxes of many images with scores, such as false alarms.

    Attributes:
        images: the images and the boxes; all are required.
        scores: (n,) of the boxes, at least 0.
    """

    images: ImageBoxes
    scores: Float[np.ndarray, " n"]

    @classmethod
    def none(cls, images: ImageBoxes) -> "ScoredBoxes":
        """Return no boxes of some images."""
        empty = ImageBoxes(
            widths=images.widths,
            heights=images.heights,
            offsets=np.zeros_like(images.offsets),
            boxes=np.zeros((0, 4)),
            is_required=np.zeros(0, dtype=np.bool_),
        )
        return cls(images=empty, scores=np.zeros(0))
