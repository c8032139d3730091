"""Reading a data set: chips, out of the cache or cut from images decoded once for all; whole images; a check of all.

What cannot be read is refused by name, or skipped with a warning where that was asked for.
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sniper.chips import Chip
from sniper.data.datasets import Dataset
from sniper.data.images.cache import ChipCache, Stamp
from sniper.data.images.files import ImageReader, open_image
from sniper.data.images.regions import cut_chip, finished, read_source_pixels
from sniper.data.spec import CacheSpec, ReadSpec
from sniper.errors import ImageError

_CHECKED_SIDE = 4096  # pixels of a large image looked at together
_CHECKED_TOGETHER = 256  # images


class ChipReader:
    """Reads chips; each process has its own.

    Args:
        spec: how image files become pixels.
        cache: chips kept on disk.
        kept_images: how many images stay decoded; those that were not looked at for longest go first.
    """

    def __init__(
        self, spec: ReadSpec = ReadSpec(), *, cache: CacheSpec = CacheSpec(), kept_images: int = 1
    ) -> None:
        self._spec = spec
        self._cache = ChipCache(cache, spec) if cache.folder is not None else None
        self._kept_images = kept_images
        self._pictures: OrderedDict[Path, ImageReader] = OrderedDict()
        self._stamps: dict[Path, Stamp] = {}
        self._bad: dict[Path, str] = {}

    def read(self, path: Path, chip: Chip) -> UInt8[np.ndarray, "h w 3"]:
        """Give the pixels of a chip.

        Args:
            path: of its image.
            chip: where to cut.

        Raises:
            ImageError: if the image cannot be read; a file that could not is not tried again.
            CacheError: if the cache cannot be used.
        """
        if path in self._bad:
            raise ImageError(self._bad[path])
        try:
            if self._cache is None:
                return cut_chip(self._picture(path, chip), chip)
            return self._read_cached(self._cache, path, chip)
        except ImageError as error:
            self._bad[path] = str(error)
            raise

    def _read_cached(self, cache: ChipCache, path: Path, chip: Chip) -> UInt8[np.ndarray, "h w 3"]:
        try:
            stamp = cache.stamp(path)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read as an image ({error})") from error
        if self._stamps.get(path, stamp) != stamp:
            self._pictures.pop(path, None)  # the file has changed since it was decoded
        key = cache.key(stamp, chip)
        essence = cache.find(key)
        if essence is None:
            essence = read_source_pixels(self._picture(path, chip), chip)
            self._stamps[path] = stamp
            is_same = cache.stamp(path) == stamp
            essence = cache.keep(key if is_same else None, essence)
        return finished(essence, chip)

    def _picture(self, path: Path, chip: Chip) -> ImageReader:
        """Give an image, decoded if it was looked at lately."""
        picture = self._pictures.pop(path, None)
        if picture is None:
            sides = (chip.level.image_width, chip.level.image_height)
            picture = open_image(path, self._spec, sides=sides)
        self._pictures[path] = picture
        while len(self._pictures) > self._kept_images:
            forgotten, _ = self._pictures.popitem(last=False)
            self._stamps.pop(forgotten, None)
        return picture


def find_bad_images(annotations: Dataset, spec: ReadSpec) -> Iterator[str | None]:
    """Read every pixel of a data set; gives for each image, in order, what is wrong with it, or None."""

    def problem(index: int) -> str | None:
        record = annotations[index]
        try:
            picture = open_image(record.path, spec, sides=(record.width, record.height))
            corners = itertools.product(
                range(0, picture.width, _CHECKED_SIDE), range(0, picture.height, _CHECKED_SIDE)
            )
            for x, y in corners:
                right, bottom = (
                    min(x + _CHECKED_SIDE, picture.width),
                    min(y + _CHECKED_SIDE, picture.height),
                )
                picture.read((x, y, right, bottom))
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as readers:
        for start in range(0, len(annotations), _CHECKED_TOGETHER):
            yield from readers.map(problem, range(start, min(start + _CHECKED_TOGETHER, len(annotations))))
