"""Proposals of a data set in a `BoxStore`, and negative chips chosen from them (SNIPER §3.3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.negatives import NegativeSpec, choose_negatives, choose_on_alarms
from sniper.data.datasets import Dataset
from sniper.geometry import Detections
from sniper.inference.store import BoxStore, ImageList, ProposalEncoding
from sniper.runs.processes import SINGLE_PROCESS, Processes

_IMAGES_PER_BLOCK = 256  # read at once; the seeds of negative chips depend on it


def start_proposals(
    folder: Path,
    dataset: Dataset,
    *,
    source: Mapping[str, Any],
    processes: Processes = SINGLE_PROCESS,
) -> BoxStore:
    """Create a store of proposals; continue one of the same images and source, replace another.

    Args:
        folder: of the store.
        dataset: the images.
        source: everything else that the proposals depend on, as plain data.
        processes: those that fill the store; all call this.

    Raises:
        ProposalsError: if the folder contains something else than proposals.
    """
    return BoxStore.start(
        folder,
        _encoding_for(dataset),
        images=_images_of(dataset),
        source=source,
        existing="resume or replace",
        processes=processes,
    )


def open_proposals(folder: Path, dataset: Dataset) -> BoxStore:
    """Open complete proposals.

    Raises:
        ProposalsError: if there are none, or they are incomplete or of other images.
    """
    return BoxStore.open(folder, _encoding_for(dataset), images=_images_of(dataset))


def has_false_alarms(proposals: BoxStore) -> bool:
    """Check whether a store has false alarms, rather than all proposals or detections."""
    return proposals.source.get("max_iou") is not None


def add_negatives(
    positives: ChipTable,
    proposals: BoxStore,
    spec: NegativeSpec,
    *,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> ChipTable:
    """Choose negative chips where uncovered proposals are dense, and merge them with the positive ones.

    Of false alarms, a negative chip must newly cover one. Both are read block by block, so memory does not grow with
    their number.

    Args:
        positives: the positive chips of the same images.
        proposals: a complete store of proposals or false alarms.
        spec: which proposals count, and how many a negative chip must newly cover.
        pyramid: the pyramid of the positive chips.
        generator: draws among equally good windows.
    """
    negatives = [positives.of_images(range(0))]
    is_of_alarms = has_false_alarms(proposals)
    for start in range(0, proposals.num_images, _IMAGES_PER_BLOCK):
        images = range(start, min(start + _IMAGES_PER_BLOCK, proposals.num_images))
        table = positives.of_images(images)
        scored = _read(
            proposals,
            images,
            widths=table.image_widths,
            heights=table.image_heights,
            min_score=spec.min_score,
        )
        options: dict[str, Any] = {"pyramid": pyramid, "generator": generator}
        negatives.append(
            choose_on_alarms(table, scored, spec, **options)[0]
            if is_of_alarms
            else choose_negatives(table, scored.images, spec, **options)
        )
    return positives.merge(ChipTable.concatenate(negatives))


def read_alarms(alarms: BoxStore, images: ImageBoxes, *, min_score: float) -> ScoredBoxes:
    """Read the false alarms of all images.

    Args:
        alarms: a complete store.
        images: the same images.
        min_score: alarms of a lower score are left out.
    """
    return _read(
        alarms, range(alarms.num_images), widths=images.widths, heights=images.heights, min_score=min_score
    )


def _read(
    proposals: BoxStore,
    images: range,
    *,
    widths: Int[np.ndarray, " m"],
    heights: Int[np.ndarray, " m"],
    min_score: float,
) -> ScoredBoxes:
    """Read the boxes of some images whose score is high enough."""
    per_image = []
    for image in images:
        detections = proposals.read(image) or Detections.empty()
        per_image.append(detections[detections.scores >= min_score])
    boxes = np.concatenate([np.zeros((0, 4)), *[each.boxes for each in per_image]])
    return ScoredBoxes(
        images=ImageBoxes(
            widths=widths,
            heights=heights,
            offsets=np.concatenate([[0], np.cumsum([len(each) for each in per_image])]).astype(np.int64),
            boxes=boxes,
            is_required=np.ones(len(boxes), dtype=np.bool_),
        ),
        scores=np.concatenate([np.zeros(0), *[each.scores for each in per_image]]),
    )


def _encoding_for(dataset: Dataset) -> ProposalEncoding:
    return ProposalEncoding(widths=dataset.widths, heights=dataset.heights)


def _images_of(dataset: Dataset) -> ImageList:
    return ImageList(digest=dataset.digest, count=len(dataset), name=str(dataset.path))
