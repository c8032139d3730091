"""Boxes, scores and labels of one image: indexed, moved and joined together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.geometry.boxes import empty_boxes


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: (n, 4) xyxy; the frame is the giver's to say. May be empty.
        scores: (n,) confidence from 0 to 1.
        labels: (n,) contiguous class labels, 0..C-1.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, index: Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]) -> Self:
        """Keep the detections that an index or a mask names, in its order."""
        return type(self)(boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index])

    def to_supervision(self) -> Any:
        """Give them as `supervision.Detections`, for the trackers, zones and annotators of that package.

        Raises:
            ModuleNotFoundError: if supervision is not installed.
        """
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(np.int64),
        )

    @classmethod
    def empty(cls) -> Self:
        """Give the detections of an image in which nothing was found."""
        return cls(boxes=empty_boxes(), scores=np.zeros(0), labels=np.zeros(0, dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence["Detections"]) -> Self:
        """Put the detections of several levels of one image together, in order."""
        if not parts:
            return cls.empty()
        return cls(
            boxes=np.concatenate([part.boxes for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
        )
