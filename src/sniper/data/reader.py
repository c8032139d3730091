"""Read the images of a data set: chip by chip, from the cache or from images that stay decoded; or all, to check them.

An image that cannot be read raises an error that names the file.
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sniper.chips import Chip
from sniper.data.datasets import Dataset, ImageRecord
from sniper.data.datasets.image_files import find_bad_files, find_path_problem, locate_image_files
from sniper.data.images.cache import ChipCache, Stamp
from sniper.data.images.files import ImageReader, open_image
from sniper.data.images.regions import cut_chip, read_source_pixels, render_chip
from sniper.data.spec import CacheSpec, ReadSpec
from sniper.errors import ImageError, describe_os_error
from sniper.geometry.boxes import Sides
from sniper.remote import fetch_ahead, is_remote, read_ahead

_CHECK_WINDOW = 4096  # pixels a side that are read at a time while an image is checked
_CHECK_AHEAD = 256  # images that are checked before their results are yielded


class ChipReader:
    """Reads chips; each process has its own.

    Args:
        spec: how image files become pixels.
        cache: where cut chips are kept on disk.
        kept_images: how many images stay decoded; the least recently used goes first.

    Raises:
        CacheError: if the cache cannot be used.
    """

    def __init__(
        self, spec: ReadSpec = ReadSpec(), *, cache: CacheSpec = CacheSpec(), kept_images: int = 1
    ) -> None:
        self._spec = spec
        self._cache = ChipCache(cache, spec) if cache.folder is not None else None
        self._kept_images = kept_images
        self._images: OrderedDict[Path, ImageReader] = OrderedDict()
        self._stamps: dict[Path, Stamp] = {}
        self._errors: dict[Path, str] = {}

    def read_record(self, record: ImageRecord, chip: Chip) -> UInt8[np.ndarray, "h w 3"]:
        """Read the pixels of a chip of an image of a data set; see `read`."""
        if record.path not in self._errors:
            try:
                check_record(record)
            except ImageError as error:
                self._errors[record.path] = str(error)
                raise
        return self.read(record.path, chip)

    def read(self, path: Path, chip: Chip) -> UInt8[np.ndarray, "h w 3"]:
        """Read the pixels of a chip.

        Args:
            path: of its image.
            chip: where to cut.

        Raises:
            ImageError: if the image cannot be read; it is not tried a second time.
            CacheError: if the cache cannot be used.
        """
        if path in self._errors:
            raise ImageError(self._errors[path])
        try:
            if self._cache is None or is_remote(path):
                return cut_chip(self._open(path, chip), chip)
            return self._read_cached(self._cache, path, chip)
        except ImageError as error:
            self._errors[path] = str(error)
            raise

    def read_ahead(self, paths: Iterable[Path]) -> None:
        """Start to read the remote ones of some image files that are read soon, unless they are decoded already."""
        fetch_ahead([path for path in paths if path not in self._images and path not in self._errors])

    def _read_cached(self, cache: ChipCache, path: Path, chip: Chip) -> UInt8[np.ndarray, "h w 3"]:
        try:
            stamp = cache.stamp(path)
        except OSError as error:
            raise ImageError(f"{path}: cannot be read as an image ({describe_os_error(error)})") from error
        if self._stamps.get(path, stamp) != stamp:
            self._images.pop(path, None)  # the file has changed since it was decoded
        key = cache.key(stamp, chip)
        pixels = cache.get(key)
        if pixels is None:
            pixels = read_source_pixels(self._open(path, chip), chip)
            self._stamps[path] = stamp
            is_unchanged = cache.stamp(path) == stamp
            pixels = cache.put(key if is_unchanged else None, pixels)
        return render_chip(pixels, chip)

    def _open(self, path: Path, chip: Chip) -> ImageReader:
        """Return the reader of an image, decoded if it was used lately."""
        image = self._images.pop(path, None)
        if image is None:
            sides = Sides(chip.level.image_width, chip.level.image_height)
            image = open_image(path, self._spec, sides=sides)
        self._images[path] = image
        while len(self._images) > self._kept_images:
            dropped, _ = self._images.popitem(last=False)
            self._stamps.pop(dropped, None)
        return image


def check_record(record: ImageRecord) -> None:
    """Check that the image file of a record may be opened: see `find_path_problem`.

    Raises:
        ImageError: if it may not.
    """
    problem = find_path_problem(record.path, record.image_root, follow_links=record.follow_links)
    if problem is not None:
        raise ImageError(f"{record.path}: {problem}")


def open_record(record: ImageRecord, spec: ReadSpec) -> ImageReader:
    """Open the image of a record.

    Raises:
        ImageError: if its file may not be opened, cannot be read, or has other sides than annotated.
    """
    check_record(record)
    return open_image(record.path, spec, sides=record.sides)


def find_bad_images(dataset: Dataset, spec: ReadSpec) -> Iterator[str | None]:
    """Check the image files of a data set as `load_dataset` does, and read every pixel of the good ones.

    Yields:
        For each image, in order, its problem, or None.

    Raises:
        ImageError: if the image root is not a folder.
    """
    file_names = dataset.file_names.tolist()
    bad_files = find_bad_files(
        locate_image_files(dataset.path, file_names, image_root=dataset.image_root),
        file_names,
        [record.sides for record in dataset],
        read=spec,
        follow_links=dataset.follow_links,
    )
    problems = dict(bad_files)
    if None in problems:
        raise ImageError(f"{dataset.path}: {problems[None]}")

    def check(index: int) -> str | None:
        if index in problems:
            return problems[index]
        try:
            image = open_record(dataset[index], spec)
            corners = itertools.product(
                range(0, image.width, _CHECK_WINDOW), range(0, image.height, _CHECK_WINDOW)
            )
            for x, y in corners:
                image.read((x, y, min(x + _CHECK_WINDOW, image.width), min(y + _CHECK_WINDOW, image.height)))
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        for start in range(0, len(dataset), _CHECK_AHEAD):
            indices = range(start, min(start + _CHECK_AHEAD, len(dataset)))
            paths = (dataset.image_root / str(dataset.image_paths[index]) for index in indices)
            ahead = zip(indices, read_ahead(paths, is_fixed=True), strict=True)
            yield from executor.map(check, (index for index, _ in ahead))
