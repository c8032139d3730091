"""The proposals of each image, kept on disk in shards of some images each: written one by one, read one by one.

A folder holds `head.json`, which says what they belong to, and `00000.npz`, `00001.npz` and so on. A shard is written
whole or not at all, so whoever is killed goes on with the first one missing, and processes that share the work each
write their own.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.negatives import NegativeSpec, choose_negatives
from sniper.data.datasets import Dataset
from sniper.errors import ProposalsError
from sniper.files import UNREADABLE, atomic_write

IMAGES_PER_SHARD = 256
_VERSION = 1
_OURS = re.compile(r"head\.json|\d{5}\.npz|\.head\.json\.\d+|\.\d{5}\.npz\.\d+")  # and unfinished ones
_FINENESS = 65_535  # steps that a side of an image is divided into: boxes are kept as 16-bit numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardProposals:
    """The proposals of the images of one shard.

    Attributes:
        offsets: (m + 1,) where those of each image begin.
        boxes: (n, 4) xyxy, image frame, pixels. May be empty.
        scores: (n,) from 0 to 1, best first in each image.
    """

    offsets: Int[np.ndarray, " m_plus_1"]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class ProposalStore:
    """A folder of proposals.

    Attributes:
        folder: where the shards are.
        annotations: the images that they belong to.
    """

    folder: Path
    annotations: Dataset

    @property
    def num_shards(self) -> int:
        """How many there are when all are written."""
        return -(-len(self.annotations) // IMAGES_PER_SHARD)

    @property
    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        return [index for index in range(self.num_shards) if not self._path(index).exists()]

    @classmethod
    def begin(cls, folder: Path, annotations: Dataset, *, source: Mapping[str, Any]) -> "ProposalStore":
        """Make the folder, or go on in one that was begun with the same images and source; others' shards are removed.

        Args:
            folder: where to.
            annotations: the images.
            source: what the proposals come from, in plain data.

        Raises:
            ProposalsError: if the folder holds something else than proposals.
        """
        if cls.is_begun(folder, annotations, source=source):
            return cls(folder, annotations)
        folder.mkdir(parents=True, exist_ok=True)
        old = list(folder.iterdir())
        if any(_OURS.fullmatch(path.name) is None for path in old) or not _has_our_head(folder):
            raise ProposalsError(f"{folder}: holds something else than proposals; name another folder")
        for path in old:
            if path.name != "head.json":  # the last to go, as it says what the others are
                path.unlink()
        with atomic_write(folder / "head.json") as file:
            file.write(json.dumps(_head_of(annotations, source)).encode())
        return cls(folder, annotations)

    @classmethod
    def is_begun(cls, folder: Path, annotations: Dataset, *, source: Mapping[str, Any]) -> bool:
        """Tell whether a folder was begun with these images and this source."""
        try:
            return _read_head(folder) == _head_of(annotations, source)
        except ProposalsError:
            return False

    @classmethod
    def open(cls, folder: Path, annotations: Dataset) -> "ProposalStore":
        """Find complete proposals.

        Raises:
            ProposalsError: if they are not there, not complete, or belong to other images.
        """
        head = _read_head(folder)
        if head["version"] != _VERSION:
            raise ProposalsError(
                f"{folder}: proposals of version {head['version']}; this program reads {_VERSION}"
            )
        if head["digest"] != annotations.digest:
            raise ProposalsError(f"{folder}: found in other images than those of {annotations.path}")
        store = cls(folder, annotations)
        if store.missing:
            raise ProposalsError(
                f"{folder}: {len(store.missing)} of {store.num_shards} shards are missing; mine again to go on"
            )
        return store

    @property
    def num_bytes(self) -> int:
        """The size of the shards that are written."""
        paths = [self._path(shard) for shard in range(self.num_shards)]
        return sum(path.stat().st_size for path in paths if path.exists())

    @property
    def num_proposals(self) -> int:
        """How many proposals the shards hold that are written."""
        missing = set(self.missing)
        return sum(
            int(self._load(shard, "offsets")[0][-1])
            for shard in range(self.num_shards)
            if shard not in missing
        )

    def images_of(self, shard: int) -> range:
        """Give the indices of the images of a shard."""
        first = shard * IMAGES_PER_SHARD
        return range(first, min(first + IMAGES_PER_SHARD, len(self.annotations)))

    def write(self, shard: int, found: ShardProposals) -> None:
        """Write the proposals of a shard's images, whole or not at all; edges are kept to a 65,535th of the image."""
        sides = self._sides_of_boxes(shard, found.offsets)
        with atomic_write(self._path(shard)) as file:
            np.savez_compressed(
                file,
                offsets=found.offsets.astype(np.int32),
                boxes=np.clip(np.rint(found.boxes / sides * _FINENESS), 0, _FINENESS).astype(np.uint16),
                scores=found.scores.astype(np.float16),
            )

    def read(self, shard: int) -> ShardProposals:
        """Read a shard.

        Raises:
            ProposalsError: if it cannot be read.
        """
        path = self._path(shard)
        offsets, boxes, scores = self._load(shard, "offsets", "boxes", "scores")
        if len(offsets) != len(self.images_of(shard)) + 1:
            raise ProposalsError(f"{path}: of {len(offsets) - 1} images, not {len(self.images_of(shard))}")
        offsets = offsets.astype(np.int64)
        sides = self._sides_of_boxes(shard, offsets)
        return ShardProposals(
            offsets=offsets, boxes=boxes / _FINENESS * sides, scores=scores.astype(np.float64)
        )

    def __iter__(self) -> Iterator[tuple[range, ShardProposals]]:
        return ((self.images_of(shard), self.read(shard)) for shard in range(self.num_shards))

    def _load(self, shard: int, *names: str) -> list[np.ndarray]:
        path = self._path(shard)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return [file[name] for name in names]
        except UNREADABLE as error:
            raise ProposalsError(f"{path}: not proposals ({error})") from error

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npz"

    def _sides_of_boxes(self, shard: int, offsets: Int[np.ndarray, " m_plus_1"]) -> Int[np.ndarray, "n 4"]:
        images = np.repeat(np.array(self.images_of(shard)), np.diff(offsets))
        sides = np.stack([self.annotations.widths, self.annotations.heights], axis=1)[images]
        return np.concatenate([sides, sides], axis=1)


def add_negatives(
    positives: ChipTable,
    store: ProposalStore,
    spec: NegativeSpec,
    *,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> ChipTable:
    """Choose negative chips where the proposals of a store gather, and put them beside the positive ones.

    Shards are read one by one, so memory does not grow with the number of proposals.

    Args:
        positives: the positive chips of the same images.
        store: the proposals.
        spec: how many are enough.
        pyramid: what the positive chips were cut from.
        generator: draws among equally good windows.
    """
    negatives = [positives.of_images(range(0))]
    for images, found in store:
        index = np.array(images)
        proposals = ImageBoxes(
            widths=positives.image_widths[index],
            heights=positives.image_heights[index],
            offsets=found.offsets,
            boxes=found.boxes,
            is_required=np.ones(len(found.boxes), dtype=np.bool_),
        )
        some = positives.of_images(images)
        negatives.append(choose_negatives(some, proposals, spec, pyramid=pyramid, generator=generator))
    return positives.merge(ChipTable.concatenate(negatives))


def _has_our_head(folder: Path) -> bool:
    """Tell whether a folder says of itself that it holds proposals, or nothing."""
    if not (folder / "head.json").exists():
        return True
    try:
        _read_head(folder)
    except ProposalsError:
        return False
    return True


def _head_of(annotations: Dataset, source: Mapping[str, Any]) -> dict[str, Any]:
    head = {"version": _VERSION, "digest": annotations.digest, "source": dict(source)}
    return dict(json.loads(json.dumps(head)))  # as it comes back: an infinite bound, a list for a tuple


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / "head.json"
    try:
        head = json.loads(path.read_bytes())
        if not {"version", "digest", "source"} <= head.keys():
            raise ValueError("keys are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise ProposalsError(f"{folder}: holds no proposals ({error})") from error
    return dict(head)
