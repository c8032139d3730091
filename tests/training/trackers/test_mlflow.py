"""MLflow has one run for a run folder, with its experiment, metrics, scores and weights."""

import time
from pathlib import Path
from typing import Any

import pytest

from sniper.training.callbacks import Callbacks
from sniper.training.trackers import build_trackers
from tests.training.trackers.reports import WrittenRun

pytest.importorskip("sqlalchemy")
mlflow: Any = pytest.importorskip("mlflow")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that is the default one, in a working folder of its own; making it takes seconds."""
    folder = tmp_path_factory.getbasetemp() / "mlflow"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return f"sqlite:///{folder / 'mlflow.db'}"


def track(warnings: list[str] | None = None) -> Callbacks:
    on_warning = pytest.fail if warnings is None else warnings.append
    return Callbacks.of(build_trackers(("mlflow",), Callbacks(on_warning=on_warning)))


def find_run(folder: Path, store: str) -> tuple[Any, Any]:
    """Return the client and the only run of a folder."""
    client = mlflow.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("sniper")
    query = f"tags.\"sniper.run\" = '{folder}'"
    (run,) = client.search_runs([experiment.experiment_id], filter_string=query)
    return client, run


def test_a_killed_training_and_the_resumed_one_are_one_run(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = WrittenRun(tmp_path)
    killed = track()
    run.start(killed)
    for step in (1, 2, 3):
        run.step(killed, step)
    run.cut(2)
    assert find_run(tmp_path, store)[1].info.status == "RUNNING"
    monkeypatch.chdir(tmp_path)  # the default store of this folder is another one
    resumed = track()
    run.start(resumed, config={"seed": 0, "train": {"epochs": 3.0, "trackers": ["mlflow"]}})
    run.step(resumed, 3)
    run.scores(resumed, 3, ap=0.5)
    run.end(resumed)
    client, recorded = find_run(tmp_path, store)
    assert (recorded.info.status, recorded.info.run_name) == ("FINISHED", tmp_path.name)
    losses = client.get_metric_history(recorded.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in losses) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    (ap,) = client.get_metric_history(recorded.info.run_id, "evaluate/ap")
    assert (ap.step, ap.value) == (3, 0.5)
    assert recorded.data.params == {"seed": "0", "train.epochs": "2.0", "train.trackers": "['mlflow']"}
    tags = recorded.data.tags
    assert tags["resumed.train.epochs"] == "3.0"
    assert tags["mlflow.source.git.commit"] == tags["origin.git_commit"] == "c0ffee"
    assert tags["sniper.weights"] == str(tmp_path / "checkpoints/00000003/weights.safetensors")


def test_a_run_that_was_deleted_is_a_warning(store: str, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    callbacks = track()
    run.start(callbacks)
    client, recorded = find_run(tmp_path, store)
    client.delete_run(recorded.info.run_id)
    warnings: list[str] = []
    resumed = track(warnings)
    run.start(resumed)
    run.step(resumed, 1)
    run.end(resumed)
    (warning,) = warnings
    assert warning.startswith("mlflow: the run cannot be recorded there (")
    assert recorded.info.run_id in warning


def test_a_server_that_does_not_answer_is_given_up_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    warnings: list[str] = []
    run = WrittenRun(tmp_path)
    started = time.monotonic()
    callbacks = track(warnings)
    run.start(callbacks)
    run.step(callbacks, 1)
    assert time.monotonic() - started < 60
    assert len(warnings) == 1
    assert "secret" not in warnings[0]
    assert not (tmp_path / "trackers").exists()
