"""Ctrl-C and SIGTERM, heard at a moment that suits."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

_PLAIN: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
_SIGNALS = tuple(_PLAIN)


class SignalHandler:
    """Notes SIGINT and SIGTERM instead of dying of them, so that the step under way can be finished."""

    def __init__(self) -> None:
        self.is_asked = Event()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
            yield
            return
        before = {one: signal.signal(one, lambda *_: self.is_asked.set()) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let signals do what they do, for work that may end anywhere, such as mining."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        listening = {one: signal.signal(one, _PLAIN[one]) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in listening.items():
                signal.signal(one, handler)


def leave_signals_to_the_trainer(_: int) -> None:
    """Keep a loader process alive when Ctrl-C reaches it too: the step under way may still need its chips."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch ends its loader processes this way
