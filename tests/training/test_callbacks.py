"""Trackers are functions, objects, or several of both."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from sniper.training.callbacks import Callbacks, EndReport, ScoresReport, Tracker, check_tracker

SCORES = ScoresReport(step=3, epoch=1.0, scores={"ap": 0.5})
END = EndReport(status="completed", folder=Path("run"), step=3, weights=None, scores=None)


class Listener:
    """Keeps what it is called with."""

    def __init__(self, log: list[Any], name: str = "") -> None:
        self._log, self._name = log, name

    def on_step(self, report: Any) -> None:
        self._log.append((self._name, report))

    def on_scores(self, report: ScoresReport) -> None:
        self._log.append((self._name, report))

    def on_end(self, report: EndReport) -> None:
        self._log.append((self._name, report))


def test_an_object_with_three_methods_is_a_tracker() -> None:
    log: list[Any] = []
    listener = Listener(log)
    assert isinstance(listener, Tracker)
    assert isinstance(Callbacks(), Tracker)
    callbacks = Callbacks.of(listener)
    callbacks.on_scores(SCORES)
    callbacks.on_notice("a line")
    callbacks.on_end(END)
    assert log == [("", SCORES), ("", END)]


def test_several_are_called_in_their_order() -> None:
    log: list[Any] = []
    last = Callbacks(on_scores=lambda report: log.append(("last", report)))
    Callbacks.of([Listener(log, "first"), Listener(log, "second"), last]).on_scores(SCORES)
    assert log == [("first", SCORES), ("second", SCORES), ("last", SCORES)]


def test_warnings_go_to_those_who_take_them_or_to_python() -> None:
    seen: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Callbacks.of([Callbacks(on_warning=seen.append), Callbacks()]).on_warning("first")
        assert (seen, caught) == (["first"], [])
        Callbacks.of([Callbacks(), Callbacks()]).on_warning("second")
    assert [str(warning.message) for warning in caught] == ["second"]


def test_an_object_that_is_no_tracker_is_refused() -> None:
    class Unfinished(Listener):
        on_step: Any = None
        on_end: Any = None

    class Misspelt(Listener):
        def on_epochs(self, report: object) -> None: ...

    with pytest.raises(
        TypeError, match=r"Unfinished has no on_step and no on_end; expected sniper\.Callbacks,"
    ):
        check_tracker(Unfinished([]))
    with pytest.raises(
        TypeError, match=r"Misspelt\.on_epochs is never called; known are on_step, on_scores, on_end,"
    ):
        check_tracker(Misspelt([]))
