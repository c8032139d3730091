"""Chips kept on disk once they are cut, so that a large image is decoded once and not once an epoch.

One SQLite file, which any number of processes read and fill at once, in which nothing is ever half written, and whose
size SQLite bounds. What is kept is found again by what it was made of: the image file, by name, size and time of its
last change, how it is read, level and window. Of a level that enlarges, the pixels of the image are kept: there are
fewer of them.
"""

import hashlib
import os
import sqlite3
import warnings
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
_FULL = ("full", "too big")


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
        self._way = (_VERSION, read.orientation, read.grey_range, spec.format, quality)
        self._connection: sqlite3.Connection | None = None
        self._process = -1
        self._of_others: list[sqlite3.Connection | None] = []
        self._is_full = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"{self._path.parent}: cannot be a folder for chips ({error.strerror})"
            ) from error
        self._opened().close()  # it can be, and what is not open is not forked
        self._connection = None

    def key(self, path: Path, chip: Chip) -> bytes:
        """Name what a chip's pixels are made of.

        Raises:
            OSError: if the image is not there.
        """
        stat = os.stat(path)
        made_of = (
            self._way,
            os.path.abspath(path),
            stat.st_size,
            stat.st_mtime_ns,
            (chip.level.width, chip.level.height, chip.x, chip.y, chip.size),
        )
        return hashlib.blake2b(repr(made_of).encode(), digest_size=16).digest()

    def find(self, key: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
        """Give the pixels that were kept under a key; None if there are none, or they were damaged since."""
        row = self._do("SELECT pixels, checksum FROM chips WHERE key = ?", (key,))
        if row is None or zlib.crc32(row[0]) != row[1]:
            return None
        return np.asarray(
            cv2.imdecode(np.frombuffer(row[0], dtype=np.uint8), cv2.IMREAD_COLOR_RGB), dtype=np.uint8
        )

    def keep(self, key: bytes, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Keep pixels under a key, if there is room.

        Raises:
            CacheError: if the file cannot be written for another reason than that it, or the disk, is full.
        """
        if self._is_full:
            return
        if self._spec.format == "jpeg":
            options = [cv2.IMWRITE_JPEG_QUALITY, self._spec.quality]
        else:
            options = [cv2.IMWRITE_PNG_COMPRESSION, 3]
        _, packed = cv2.imencode(f".{self._spec.format}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        blob = packed.tobytes()
        try:
            self._do("REPLACE INTO chips VALUES (?, ?, ?)", (key, blob, zlib.crc32(blob)))
        except CacheError as error:
            if not any(word in str(error) for word in _FULL):
                raise
            self._is_full = True
            warnings.warn(
                f"{self._path}: is full (data.cache.gigabytes: {self._spec.gigabytes:g}, or the disk); "
                "further chips are cut anew each time",
                stacklevel=2,
            )

    def _do(self, command: str, values: tuple[object, ...]) -> tuple[bytes, int] | None:
        try:
            return self._opened().execute(command, values).fetchone()
        except sqlite3.Error as error:
            raise CacheError(f"{self._path}: {error}") from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None and self._process == os.getpid():
            return self._connection
        try:
            connection = sqlite3.connect(
                self._path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
            connection.execute(f"PRAGMA page_size = {_PAGE}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            most = int(self._spec.gigabytes * 1e9) // _PAGE
            connection.execute(f"PRAGMA max_page_count = {most}")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS chips (key BLOB PRIMARY KEY, pixels BLOB, checksum INTEGER)"
            )
        except sqlite3.Error as error:
            raise CacheError(f"{self._path}: cannot be used for chips ({error})") from error
        self._of_others.append(self._connection)  # SQLite forbids even to close what was open before a fork
        self._connection, self._process = connection, os.getpid()
        return connection

    def __getstate__(self) -> dict[str, object]:
        """Leave the open file behind when sent to another process."""
        return {**vars(self), "_connection": None, "_of_others": []}
