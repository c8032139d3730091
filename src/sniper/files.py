"""Atomic writes, digests and JSON."""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sniper.errors import SniperError

UNREADABLE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Errors that NumPy raises for an `.npz` file that is missing, truncated, damaged or of another format."""


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only once it is complete and on disk.

    Args:
        path: the file to write, in an existing folder. An existing file is unchanged if writing fails.

    Yields:
        The binary file to write to.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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
        return json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from problem
    except json.JSONDecodeError as problem:
        raise error(
            f"{path}: is not JSON ({problem.msg} in line {problem.lineno}, column {problem.colno})"
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not JSON ({problem})") from problem
