"""Ctrl-C and SIGTERM, deferred to the end of a step."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_DEFAULTS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class SignalHandler:
    """Records SIGINT and SIGTERM, so that the step in progress can be completed and saved.

    Attributes:
        stop_requested: whether one of them has arrived while the handler was installed.
    """

    def __init__(self) -> None:
        self.stop_requested = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Record the signals for the duration of a block, instead of ending the process."""
        with _handlers(dict.fromkeys(_DEFAULTS, self._request_stop)):
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restore the default handlers for the duration of a block that may be interrupted anywhere."""
        with _handlers(_DEFAULTS):
            yield

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True


@contextmanager
def _handlers(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Install signal handlers for the duration of a block; a no-op outside the main thread, which cannot have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def set_worker_signals(_: int) -> None:
    """Make a loader process ignore Ctrl-C, since the step in progress may still need its chips."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch ends its loader processes with SIGTERM
