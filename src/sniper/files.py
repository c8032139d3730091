"""Files written whole or not at all, and what goes wrong when others are read."""

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
"""What NumPy raises for an `.npz` file that is absent, cut short, damaged or of another kind."""


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its place only when all of it has reached the disk.

    Args:
        path: where to; a file that is there already stays as it is if anything goes wrong. Its folder must exist.
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
        path: of the file.
        error: the class of error to raise.

    Raises:
        SniperError: of the class `error`, if the file cannot be read or is not JSON.
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
