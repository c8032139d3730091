"""A folder with the boxes of many images, which processes fill together and continue after a kill.

`head.json` names the images and everything that the boxes depend on. Each process appends one record per image to a
part file of its own, whose header ties it to that head. A record carries a checksum, so one that was cut short is
recognised and its image searched again: a process that is killed loses only the image it was at. Records are read one
by one, so memory does not grow with the number of boxes.
"""

import hashlib
import itertools
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Int

from sniper.errors import DetectionsError, ProposalsError, SniperError
from sniper.files import (
    atomic_write,
    is_temporary,
    naming_path,
    open_regular,
    read_bytes,
    remove_folder,
)
from sniper.geometry import Detections
from sniper.geometry.detection_masks import DetectionMasks
from sniper.runs.lock import FOLDER_LOCK
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.specs import parse_json

_VERSION = 2
_HEAD = "head.json"
_PART = re.compile(r"\d{3,}\.boxes")
_OURS = re.compile(rf"head\.json|\.head\.json\.\d+|{_PART.pattern}")  # the second: of an earlier version
_VERSION_1 = re.compile(r"\d{5}\.npz|\.\d{5}\.npz\.\d+")  # shards of version 1, complete or not
_MAGIC = b"sniper boxes\n"  # at the start of a part, before the hash of head.json
_RECORD = struct.Struct(
    "<IiI"
)  # index of the image, number of boxes or _UNREADABLE, CRC-32 of these and the boxes
_UNREADABLE = -1
_NUM_STEPS = 65_535  # that a side of an image is divided into by 16-bit boxes


class ExactEncoding:
    """Detections exactly as they are, 44 bytes each; with masks, the bytes of their grids and 40 more.

    `encode` returns an (n,) array of `dtype`, `decode` the detections again; it raises a ValueError for other rows than
    `encode` returns.

    Args:
        num_classes: of the detector.
        mask_side: of the grids of masks, cells; None without masks.
    """

    kind = "detections"
    error: type[SniperError] = DetectionsError

    def __init__(self, num_classes: int, *, mask_side: int | None = None) -> None:
        self._num_classes, self._mask_side = num_classes, mask_side
        fields: list[Any] = [("box", "<f8", 4), ("score", "<f8"), ("label", "<i4")]
        if mask_side is not None:
            fields += [("grid", "u1", (mask_side, mask_side)), ("mask_box", "<f8", 4), ("sides", "<i4", 2)]
        self.dtype = np.dtype(fields)

    def encode(self, index: int, detections: Detections) -> np.ndarray:
        """Encode the detections of an image."""
        rows = np.empty(len(detections), dtype=self.dtype)
        rows["box"], rows["score"], rows["label"] = detections.boxes, detections.scores, detections.labels
        if self._mask_side is not None and len(detections):
            masks = detections.masks
            if masks is None:
                raise ValueError(f"the detections of image {index} have no masks")
            rows["grid"], rows["mask_box"], rows["sides"] = masks.grids, masks.boxes, masks.sides
        return rows

    def decode(self, index: int, rows: np.ndarray) -> Detections:
        """Decode the detections of an image."""
        if not (np.isfinite(rows["box"]).all() and np.isfinite(rows["score"]).all()):
            raise ValueError("a box or a score is not finite")
        labels = rows["label"]
        if len(labels) and not 0 <= labels.min() <= labels.max() < self._num_classes:
            raise ValueError(
                f"labels are {labels.min()} to {labels.max()}, expected 0 to {self._num_classes - 1}"
            )
        return Detections(
            boxes=rows["box"].astype(np.float64),
            scores=rows["score"].astype(np.float64),
            labels=rows["label"].astype(np.int64),
            masks=None if self._mask_side is None else self._decode_masks(rows),
        )

    @staticmethod
    def _decode_masks(rows: np.ndarray) -> DetectionMasks:
        boxes, sides = rows["mask_box"].astype(np.float64), rows["sides"].astype(np.int32)
        if not (np.isfinite(boxes).all() and (sides > 0).all()):
            raise ValueError("the box of a mask is not finite, or its image has no sides")
        return DetectionMasks(grids=rows["grid"].copy(), boxes=boxes, sides=sides)


class ProposalEncoding:
    """Boxes without labels, 10 bytes each: edges as 16-bit fractions of the image's sides, scores in half precision.

    Args:
        widths: (m,) of the images, pixels.
        heights: (m,) of the images, pixels.
    """

    kind = "proposals"
    error: type[SniperError] = ProposalsError
    dtype = np.dtype([("box", "<u2", 4), ("score", "<f2")])

    def __init__(self, widths: Int[np.ndarray, " m"], heights: Int[np.ndarray, " m"]) -> None:
        self._widths, self._heights = widths, heights

    def encode(self, index: int, detections: Detections) -> np.ndarray:
        """Encode the proposals of an image."""
        steps = np.rint(detections.boxes / self._sides(index) * _NUM_STEPS)
        rows = np.empty(len(detections), dtype=self.dtype)
        rows["box"], rows["score"] = np.clip(steps, 0, _NUM_STEPS), detections.scores
        return rows

    def decode(self, index: int, rows: np.ndarray) -> Detections:
        """Decode the proposals of an image."""
        if np.isnan(rows["score"]).any() or (rows["box"][:, :2] > rows["box"][:, 2:]).any():
            raise ValueError("a score is no number, or a box has a negative width or height")
        return Detections(
            boxes=rows["box"] / _NUM_STEPS * self._sides(index),
            scores=rows["score"].astype(np.float64),
            labels=np.zeros(len(rows), dtype=np.int64),
        )

    def _sides(self, index: int) -> Int[np.ndarray, "4"]:
        width, height = int(self._widths[index]), int(self._heights[index])
        return np.array([width, height, width, height])


Encoding = ExactEncoding | ProposalEncoding


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What `head.json` has beside the source; those of earlier versions may lack the rest."""

    version: int
    kind: str | None = None
    images: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of a store, in order.

    Attributes:
        digest: hash by which they are recognised.
        count: number of images.
        name: for messages, such as the path of their data set.
    """

    digest: str
    count: int
    name: str


class BoxStore:
    """The boxes of each image of a list, in a folder. Made by `start` or `open`.

    Args:
        folder: of the store.
        encoding: of its boxes.
        num_images: number of images in the list.
        header: first bytes of its parts.

    Raises:
        SniperError: of the encoding's class, if a part belongs to another store.
    """

    def __init__(self, folder: Path, encoding: Encoding, *, num_images: int, header: bytes) -> None:
        self.folder, self.encoding, self.num_images = folder, encoding, num_images
        self._header = header
        self.scan()

    @classmethod
    def start(
        cls,
        folder: Path,
        encoding: Encoding,
        *,
        images: ImageList,
        source: Mapping[str, Any],
        existing: Literal["replace", "resume", "resume or replace"],
        processes: Processes = SINGLE_PROCESS,
    ) -> "BoxStore":
        """Create a store, or continue one; all processes call this.

        Args:
            folder: of the store.
            encoding: of its boxes.
            images: the images.
            source: everything else that the boxes depend on, as plain data.
            existing: how to treat a store that is there already: `replace` it, `resume` it and refuse one with boxes of
                other images or another source, or `resume or replace` it.
            processes: those that fill the store.

        Raises:
            SniperError: of the encoding's class, if the folder contains something else than such a store, or is to be
                resumed and has other images or another source.
        """
        content = _encode_head(encoding, images, source)
        _check_folder(folder, encoding)
        is_same = _has_head(folder, content)
        if existing == "resume" and not is_same and _parts_of(folder):
            raise encoding.error(
                f"{folder}: was written with other images, weights or settings; omit --resume to start over"
            )
        processes.barrier()  # all have read the head before the first one replaces it
        if processes.is_first and (existing == "replace" or not is_same):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_parts(folder)
            with atomic_write(folder / _HEAD) as file:
                file.write(content)
        processes.barrier()
        store = cls(folder, encoding, num_images=images.count, header=_header_of(content))
        processes.barrier()  # all agree on the missing images before one of them writes
        return store

    @classmethod
    def open(cls, folder: Path, encoding: Encoding, *, images: ImageList) -> "BoxStore":
        """Open a complete store.

        Raises:
            SniperError: of the encoding's class, if there is none, or it is incomplete or of other images.
        """
        head = _read_head(folder, encoding)
        if head.version != _VERSION:
            raise encoding.error(
                f"{folder}: {encoding.kind} of version {head.version}, expected {_VERSION}; mine again"
            )
        if head.images != images.digest:
            raise encoding.error(f"{folder}: {encoding.kind} of other images than those of {images.name}")
        content = read_bytes(folder / _HEAD)
        store = cls(folder, encoding, num_images=images.count, header=_header_of(content))
        store.check_complete("mine again to continue")
        return store

    @property
    def missing(self) -> list[int]:
        """Indices of the images without a record, as of the last scan."""
        return np.flatnonzero(self._part_indices < 0).tolist()

    @property
    def counts(self) -> Int[np.ndarray, " m"]:
        """Number of boxes of each image; 0 for an image that is missing or unreadable."""
        return np.maximum(self._counts, 0)

    @property
    def unreadable(self) -> list[int]:
        """Indices of the images that could not be read."""
        return np.flatnonzero(self._counts == _UNREADABLE).tolist()

    @property
    def num_bytes(self) -> int:
        """Size of all parts."""
        return sum(path.stat().st_size for path in self._parts)

    @property
    def source(self) -> dict[str, Any]:
        """What the boxes depend on beside the images, as it was given to `start`."""
        source: dict[str, Any] = json.loads(read_bytes(self.folder / _HEAD))["source"]
        return source

    def check_complete(self, remedy: str) -> None:
        """Make sure that every image has a record.

        Args:
            remedy: what to do otherwise, for the message.

        Raises:
            SniperError: of the encoding's class, if not.
        """
        if self.missing:
            raise self.encoding.error(
                f"{self.folder}: {len(self.missing)} of {self.num_images} images are missing; {remedy}"
            )

    def scan(self) -> None:
        """Find the records of all parts.

        Raises:
            SniperError: of the encoding's class, if a part belongs to another store.
        """
        self._parts = _parts_of(self.folder)
        self._part_indices = np.full(self.num_images, -1, dtype=np.int32)
        self._offsets = np.zeros(self.num_images, dtype=np.int64)
        self._counts = np.zeros(self.num_images, dtype=np.int32)
        for part_index, path in enumerate(self._parts):
            for index, count, offset in self._records(path):
                self._part_indices[index] = part_index
                self._offsets[index], self._counts[index] = offset, count

    def read(self, index: int) -> Detections | None:
        """Read the boxes of an image; None for one that could not be read.

        Raises:
            KeyError: if the image has no record.
            SniperError: of the encoding's class, if its boxes are damaged.
        """
        if self._part_indices[index] < 0:
            raise KeyError(index)
        count = int(self._counts[index])
        if count == _UNREADABLE:
            return None
        path = self._parts[self._part_indices[index]]
        with open_regular(path) as file:
            file.seek(int(self._offsets[index]) + _RECORD.size)
            content = file.read(count * self.encoding.dtype.itemsize)
        try:
            if len(content) < count * self.encoding.dtype.itemsize:
                raise ValueError("the file was cut short meanwhile")
            return self.encoding.decode(index, np.frombuffer(content, dtype=self.encoding.dtype))
        except ValueError as error:
            raise self._damaged(path, index, str(error)) from error

    @contextmanager
    def new_part(self) -> Iterator["PartWriter"]:
        """Create a part for this process to write to; one to which nothing is written is deleted again."""
        for number in itertools.count(len(self._parts)):
            path = self.folder / f"{number:03d}.boxes"
            with suppress(FileExistsError):  # another process has taken the name
                file = path.open("xb")
                break
        part = PartWriter(file, self.encoding)
        try:
            with naming_path(path), file:
                file.write(self._header)
                yield part
        finally:
            if not part.num_records:
                path.unlink()

    def remove(self) -> None:
        """Delete the store."""
        remove_folder(self.folder)

    def _records(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """Iterate image index, number of boxes and offset of the records of a part, up to one that is cut short."""
        size = path.stat().st_size
        with open_regular(path) as file:
            header = file.read(len(self._header))
            if len(header) < len(self._header):
                return  # killed as it started
            if header != self._header:
                raise self.encoding.error(
                    f"{path}: belongs to another store than {_HEAD} beside it; delete it"
                )
            while True:
                offset = file.tell()
                fields = file.read(_RECORD.size)
                if len(fields) < _RECORD.size:
                    return
                index, count, checksum = _RECORD.unpack(fields)
                num_bytes = max(count, 0) * self.encoding.dtype.itemsize
                if (
                    num_bytes > size - file.tell()
                    or _checksum(index, count, file.read(num_bytes)) != checksum
                ):
                    return
                if index >= self.num_images or count < _UNREADABLE:
                    raise self._damaged(
                        path, index, f"there are {self.num_images} images; it has {count} boxes"
                    )
                yield index, count, offset

    def _damaged(self, path: Path, index: int, problem: str) -> SniperError:
        return self.encoding.error(
            f"{path}: the record of image {index} is damaged ({problem}); delete the file"
        )


class PartWriter:
    """Appends records to a part.

    Args:
        file: the part.
        encoding: of the boxes.
    """

    def __init__(self, file: BinaryIO, encoding: Encoding) -> None:
        self._file, self._encoding = file, encoding
        self.num_records = 0

    def write(self, index: int, detections: Detections | None) -> None:
        """Append the boxes of an image; None for one that could not be read.

        Raises:
            ValueError: if a box or score is not finite.
        """
        count, content = _UNREADABLE, b""
        if detections is not None:
            if not (np.isfinite(detections.boxes).all() and np.isfinite(detections.scores).all()):
                raise ValueError(f"the detections of image {index} are not finite")
            count, content = len(detections), self._encoding.encode(index, detections).tobytes()
        self._file.write(_RECORD.pack(index, count, _checksum(index, count, content)) + content)
        self._file.flush()
        self.num_records += 1


def search_images(
    store: BoxStore,
    find: Callable[[Sequence[int]], Iterable[Detections | None]],
    *,
    processes: Processes,
    on_progress: Callable[[int, int], None],
    on_image: Callable[[int, Detections], None] | None = None,
) -> None:
    """Fill a store with the boxes of its missing images; all processes call this, and each takes its share.

    Args:
        store: the store, as all processes started it.
        find: returns the boxes of the images with these indices, in order; None for an image that cannot be read.
        processes: those that fill the store.
        on_progress: called after each image with the number of images that this process has searched, and of all that
            it is to search.
        on_image: called with the index and the boxes of each image that this process has searched, before they are
            stored.

    Raises:
        SniperError: of the encoding's class, if images are missing at the end because parts were removed meanwhile.
    """
    share = store.missing[processes.rank :: processes.world_size]
    if share:
        with store.new_part() as part:
            for num_done, (index, detections) in enumerate(zip(share, find(share), strict=True), start=1):
                if on_image is not None and detections is not None:
                    on_image(index, detections)  # first, since it is not called for an image with a record
                part.write(index, detections)
                on_progress(num_done, len(share))
    processes.barrier()
    store.scan()
    store.check_complete("files of it were removed meanwhile; resume to search these images again")


def _checksum(index: int, count: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<Ii", index, count)))


def _header_of(head: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(head).digest()


def _encode_head(encoding: Encoding, images: ImageList, source: Mapping[str, Any]) -> bytes:
    head = {"version": _VERSION, "kind": encoding.kind, "images": images.digest, "source": source}
    return json.dumps(head).encode()


def _parts_of(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if _PART.fullmatch(path.name))


def _has_head(folder: Path, content: bytes) -> bool:
    path = folder / _HEAD
    return path.exists() and read_bytes(path) == content


def _read_head(folder: Path, encoding: Encoding) -> "_Head":
    try:
        head = parse_json(read_bytes(folder / _HEAD), _Head)
        if head.version == _VERSION and None in (head.kind, head.images):
            raise ValueError("keys are missing")
        if head.kind not in (None, encoding.kind):
            raise ValueError(f"it contains {head.kind}")
    except (OSError, ValueError) as error:
        raise encoding.error(f"{folder}: contains no {encoding.kind} ({error})") from error
    return head


def _check_folder(folder: Path, encoding: Encoding) -> None:
    """Check that a folder can become a store: it is absent, empty, or a store of the same kind.

    Shards of version 1 count only beside a head of that version: a user may have files of such names.
    """
    if folder.exists() and not folder.is_dir():
        raise encoding.error(f"{folder}: is a file, expected a folder for {encoding.kind}")
    names = [path.name for path in folder.iterdir() if not _is_auxiliary(path)] if folder.exists() else []
    version = None
    if _HEAD in names:
        try:
            version = _read_head(folder, encoding).version
        except SniperError as error:
            raise _not_a_store(folder, encoding) from error
    for name in names:
        is_shard = version == 1 and _VERSION_1.fullmatch(name)
        if not (_OURS.fullmatch(name) or is_shard):
            raise _not_a_store(folder, encoding)


def _not_a_store(folder: Path, encoding: Encoding) -> SniperError:
    return encoding.error(f"{folder}: contains something else than {encoding.kind}; choose another folder")


def _remove_parts(folder: Path) -> None:
    """Delete the files of a store except the head, which identifies the folder as a store."""
    for path in folder.iterdir():
        if path.name != _HEAD and not _is_auxiliary(path):
            path.unlink()


def _is_auxiliary(path: Path) -> bool:
    """Check whether a path in the folder of a store is its lock, or was left by a process that wrote the head."""
    return path.name == FOLDER_LOCK or is_temporary(path.name)
