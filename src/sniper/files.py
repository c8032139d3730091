"""Files on disk: paths as a user writes them, regular files alone for reading, atomic writes, digests and JSON."""

import errno
import gc
import hashlib
import io
import json
import mmap
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from sniper.errors import ConfigError, SniperError, describe_os_error

_T = TypeVar("_T")

UNREADABLE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Errors that NumPy raises for an `.npz` file that is missing, truncated, damaged or of another format."""

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

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}/]+)\})", re.ASCII)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expand_path(path: str | os.PathLike[str], *, folder: Path = Path()) -> Path:
    """Replace `~`, `~user`, `$NAME` and `${NAME}` in a path, as a shell does.

    A part of the path that exists as it is written is kept, so that files with `$` in their names can be named.

    Args:
        path: as a user wrote it.
        folder: that a relative path starts from, to look for parts that exist.

    Raises:
        ConfigError: if an environment variable is not defined, or empty.
    """
    text = os.fspath(path)
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
    """Open a regular file for reading. Nothing else is opened: to open a pipe waits for a writer, perhaps forever.

    Raises:
        OSError: if it is not a regular file, or cannot be read; `strerror` is the reason.
    """
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


def matches_pattern(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Check whether the parts of a path match those of a glob pattern; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches_pattern(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches_pattern(parts[1:], pattern[1:])


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
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with naming_path(path, written_as=unfinished):
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write one of many files, such as a picture: complete or not at all, but not synced to disk.

    Args:
        path: the file to write, in an existing folder. An existing file is unchanged if writing fails.
        content: of the file.

    Raises:
        OSError: if it cannot be written; names the file.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with naming_path(path, written_as=unfinished):
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


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
        with content, no_garbage_collection():
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
