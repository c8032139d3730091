"""Run a detector on every level of images: windows of equal padded sides are batched and prefetched.

Images are searched in groups, and the windows of a group level by level. With a focus, the windows of a level depend on
what coarser levels have detected, so a batch waits for those before it. Windows in one batch are all padded to the
same sides, so the detections of an image do not depend on the images beside it.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from sniper.chips import Level, LevelSpec
from sniper.config.experiment import FocusSpec
from sniper.data.datasets import ImageRecord
from sniper.data.images.files import ImageReader
from sniper.data.images.regions import cut_window, useful_reduction
from sniper.data.images.tiff import TiffReader
from sniper.data.spec import DataSpec
from sniper.errors import ImageError, OutOfMemory
from sniper.geometry import Detections, SelectDetections
from sniper.geometry.boxes import Sides
from sniper.geometry.focus_cells import FocusCells
from sniper.inference.focus import LevelResult, choose_windows
from sniper.inference.sources import Channels, ImageSource, open_source
from sniper.inference.windows import Tiling, Window, WindowDetections, join_windows
from sniper.remote import read_ahead, to_path

if TYPE_CHECKING:
    import torch

_GROUP_PIXELS = 64_000_000  # of decoded images searched together
_GROUP_IMAGES = 32
_LARGE_PIXELS = 16_000_000  # more are enough for batches of one image
_BATCHES_AHEAD = 2
_THREADS = min(os.cpu_count() or 1, 8)

Detect = Callable[[Sequence["torch.Tensor"]], Sequence[Detections]]
"""Detects objects in (3, H, W) uint8 images on a device, whose sides may differ; returns those of each in its frame."""

DetectInArrays = Callable[[Sequence[np.ndarray]], Sequence[Detections]]
"""Detects objects as `Detect` does, in (h, w, 3) uint8 arrays."""

DetectMasks = Callable[[Sequence["torch.Tensor"], SelectDetections], Sequence[Detections]]
"""Detects objects as `Detect` does, and returns those that are selected, with masks."""

DetectFocused = Callable[
    [Sequence["torch.Tensor"], SelectDetections | None], tuple[Sequence[Detections], Sequence[FocusCells]]
]
"""Detects objects as `Detect` does, or `DetectMasks` with a selection, and predicts the cells of a focus head."""

AnyDetect = Detect | DetectInArrays
AnyDetectMasks = DetectMasks | Callable[[Sequence[np.ndarray], SelectDetections], Sequence[Detections]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """The detections of one image.

    Attributes:
        width: of the image, pixels.
        height: of the image, pixels.
        detections: of all levels, image frame, not yet merged.
        by_level: for each level, coarsest first, what was found there; none unless the search has a focus or
            `keeps_all_sizes`.
        num_pixels: number of level pixels that were searched, padding included.
    """

    width: int
    height: int
    detections: Detections
    by_level: Sequence[LevelResult] = ()
    num_pixels: int = 0


@dataclass(frozen=True, kw_only=True)
class Search:
    """A detector, and how images are searched with it.

    Attributes:
        detect: the detector, of tensors if there is a device, else of arrays.
        levels: the scales at which it sees every image.
        in_valid_range: keep only detections with a size in the valid range of their level.
        window: longest side of a window, level pixels; or the sides that windows have at most.
        batch_megapixels: maximum level pixels in a batch; it shrinks where a batch does not fit into memory.
        device: device of the detector; None for one of arrays.
        data: how images are read, and whether those that cannot be are skipped.
        channels: order of the colours in arrays and tensors.
        detect_masks: used in place of `detect` if masks are wanted.
        detect_focused: used in place of both where cells of a focus head are wanted; None without such a head.
        focus: where levels are searched, coarsest first; None searches every level as a whole.
        keeps_all_sizes: return all that was found at each level, too: detections of all sizes, and cells.
        on_progress: called within a large image with the number of images that are searched, and the share of this one.
    """

    detect: AnyDetect
    levels: Sequence[LevelSpec]
    in_valid_range: bool
    window: int | Sides
    batch_megapixels: float
    device: "torch.device | None"
    data: DataSpec
    channels: Channels = "RGB"
    detect_masks: AnyDetectMasks | None = None
    detect_focused: DetectFocused | None = None
    focus: FocusSpec | None = None
    keeps_all_sizes: bool = False
    on_progress: Callable[[float], None] = lambda num_done: None

    def __call__(self, sources: Iterable[ImageSource]) -> Iterator[SearchResult | None]:
        """Search images, and iterate the results in order: None for an image that cannot be read and is skipped.

        Raises:
            ImageError: if an image cannot be read, and is not to be skipped.
            OutOfMemory: if a single window does not fit into the device's memory.
        """
        limit = _MemoryLimit(self.batch_megapixels * 1e6)
        readers, is_interrupted = ThreadPoolExecutor(_THREADS), False
        num_done = 0

        def search(batch: _Batch) -> Iterator[SearchResult | None]:
            nonlocal num_done
            yield from self._search(batch, limit)
            if batch.is_last:
                num_done += len(batch.group)
            elif len(batch.group) == 1:
                self.on_progress(num_done + batch.group[0].share_searched)

        try:
            batches: deque[_Batch] = deque()
            for batch in self._batches(read_ahead(sources, is_fixed=True, path_of=_path_of), limit):
                if batch is None:
                    while batches:
                        yield from search(batches.popleft())
                    continue
                batch.start_reading(readers)
                batches.append(batch)
                if len(batches) > _BATCHES_AHEAD:
                    yield from search(batches.popleft())
            while batches:
                yield from search(batches.popleft())
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
        for (task, _), (detections, cells) in zip(read, detected, strict=True):
            task.image.windows.append(
                WindowDetections.of(task.window, detections, in_valid_range=self.in_valid_range)
            )
            if self.detect_masks is None:
                task.keep(detections)
            if cells is not None and task.of_level is not None:
                task.of_level.add_cells(task.window, cells)
            task.image.num_pixels += task.window.padded_sides.width * task.window.padded_sides.height
        if batch.is_last:
            for image in batch.group:
                image.reader = None
                yield None if image.is_bad else image.result()

    def _detect(
        self, read: Sequence[tuple["_Task", UInt8[np.ndarray, "_ _ 3"]]], limit: "_MemoryLimit"
    ) -> list[tuple[Detections, FocusCells | None]]:
        """Run the detector, on one half after the other where a batch does not fit into the device's memory."""
        if not read:
            return []
        images = [pixels for _, pixels in read]

        def select(index: int, detections: Detections) -> Detections:
            return self._select(read[index][0], detections)

        cells: Sequence[FocusCells | None] = [None] * len(images)
        try:
            inputs: Any = images if self.device is None else _to_tensors(images, self.device)
            if self.detect_focused is not None and read[0][0].has_cells:
                detected, cells = self.detect_focused(inputs, None if self.detect_masks is None else select)
            elif self.detect_masks is not None:
                detected = self.detect_masks(inputs, select)
            else:
                detected = self.detect(inputs)
        except RuntimeError as error:
            if self.device is None or not _is_out_of_memory(error):
                raise
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
            return list(zip(detected, cells, strict=True))
        _empty_cache()
        half = len(images) // 2
        limit.pixels = min(limit.pixels, sum(pixels.shape[0] * pixels.shape[1] for pixels in images) / 2)
        return self._detect(read[:half], limit) + self._detect(read[half:], limit)

    def _select(self, task: "_Task", detections: Detections) -> Detections:
        """Select the detections whose masks are predicted: those that can remain after merging.

        A mask is predicted while the features of its window are there. Features of all windows of a large image do not
        fit into memory, and computing them again after merging would double the time of the search. See
        docs/decisions/0024-masks.md.
        """
        task.keep(detections)
        is_kept, _ = task.window.keeps(detections.boxes, in_valid_range=self.in_valid_range)
        return detections[is_kept]

    @property
    def _is_by_level(self) -> bool:
        """Whether images are searched from the coarsest level to the finest."""
        return self.focus is not None or self.keeps_all_sizes

    @property
    def _uses_cells(self) -> bool:
        """Whether cells of a focus head are wanted of all levels but the finest."""
        return self.keeps_all_sizes or (self.focus is not None and self.focus.cues == "head")

    def _batches(self, sources: Iterable[ImageSource], limit: "_MemoryLimit") -> Iterator["_Batch | None"]:
        """Yield the batches of all images; None where the next ones depend on the results of those before."""
        for group in self._groups(sources):
            last = _Batch(group=group, tasks=[])
            for step in range(len(self.levels)):
                if self.focus is not None and step > 0:
                    if last.tasks:
                        yield last
                        last = _Batch(group=group, tasks=[])
                    yield None
                for tasks in _split(self._tasks(group, step), limit):
                    if last.tasks:
                        yield last
                    last = _Batch(group=group, tasks=tasks)
            last.is_last = True
            yield last

    def _groups(self, sources: Iterable[ImageSource]) -> Iterator[list["_Image"]]:
        """Group images, as many together as may be decoded at once."""
        group: list[_Image] = []
        for source in sources:
            image = _Image(source, self)
            num_decoded = sum(other.num_decoded for other in group) + image.num_decoded
            if group and (image.is_large or len(group) == _GROUP_IMAGES or num_decoded > _GROUP_PIXELS):
                yield group
                group = []
            group.append(image)
            if image.is_large:  # its result does not wait for those of others
                yield group
                group = []
        if group:
            yield group

    def _tasks(self, group: Sequence["_Image"], step: int) -> list["_Task"]:
        """Return the windows of one level of all images of a group, those of like shape next to each other."""
        tasks = []
        for image in group:
            if image.is_bad:
                continue
            levels = image.levels
            if self._is_by_level:
                levels = sorted(levels, key=lambda level: level.scale)
            level = levels[step]
            windows = self._windows(level, image)
            of_level = None
            if self._is_by_level:
                of_level = LevelResult(level=level)
                image.by_level.append(of_level)
            has_cells = self._uses_cells and step + 1 < len(levels)
            tasks += [
                _Task(image=image, window=window, of_level=of_level, has_cells=has_cells)
                for window in windows
            ]
        return sorted(tasks, key=lambda task: task.window.padded_sides.hw)

    def _windows(self, level: Level, image: "_Image") -> Iterable[Window]:
        """Return the windows of a level of an image that are searched."""
        if self.focus is None:
            return Tiling.of(level, limit=self.window).windows()
        return choose_windows(level, image.by_level, focus=self.focus, limit=self.window)


def _to_tensors(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], device: "torch.device") -> list["torch.Tensor"]:
    """Return arrays as tensors on a device, channels first."""
    import torch

    return [torch.from_numpy(pixels).permute(2, 0, 1).to(device) for pixels in images]


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _empty_cache() -> None:
    """Return the memory that torch keeps to the device."""
    import torch

    torch.cuda.empty_cache()


class _MemoryLimit:
    """Maximum level pixels in a batch; it falls when a batch does not fit into memory."""

    def __init__(self, pixels: float) -> None:
        self.pixels = pixels


class _Image:
    """An image under search.

    One that is decoded as a whole is decoded once, for its finest level, unless it is searched by level:
    `largest_reduction` is that of all levels.
    """

    def __init__(self, source: ImageSource, search: Search) -> None:
        data = search.data
        self._window = search.window
        self.reader: ImageReader | None = None
        self.is_bad = False
        self.width = self.height = 0
        self.levels: Sequence[Level] = ()
        self.largest_reduction: int | None = None
        self.windows: list[WindowDetections] = []
        self.by_level: list[LevelResult] = []
        self.num_pixels = 0
        try:
            self.reader = open_source(source, data.read, channels=search.channels)
            self.width, self.height = self.reader.width, self.reader.height
            self.levels = [
                spec.at(width=self.width, height=self.height, index=index)
                for index, spec in enumerate(search.levels)
            ]
            if not isinstance(self.reader, TiffReader):
                finest = max(self.levels, key=lambda level: level.scale)
                self.largest_reduction = self.reader.largest_reduction(useful_reduction(finest))
        except ImageError as error:
            self.refuse(error, data)

    @property
    def num_decoded(self) -> int:
        """Number of its pixels that are kept in memory."""
        reduction = self.largest_reduction
        return 0 if reduction is None else -(-self.width // reduction) * -(-self.height // reduction)

    @property
    def is_large(self) -> bool:
        """Whether it is searched by itself."""
        return isinstance(self.reader, TiffReader) or self.num_decoded > _LARGE_PIXELS

    @property
    def share_searched(self) -> float:
        """Share of the pixels of all its levels that is searched; with a focus, the rest may not be searched at all."""
        return min(self.num_pixels / self._num_pixels_of_levels, 1.0) if self.levels else 1.0

    @cached_property
    def _num_pixels_of_levels(self) -> int:
        """Number of pixels of the windows of all levels, padding included."""
        return sum(
            window.padded_sides.width * window.padded_sides.height
            for level in self.levels
            for window in Tiling.of(level, limit=self._window).windows()
        )

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
        return SearchResult(
            width=self.width,
            height=self.height,
            detections=joined,
            by_level=self.by_level,
            num_pixels=self.num_pixels,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """A window of an image that is to be searched.

    Attributes:
        image: the image.
        window: the window.
        of_level: what was found at its level, whatever its size, where that is kept.
        has_cells: whether the cells of a focus head are wanted.
    """

    image: _Image
    window: Window
    of_level: LevelResult | None
    has_cells: bool

    def keep(self, detections: Detections) -> None:
        """Keep the detections of the window whatever their sizes, where that is wanted."""
        if self.of_level is not None:
            self.of_level.add(self.window, detections)

    def read(self) -> UInt8[np.ndarray, "h w 3"]:
        """Read the pixels of the window."""
        assert self.image.reader is not None
        pixels = cut_window(
            self.image.reader,
            self.window.level,
            self.window.corners,
            # By level, finer ones may not be searched: each has a decode of its own, a small one if it is coarse.
            largest_reduction=self.image.largest_reduction if self.of_level is None else None,
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
