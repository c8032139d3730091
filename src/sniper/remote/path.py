"""Paths of remote files, which are used like those of local ones."""

import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PosixPath
from typing import Any, Self, TypeGuard, TypeVar

from sniper.remote import client
from sniper.remote.urls import clean_url, is_url

_T = TypeVar("_T")


class RemotePath(PosixPath):
    """The path of a remote file or folder; as text it is the URL without credentials.

    Joining, comparing and splitting are those of `pathlib`. What asks the server raises `OSError`, with the URL.

    Example:
        >>> path = to_path("s3://bucket/images") / "a.jpg"
        >>> str(path), path.name, str(path.parent)
        ('s3://bucket/images/a.jpg', 'a.jpg', 's3://bucket/images')
    """

    __slots__ = ()

    def __str__(self) -> str:
        first, *others = self.parts or ("",)
        return f"{first}//{'/'.join(others)}" if first.endswith(":") else super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, key: str | os.PathLike[str]) -> Self:
        """Return the path below; a name that is absolute, or a URL, is a name like others."""
        if isinstance(key, RemotePath) and key.is_absolute():
            return type(self)(key)
        return super().__truediv__(os.fspath(key).lstrip("/"))

    def __rtruediv__(self, key: str | os.PathLike[str]) -> Self:
        """Return this path, whatever folder it is joined to."""
        return self

    def is_absolute(self) -> bool:
        """Check whether this is a URL, and not a part of one."""
        return bool(self.parts) and self.parts[0].endswith(":")

    def absolute(self) -> Self:
        """Return this path."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Return this path; there are no links."""
        return self

    def is_symlink(self) -> bool:
        """Return False; there are no links."""
        return False

    def exists(self, **_: Any) -> bool:
        """Check whether there is a file or a folder that may be read."""
        try:
            client.info(str(self))
        except (FileNotFoundError, PermissionError):
            return self._is_listed()
        return True

    def is_dir(self, **_: Any) -> bool:
        """Check whether this is a folder: on a web server, a page that lists files."""
        try:
            info = client.info(str(self))
        except (FileNotFoundError, PermissionError):
            return self._is_listed()
        return info.is_folder or (info.is_page and not self.suffix.lower().startswith(".htm"))

    def _is_listed(self) -> bool:
        """Check whether there are files below: a folder of a bucket is nothing but the start of their names."""
        if self.parts[0] in ("http:", "https:"):
            return False
        try:
            return bool(client.list_folder(str(self)))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False

    def is_file(self, **_: Any) -> bool:
        """Check whether this is a file that may be read."""
        try:
            info = client.info(str(self))
        except (FileNotFoundError, PermissionError):
            return False
        return not info.is_folder

    def stat(self, **_: Any) -> os.stat_result:
        """Raise: a server does not tell most of it."""
        raise io.UnsupportedOperation(f"{self}: a remote file has no status")

    def list_folders_and_files(self) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files in this folder, sorted."""
        listing = client.list_folder(str(self))
        folders = sorted(name for name, info in listing.items() if info.is_folder)
        return folders, sorted(listing.keys() - set(folders))

    def iterdir(self) -> Generator[Self, None, None]:
        """Iterate over what is in this folder, in no order."""
        yield from [self / name for name in client.list_folder(str(self))]

    def glob(self, pattern: str) -> Generator[Self, None, None]:
        """Iterate over what is in this folder and matches a pattern of names."""
        if "/" in pattern:
            raise NotImplementedError(f"a pattern of several parts in a remote folder: {pattern}")
        with suppress(FileNotFoundError, NotADirectoryError):
            yield from [self / name for name in client.list_folder(str(self)) if fnmatchcase(name, pattern)]

    def walk_files(self) -> Iterator[Self]:
        """Iterate over all files below this folder, sorted within each folder."""
        folders, files = self.list_folders_and_files()
        for name in files:
            yield self / name
        for name in folders:
            yield from (self / name).walk_files()

    def open_binary(self, *, is_fixed: bool = False) -> io.BufferedReader:
        """Open the file for reading; see `client.open_file`."""
        return client.open_file(str(self), is_fixed=is_fixed)

    def fetch(self, *, is_fixed: bool = False) -> Path | bytes:
        """Return the file in the cache, or its content; see `client.fetch`."""
        return client.fetch(str(self), is_fixed=is_fixed)


def is_remote(path: object) -> TypeGuard[RemotePath]:
    """Check whether a path is that of a remote file."""
    return isinstance(path, RemotePath)


def to_path(path: str | os.PathLike[str]) -> Path:
    """Return text as a path: a URL as that of a remote file, without credentials, and `file://` as a local one."""
    if isinstance(path, Path):
        return path
    text = os.fspath(path)
    if not is_url(text):
        return Path(text)
    clean = clean_url(text)
    return Path(clean.removeprefix("file://")) if clean.startswith("file://") else RemotePath(clean)


def fetch_ahead(paths: Iterable[Path]) -> None:
    """Start to read the remote ones of some image files that are opened soon, as far as there is room ahead."""
    urls = dict.fromkeys(str(path) for path in paths if is_remote(path))
    client.read_ahead(urls, is_fixed=True)


def read_ahead(
    items: Iterable[_T], *, is_fixed: bool = False, path_of: Callable[[_T], object] = lambda item: item
) -> Iterator[_T]:
    """Iterate over paths, or things that have paths, while the next remote files are read.

    Args:
        items: to iterate over; remote ones are taken from it a few ahead of their use.
        is_fixed: see `client.open_file`.
        path_of: returns the path of an item, or something else.
    """
    waiting: deque[_T] = deque()
    for item in items:
        waiting.append(item)
        path = path_of(item)
        if is_remote(path):
            client.read_ahead([str(path)], is_fixed=is_fixed)
        if not is_remote(path) or len(waiting) > client.MAX_AHEAD:
            yield waiting.popleft()
    yield from waiting
