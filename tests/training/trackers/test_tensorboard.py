"""Event files have what the metrics have."""

from pathlib import Path
from typing import Any

import pytest

from sniper.training.callbacks import Callbacks
from sniper.training.trackers import build_trackers
from tests.training.trackers.reports import WrittenRun

events: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def track() -> Callbacks:
    return Callbacks.of(build_trackers(("tensorboard",), Callbacks(on_warning=pytest.fail)))


def points_of(folder: Path, name: str) -> list[tuple[int, Any]]:
    board = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(point.step, point.value) for point in board.Scalars(name)]


def test_a_killed_training_and_the_resumed_one_have_one_curve(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    killed = track()
    run.start(killed)
    for step in (1, 2, 3):
        run.step(killed, step, part="rpn")
    for step in (1, 2, 3, 4):
        run.step(killed, step)
    run.scores(killed, 4, ap=0.25)
    run.cut(2)  # the checkpoint that it is resumed from
    resumed = track()
    run.start(resumed)
    run.step(resumed, 3)
    run.scores(resumed, 3, ap=0.5)
    run.scores(resumed, 2, ap=0.75, is_final=True)
    run.end(resumed)
    assert points_of(tmp_path, "train/loss") == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert points_of(tmp_path, "evaluate/ap") == [(3, 0.5)]
    assert points_of(tmp_path, "final/ap") == [(2, 0.75)]
    assert points_of(tmp_path / "rpn", "rpn/loss") == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    warnings: list[str] = []
    run = WrittenRun(tmp_path)
    callbacks = Callbacks.of(build_trackers(("tensorboard",), Callbacks(on_warning=warnings.append)))
    run.start(callbacks)
    run.step(callbacks, 1)
    run.end(callbacks)
    (warning,) = warnings
    assert warning.startswith("tensorboard: the run cannot be recorded there (")
    assert "exists" in warning
