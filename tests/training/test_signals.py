"""Ctrl-C and SIGTERM are deferred while a step is in progress."""

import os
import signal
import threading

import pytest

from sniper.training.signals import SignalHandler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_recorded_and_does_not_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    handler = SignalHandler()
    with handler.installed():
        assert not handler.stop_requested
        os.kill(os.getpid(), number)
        assert handler.stop_requested
    assert signal.getsignal(number) == before


def test_a_suspended_handler_lets_ctrl_c_interrupt() -> None:
    handler = SignalHandler()
    with handler.installed():
        with pytest.raises(KeyboardInterrupt), handler.suspended():
            os.kill(os.getpid(), signal.SIGINT)
        assert not handler.stop_requested
        os.kill(os.getpid(), signal.SIGINT)
        assert handler.stop_requested


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
