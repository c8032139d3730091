"""Searching images at every level: windows of like shape side by side, read ahead of the device.

A level image whose sides are beyond a limit is searched in overlapping windows. Their corners lie on the grid of the
network's strides, so that far from its borders a window shows the network what the whole image would.
"""

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from sniper.chips import Level, LevelSpec
from sniper.data.cutting import cut_window
from sniper.data.images import Picture, PictureInMemory, WindowedTiff, open_picture
from sniper.data.spec import DataSpec
from sniper.errors import ImageError
from sniper.geometry import Detections
from sniper.geometry.boxes import area, intersections

_GRID = 64  # level pixels; all strides divide it
_CONTEXT = 64  # level pixels around an object that help to recognize it
_GROUP_PIXELS = 64_000_000  # of decoded images searched together
_GROUP_IMAGES = 32
_BATCHES_AHEAD = 2
_THREADS = min(os.cpu_count() or 1, 8)
_AT_BORDER = 4.0  # level pixels; a box that ends so near to an inner border was cut by it
_MOST_OF_IT = 0.7
_AS_SURE = 0.5
_CUT_AT_ONCE = 256
_LONGEST = 1.5  # times the size: how long an object may be to be seen whole by one window wherever it lies

Source = Path | Picture | UInt8[np.ndarray, "_ _ 3"]
Found = TypeVar("Found")


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
        """Tell which extents end at an inner border of a window.

        Args:
            place: which window.
            low: (n,) where they begin, level pixels.
            high: (n,) where they end.
        """
        start, stop = self.spans[place]
        is_cut = np.zeros(len(low), dtype=np.bool_)
        if place > 0:
            is_cut |= low < start + _AT_BORDER
        if place + 1 < len(self.spans):
            is_cut |= high > stop - _AT_BORDER
        return is_cut


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


def is_mere_part(detections: Detections, is_cut: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Tell which detections were cut by a window, while a neighbour or another level sees the object whole.

    That is so if most of the box lies in one of the same class that was not cut and is at least half as sure.

    Args:
        detections: of all windows and levels of an image, image frame. May be empty.
        is_cut: (n,) which of them were cut.
    """
    is_part = np.zeros(len(detections), dtype=np.bool_)
    for label in np.unique(detections.labels[is_cut]).tolist():
        of_class = detections.labels == label
        whole = detections.select(of_class & ~is_cut)
        cut_places = np.flatnonzero(of_class & is_cut)
        for start in range(0, len(cut_places), _CUT_AT_ONCE):
            places = cut_places[start : start + _CUT_AT_ONCE]
            boxes = detections.boxes[places]
            shared = intersections(boxes, whole.boxes)  # (k, w)
            is_inside = shared >= _MOST_OF_IT * area(boxes)[:, None]
            is_sure = whole.scores >= _AS_SURE * detections.scores[places][:, None]
            is_part[places] = (is_inside & is_sure).any(axis=1)
    return is_part


@dataclass(frozen=True, kw_only=True, eq=False)
class Searched(Generic[Found]):
    """What was found in one image.

    Attributes:
        width: of the image, pixels.
        height: of the image, pixels.
        parts: each window with what was found there.
    """

    width: int
    height: int
    parts: list[tuple[Window, Found]]


@dataclass(frozen=True, kw_only=True)
class Search(Generic[Found]):
    """How images are searched.

    Attributes:
        compute: finds something in some (3, h, w) uint8 images on the device, whose sides may differ.
        levels: at which scales.
        window: longest side of what is searched at once, level pixels.
        batch_megapixels: at most so many level pixels are searched at once, padding included; fewer from where they do
            not fit into memory.
        device: where to compute.
        data: how images are read, and what becomes of those that cannot be.
    """

    compute: Callable[[Sequence[torch.Tensor]], Sequence[Found]]
    levels: Sequence[LevelSpec]
    window: int
    batch_megapixels: float
    device: torch.device
    data: DataSpec

    def __call__(self, sources: Iterable[Source]) -> Iterator[Searched[Found] | None]:
        """Search images; gives one answer for each, in order: None for one that cannot be read and is to be skipped.

        Raises:
            ImageError: if an image cannot be read, and is not to be skipped.
        """
        with ThreadPoolExecutor(_THREADS) as readers:
            waiting: deque[_Batch] = deque()
            for batch in self._batches(sources):
                batch.read(readers)
                waiting.append(batch)
                if len(waiting) > _BATCHES_AHEAD:
                    yield from self._searched(waiting.popleft())
            while waiting:
                yield from self._searched(waiting.popleft())

    def _searched(self, batch: "_Batch") -> Iterator[Searched[Found] | None]:
        """Search a batch; after the last of a group, give what was found in the group."""
        pixels = batch.arrived(self.data)
        found = self._computed([one for one in pixels if one is not None])
        results = iter(found)
        for item, one in zip(batch.items, pixels, strict=True):
            if one is not None:
                item.image.parts.append((item.window, next(results)))
        if batch.is_last:
            for image in batch.group:
                image.picture = None
                if image.is_bad:
                    yield None
                else:
                    yield Searched(width=image.width, height=image.height, parts=image.parts)

    def _computed(self, pixels: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> list[Found]:
        """Compute, in halves if the whole does not fit into the device's memory."""
        if not pixels:
            return []
        try:
            return list(
                self.compute([torch.from_numpy(one).permute(2, 0, 1).to(self.device) for one in pixels])
            )
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        return self._computed(pixels[:half]) + self._computed(pixels[half:])

    def _batches(self, sources: Iterable[Source]) -> Iterator["_Batch"]:
        for group in _groups(sources, self.data):
            batches = [
                _Batch(group=group, items=items)
                for index in range(len(self.levels))
                for items in self._batched(self._items(group, index))
            ]
            yield from batches[:-1]
            last = batches[-1] if batches else _Batch(group=group, items=[])
            yield _Batch(group=group, items=last.items, is_last=True)

    def _items(self, group: Sequence["_Image"], index: int) -> list["_Item"]:
        """Give the windows of one level of all images of a group, those of like shape beside each other."""
        items = []
        for image in group:
            if image.is_bad:
                continue
            if not image.tilings:
                image.tilings = [
                    Tiling.of(spec.at(width=image.width, height=image.height, index=place), limit=self.window)
                    for place, spec in enumerate(self.levels)
                ]
            items += [_Item(image=image, window=window) for window in image.tilings[index].windows()]
        return sorted(items, key=lambda item: item.window.sides)

    def _batched(self, items: Sequence["_Item"]) -> Iterator[list["_Item"]]:
        """Put as many windows together as may be computed at once."""
        batch: list[_Item] = []
        height = width = 0
        for item in items:
            own_height, own_width = item.window.sides
            height, width = max(height, own_height), max(width, own_width)
            if batch and (len(batch) + 1) * height * width > self.batch_megapixels * 1e6:
                yield batch
                batch, height, width = [], own_height, own_width
            batch.append(item)
        if batch:
            yield batch


class _Image:
    """An image that is searched: what is known of it, and what was found so far."""

    def __init__(self, source: Source, data: DataSpec) -> None:
        self.picture: Picture | None = None
        self.is_bad = False
        self.width = self.height = 0
        self.tilings: list[Tiling] = []
        self.parts: list[tuple[Window, Any]] = []
        try:
            self.picture = _opened(source, data)
            self.width, self.height = self.picture.width, self.picture.height
        except ImageError as error:
            self.refuse(error, data)

    @property
    def num_decoded(self) -> int:
        """How many pixels of it are held in memory."""
        return 0 if isinstance(self.picture, WindowedTiff) else self.width * self.height

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
        return pixels


def _pixels_of(item: _Item) -> np.ndarray:
    assert item.image.picture is not None
    picture = item.image.picture
    cut = cut_window(
        picture,
        item.window.level,
        item.window.corners,
        reads_smaller=isinstance(picture, WindowedTiff),  # others are decoded for the finest level anyway
    )
    return np.require(cut, requirements=["C", "W"])


def _opened(source: Source, data: DataSpec) -> Picture:
    if isinstance(source, np.ndarray):
        return PictureInMemory(source)
    return open_picture(source, data.read) if isinstance(source, Path) else source


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
    if group:
        yield group
