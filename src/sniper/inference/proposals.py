"""Proposals of a data set in a `BoxStore`, and negative chips chosen from them (SNIPER §3.2)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.negatives import NegativeSpec, choose_negatives
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


def add_negatives(
    positives: ChipTable,
    proposals: BoxStore,
    spec: NegativeSpec,
    *,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> ChipTable:
    """Choose negative chips where uncovered proposals are dense, and merge them with the positive ones.

    Proposals are read block by block, so memory does not grow with their number.

    Args:
        positives: the positive chips of the same images.
        proposals: a complete store.
        spec: how many proposals a negative chip must newly cover.
        pyramid: the pyramid of the positive chips.
        generator: draws among equally good windows.
    """
    negatives = [positives.of_images(range(0))]
    for images, boxes in _blocks(proposals, positives):
        table = positives.of_images(images)
        negatives.append(choose_negatives(table, boxes, spec, pyramid=pyramid, generator=generator))
    return positives.merge(ChipTable.concatenate(negatives))


def _blocks(proposals: BoxStore, positives: ChipTable) -> Iterator[tuple[range, ImageBoxes]]:
    for start in range(0, proposals.num_images, _IMAGES_PER_BLOCK):
        images = range(start, min(start + _IMAGES_PER_BLOCK, proposals.num_images))
        per_image = [proposals.read(image) or Detections.empty() for image in images]
        boxes = np.concatenate([each.boxes for each in per_image])
        yield (
            images,
            ImageBoxes(
                widths=positives.image_widths[images.start : images.stop],
                heights=positives.image_heights[images.start : images.stop],
                offsets=np.concatenate([[0], np.cumsum([len(each) for each in per_image])]).astype(np.int64),
                boxes=boxes,
                is_required=np.ones(len(boxes), dtype=np.bool_),
            ),
        )


def _encoding_for(dataset: Dataset) -> ProposalEncoding:
    return ProposalEncoding(widths=dataset.widths, heights=dataset.heights)


def _images_of(dataset: Dataset) -> ImageList:
    return ImageList(digest=dataset.digest, count=len(dataset), name=str(dataset.path))
