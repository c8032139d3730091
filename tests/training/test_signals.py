"""Ctrl-C, SIGTERM and SIGHUP are deferred while a step is in progress."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sniper.training import signals
from sniper.training.signals import STOP_SIGNALS, SignalHandler, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def send_deferred(handler: SignalHandler, *numbers: int) -> None:
    """Send signals inside a block that defers them."""
    with handler.deferred():
        for number in numbers:
            send(number)
            assert handler.stopped_by == numbers[0]


def send_while_waiting(handler: SignalHandler, number: int) -> None:
    """Send a signal while the next step is awaited."""
    with handler.interruptible():
        send(number)
        pytest.fail("nothing was raised")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_deferred_to_the_end_of_a_block(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    handler = SignalHandler()
    with handler.installed():
        with pytest.raises(Stopped) as stop:
            send_deferred(handler, number)
        with pytest.raises(Stopped), handler.deferred():
            pytest.fail("the next block begins")
    assert signal.getsignal(number) == before
    assert stop.value.exit_code == 128 + number


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_outside_the_block_interrupts_at_once(number: signal.Signals) -> None:
    handler = SignalHandler()
    with handler.installed(), pytest.raises(KeyboardInterrupt):
        send(number)


def test_a_wait_inside_the_block_is_interrupted() -> None:
    handler = SignalHandler()
    handler.is_deferring = True
    with handler.installed(), pytest.raises(Stopped):
        send_while_waiting(handler, signal.SIGTERM)
    assert handler.is_deferring


def test_a_wait_is_not_begun_after_a_signal() -> None:
    handler = SignalHandler()
    handler.stopped_by = signal.SIGTERM
    with pytest.raises(Stopped), handler.interruptible():
        pytest.fail("the wait begins")


def test_a_second_signal_interrupts_if_it_is_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = SignalHandler()
    with handler.installed():
        with pytest.raises(Stopped) as stop:
            send_deferred(handler, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)  # as timeout and torchrun
        assert stop.value.number == signal.SIGTERM
        monkeypatch.setattr(signals, "_REPEATED", 0.0)
        with pytest.raises(Stopped) as stop:
            send(signal.SIGINT)
    assert stop.value.number == signal.SIGINT


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a command
    handler = SignalHandler()
    try:
        with handler.installed():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not handler.stop_requested


def test_the_installed_handler_is_shared() -> None:
    handler = SignalHandler()
    with handler.installed():
        assert SignalHandler.current() is handler
    assert SignalHandler.current() is not handler


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def install() -> None:
        with SignalHandler().installed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert seen == [before]


HASH = """
import hashlib
from sniper.training import signals
signals._REPEATED = 0.2
handler = signals.SignalHandler()
announce = lambda number: print("first", number, flush=True)
with handler.installed(), signals.ending_at_second_signal(on_first=announce):
    with handler.deferred():
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without Python code
"""


def test_a_second_signal_ends_a_process_inside_a_library() -> None:
    process = subprocess.Popen([sys.executable, "-c", HASH], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "first 15\n"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    process.kill()
    process.stdout.close()
    assert process.wait() == 130
