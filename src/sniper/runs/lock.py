"""Locks of runs and outputs: one process at a time writes to each, and another one is refused with its name.

The system releases a lock when the process that holds it ends, however it ends. Under torchrun, the first process holds
the lock for all. This module imports neither NumPy nor torch, so that a command is refused at once.
"""

import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sniper.errors import InUseError
from sniper.files import FileLock, read_bytes
from sniper.remote import redact

FOLDER_LOCK = ".sniper.lock"
"""Name of the lock of a folder, in it."""

_NUM_TRIES = 20  # while the holder is just starting or ending, so that it cannot be named
_SECONDS_BETWEEN_TRIES = 0.02
_MAX_COMMAND = 300  # characters


def lock_folder(folder: Path, *, option: str) -> AbstractContextManager[None]:
    """Hold the lock of a folder that is written to, such as that of a run, for the duration of a block.

    The folder is created if it is missing, and removed again if nothing was written to it. If it cannot be created,
    nothing is locked, and writing to it will fail. The thread that holds a lock may take it again.

    Args:
        folder: the folder.
        option: that names another one, for the error.

    Raises:
        InUseError: if another process or thread holds the lock.
        OSError: if the file of the lock cannot be created.
    """
    return _hold(folder / FOLDER_LOCK, folder, option=option)


def lock_file(path: Path, *, option: str) -> AbstractContextManager[None]:
    """Hold the lock of a file, or of a folder that has to be empty, for the duration of a block; see `lock_folder`."""
    absolute = path.absolute()
    return _hold(absolute.with_name(f".{absolute.name}.lock"), path, option=option)


@dataclass(frozen=True)
class _Holder:
    lock: FileLock
    thread: int


_HOLDERS: dict[Path, _Holder] = {}
"""The locks that this process holds, by the path of their file."""


@contextmanager
def _hold(path: Path, subject: Path, *, option: str) -> Iterator[None]:
    if not _is_first_process():
        yield
        return
    created = _create_folder(path.parent)
    try:
        key = path.resolve()
        holder = _HOLDERS.get(key)
        is_held = holder is not None and holder.lock.is_held and holder.thread == threading.get_ident()
        if is_held or not path.parent.is_dir():
            yield
            return
        lock = _take(key, subject, option=option)
        _HOLDERS[key] = _Holder(lock, threading.get_ident())
        try:
            _announce(lock, subject)
            yield
        finally:
            del _HOLDERS[key]
            lock.release()
    finally:
        with suppress(OSError):  # something was written to it
            for folder in created:
                folder.rmdir()


def _is_first_process() -> bool:
    """Check whether this is rank 0; see `sniper.runs.processes`, which imports torch."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _create_folder(folder: Path) -> list[Path]:
    """Create a folder, and return what was missing of its path, from its end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(path: Path, subject: Path, *, option: str) -> FileLock:
    holder = None
    for _ in range(_NUM_TRIES):
        with suppress(BlockingIOError, FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)  # its last holder may have removed it
            return FileLock(path)
        holder = _read_holder(path)
        if holder is not None:
            break
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise InUseError(_describe(subject, holder, option=option))


def _announce(lock: FileLock, subject: Path) -> None:
    """Write into a lock which process holds it; warn if the file system has none."""
    if lock.problem is not None:
        warnings.warn(
            f"{subject}: its file system has no locks ({lock.problem}), so make sure that no other process writes "
            "there at the same time",
            stacklevel=2,
        )
    with suppress(OSError):  # a full disk: the lock is held without the name of its holder
        lock.write(_describe_this_process())


def _describe_this_process() -> bytes:
    command = redact(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    fields = {
        "command": command if len(command) <= _MAX_COMMAND else f"{command[:_MAX_COMMAND]} ...",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }
    return json.dumps(fields).encode()


def _read_holder(path: Path) -> dict[str, Any] | None:
    """Read which process holds a lock; None if that is not there yet or no more, or cannot be read."""
    try:
        holder = json.loads(read_bytes(path))
        return {name: holder[name] for name in ("command", "pid", "host", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(subject: Path, holder: Mapping[str, Any] | None, *, option: str) -> str:
    if holder is None:
        return (
            f"{subject}: another process writes there; wait until it has ended, or write elsewhere ({option})"
        )
    host = "" if holder["host"] == socket.gethostname() else f" on {holder['host']}"
    return (
        f"{subject}: another process writes there: {holder['command']} (process {holder['pid']} on {holder['host']}, "
        f"since {holder['since']}). Wait until it has ended, stop it (kill {holder['pid']}{host}), or write elsewhere "
        f"({option})."
    )
