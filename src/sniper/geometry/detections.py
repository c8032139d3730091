"""Boxes, scores and labels of the objects in one image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.errors import count_and_list
from sniper.geometry.boxes import empty_boxes
from sniper.geometry.detection_masks import DetectionMasks

DEFAULT_MIN_SCORE = 0.3
"""The score from which detections are shown where no better one is known."""

_NUM_CLASSES_SHOWN = 5


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Detections:
    """Detections of one image, in arrays of equal length.

    Indexing with a mask, an array of indices, a slice or one index returns `Detections` again, and so does iterating,
    one by one.

    Attributes:
        boxes: (n, 4) xyxy; in the image frame where they come from a `Detector`. May be empty.
        scores: (n,) confidence from 0 to 1.
        labels: (n,) contiguous class labels, 0..C-1.
        masks: of the n detections; None where the detector predicts none.
        sources: (n,) what each comes from, such as the row of a file; it is kept when detections are merged. None where
            that does not matter.
        class_names: names by label; empty where they are unknown.
        min_score: score from which `confident` selects detections: where F1 was best on the validation images. None
            where it is unknown.

    Example:
        >>> boxes = np.array([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 20.0, 9.0], [5.0, 0.0, 9.0, 9.0]])
        >>> detections = Detections(
        ...     boxes=boxes,
        ...     scores=np.array([0.9, 0.8, 0.3]),
        ...     labels=np.array([0, 1, 0]),
        ...     class_names=("car", "person"),
        ... )
        >>> detections
        Detections(3: 2 car, 1 person)
        >>> detections[detections.scores > 0.5].names
        ('car', 'person')
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    masks: DetectionMasks | None = None
    sources: Int[np.ndarray, " n"] | None = None
    class_names: tuple[str, ...] = ()
    min_score: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(
        self, index: int | np.integer | slice | Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]
    ) -> Self:
        rows = np.array([index]) if isinstance(index, int | np.integer) else index
        return replace(
            self,
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            masks=None if self.masks is None else self.masks[rows],
            sources=None if self.sources is None else self.sources[rows],
        )

    def __iter__(self) -> Iterator[Self]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        labels, counts = np.unique(self.labels, return_counts=True)
        names = self.class_names or {label: f"of class {label}" for label in labels.tolist()}
        most_first = sorted(zip((-counts).tolist(), labels.tolist(), strict=True))
        per_class = [f"{-count} {names[label]}" for count, label in most_first]
        listed = count_and_list(per_class, limit=_NUM_CLASSES_SHOWN, separator=", ")
        return f"{type(self).__name__}({len(self)}{': ' if listed else ''}{listed})"

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each detection.

        Raises:
            ValueError: if the detections have no class names.
        """
        if not self.class_names:
            raise ValueError("these detections have no class names")
        return tuple(self.class_names[label] for label in self.labels.tolist())

    def with_masks(self, masks: DetectionMasks) -> Self:
        """Return the detections with masks."""
        return replace(self, masks=masks)

    def confident(self, min_score: float | None = None) -> "Detections":
        """Return the detections to look at or to act on: of at least a score, and without a second box on an object.

        All detections together score best in an evaluation, since soft-NMS keeps duplicates with lower scores, and the
        score of a detection counts.

        Args:
            min_score: the score; by default the attribute `min_score`, or 0.3 where that is unknown.

        Returns:
            The detections, best first.
        """
        from sniper.geometry.nms import drop_duplicates

        if min_score is None:
            min_score = DEFAULT_MIN_SCORE if self.min_score is None else self.min_score
        return drop_duplicates(self[self.scores >= min_score])

    def to_supervision(self, min_score: float | None = None) -> Any:
        """Convert to `supervision.Detections`, for the trackers, zones and annotators of that package.

        Class names, where they are known, become `data["class_name"]`. Masks become arrays of the size of the image, as
        that package has them: one byte for each pixel and detection.

        Args:
            min_score: see `confident`, whose detections are converted.

        Raises:
            ModuleNotFoundError: if supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            if error.name != "supervision":
                raise
            raise ModuleNotFoundError(
                "to_supervision requires supervision: pip install 'sniper-det[supervision]'", name=error.name
            ) from error

        shown = self.confident(min_score)
        return supervision.Detections(
            xyxy=shown.boxes.astype(np.float32),
            confidence=shown.scores.astype(np.float32),
            class_id=shown.labels.astype(np.int64),
            **({} if shown.masks is None or not len(shown) else {"mask": shown.masks.to_arrays()}),
            data={"class_name": np.array(shown.names, dtype=np.str_)} if shown.class_names else {},
        )

    @classmethod
    def from_supervision(cls, detections: Any, *, class_names: Sequence[str] = ()) -> Self:
        """Convert from `supervision.Detections`, such as what a tracker of that package returns.

        Args:
            detections: with `xyxy`. Without confidences, scores are 1. Masks and tracker ids are not kept.
            class_names: names by label. Without them, labels are `class_id`, and names those of `data["class_name"]`;
                with names alone, labels count the names in alphabetical order. A detection without either is of
                class 0.

        Raises:
            ValueError: if a class id is negative or has no name, or `class_name` gives a class two names.

        Example:
            >>> boxes = np.array([[0.0, 0.0, 8.0, 8.0]])
            >>> detections = Detections(
            ...     boxes=boxes, scores=np.array([0.5]), labels=np.array([1]), class_names=("car", "person")
            ... )
            >>> Detections.from_supervision(detections.to_supervision(0)).names  # doctest: +SKIP
            ('person',)
        """
        count = len(detections.xyxy)
        names = detections.data.get("class_name")
        texts = None if names is None else [str(name) for name in np.asarray(names).tolist()]
        if detections.class_id is not None:
            labels = np.asarray(detections.class_id).astype(np.int64)
        elif texts is not None:
            listed = list(class_names) or sorted(set(texts))
            unknown = sorted(set(texts) - set(listed))
            if unknown:
                raise ValueError(f"class_name has {', '.join(unknown)}, expected {', '.join(listed)}")
            class_names, labels = listed, np.array([listed.index(text) for text in texts], dtype=np.int64)
        else:
            labels = np.zeros(count, dtype=np.int64)
        if not class_names and texts is not None:
            class_names = _names_by_label(labels.tolist(), texts)
        if len(labels) and (labels.min() < 0 or (class_names and labels.max() >= len(class_names))):
            raise ValueError(
                f"class_id is {labels.min()} to {labels.max()}, expected 0 to {len(class_names) - 1}"
                if class_names
                else f"class_id is {labels.min()}, expected at least 0"
            )
        scores = np.ones(count) if detections.confidence is None else detections.confidence
        return cls(
            boxes=np.asarray(detections.xyxy, dtype=np.float64).reshape(-1, 4),
            scores=np.asarray(scores, dtype=np.float64),
            labels=labels,
            class_names=tuple(class_names),
        )

    @classmethod
    def empty(cls) -> Self:
        """Return the detections of an image without objects."""
        return cls(boxes=empty_boxes(), scores=np.zeros(0), labels=np.zeros(0, dtype=np.int64))

    @classmethod
    def join(cls, detections: Sequence["Detections"]) -> Self:
        """Concatenate detections of one image, in order; class names and `min_score` are those of the first.

        Raises:
            ValueError: if some of them have masks, and others none.
        """
        if not detections:
            return cls.empty()
        masks = [each.masks for each in detections if each.masks is not None]
        if masks and any(each.masks is None and len(each) for each in detections):
            raise ValueError("some of the detections have masks, and others none")
        sources = [each.sources for each in detections if each.sources is not None]
        return cls(
            boxes=np.concatenate([each.boxes for each in detections]),
            scores=np.concatenate([each.scores for each in detections]),
            labels=np.concatenate([each.labels for each in detections]),
            masks=DetectionMasks.join(masks) if masks else None,
            sources=np.concatenate(sources) if len(sources) == len(detections) else None,
            class_names=detections[0].class_names,
            min_score=detections[0].min_score,
        )


SelectDetections = Callable[[int, Detections], Detections]
"""Returns some of the detections of an image, by its index; the frame of their boxes stays the same."""


def _names_by_label(labels: Sequence[int], texts: Sequence[str]) -> list[str]:
    """Return names by label from the name of each detection; labels without a detection are named by their number.

    Raises:
        ValueError: if a label has two names.
    """
    names: dict[int, str] = {}
    for label, text in zip(labels, texts, strict=True):
        if names.setdefault(label, text) != text:
            raise ValueError(f"class {label} has two names, {names[label]} and {text}")
    return [names.get(label, str(label)) for label in range(max(labels, default=-1) + 1)]
