"""Classify the errors of a detector in an image, by the error types of TIDE (Bolya et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Bool, Float, Int

from sniper.data.datasets import ImageRecord
from sniper.evaluation.matching import match_detections
from sniper.geometry import Detections
from sniper.geometry.boxes import iou

BACKGROUND_IOU = 0.1
"""A detection whose overlap with every object is at most this lies on the background."""


class ErrorKind(StrEnum):
    """What is wrong with a detection, or with an object that no detection matches.

    BACKGROUND: a detection on the background.
    MISSED: an object that no detection matches, nor any of the kinds `WRONG_CLASS` and `LOOSE` lies on.
    WRONG_CLASS: a detection whose overlap with an object of another class is enough for a match.
    LOOSE: a detection whose overlap with an object of its class is too small for a match.
    WRONG_CLASS_AND_LOOSE: a detection whose overlap with an object of another class is too small for a match.
    DUPLICATE: a detection that would match an object of its class that another detection with a higher score matches.
    """

    BACKGROUND = "background"
    MISSED = "missed"
    WRONG_CLASS = "wrong_class"
    LOOSE = "loose"
    WRONG_CLASS_AND_LOOSE = "wrong_class_and_loose"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, kw_only=True)
class DetectionError:
    """An error in an image.

    Attributes:
        kind: the type.
        detection: index of the detection; None for a missed object.
        object: index of the object that is missed, or that the detection overlaps most: of its class for `LOOSE` and
            `DUPLICATE`, of another class for `WRONG_CLASS`. None for `BACKGROUND`.
        overlap: IoU of both; 0 where one of them is None.
    """

    kind: ErrorKind
    detection: int | None
    object: int | None
    overlap: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageErrors:
    """The detections of an image, matched with its objects, and what is wrong with them.

    Attributes:
        errors: the wrong detections by falling score, then the missed objects.
        is_true_positive: (n,) whether each detection matches an object.
        is_missed: (m,) whether each object is matched by no detection, whatever else lies on it; False for crowds.
    """

    errors: Sequence[DetectionError]
    is_true_positive: Bool[np.ndarray, " n"]
    is_missed: Bool[np.ndarray, " m"]


def find_errors(detections: Detections, ground_truth: ImageRecord, *, min_iou: float = 0.5) -> ImageErrors:
    """Match the detections of an image with its objects by the COCO rules, and classify what does not match.

    Detections in crowds of their class are neither right nor wrong.

    Args:
        detections: image frame, highest score first. May be empty.
        ground_truth: of the image.
        min_iou: least overlap of a match.
    """
    matches = match_detections(detections, ground_truth, iou_threshold=min_iou)
    objects = np.flatnonzero(~ground_truth.is_crowd)
    boxes, labels = ground_truth.boxes[objects], ground_truth.labels[objects]
    errors = []
    is_touched = np.zeros(len(ground_truth.boxes), dtype=np.bool_)
    for index in np.flatnonzero(~matches.is_true_positive & ~matches.is_ignored).tolist():
        overlaps = iou(detections.boxes[index : index + 1], boxes)[0]  # (k,)
        kind, nearest = _classify(overlaps, labels == detections.labels[index], min_iou=min_iou)
        touched = None if nearest is None else int(objects[nearest])
        if kind in (ErrorKind.WRONG_CLASS, ErrorKind.LOOSE):
            is_touched[touched] = True
        overlap = 0.0 if nearest is None else float(overlaps[nearest])
        errors.append(DetectionError(kind=kind, detection=index, object=touched, overlap=overlap))
    errors += [
        DetectionError(kind=ErrorKind.MISSED, detection=None, object=index)
        for index in np.flatnonzero(matches.is_missed & ~is_touched).tolist()
    ]
    return ImageErrors(errors=errors, is_true_positive=matches.is_true_positive, is_missed=matches.is_missed)


def _classify(
    overlaps: Float[np.ndarray, " k"], is_of_class: Bool[np.ndarray, " k"], *, min_iou: float
) -> tuple[ErrorKind, int | None]:
    """Return the type of a wrong detection, and the object that explains it."""
    of_class, of_other = _largest(overlaps, is_of_class), _largest(overlaps, ~is_of_class)
    own = 0.0 if of_class is None else float(overlaps[of_class])
    other = 0.0 if of_other is None else float(overlaps[of_other])
    if BACKGROUND_IOU <= own < min_iou:
        return ErrorKind.LOOSE, of_class
    if other >= min_iou:
        return ErrorKind.WRONG_CLASS, of_other
    if own >= min_iou:
        return ErrorKind.DUPLICATE, of_class
    if max(own, other) <= BACKGROUND_IOU:
        return ErrorKind.BACKGROUND, None
    return ErrorKind.WRONG_CLASS_AND_LOOSE, of_other


def _largest(values: Float[np.ndarray, " k"], is_chosen: Bool[np.ndarray, " k"]) -> int | None:
    """Return the index of the largest of the chosen values; None if none is chosen."""
    indices: Int[np.ndarray, " c"] = np.flatnonzero(is_chosen)
    return int(indices[values[indices].argmax()]) if len(indices) else None
