"""Run a detector on every level of images: windows of equal padded sides are batched and prefetched.

Images are searched in groups, and the windows of a group level by level. Windows in one batch are all padded to the
same sides, so the detections of an image do not depend on the images beside it.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from sniper.chips import LevelSpec
from sniper.data.datasets import ImageRecord
from sniper.data.images.files import ImageReader
from sniper.data.images.regions import cut_window
from sniper.data.images.tiff import TiffReader
from sniper.data.spec import DataSpec
from sniper.errors import ImageError, OutOfMemory
from sniper.geometry import Detections
from sniper.geometry.boxes import Sides
from sniper.inference.sources import Channels, ImageSource, open_source
from sniper.inference.windows import Tiling, Window, WindowDetections, join_windows
from sniper.models.protocol import SelectDetections
from sniper.remote import read_ahead, to_path

_GROUP_PIXELS = 64_000_000  # of decoded images searched together
_GROUP_IMAGES = 32
_BATCHES_AHEAD = 2
_THREADS = min(os.cpu_count() or 1, 8)

Detect = Callable[[Sequence[torch.Tensor]], Sequence[Detections]]
"""Detects objects in (3, H, W) uint8 images on a device, whose sides may differ; returns those of each in its frame."""


DetectMasks = Callable[[Sequence[torch.Tensor], SelectDetections], Sequence[Detections]]
"""Detects objects as `Detect` does, and returns those that are selected, with masks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """The detections of one image.

    Attributes:
        width: of the image, pixels.
        height: of the image, pixels.
        detections: of all levels, image frame, not yet merged.
    """

    width: int
    height: int
    detections: Detections


@dataclass(frozen=True, kw_only=True)
class Search:
    """A detector, and how images are searched with it.

    Attributes:
        detect: the detector.
        levels: the scales at which it sees every image.
        in_valid_range: keep only detections with a size in the valid range of their level.
        window: longest side of a window, level pixels.
        batch_megapixels: maximum level pixels in a batch; it shrinks where a batch does not fit into memory.
        device: device of the detector.
        data: how images are read, and whether those that cannot be are skipped.
        channels: order of the colours in arrays and tensors.
        detect_masks: used in place of `detect` if masks are wanted.
    """

    detect: Detect
    levels: Sequence[LevelSpec]
    in_valid_range: bool
    window: int
    batch_megapixels: float
    device: torch.device
    data: DataSpec
    channels: Channels = "RGB"
    detect_masks: DetectMasks | None = None

    def __call__(self, sources: Iterable[ImageSource]) -> Iterator[SearchResult | None]:
        """Search images, and iterate the results in order: None for an image that cannot be read and is skipped.

        Raises:
            ImageError: if an image cannot be read, and is not to be skipped.
            OutOfMemory: if a single window does not fit into the device's memory.
        """
        limit = _MemoryLimit(self.batch_megapixels * 1e6)
        readers, is_interrupted = ThreadPoolExecutor(_THREADS), False
        try:
            batches: deque[_Batch] = deque()
            for batch in self._batches(read_ahead(sources, is_fixed=True, path_of=_path_of), limit):
                batch.start_reading(readers)
                batches.append(batch)
                if len(batches) > _BATCHES_AHEAD:
                    yield from self._search(batches.popleft(), limit)
            while batches:
                yield from self._search(batches.popleft(), limit)
        except KeyboardInterrupt:
            is_interrupted = True
            raise
        finally:
            readers.shutdown(wait=not is_interrupted, cancel_futures=True)

    def _search(self, batch: "_Batch", limit: "_MemoryLimit") -> Iterator[SearchResult | None]:
        """Search a batch; after the last of a group, yield the results of its images."""
        read = [
            (task, pixels)
            for task, pixels in zip(batch.tasks, batch.wait_for_pixels(self.data), strict=True)
            if pixels is not None
        ]
        detected = self._detect(read, limit)
        for (task, _), detections in zip(read, detected, strict=True):
            task.image.windows.append(
                WindowDetections.of(task.window, detections, in_valid_range=self.in_valid_range)
            )
        if batch.is_last:
            for image in batch.group:
                image.reader = None
                yield None if image.is_bad else image.result()

    def _detect(
        self, read: Sequence[tuple["_Task", UInt8[np.ndarray, "_ _ 3"]]], limit: "_MemoryLimit"
    ) -> list[Detections]:
        """Run the detector, on one half after the other where a batch does not fit into the device's memory."""
        if not read:
            return []
        images = [pixels for _, pixels in read]
        try:
            tensors = [torch.from_numpy(pixels).permute(2, 0, 1).to(self.device) for pixels in images]
            if self.detect_masks is None:
                detected = self.detect(tensors)
            else:
                detected = self.detect_masks(
                    tensors, lambda index, detections: self._select(read[index][0].window, detections)
                )
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                height, width = images[0].shape[:2]
                raise OutOfMemory(
                    f"a window of {width}x{height} pixels does not fit into the memory of {self.device}; "
                    f"choose a smaller predict.window than {self.window}"
                ) from error
        else:
            if len(detected) != len(images):
                raise ValueError(
                    f"the detector returned detections of {len(detected)} images, expected {len(images)}"
                )
            return list(detected)
        torch.cuda.empty_cache()
        half = len(images) // 2
        limit.pixels = min(limit.pixels, sum(pixels.shape[0] * pixels.shape[1] for pixels in images) / 2)
        return self._detect(read[:half], limit) + self._detect(read[half:], limit)

    def _select(self, window: Window, detections: Detections) -> Detections:
        """Select the detections whose masks are predicted: those that can remain after merging.

        A mask is predicted while the features of its window are there. Features of all windows of a large image do not
        fit into memory, and computing them again after merging would double the time of the search. See
        docs/decisions/0024-masks.md.
        """
        is_kept, _ = window.keeps(detections.boxes, in_valid_range=self.in_valid_range)
        return detections[is_kept]

    def _batches(self, sources: Iterable[ImageSource], limit: "_MemoryLimit") -> Iterator["_Batch"]:
        for group in _groups(sources, self.data, self.channels):
            last = _Batch(group=group, tasks=[])
            for index in range(len(self.levels)):
                for tasks in _split(self._tasks(group, index), limit):
                    if last.tasks:
                        yield last
                    last = _Batch(group=group, tasks=tasks)
            last.is_last = True
            yield last

    def _tasks(self, group: Sequence["_Image"], index: int) -> list["_Task"]:
        """Return the windows of one level of all images of a group, those of like shape next to each other."""
        tasks = []
        for image in group:
            if image.is_bad:
                continue
            level = self.levels[index].at(width=image.width, height=image.height, index=index)
            tiling = Tiling.of(level, limit=self.window)
            tasks += [_Task(image=image, window=window) for window in tiling.windows()]
        return sorted(tasks, key=lambda task: task.window.padded_sides.hw)


class _MemoryLimit:
    """Maximum level pixels in a batch; it falls when a batch does not fit into memory."""

    def __init__(self, pixels: float) -> None:
        self.pixels = pixels


class _Image:
    """An image under search."""

    def __init__(self, source: ImageSource, data: DataSpec, channels: Channels) -> None:
        self.reader: ImageReader | None = None
        self.is_bad = False
        self.width = self.height = 0
        self.windows: list[WindowDetections] = []
        try:
            self.reader = open_source(source, data.read, channels=channels)
            self.width, self.height = self.reader.width, self.reader.height
        except ImageError as error:
            self.refuse(error, data)

    @property
    def num_decoded(self) -> int:
        """Number of its pixels that are kept in memory."""
        return 0 if isinstance(self.reader, TiffReader) else self.width * self.height

    def refuse(self, error: ImageError, data: DataSpec) -> None:
        """Raise the error, or warn once and skip the image."""
        if data.on_bad_image == "refuse":
            raise error
        if not self.is_bad:
            warnings.warn(f"{error}; skipped", stacklevel=2)
        self.is_bad = True

    def result(self) -> SearchResult:
        """Join the detections of all windows."""
        joined = join_windows(self.windows)
        if joined.masks is not None:
            joined = joined.with_masks(joined.masks.in_image(Sides(self.width, self.height)))
        return SearchResult(width=self.width, height=self.height, detections=joined)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """A window of an image that is to be searched."""

    image: _Image
    window: Window

    def read(self) -> UInt8[np.ndarray, "h w 3"]:
        """Read the pixels of the window."""
        assert self.image.reader is not None
        pixels = cut_window(
            self.image.reader,
            self.window.level,
            self.window.corners,
            # Other images are decoded for the finest level anyway.
            reads_smaller=isinstance(self.image.reader, TiffReader),
        )
        return np.require(pixels, requirements=["C", "W"])


def _path_of(source: ImageSource) -> Path | None:
    """Return the path of an image that is read from a file; None for others."""
    if isinstance(source, ImageRecord):
        return source.path
    return to_path(source) if isinstance(source, str | os.PathLike) else None


class _Batch:
    """Windows that are searched at once."""

    def __init__(self, *, group: Sequence[_Image], tasks: Sequence[_Task], is_last: bool = False) -> None:
        self.group, self.tasks, self.is_last = group, tasks, is_last
        self._futures: list[Future[np.ndarray]] = []

    def start_reading(self, readers: ThreadPoolExecutor) -> None:
        """Start to read the pixels of all windows."""
        self._futures = [readers.submit(task.read) for task in self.tasks]

    def wait_for_pixels(self, data: DataSpec) -> list[np.ndarray | None]:
        """Return the pixels of each window; None for those of an image that cannot be read and is skipped."""
        pixels: list[np.ndarray | None] = []
        for task, future in zip(self.tasks, self._futures, strict=True):
            try:
                pixels.append(future.result())
            except ImageError as error:
                task.image.refuse(error, data)
                pixels.append(None)
        self._futures = []  # they keep the pixels alive
        return pixels


def _split(tasks: Sequence[_Task], limit: _MemoryLimit) -> Iterator[list[_Task]]:
    """Split windows into batches of equal padded sides within the memory limit."""
    batch: list[_Task] = []
    for task in tasks:
        sides = task.window.padded_sides
        if batch and (
            sides != batch[0].window.padded_sides
            or (len(batch) + 1) * sides.width * sides.height > limit.pixels
        ):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def _groups(sources: Iterable[ImageSource], data: DataSpec, channels: Channels) -> Iterator[list[_Image]]:
    """Group images, as many together as may be decoded at once."""
    group: list[_Image] = []
    for source in sources:
        image = _Image(source, data, channels)
        num_decoded = sum(other.num_decoded for other in group) + image.num_decoded
        if group and (len(group) == _GROUP_IMAGES or num_decoded > _GROUP_PIXELS):
            yield group
            group = []
        group.append(image)
        if isinstance(image.reader, TiffReader):  # its result does not wait for those of others
            yield group
            group = []
    if group:
        yield group
