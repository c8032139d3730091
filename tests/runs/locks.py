"""Hold locks as another process would, for the tests."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


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
