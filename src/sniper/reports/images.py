"""Pictures of whole images with their detections, for pages."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from sniper.data.datasets import Category
from sniper.data.images.files import ImageReader
from sniper.data.spec import ReadSpec
from sniper.errors import SniperError, counted
from sniper.evaluation.pair import look_up_ids
from sniper.evaluation.results import DetectionTable, pack_ids
from sniper.geometry import Detections
from sniper.geometry.boxes import from_xywh
from sniper.geometry.detection_masks import DetectionMasks
from sniper.inference.results import ImageToSearch
from sniper.inference.sources import open_source
from sniper.reports.crops import read_reduced
from sniper.reports.parts import Budget, Mark, MarkedPicture, SearchedPart

NUM_IMAGES = 12
"""Images of a part that are shown."""

MAX_MARKS = 400
"""Boxes of a picture; browsers are slow with more."""

_SIDE = 640  # pixels of a picture
_TOLERANCE = 0.4  # pixels of a picture that an outline may be off by, to have fewer corners


def build_searched(
    table: DetectionTable,
    images: Sequence[ImageToSearch],
    *,
    categories: Sequence[Category],
    read: ReadSpec,
    min_score: float,
    step: int,
    budget: Budget,
) -> SearchedPart:
    """Draw images without ground truth, evenly spread, with their detections.

    Args:
        table: detections of the images.
        images: that were searched.
        categories: of the detections.
        read: how image files become pixels.
        min_score: detections from this score on are shown, without second boxes on an object.
        step: of the weights.
        budget: for the pictures.
    """
    labels = look_up_ids(table.category_ids, pack_ids([each.category_id for each in categories]))
    indices = look_up_ids(table.image_ids, pack_ids([image.image_id for image in images]))
    names = [category.name for category in categories]
    boxes = from_xywh(table.boxes)
    pictures = []
    for index in choose_evenly(range(len(images))):
        if budget.is_spent:
            budget.num_left_out += 1
            continue
        rows = np.flatnonzero((indices == index) & (labels >= 0))
        found = Detections(
            boxes=boxes[rows],
            scores=table.scores[rows],
            labels=labels[rows],
            masks=None if table.masks is None else DetectionMasks.from_arrays(table.masks.select(rows)),
        )
        shown = found.confident(min_score)
        try:
            reader = open_source(images[index].record or images[index].path, read)
            picture = read_image(
                reader,
                lambda zoom, shown=shown: mark_detections(shown, names, zoom=zoom),  # type: ignore[misc]
                f"{images[index].path.name}: {counted(len(shown), 'detection')}",
            )
        except SniperError:
            budget.num_left_out += 1
            continue
        budget.add(picture)
        pictures.append(picture)
    return SearchedPart(
        step=step,
        num_images=len(images),
        num_detections=int((table.scores >= min_score).sum()),
        min_score=min_score,
        images=pictures,
        num_left_out=budget.num_left_out,
    )


def choose_evenly(indices: range) -> list[int]:
    """Return up to `NUM_IMAGES` of some indices, evenly spread.

    Example:
        >>> choose_evenly(range(0, 100, 2))[:4]
        [0, 8, 18, 26]
    """
    count = min(NUM_IMAGES, len(indices))
    return [indices[place] for place in np.linspace(0, len(indices) - 1, count).round().astype(int).tolist()]


def mark_detections(detections: Detections, names: Sequence[str], *, zoom: float) -> list[Mark]:
    """Return the marks of detections, at most `MAX_MARKS`.

    Args:
        detections: image frame, best first.
        names: of the classes.
        zoom: from the image to the picture.
    """
    boxes = (detections.boxes[:MAX_MARKS] * zoom).round(1).tolist()
    rows = zip(boxes, detections.labels.tolist(), detections.scores.tolist(), strict=False)
    return [
        Mark(
            box=box,
            kind="right",
            text=f"{names[label]} {score:.2f}",
            outline=to_path(detections.masks, row, zoom=zoom),
        )
        for row, (box, label, score) in enumerate(rows)
    ]


def to_path(masks: DetectionMasks | None, row: int, *, zoom: float) -> str:
    """Return the outline of a mask as the path of SVG; empty without a mask.

    Args:
        masks: image frame.
        row: of the mask.
        zoom: from the image to the picture.
    """
    if masks is None:
        return ""
    rings = [ring[:-1] * zoom for part in masks.outlines(row) for ring in part]
    simple = [
        cv2.approxPolyDP(ring[:, None].astype(np.float32), _TOLERANCE, closed=True)[:, 0] for ring in rings
    ]
    return "".join(
        "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in ring.tolist()) + "Z" for ring in simple if len(ring) > 2
    )


def read_image(reader: ImageReader, marks_at: Callable[[float], list[Mark]], caption: str) -> MarkedPicture:
    """Read a whole image as a small picture.

    Args:
        reader: of the image.
        marks_at: returns the marks for a zoom from the image to the picture; the last are drawn on top.
        caption: of the picture.

    Raises:
        ImageError: if the image cannot be read.
    """
    picture = read_reduced(reader, max_side=_SIDE)
    return MarkedPicture(picture=picture, marks=marks_at(picture.width / reader.width), caption=caption)
