"""Tiles of the images of a data set at all zooms, for a page that shows images of any size in bounded memory.

A zoom is a power of two by which an image is reduced. A large TIFF is read in windows. From the zoom on at which one
tile would take many pixels of the file, tiles are made from an overview: the whole image, reduced once, strip by strip.
"""

import math
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sniper.chips import Level, ValidRange
from sniper.data.datasets import Dataset, ImageRecord
from sniper.data.datasets.image_files import find_file_problem
from sniper.data.images.files import ImageReader
from sniper.data.images.regions import cut_window
from sniper.data.images.tiff import TiffReader
from sniper.data.reader import open_record
from sniper.data.spec import ReadSpec
from sniper.errors import ImageError
from sniper.geometry.boxes import Sides

TILE = 512
"""The sides of a tile, pixels; those at the right and lower border of an image are smaller."""

MAX_DECODED = 2_000_000_000
"""The most bytes of an image that is decoded whole."""

_KEPT_BYTES = 500_000_000  # of images that stay decoded, and of overviews
_OVERVIEW_BYTES = 64_000_000  # of the overview of an image
_STRIP = Sides(8192, 512)  # pixels of the image that are read at once for an overview
_ABANDONED = 15.0  # seconds after which an overview is given up that is no longer asked for
_ALMOST = 0.99  # of an overview that is read, but is not kept yet
_MAX_THREADS = 4  # that read images
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]


class ImageTiles:
    """Reads tiles; its methods may be called by several threads.

    Args:
        dataset: the images.
        spec: how image files become pixels.
        kept_bytes: memory of the images and overviews that are kept for the next tiles, the least recently used go
            first; the newest is kept whatever its size.
    """

    def __init__(
        self, dataset: Dataset, spec: ReadSpec = ReadSpec(), *, kept_bytes: int = _KEPT_BYTES
    ) -> None:
        self._dataset, self._spec, self._kept_bytes = dataset, spec, kept_bytes
        self._images: OrderedDict[int, _OpenImage] = OrderedDict()
        self._lock = threading.Lock()
        # Few threads bound the memory, and each keeps the files open that it has read from.
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), "tiles")

    def zooms(self, index: int) -> list[Sides]:
        """Return the sides of an image at each zoom; see `list_zooms`."""
        return list_zooms(self._dataset[index].sides)

    def needs_overview(self, index: int) -> int | None:
        """Return the first zoom whose tiles need the overview of an image; None if none does.

        Raises:
            ImageError: if the image cannot be read.
        """
        overview = self._open(index).overview
        return None if overview is None else overview.first_zoom

    def build_overview(self, index: int) -> float:
        """Build the overview of an image in a thread, which ends early if this is not called again and again.

        Returns:
            The part that is done; 1 if the overview is complete, or the image needs none.

        Raises:
            ImageError: if the image cannot be read.
        """
        overview = self._open(index).overview
        return 1.0 if overview is None else overview.build()

    def read(self, index: int, *, zoom: int, column: int, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """Read a tile.

        Args:
            index: of the image.
            zoom: power of two by which the image is reduced.
            column: of the tile, from the left.
            row: of the tile, from the top.

        Raises:
            IndexError: if there is no such tile.
            ImageError: if the image cannot be read, or its overview is not complete.
        """
        zooms = self.zooms(index)
        if not 0 <= zoom < len(zooms):
            raise IndexError(zoom)
        sides = zooms[zoom]
        x, y = column * TILE, row * TILE
        if not (0 <= x < sides.width and 0 <= y < sides.height):
            raise IndexError((column, row))
        window = (x, y, min(x + TILE, sides.width), min(y + TILE, sides.height))
        return self._threads.submit(self._cut, index, zoom, sides, window).result()

    def read_png(self, index: int, *, zoom: int, column: int, row: int) -> bytes:
        """Read a tile as PNG; see `read`."""
        pixels = self.read(index, zoom=zoom, column=column, row=row)
        encoded: UInt8[np.ndarray, " n"] = cv2.imencode(".png", pixels[..., ::-1], _PNG)[1]
        return encoded.tobytes()

    def _cut(
        self, index: int, zoom: int, sides: Sides, window: tuple[int, int, int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        image = self._open(index)
        reader: ImageReader = image.reader
        if image.overview is not None and zoom >= image.overview.first_zoom:
            reader = image.overview
        level = Level(
            index=zoom,
            image_width=reader.width,
            image_height=reader.height,
            width=sides.width,
            height=sides.height,
            valid_range=ValidRange(),
        )
        return cut_window(reader, level, window)

    def _open(self, index: int) -> "_OpenImage":
        """Return an image, opened if it was not used lately."""
        record = self._dataset[index]
        with self._lock:
            image = self._images.pop(index, None)
            if image is None:
                image = _OpenImage.of(record, self._spec)
            self._images[index] = image
            total = sum(kept.num_bytes for kept in self._images.values())
            while total > self._kept_bytes and len(self._images) > 1:
                _, dropped = self._images.popitem(last=False)
                total -= dropped.num_bytes
        return image


def list_zooms(sides: Sides) -> list[Sides]:
    """Return the sides of an image reduced by 1, 2, 4 ..., rounded down, to where it is one tile or one pixel wide.

    Example:
        >>> list_zooms(Sides(1301, 700))
        [Sides(width=1301, height=700), Sides(width=650, height=350), Sides(width=325, height=175)]
    """
    zooms = [sides]
    while max(zooms[-1]) > TILE and min(zooms[-1]) > 1:
        width, height = zooms[-1]
        zooms.append(Sides(width // 2, height // 2))
    return zooms


@dataclass(frozen=True, kw_only=True, eq=False)
class _OpenImage:
    """An image that tiles are read from.

    Attributes:
        reader: of the file.
        overview: of an image that is read in windows, and too large for one strip; else None.
        num_bytes: an estimate of the memory that it may take.
    """

    reader: ImageReader
    overview: "Overview | None"
    num_bytes: int

    @classmethod
    def of(cls, record: ImageRecord, spec: ReadSpec) -> "_OpenImage":
        problem = find_file_problem(
            record.path, record.image_root, spec, expected=record.sides, follow_links=record.follow_links
        )
        if problem is not None:
            raise ImageError(f"{record.file_name}: {problem}")
        reader = open_record(record, spec)
        num_bytes = 3 * reader.width * reader.height
        if isinstance(reader, TiffReader):
            overview = Overview(reader, name=str(record.path), max_bytes=_OVERVIEW_BYTES)
            return cls(reader=reader, overview=overview, num_bytes=overview.num_bytes)
        if num_bytes > MAX_DECODED:
            raise ImageError(
                f"{record.path}: has {reader.width}x{reader.height} pixels, which take {num_bytes / 1e9:.1f} GB of "
                f"memory, expected at most {MAX_DECODED / 1e9:g} GB: only a TIFF of 8 or more bits a channel, without "
                "a palette, is read in windows (gdal_translate -co TILED=YES -co COMPRESS=DEFLATE; pip install "
                "'sniper-det[tiff]')"
            )
        return cls(reader=reader, overview=None, num_bytes=num_bytes * 4 // 3)


@dataclass(kw_only=True)
class _Build:
    """The state of the thread that builds an overview."""

    done: float = 0.0
    asked: float = field(default_factory=time.monotonic)
    error: ImageError | None = None


class Overview:
    """A large image reduced so far that it fits into some memory, from which it can be read smaller still.

    Args:
        reader: of the image.
        name: of the image, for errors.
        max_bytes: memory that it may take.

    Attributes:
        width: of the image, pixels.
        height: of the image, pixels.
        reduction: factor by which it is smaller than the image, a power of two.
    """

    def __init__(self, reader: ImageReader, *, name: str, max_bytes: int) -> None:
        self._reader, self._name = reader, name
        self.width, self.height = reader.width, reader.height
        self.reduction = 2
        while 3 * math.prod(self._reduced_sides()) > max_bytes:
            self.reduction *= 2
        self._pixels: np.ndarray | None = None
        self._build: _Build | None = None
        self._lock = threading.Lock()

    @property
    def first_zoom(self) -> int:
        """The first zoom that can be cut from it: those are cut from an image of twice the sides."""
        return self.reduction.bit_length()

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return 3 * math.prod(self._reduced_sides())

    def build(self) -> float:
        """Start to read the image, or keep the thread going that does, and return the part that is done.

        Raises:
            ImageError: if the image cannot be read.
        """
        with self._lock:
            if self._pixels is not None:
                return 1.0
            if self._build is None:
                self._build = _Build()
                threading.Thread(target=self._run, args=(self._build,), name="overview", daemon=True).start()
            self._build.asked = time.monotonic()
            if self._build.error is not None:
                raise ImageError(str(self._build.error))
            return min(self._build.done, _ALMOST)

    def largest_reduction(self, limit: int) -> int:
        """See `ImageReader`: it is always read smaller."""
        return limit

    def read(self, window: tuple[int, int, int, int], *, reduction: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `ImageReader`; the reduction is at least that of the overview.

        Raises:
            ImageError: if it is not complete.
        """
        if self._pixels is None:
            raise ImageError(f"{self._name}: its overview is not complete")
        if reduction < self.reduction:
            raise ValueError(f"expected a reduction of at least {self.reduction}, not {reduction}")
        x1, y1, x2, y2 = window
        unit = self.reduction
        pixels = self._pixels[y1 // unit : -(-y2 // unit), x1 // unit : -(-x2 // unit)]
        if reduction == unit:
            return pixels
        return np.asarray(Image.fromarray(pixels).reduce(reduction // unit))

    def _reduced_sides(self) -> Sides:
        return Sides(-(-self.width // self.reduction), -(-self.height // self.reduction))

    def _run(self, build: _Build) -> None:
        """Read the image strip by strip; called in a thread of its own."""
        try:
            pixels = self._read_strips(build)
        except ImageError as error:
            build.error = error
            return
        with self._lock:
            self._pixels, self._build = pixels, None

    def _read_strips(self, build: _Build) -> UInt8[np.ndarray, "h w 3"] | None:
        """Read the image strip by strip; None if the overview is no longer asked for."""
        pixels = np.zeros((*self._reduced_sides().hw, 3), dtype=np.uint8)
        unit = self.reduction
        columns, rows = (max(side, unit) for side in _STRIP)
        for y in range(0, self.height, rows):
            for x in range(0, self.width, columns):
                if time.monotonic() - build.asked > _ABANDONED:
                    return None
                window = (x, y, min(x + columns, self.width), min(y + rows, self.height))
                part = self._reader.read(window, reduction=unit)
                height, width = part.shape[:2]
                pixels[y // unit : y // unit + height, x // unit : x // unit + width] = part
            build.done = min(y + rows, self.height) / self.height
        return pixels
