"""Files on disk: paths as a user writes them, regular files alone, locks, atomic writes, digests and JSON."""

import difflib
import errno
import fcntl
import gc
import hashlib
import io
import json
import mmap
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from sniper.errors import ConfigError, SniperError, describe_os_error
from sniper.remote import RemotePath, is_remote, is_url, to_path

_T = TypeVar("_T")

_OTHER_CONTENT = (
    (b"version https://git-lfs", "a pointer of Git LFS; git lfs pull fetches the file"),
    (b"/annex/objects/", "a pointer of git-annex; git annex get fetches the file"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"pk\x03\x04", "a zip archive"),
)
_IGNORED = frozenset(
    {"@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "system volume information", "desktop.ini"}
    | {"thumbs.db"}
)
"""Names, in lower case, that systems give to thumbnails, attributes and trash; others of these start with a dot."""

_HOST = re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:32]
_PREFIX = ".unfinished-"
_TEMPORARY = re.compile(rf"{re.escape(_PREFIX)}\w+-\d+-[0-9a-f]{{8}}", re.ASCII)
_LOCK = ".lock"  # in a temporary folder
_SECONDS_KEPT = 86_400.0

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}/]+)\})", re.ASCII)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expand_path(path: str | os.PathLike[str], *, folder: Path = Path()) -> Path:
    """Replace `~`, `~user`, `$NAME` and `${NAME}` in a path, as a shell does.

    A part of the path that exists as it is written is kept, so that files with `$` in their names can be named. A URL
    becomes the path of a remote file.

    Args:
        path: as a user wrote it.
        folder: that a relative path starts from, to look for parts that exist.

    Raises:
        ConfigError: if an environment variable is not defined, or empty.
    """
    text = os.fspath(path)
    if is_url(text):
        return to_path(path)
    if not text.startswith("~") and "$" not in text:
        return Path(path)
    start, *rest = Path(text).parts
    if start.startswith("~") and not os.path.lexists(folder / start):
        start = os.path.expanduser(start)
    expanded = Path()
    for part in (start, *rest):
        if "$" in part and not os.path.lexists(folder / expanded / part):
            value = _VARIABLE.sub(lambda match: _variable(match[1] or match[2], text), part)
            expanded = Path(value) if expanded == Path() else expanded / value.lstrip("/")
        else:
            expanded /= part
    return expanded


def _variable(name: str, path: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(
            f"{path}: the environment variable {name} is not defined, and there is no such file"
        )
    return value


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that a path is a regular file, for libraries that open files themselves.

    Raises:
        OSError: if it is not, or cannot be read; `strerror` is the reason.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a zero byte, or a character that file names cannot have
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    _refuse_special(mode, path)


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular or a remote file for reading.

    Nothing else is opened: to open a pipe waits for a writer, perhaps forever.

    Raises:
        OSError: if it is not a regular file, or cannot be read; `strerror` is the reason.
    """
    if is_remote(path):
        return path.open_binary()
    check_regular(path)  # before it is opened, since opening a device may change it
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 - returned
    try:
        _refuse_special(os.fstat(file.fileno()).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def _refuse_special(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "of an unknown kind")
    raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))


def list_folder(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the other files in a local or remote folder, sorted.

    Raises:
        OSError: if it cannot be listed.
    """
    path = to_path(folder)
    if is_remote(path):
        return path.list_folders_and_files()
    with os.scandir(path) as entries:
        are_folders = {entry.name: entry.is_dir() for entry in entries}
    names = sorted(are_folders)
    return [name for name in names if are_folders[name]], [name for name in names if not are_folders[name]]


def list_names(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names in a local or remote folder, in no order.

    Raises:
        OSError: if it cannot be listed.
    """
    path = to_path(folder)
    return [each.name for each in path.iterdir()] if is_remote(path) else os.listdir(path)


def similar_files(path: Path) -> list[str]:
    """Return up to two files and folders beside a path with similar names; none if its folder cannot be listed."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    near = difflib.get_close_matches(path.name, names, n=2, cutoff=0.75)
    return [str(path.parent / name) for name in near]


def absolute_text(path: str | os.PathLike[str]) -> str:
    """Return a path as absolute text, without `.` and `..`; a URL as it is."""
    text = os.fspath(path)
    return text if is_url(text) else os.path.abspath(text)


def real_text(path: str | os.PathLike[str]) -> str:
    """Return a path as text with all links followed; a URL as it is."""
    text = os.fspath(path)
    return text if is_url(text) else os.path.realpath(text)


def is_folder(path: Path) -> bool:
    """Check whether there is a local or remote folder under a path, whatever characters its name has.

    Raises:
        OSError: if a server does not answer.
    """
    return path.is_dir() if is_remote(path) else os.path.isdir(path)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Check whether there is anything under a path, be it a broken link.

    Raises:
        OSError: if a server does not answer.
    """
    return path.exists() if is_remote(path) else os.path.lexists(path)


def matches_pattern(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Check whether the parts of a path match those of a glob pattern; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches_pattern(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches_pattern(parts[1:], pattern[1:])


def match_remote(pattern: RemotePath) -> list[RemotePath]:
    """Return the remote files and folders that match a glob pattern, sorted."""
    parts = pattern.parts
    start = next((index for index, part in enumerate(parts) if has_magic(part)), len(parts))
    base, rest = RemotePath(*parts[:start]), parts[start:]
    if "**" in rest:
        return sorted(file for file in base.walk_files() if matches_pattern(file.parts[start:], rest))
    found = [base]
    for part in rest:
        found = [inner for folder in found for inner in folder.glob(part)]
    return sorted(found)


def is_ignored(name: str) -> bool:
    """Check whether a file or folder is hidden, or holds thumbnails, attributes or trash, as its name shows."""
    return name.startswith(".") or name.lower() in _IGNORED


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_other_content(content: bytes) -> str | None:
    """Describe content that stands in for that of a file, such as the pointer of Git LFS to it; None if it is none.

    Args:
        content: of the file, or its first 64 bytes.

    Example:
        >>> describe_other_content(b"<html><title>404 Not Found</title>")
        'a web page'
    """
    start = content[:64].lstrip().lower()
    if not start:
        return "empty"
    return next((name for signature, name in _OTHER_CONTENT if start.startswith(signature)), None)


class FileLock:
    """An exclusive lock, which the system releases when this process ends, however it ends.

    The lock is on a file that is removed with it. A forked process does not hold it.

    Args:
        path: of the file, in an existing folder. Its content is kept until `write`.

    Attributes:
        path: of the file.
        problem: why the file system has no locks; None if it has.

    Raises:
        BlockingIOError: if the lock is held, in this process or another one.
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._descriptor: int | None = None
        while not self._is_of_path():
            self._close()
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _LOCKS.add(self)
            try:
                # Not lockf: its locks are lost when any descriptor of the file is closed in the process. On NFS, Linux
                # turns a flock into a lock of the server, for which the file has to be open for writing.
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    self._close()
                    raise BlockingIOError(errno.EAGAIN, "is locked", os.fspath(path)) from error
                self.problem = error.strerror or str(error)

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock; False in a process that was forked from it."""
        return self._descriptor is not None

    def write(self, content: bytes) -> None:
        """Replace the content of the file."""
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)

    def release(self) -> None:
        """Remove the file and release the lock, if this process holds it."""
        if self.is_held:
            self.path.unlink(missing_ok=True)  # while it is locked, so that it is not that of another process
            self._close()

    def _is_of_path(self) -> bool:
        """Check whether the open file is still the one at the path, and was not removed by its last holder."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        _LOCKS.discard(self)


_LOCKS: set[FileLock] = set()
"""The locks that this process holds."""


def _close_locks() -> None:
    """Close the files of all locks in a forked process, which would keep them locked after the end of its parent."""
    for lock in tuple(_LOCKS):
        lock._close()


os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Create a hidden folder for this process alone; at the end it is removed with what is left in it.

    Its name has host, process and a random number. Folders that killed processes left in the same place are removed.

    Args:
        parent: an existing folder.

    Yields:
        The folder.

    Raises:
        OSError: if it cannot be created.
    """
    remove_leftovers(parent)
    folder, lock = _create_temporary(parent)
    try:
        yield folder
    finally:
        if lock.is_held:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def remove_leftovers(parent: Path) -> None:
    """Remove what processes that have ended, on any machine, left under temporary names in a folder.

    The folder of a process that has not ended is locked. Since some network file systems have locks only among the
    processes of a machine, folders of other hosts are kept until nothing in them has changed for a day, as are files.
    """
    for path in [path for path in parent.iterdir() if is_temporary(path.name)]:
        with suppress(OSError):  # it is locked, or another process removes it, too
            is_new = time.time() - _last_change(path) < _SECONDS_KEPT
            if path.is_file() and not is_new:
                path.unlink()
            elif path.is_dir() and (_is_of_this_host(path) or not is_new):
                lock = FileLock(path / _LOCK)
                if lock.problem is None:
                    shutil.rmtree(path, ignore_errors=True)
                lock.release()


def is_temporary(name: str) -> bool:
    """Check whether a name is that of a `temporary_folder`."""
    return _TEMPORARY.fullmatch(name) is not None


def _temporary_path(parent: Path) -> Path:
    return parent / f"{_PREFIX}{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def _create_temporary(parent: Path) -> tuple[Path, FileLock]:
    while True:
        folder = _temporary_path(parent)
        with naming_path(parent, written_as=folder):
            folder.mkdir()
            # Before it is locked, another process may take it for a leftover.
            with suppress(BlockingIOError, FileNotFoundError):
                return folder, FileLock(folder / _LOCK)


def _is_of_this_host(folder: Path) -> bool:
    return folder.name.startswith(f"{_PREFIX}{_HOST}-")


def _last_change(folder: Path) -> float:
    """Return when a folder or something in it was changed last, seconds since the epoch."""
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on disk, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming_path(path: Path, *, written_as: Path | None = None) -> Iterator[None]:
    """Name a file in errors of the operating system: one of a write does not name the file that is written to.

    Args:
        path: of the file, or of a folder.
        written_as: its temporary path, which is replaced in errors.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        elif written_as is not None and isinstance(error.filename, str):
            named = Path(error.filename)
            if named.is_relative_to(written_as):
                error.filename = os.fspath(path / named.relative_to(written_as))
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only once it is complete and on disk.

    Args:
        path: the file to write, in an existing folder. An existing file is unchanged if writing fails.

    Yields:
        The binary file to write to.
    """
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Let a library write a file that appears under its name only once it is complete and on disk.

    Args:
        path: the file to write, in an existing folder. An existing file is unchanged if writing fails.

    Yields:
        The path to write to, of the same name in another folder.
    """
    with temporary_folder(path.parent) as folder, naming_path(path, written_as=folder / path.name):
        unfinished = folder / path.name
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write one of many files, such as a picture: complete or not at all, but not synced to disk.

    Args:
        path: the file to write, in an existing folder. An existing file is unchanged if writing fails.
        content: of the file.

    Raises:
        OSError: if it cannot be written; names the file.
    """
    unfinished = _temporary_path(path.parent)
    with naming_path(path, written_as=unfinished):
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a folder that appears under its name only once it is complete; its files are not synced to disk.

    Args:
        path: the folder, absent or empty at the end, in an existing folder.

    Yields:
        The folder to write to, under another name.
    """
    with temporary_folder(path.parent) as folder, naming_path(path, written_as=folder / path.name):
        unfinished = folder / path.name
        unfinished.mkdir()
        yield unfinished
        sync_folder(unfinished)
        unfinished.replace(path)
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder; if that is interrupted, nothing is left under its name."""
    renamed = _temporary_path(path.parent)
    path.replace(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def read_json(path: Path, *, error: type[SniperError]) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        error: the class of error to raise.

    Raises:
        SniperError: an `error`, if the file cannot be read or is not JSON.
    """
    try:
        content = read_bytes(path)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({describe_os_error(problem)})") from problem
    other = describe_other_content(content)
    if other is not None:
        raise error(f"{path}: is not JSON, but {other}")
    try:
        return json.loads(content)
    except json.JSONDecodeError as problem:
        raise error(
            f"{path}: is not JSON ({problem.msg} in line {problem.lineno}, column {problem.colno})"
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not JSON ({problem})") from problem


def read_typed_json(path: Path, kind: type[_T]) -> _T | None:
    """Read a JSON file into msgspec structs, several times faster than `read_json` and in a third of its memory.

    Args:
        path: the file.
        kind: type of its content; keys that it does not name are skipped.

    Returns:
        The content; None if the file cannot be read, is not JSON, or is not of this type. `read_json` explains why.
    """
    try:
        with open_regular(path) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with no_garbage_collection():  # fields of the type msgspec.Raw keep the file mapped
            return msgspec.json.decode(content, type=kind)
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Stop the garbage collector while many objects are created, among which it would search again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
