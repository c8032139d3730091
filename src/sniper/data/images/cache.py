"""A cache of cut chips on disk, so that a large image is not decoded again in every epoch.

It is one SQLite file, which any number of processes may read and write at the same time: entries are never half
written, and SQLite enforces the size limit. An entry's key is a hash of everything that its pixels depend on: path,
size and modification time of the image file, how it is read, level and window. For a level that enlarges, the entry has
the image's own pixels, of which there are fewer.
"""

import fcntl
import hashlib
import os
import sqlite3
import warnings
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from sniper.chips import Chip
from sniper.data.spec import CacheSpec, ReadSpec
from sniper.errors import CacheError, describe_os_error
from sniper.files import check_regular
from sniper.remote.cache import free_share

_VERSION = 2  # changes where the same file gives other pixels
_FILE_NAME = "chips.sqlite"
_PAGE_SIZE = 16_384  # bytes; a chip takes a few pages
_TIMEOUT = 120.0  # seconds to wait for another process that writes
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_IOERR_WRITE)


class Stamp(NamedTuple):
    """The version of a file, as far as it shows without reading it.

    Attributes:
        path: absolute.
        size: bytes.
        modified: time of the last change, nanoseconds.
    """

    path: str
    size: int
    modified: int


class ChipCache:
    """Source pixels of chips by key, in a folder on disk. A forked process opens the file again for itself.

    Args:
        spec: folder, size limit and format; its folder must not be None.
        read: how image files become pixels.

    Raises:
        CacheError: if the folder has a file that is not a cache, or cannot be written.
    """

    def __init__(self, spec: CacheSpec, read: ReadSpec) -> None:
        if spec.folder is None:
            raise ValueError("a cache needs a folder")
        self._path = Path(spec.folder) / _FILE_NAME
        self._spec = spec
        quality = spec.quality if spec.format == "jpeg" else None
        self._settings = (
            _VERSION,
            read.exif_orientation,
            read.intensity_range,
            read.bands,
            spec.format,
            quality,
        )
        self._connection: sqlite3.Connection | None = None
        self._is_full = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"{self._path.parent}: cannot be used as the folder of a chip cache ({describe_os_error(error)})"
            ) from error
        self._connect()

    @staticmethod
    def stamp(path: Path) -> Stamp:
        """Return the version of an image file.

        Raises:
            OSError: if there is no such file.
        """
        stat = os.stat(path)
        return Stamp(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)

    def key(self, stamp: Stamp, chip: Chip) -> bytes:
        """Compute the key of a chip of an image file."""
        level = chip.level
        parts = (self._settings, tuple(stamp), (level.width, level.height, chip.x, chip.y, *chip.visible))
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()

    def get(self, key: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
        """Return the pixels of a key; None if there are none, or if they were damaged on disk.

        Raises:
            CacheError: if the file cannot be read.
        """
        row = self._execute("SELECT pixels, checksum FROM chips WHERE key = ?", (key,))
        if row is None or not isinstance(row[0], bytes) or _checksum(key, row[0]) != row[1]:
            return None
        return _decode(row[0])

    def put(self, key: bytes | None, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Store pixels under a key, unless the cache is full.

        Args:
            key: of the pixels; None stores nothing.
            pixels: to store.

        Returns:
            The pixels as `get` will return them: a chip is the same whether or not it was in the cache before.

        Raises:
            CacheError: if the file cannot be written for another reason than a full cache or disk.
        """
        if self._spec.format == "jpeg":
            options = [cv2.IMWRITE_JPEG_QUALITY, self._spec.quality]
        else:
            options = [cv2.IMWRITE_PNG_COMPRESSION, 3]
        _, encoded = cv2.imencode(f".{self._spec.format}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        blob = encoded.tobytes()
        if key is not None and not self._is_full:
            try:
                self._execute("REPLACE INTO chips VALUES (?, ?, ?)", (key, blob, _checksum(key, blob)))
            except CacheError as error:
                if getattr(error.__cause__, "sqlite_errorcode", None) not in _FULL:
                    raise
                self._is_full = True
                warnings.warn(
                    f"{self._path}: is full (data.cache.gigabytes: {self._limit() / 1e9:.3g}, or the disk); "
                    "chips that do not fit are cut again each time",
                    stacklevel=2,
                )
        return _decode(blob)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _execute(self, command: str, values: tuple[object, ...]) -> tuple[object, ...] | None:
        try:
            row: tuple[object, ...] | None = self._connect().execute(command, values).fetchone()
            return row
        except sqlite3.Error as error:
            raise CacheError(
                f"{self._path}: {error}; if the cache is damaged, delete it, and it fills again"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        try:
            lock_path = self._path.parent / f".{_FILE_NAME}.lock"
            for path in (lock_path, self._path):
                if path.exists():
                    check_regular(path)
            # SQLite waits for processes that write to the file, but not for processes that create it.
            with lock_path.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._connection = sqlite3.connect(
                    self._path, timeout=_TIMEOUT, isolation_level=None, check_same_thread=False
                )
                max_pages = self._limit() // _PAGE_SIZE
                for setting in (
                    f"PRAGMA page_size = {_PAGE_SIZE}",
                    "PRAGMA journal_mode = WAL",
                    "PRAGMA synchronous = NORMAL",
                    f"PRAGMA max_page_count = {max_pages}",
                    "CREATE TABLE IF NOT EXISTS chips (key BLOB PRIMARY KEY, pixels BLOB, checksum INTEGER)",
                ):
                    self._connection.execute(setting)
        except (sqlite3.Error, OSError) as error:
            self.close()
            reason = describe_os_error(error) if isinstance(error, OSError) else error
            raise CacheError(f"{self._path}: cannot be used as a chip cache ({reason})") from error
        _OPEN_CACHES.add(self)
        return self._connection

    def _limit(self) -> int:
        """Return the bytes that the file may take."""
        if self._spec.gigabytes is not None:
            return int(self._spec.gigabytes * 1e9)
        held = self._path.stat().st_size if self._path.exists() else 0
        return max(free_share(self._path.parent, held=held), _PAGE_SIZE)

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the open file, which cannot be sent to another process."""
        return {**vars(self), "_connection": None}


_OPEN_CACHES: "weakref.WeakSet[ChipCache]" = weakref.WeakSet()


def _close_all() -> None:
    """Close every cache: SQLite does not allow an open file to be carried across a fork."""
    for cache in tuple(_OPEN_CACHES):
        cache.close()


os.register_at_fork(before=_close_all)


def _checksum(key: bytes, blob: bytes) -> int:
    """Return the CRC-32 of an entry: in a damaged file a key may point to the pixels of another one."""
    return zlib.crc32(blob, zlib.crc32(key))


def _decode(blob: bytes) -> UInt8[np.ndarray, "h w 3"]:
    pixels = cv2.imdecode(np.frombuffer(blob, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    return np.asarray(pixels, dtype=np.uint8)
