"""Searching images at every level: windows of like shape side by side, read ahead of the device.

A level image whose sides are beyond a limit is searched in overlapping windows. Their corners lie on the grid of the
network's strides, so that far from its borders a window shows the network what the whole image would. Each window
answers for the objects whose middles are nearest to it; what is longer than the overlap is cut, and a part of it is
dropped where another window or level sees the whole.
"""

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from sniper.chips import Level, LevelSpec
from sniper.data.images.files import ArrayImageReader, ImageReader, WindowedTiffReader, open_image
from sniper.data.images.regions import cut_window
from sniper.data.spec import DataSpec
from sniper.errors import ImageError, OutOfMemory
from sniper.geometry import Detections
from sniper.geometry.nms import is_part_of_better, soft_nms

_GRID = 64  # level pixels; all strides divide it
_CONTEXT = 64  # level pixels around an object that help to recognize it
_GROUP_PIXELS = 64_000_000  # of decoded images searched together
_GROUP_IMAGES = 32
_BATCHES_AHEAD = 2
_THREADS = min(os.cpu_count() or 1, 8)
_AT_BORDER = 4.0  # level pixels; a box that ends so near to an inner border was cut by it
_NEAR_LINE = 8.0  # level pixels; by how much two windows may differ about the middle of an object
_TWINS = 0.7  # IoU of what two windows found of one object
_MOST_OF_IT = 0.7
_AS_SURE = 0.5
_LONGEST = 1.5  # times the size: how long an object may be to be seen whole by one window wherever it lies

Source = str | os.PathLike[str] | ImageReader | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How one axis of a level image is cut into windows.

    Attributes:
        spans: where each begins and ends, level pixels; neighbours overlap.
    """

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, length: int, *, limit: int, overlap: float) -> "Axis":
        """Cut an axis.

        Args:
            length: of the level image, pixels.
            limit: no window is longer.
            overlap: of neighbours; never more than half of the limit.
        """
        if length <= limit:
            return cls(spans=((0, length),))
        step = max(math.floor((limit - min(overlap, limit / 2)) / _GRID), 1) * _GRID
        num_windows = math.ceil((length - limit) / step) + 1
        starts = [i * step for i in range(num_windows)]
        return cls(spans=tuple((start, min(start + limit, length)) for start in starts))

    def is_cut(
        self, place: int, low: Float[np.ndarray, " n"], high: Float[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """Tell which extents, (n,) in level pixels, end at an inner border of a window."""
        start, stop = self.spans[place]
        is_cut = np.zeros(len(low), dtype=np.bool_)
        if place > 0:
            is_cut |= low < start + _AT_BORDER
        if place + 1 < len(self.spans):
            is_cut |= high > stop - _AT_BORDER
        return is_cut

    def owns(
        self, place: int, middles: Float[np.ndarray, " n"]
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Tell which middles, (n,) in level pixels, a window is to answer for, and which its neighbour is, too.

        The line between neighbours is in the middle of their overlap. What lies on it is seen by both, each with a
        little error, so both answer for what is near it.
        """
        begin = -math.inf if place == 0 else self._line(place)
        end = math.inf if place + 1 == len(self.spans) else self._line(place + 1)
        is_owned = (middles >= begin - _NEAR_LINE) & (middles < end + _NEAR_LINE)
        is_shared = (np.abs(middles - begin) <= _NEAR_LINE) | (np.abs(middles - end) <= _NEAR_LINE)
        return is_owned, is_owned & is_shared

    def _line(self, place: int) -> float:
        return (self.spans[place - 1][1] + self.spans[place][0]) / 2


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The windows of one level of one image.

    Attributes:
        level: which.
        across: the windows from left to right.
        down: the windows from top to bottom.
    """

    level: Level
    across: Axis
    down: Axis

    @classmethod
    def of(cls, level: Level, *, limit: int) -> "Tiling":
        """Cut a level image into windows of at most so many pixels a side, which overlap by its largest objects."""
        overlap = _LONGEST * level.valid_sizes[1] + _CONTEXT
        return cls(
            level=level,
            across=Axis.of(level.width, limit=limit, overlap=overlap),
            down=Axis.of(level.height, limit=limit, overlap=overlap),
        )

    def windows(self) -> Iterator["Window"]:
        """Give all windows, row by row."""
        for row in range(len(self.down.spans)):
            for column in range(len(self.across.spans)):
                yield Window(tiling=self, column=column, row=row)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a level image that is searched at once; all of it where that is not large.

    Attributes:
        tiling: the windows that this is one of.
        column: which from the left.
        row: which from the top.
    """

    tiling: Tiling
    column: int
    row: int

    @property
    def level(self) -> Level:
        """The level whose part this is."""
        return self.tiling.level

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """The window as xyxy, level frame, whole pixels."""
        (x1, x2), (y1, y2) = self.tiling.across.spans[self.column], self.tiling.down.spans[self.row]
        return x1, y1, x2, y2

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width, level pixels."""
        x1, y1, x2, y2 = self.corners
        return y2 - y1, x2 - x1

    def to_image(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Bring (n, 4) xyxy boxes from the window's frame to the image frame."""
        x, y, _, _ = self.corners
        return self.level.to_image(boxes + np.array([x, y, x, y]))

    def is_cut(self, boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
        """Tell which boxes, (n, 4) xyxy in the window's frame, end at an inner border of it."""
        x, y, _, _ = self.corners
        at_level = boxes + np.array([x, y, x, y])
        return self.tiling.across.is_cut(
            self.column, at_level[:, 0], at_level[:, 2]
        ) | self.tiling.down.is_cut(self.row, at_level[:, 1], at_level[:, 3])

    def owns(self, boxes: Float[np.ndarray, "n 4"]) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Tell for which boxes of its frame this window answers, and for which a neighbour does, too."""
        x, y, _, _ = self.corners
        across, across_shared = self.tiling.across.owns(self.column, x + (boxes[:, 0] + boxes[:, 2]) / 2)
        down, down_shared = self.tiling.down.owns(self.row, y + (boxes[:, 1] + boxes[:, 3]) / 2)
        is_owned = across & down
        return is_owned, is_owned & (across_shared | down_shared)


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchResult:
    """What was found in one image.

    Attributes:
        width: of the image, pixels.
        height: of the image, pixels.
        detections: of all levels, image frame, not yet merged.
    """

    width: int
    height: int
    detections: Detections


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """What a window answers for.

    Attributes:
        level: whose window it is.
        detections: in the image frame.
        is_cut: (n,) which of them end at an inner border.
        is_shared: (n,) for which of them a neighbour answers, too.
    """

    level: int
    detections: Detections
    is_cut: Bool[np.ndarray, " n"]
    is_shared: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, window: Window, found: Detections, *, keeps_range: bool) -> "_Part":
        boxes = window.to_image(found.boxes)
        is_owned, is_shared = window.owns(found.boxes)
        kept = is_owned & window.level.valid_range.contains(boxes) if keeps_range else is_owned
        in_image = Detections(boxes=boxes, scores=found.scores, labels=found.labels)
        return cls(
            level=window.level.index,
            detections=in_image.select(kept),
            is_cut=window.is_cut(found.boxes)[kept],
            is_shared=is_shared[kept],
        )


def _joined(parts: Sequence[_Part]) -> Detections:
    """Put the windows of all levels together, each object once for each level that looks for it."""
    if not parts:
        return Detections.empty()
    joined = Detections.join([part.detections for part in parts])
    is_cut = np.concatenate([part.is_cut for part in parts])
    is_shared = np.concatenate([part.is_shared for part in parts])
    level = np.repeat([part.level for part in parts], [len(part.detections) for part in parts])
    is_kept = ~is_part_of_better(joined, is_cut, share=_MOST_OF_IT, as_sure=_AS_SURE)
    single = joined.select(is_kept & ~is_shared)
    twins = [joined.select(is_kept & is_shared & (level == index)) for index in np.unique(level[is_shared])]
    return Detections.join([single, *(soft_nms(own, decay="hard", iou=_TWINS, floor=0.0) for own in twins)])


@dataclass(frozen=True, kw_only=True)
class Search:
    """How images are searched.

    Attributes:
        detect: finds something in some (3, h, w) uint8 images on the device, whose sides may differ; each one's in its
            own frame.
        levels: at which scales.
        keeps_range: whether what lies outside the valid range of its level is left out.
        window: longest side of what is searched at once, level pixels.
        batch_megapixels: windows are searched together up to so many level pixels; as many as fit into memory, if those
            are fewer.
        device: where to compute.
        data: how images are read, and what becomes of those that cannot be.
    """

    detect: Callable[[Sequence[torch.Tensor]], Sequence[Detections]]
    levels: Sequence[LevelSpec]
    keeps_range: bool
    window: int
    batch_megapixels: float
    device: torch.device
    data: DataSpec

    def __call__(self, sources: Iterable[Source]) -> Iterator[SearchResult | None]:
        """Search images; gives one answer for each, in order: None for one that cannot be read and is to be skipped.

        Raises:
            ImageError: if an image cannot be read, and is not to be skipped.
            OutOfMemory: if a single window does not fit into the device's memory.
        """
        limit = _Limit(self.batch_megapixels * 1e6)
        with ThreadPoolExecutor(_THREADS) as readers:
            waiting: deque[_Batch] = deque()
            for batch in self._batches(sources, limit):
                batch.read(readers)
                waiting.append(batch)
                if len(waiting) > _BATCHES_AHEAD:
                    yield from self._searched(waiting.popleft(), limit)
            while waiting:
                yield from self._searched(waiting.popleft(), limit)

    def _searched(self, batch: "_Batch", limit: "_Limit") -> Iterator[SearchResult | None]:
        """Search a batch; after the last of a group, give what was found in the group."""
        pixels = batch.arrived(self.data)
        there = [(item, one) for item, one in zip(batch.items, pixels, strict=True) if one is not None]
        found = self._computed([one for _, one in there], limit)
        for (item, _), detections in zip(there, found, strict=True):
            item.image.parts.append(_Part.of(item.window, detections, keeps_range=self.keeps_range))
        if batch.is_last:
            for image in batch.group:
                image.picture = None
                if image.is_bad:
                    yield None
                else:
                    yield SearchResult(
                        width=image.width, height=image.height, detections=_joined(image.parts)
                    )

    def _computed(self, pixels: Sequence[UInt8[np.ndarray, "_ _ 3"]], limit: "_Limit") -> list[Detections]:
        """Compute, in halves if the whole does not fit into the device's memory."""
        if not pixels:
            return []
        try:
            found = self.detect([torch.from_numpy(one).permute(2, 0, 1).to(self.device) for one in pixels])
        except torch.OutOfMemoryError as error:
            if len(pixels) == 1:
                height, width = pixels[0].shape[:2]
                raise OutOfMemory(
                    f"a window of {width}x{height} pixels does not fit into the memory of {self.device}; "
                    f"choose a smaller predict.window than {self.window}"
                ) from error
        else:
            if len(found) != len(pixels):
                raise ValueError(f"the detector gave {len(found)} answers for {len(pixels)} images")
            return list(found)
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        limit.pixels = min(limit.pixels, sum(one.shape[0] * one.shape[1] for one in pixels) / 2)
        return self._computed(pixels[:half], limit) + self._computed(pixels[half:], limit)

    def _batches(self, sources: Iterable[Source], limit: "_Limit") -> Iterator["_Batch"]:
        for group in _groups(sources, self.data):
            last = _Batch(group=group, items=[])
            for index in range(len(self.levels)):
                for items in self._batched(self._items(group, index), limit):
                    if last.items:
                        yield last
                    last = _Batch(group=group, items=items)
            last.is_last = True
            yield last

    def _items(self, group: Sequence["_Image"], index: int) -> list["_Item"]:
        """Give the windows of one level of all images of a group, those of like shape beside each other."""
        items = []
        for image in group:
            if image.is_bad:
                continue
            level = self.levels[index].at(width=image.width, height=image.height, index=index)
            tiling = Tiling.of(level, limit=self.window)
            items += [_Item(image=image, window=window) for window in tiling.windows()]
        return sorted(items, key=lambda item: item.padded_sides)

    @staticmethod
    def _batched(items: Sequence["_Item"], limit: "_Limit") -> Iterator[list["_Item"]]:
        """Put as many windows together as may be computed at once.

        Only those are that fill up to the same sides: what is found in an image must not depend on the others.
        """
        batch: list[_Item] = []
        for item in items:
            height, width = item.padded_sides
            if batch and (
                item.padded_sides != batch[0].padded_sides or (len(batch) + 1) * height * width > limit.pixels
            ):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch


class _Limit:
    """How many level pixels are searched at once; it falls when they do not fit."""

    def __init__(self, pixels: float) -> None:
        self.pixels = pixels


class _Image:
    """An image that is searched: what is known of it, and what was found so far."""

    def __init__(self, source: Source, data: DataSpec) -> None:
        self.picture: ImageReader | None = None
        self.is_bad = False
        self.width = self.height = 0
        self.parts: list[_Part] = []
        try:
            self.picture = _opened(source, data)
            self.width, self.height = self.picture.width, self.picture.height
        except ImageError as error:
            self.refuse(error, data)

    @property
    def num_decoded(self) -> int:
        """How many pixels of it are held in memory."""
        return 0 if isinstance(self.picture, WindowedTiffReader) else self.width * self.height

    def refuse(self, error: ImageError, data: DataSpec) -> None:
        """Raise, or warn once and go on without it."""
        if data.on_bad_image == "refuse":
            raise error
        if not self.is_bad:
            warnings.warn(f"{error}; skipped", stacklevel=2)
        self.is_bad = True


@dataclass(frozen=True, kw_only=True, eq=False)
class _Item:
    image: _Image
    window: Window

    @property
    def padded_sides(self) -> tuple[int, int]:
        """Height and width, filled up to the grid, as a detector does."""
        height, width = self.window.sides
        return -(-height // _GRID) * _GRID, -(-width // _GRID) * _GRID


class _Batch:
    """Windows that are searched at once."""

    def __init__(self, *, group: Sequence[_Image], items: Sequence[_Item], is_last: bool = False) -> None:
        self.group, self.items, self.is_last = group, items, is_last
        self._futures: list[Future[np.ndarray]] = []

    def read(self, readers: ThreadPoolExecutor) -> None:
        """Begin to read the pixels."""
        self._futures = [readers.submit(_pixels_of, item) for item in self.items]

    def arrived(self, data: DataSpec) -> list[np.ndarray | None]:
        """Wait for the pixels; None for those of an image that cannot be read and is to be skipped."""
        pixels: list[np.ndarray | None] = []
        for item, future in zip(self.items, self._futures, strict=True):
            try:
                pixels.append(future.result())
            except ImageError as error:
                item.image.refuse(error, data)
                pixels.append(None)
        self._futures = []  # they hold the pixels
        return pixels


def _pixels_of(item: _Item) -> np.ndarray:
    assert item.image.picture is not None
    picture = item.image.picture
    cut = cut_window(
        picture,
        item.window.level,
        item.window.corners,
        reads_smaller=isinstance(
            picture, WindowedTiffReader
        ),  # others are decoded for the finest level anyway
    )
    return np.require(cut, requirements=["C", "W"])


def _opened(source: Source, data: DataSpec) -> ImageReader:
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"an image is uint8 of (height, width, 3), not {source.dtype} of {source.shape}")
        return ArrayImageReader(source)
    return open_image(Path(source), data.read) if isinstance(source, str | os.PathLike) else source


def _groups(sources: Iterable[Source], data: DataSpec) -> Iterator[list[_Image]]:
    """Take images together, as many as may be decoded at once."""
    group: list[_Image] = []
    for source in sources:
        image = _Image(source, data)
        pixels = sum(one.num_decoded for one in group) + image.num_decoded
        if group and (len(group) == _GROUP_IMAGES or pixels > _GROUP_PIXELS):
            yield group
            group = []
        group.append(image)
        if isinstance(image.picture, WindowedTiffReader):  # its answer is not to wait for those of others
            yield group
            group = []
    if group:
        yield group
