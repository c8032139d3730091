"""Chips kept on disk once they are cut, so that a large image is decoded once and not once an epoch.

One SQLite file, which any number of processes read and fill at once, in which nothing is ever half written, and whose
size SQLite bounds. What is kept is found again by what it was made of: the image file, by name, size and time of its
last change, how it is read, level and window. Of a level that enlarges, the pixels of the image are kept: there are
fewer of them.
"""

import fcntl
import hashlib
import os
import sqlite3
import warnings
import weakref
import zlib
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from sniper.chips import Chip
from sniper.data.spec import CacheSpec, ReadSpec
from sniper.errors import CacheError

_VERSION = 1
_NAME = "chips.sqlite"
_PAGE = 16_384  # bytes; a chip takes a few
_PATIENCE = 120.0  # seconds to wait for another process that writes
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_TOOBIG)

Stamp = tuple[str, int, int]
"""Path, size and time of the last change of a file."""


class ChipCache:
    """Pixels by what they were made of. A process that is forked opens the file for itself.

    Args:
        spec: where, how large and in which format; it names a folder.
        read: how the images are read.

    Raises:
        CacheError: if the folder holds something else, or cannot be written.
    """

    def __init__(self, spec: CacheSpec, read: ReadSpec) -> None:
        assert spec.folder is not None
        self._path = Path(spec.folder) / _NAME
        self._spec = spec
        quality = spec.quality if spec.format == "jpeg" else None
        self._way = (_VERSION, read.exif_orientation, read.intensity_range, spec.format, quality)
        self._connection: sqlite3.Connection | None = None
        self._is_full = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"{self._path.parent}: cannot be a folder for chips ({error.strerror})"
            ) from error
        self._opened()

    @staticmethod
    def stamp(path: Path) -> Stamp:
        """Tell what an image file is, without reading it.

        Raises:
            OSError: if it is not there.
        """
        stat = os.stat(path)
        return os.path.abspath(path), stat.st_size, stat.st_mtime_ns

    def key(self, stamp: Stamp, chip: Chip) -> bytes:
        """Name what a chip's pixels are made of."""
        level = chip.level
        made_of = (self._way, stamp, (level.width, level.height, chip.x, chip.y, *chip.visible))
        return hashlib.blake2b(repr(made_of).encode(), digest_size=16).digest()

    def find(self, key: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
        """Give the pixels that were kept under a key; None if there are none, or they were damaged since.

        Raises:
            CacheError: if the file cannot be read.
        """
        row = self._do("SELECT pixels, checksum FROM chips WHERE key = ?", (key,))
        return None if row is None or zlib.crc32(row[0]) != row[1] else _unpacked(row[0])

    def keep(self, key: bytes | None, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Keep pixels under a key, if there is room.

        Args:
            key: what they are made of; None keeps nothing.
            pixels: what to keep.

        Returns:
            The pixels as they will be found, so that what is learnt does not depend on what was kept before.

        Raises:
            CacheError: if the file cannot be written for another reason than that it, or the disk, is full.
        """
        if self._spec.format == "jpeg":
            options = [cv2.IMWRITE_JPEG_QUALITY, self._spec.quality]
        else:
            options = [cv2.IMWRITE_PNG_COMPRESSION, 3]
        _, packed = cv2.imencode(f".{self._spec.format}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        blob = packed.tobytes()
        if key is not None and not self._is_full:
            try:
                self._do("REPLACE INTO chips VALUES (?, ?, ?)", (key, blob, zlib.crc32(blob)))
            except CacheError as error:
                if getattr(error.__cause__, "sqlite_errorcode", None) not in _FULL:
                    raise
                self._is_full = True
                warnings.warn(
                    f"{self._path}: is full (data.cache.gigabytes: {self._spec.gigabytes:g}, or the disk); "
                    "further chips are cut anew each time",
                    stacklevel=2,
                )
        return _unpacked(blob)

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _do(self, command: str, values: tuple[object, ...]) -> tuple[bytes, int] | None:
        try:
            return self._opened().execute(command, values).fetchone()
        except sqlite3.Error as error:
            raise CacheError(
                f"{self._path}: {error}; a cache that is damaged may be deleted, and fills again"
            ) from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        try:
            # SQLite waits for others that write, but not for others that make the file.
            with (self._path.parent / f".{_NAME}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._connection = sqlite3.connect(
                    self._path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
                )
                most = int(self._spec.gigabytes * 1e9) // _PAGE
                for setting in (
                    f"PRAGMA page_size = {_PAGE}",
                    "PRAGMA journal_mode = WAL",
                    "PRAGMA synchronous = NORMAL",
                    f"PRAGMA max_page_count = {most}",
                    "CREATE TABLE IF NOT EXISTS chips (key BLOB PRIMARY KEY, pixels BLOB, checksum INTEGER)",
                ):
                    self._connection.execute(setting)
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise CacheError(f"{self._path}: cannot be used for chips ({error})") from error
        _OPEN.add(self)
        return self._connection

    def __getstate__(self) -> dict[str, object]:
        """Leave the open file behind when sent to another process."""
        return {**vars(self), "_connection": None}


_OPEN: "weakref.WeakSet[ChipCache]" = weakref.WeakSet()


def _close_all() -> None:
    """Close every cache; SQLite forbids to carry an open file over a fork."""
    for cache in tuple(_OPEN):
        cache.close()


os.register_at_fork(before=_close_all)


def _unpacked(blob: bytes) -> UInt8[np.ndarray, "h w 3"]:
    pixels = cv2.imdecode(np.frombuffer(blob, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    return np.asarray(pixels, dtype=np.uint8)
