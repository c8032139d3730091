"""Hold locks as another process would, and check that nothing was changed, for the tests."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


@contextmanager
def held_by_another_thread(lock: AbstractContextManager[None]) -> Iterator[None]:
    """Hold a lock as another process would, for the duration of a block."""
    is_held, is_done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            is_done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(60)
    try:
        yield
    finally:
        is_done.set()
        thread.join()


def identities(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Return what changes when a file in a folder is written or replaced."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
