"""A folder of files by key, bounded in size, that the processes of a machine share.

A file appears under its name only once it is complete. Its size is reserved first, under a lock, so that the files
never take more than the bound, whatever is killed. Where the bound is reached, files that have not been used for a day
make room for others, and then nothing does: an epoch reads every image once, in another order each time, and a cache
that keeps the first images has those of its share in each epoch, while one that drops the least recently used has
almost none (docs/decisions/0022-remote.md).
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_LOCK = "bytes"  # has the number of reserved bytes
_UNFINISHED = ".unfinished-"
_NUM_DIGITS = 20  # of that number
_SECONDS_KEPT = 86_400.0  # since the last use, before a file makes room for another
_SECONDS_FULL = 60.0  # before a full cache is searched for old files again
_SECONDS_UNTOUCHED = 3_600.0  # before a use is noted again


def free_share(folder: Path, *, held: int) -> int:
    """Return half of what the disk of a folder has free, with what a cache in it holds already, bytes.

    Args:
        folder: that exists or can be created.
        held: size of the cache, bytes.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return (shutil.disk_usage(existing).free + held) // 2


class FileCache:
    """Files by key in a folder.

    Args:
        folder: created if it does not exist.
        limit: bytes that the files may take; None is half of what the disk has free.

    Raises:
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._full_until = 0.0
        with self._locked() as lock:
            held = _read_count(lock)
        self.limit = free_share(folder, held=held) if limit is None else limit

    @staticmethod
    def key(*parts: str) -> str:
        """Return the key of a file that texts identify."""
        return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def find(self, key: str) -> Path | None:
        """Return the file of a key; None if there is none."""
        path = self._path(key)
        try:
            unused = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return None
        if unused > _SECONDS_UNTOUCHED:
            with suppress(OSError):
                os.utime(path)
        return path

    def add(self, key: str, content: bytes) -> Path | None:
        """Store a file, and return its path; None if there is no room for it, in the cache or on the disk."""
        try:
            with self.adding(key, len(content)) as file:
                if file is None:
                    return None
                file.write(content)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return None
            raise
        return self._path(key)

    @contextmanager
    def adding(self, key: str, num_bytes: int) -> Iterator[IO[bytes] | None]:
        """Open a file for writing that appears under its key at the end of the block, unless that raises.

        Args:
            key: of the file.
            num_bytes: its size.

        Yields:
            The file; None if there is no room for it.
        """
        unfinished = self._reserve(key, num_bytes)
        if unfinished is None:
            yield None
            return
        path = self._path(key)
        try:
            with unfinished.open("r+b") as file:
                yield file
            is_new = not path.exists()
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            self._release(num_bytes)
            raise
        if not is_new:  # another process has stored it meanwhile
            self._release(num_bytes)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _reserve(self, key: str, num_bytes: int) -> Path | None:
        """Create a file of its full size, without content; None if there is no room for it."""
        if num_bytes > self.limit or time.monotonic() < self._full_until:
            return None
        with self._locked() as lock:
            count = _read_count(lock)
            if count + num_bytes > self.limit:
                count = self._make_room(self.limit - num_bytes)
            has_room = count + num_bytes <= self.limit
            _write_count(lock, count + num_bytes if has_room else count)
            if not has_room:
                self._full_until = time.monotonic() + _SECONDS_FULL
                return None
            folder = self._path(key).parent
            folder.mkdir(exist_ok=True)
            unfinished = folder / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}"
            with unfinished.open("wb") as file:
                file.truncate(num_bytes)  # while the lock is held: a count of all files has it
            return unfinished

    def _release(self, num_bytes: int) -> None:
        with self._locked() as lock:
            _write_count(lock, max(_read_count(lock) - num_bytes, 0))

    def _make_room(self, target: int) -> int:
        """Remove files that have not been used lately until at most `target` bytes are left; return the bytes left.

        Unfinished files count, and those that killed processes left are removed like others.
        """
        files = []
        for folder in self.folder.iterdir():
            for path in folder.iterdir() if folder.is_dir() else ():
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    files.append((stat.st_mtime, stat.st_size, path))
        count = sum(size for _, size, _ in files)
        limit = time.time() - _SECONDS_KEPT
        for modified, size, path in sorted(files):
            if count <= target or modified > limit:
                break
            path.unlink(missing_ok=True)
            count -= size
        return count

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b", buffering=0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock


def _read_count(lock: IO[bytes]) -> int:
    digits = os.pread(lock.fileno(), _NUM_DIGITS, 0)
    return int(digits) if digits.isdigit() else 0


def _write_count(lock: IO[bytes], count: int) -> None:
    os.pwrite(lock.fileno(), b"%0*d" % (_NUM_DIGITS, count), 0)  # of one length: it is never half a number
