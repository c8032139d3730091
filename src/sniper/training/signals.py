"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: the step in progress is completed and saved; a second signal ends at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_REPEATED = 2.0  # seconds in which a signal counts as the same: timeout and torchrun send it twice


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end, raised where nothing is lost by it.

    Attributes:
        number: of the signal.
        note: what is saved and how to continue, to be printed after "stopped".
    """

    def __init__(self, number: int, note: str = "") -> None:
        super().__init__(note)
        self.number, self.note = number, note

    @property
    def exit_code(self) -> int:
        """The exit code by the convention of shells: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number

    @classmethod
    def of(cls, interrupt: KeyboardInterrupt, note: str | None = None) -> "Stopped":
        """Return an interrupt with its signal; Python's own has none and stands for SIGINT."""
        if note is None:
            note = str(interrupt)
        return cls(interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT, note)


class SignalHandler:
    """Raises `Stopped` at SIGINT, SIGTERM and SIGHUP, or defers it to the end of a block.

    Only the first signal counts, and those that come more than two seconds after it. A signal that the process was
    started to ignore (SIGHUP under nohup) stays ignored.

    Attributes:
        stopped_by: number of the first signal; None before.
        is_deferring: whether a signal is recorded only.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.is_deferring = False
        self._stopped_at = 0.0

    @classmethod
    def current(cls) -> "SignalHandler":
        """Return the handler that is installed, or a new one."""
        installed = (signal.getsignal(number) for number in STOP_SIGNALS)
        return next((handler for handler in installed if isinstance(handler, SignalHandler)), None) or cls()

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.stopped_by is not None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals for the duration of a block."""
        with _handlers({number: self for number in STOP_SIGNALS if _is_handled(number)}):
            yield

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Record a signal for the duration of a block, and raise `Stopped` at its end.

        The block looks at `stop_requested` to end earlier.
        """
        self.check()
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = False
        self.check()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Stopped` at once for the duration of a block, inside one that is deferred."""
        self.is_deferring = False
        try:
            self.check()
            yield
        finally:
            self.is_deferring = True

    def check(self) -> None:
        """Raise `Stopped` if a signal has arrived."""
        if self.stopped_by is not None:
            raise Stopped(self.stopped_by)

    def __call__(self, number: int, _: object) -> None:
        """Handle a signal; called by Python in the main thread."""
        now = time.monotonic()
        if self.stopped_by is None:
            self.stopped_by, self._stopped_at = number, now
            if not self.is_deferring:
                raise Stopped(number)
        elif now - self._stopped_at > _REPEATED:
            raise Stopped(number)


@contextmanager
def ending_at_second_signal(
    *, on_first: Callable[[int], None], on_second: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """End the process at a second signal, even if the main thread is inside a library that does not return.

    Signals within two seconds of the first count as the same. The exit code is that of the signal.

    Args:
        on_first: called with the number of the first signal. Both are called in a thread of their own, and their errors
            are ignored.
        on_second: called before the end.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python writes the number of every signal to the pipe when it arrives, before the main thread handles it.
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading, on_first, on_second), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writing, b"\0")
        thread.join(timeout=1)  # it may wait for a terminal
        os.close(reading)
        os.close(writing)


def _watch(reading: int, on_first: Callable[[int], None], on_second: Callable[[], None]) -> None:
    first = None
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number == 0:  # no signal: the block has ended
                return
            if number not in STOP_SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                with suppress(Exception):  # such as a terminal that was closed
                    on_first(number)
            elif time.monotonic() - first > _REPEATED:
                with suppress(Exception):
                    on_second()
                os._exit(128 + number)


def _is_handled(number: signal.Signals) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


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
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not from Python
