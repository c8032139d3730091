"""The boxes of many images as flat arrays: what chips are chosen for."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBoxes:
    """The sides and boxes of many images, image after image.

    Attributes:
        widths: (m,) of the images, pixels.
        heights: (m,) of the images, pixels.
        offsets: (m + 1,) where the boxes of each image begin; the last is the number of boxes.
        boxes: (n, 4) xyxy, image frame, pixels, inside their images. May be empty.
        is_wanted: (n,) which boxes a chip must cover.
    """

    widths: Int[np.ndarray, " m"]
    heights: Int[np.ndarray, " m"]
    offsets: Int[np.ndarray, " m_plus_1"]
    boxes: Float[np.ndarray, "n 4"]
    is_wanted: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def image_of_box(self) -> Int[np.ndarray, " n"]:
        """The image of each box, as an index."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def has_wanted(self) -> Bool[np.ndarray, " m"]:
        """Which images have a box to be covered."""
        return np.bincount(self.image_of_box[self.is_wanted], minlength=len(self)) > 0

    def select(self, indices: Int[np.ndarray, " k"]) -> "ImageBoxes":
        """Keep some images with their boxes, in the order wanted.

        Args:
            indices: (k,) of the images. May be empty.

        Example:
            >>> two = ImageBoxes(
            ...     widths=np.array([8, 9]),
            ...     heights=np.array([8, 9]),
            ...     offsets=np.array([0, 1, 2]),
            ...     boxes=np.array([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 5.0, 5.0]]),
            ...     is_wanted=np.array([True, True]),
            ... )
            >>> two.select(np.array([1])).boxes.tolist()
            [[2.0, 2.0, 5.0, 5.0]]
        """
        counts = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # (k + 1,)
        own = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], counts)
        return ImageBoxes(
            widths=self.widths[indices],
            heights=self.heights[indices],
            offsets=offsets,
            boxes=self.boxes[own],
            is_wanted=self.is_wanted[own],
        )
