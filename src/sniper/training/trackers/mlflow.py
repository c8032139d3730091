"""Metrics in MLflow: its server, or its local store."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from sniper.config.loading import flatten
from sniper.training.callbacks import EndReport, StartReport
from sniper.training.trackers.tracking import Entry, numbers_of

EXPERIMENT = "sniper"
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # of a request
_IMPATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def build_service() -> "MLflow":
    """Return the service."""
    return MLflow()


class MLflow:
    """Records a run in the store that MLflow is set to, by `MLFLOW_TRACKING_URI` or its own default."""

    name = "mlflow"
    num_unsure = 0

    def __init__(self) -> None:
        self._client: MlflowClient
        self._run_id = ""

    def open(self, start: StartReport, state: Mapping[str, str]) -> tuple[dict[str, str], str]:
        """Create a run with the experiment as its parameters, or continue one."""
        # The default store is a file in the working folder, which may be another one when a run is resumed.
        has_uri = mlflow.is_tracking_uri_set()
        uri = mlflow.get_tracking_uri() if has_uri else state.get("store", mlflow.get_tracking_uri())
        with _impatient():
            self._client = MlflowClient(tracking_uri=uri)
            if not state and not self._run_id:
                self._run_id = self._create_run(start)
            run = self._continue_run(state.get("run_id", self._run_id), start)
        # A server's address may have a password in it, and is set anyway.
        store = {} if has_uri else {"store": uri}
        return {"run_id": self._run_id, **store}, f"run {run.info.run_name}, {self._run_id}"

    def write(self, part: str, entries: Sequence[Entry], *, after: int) -> None:
        """Record lines of the metrics."""
        now = time.time_ns() // 1_000_000
        metrics = [
            Metric(name, value, now, entry["step"])
            for entry in entries
            for name, value in numbers_of(entry, part).items()
        ]
        with _impatient():
            for first in range(0, len(metrics), _MAX_METRICS):
                self._client.log_batch(
                    self._run_id, metrics=metrics[first : first + _MAX_METRICS], synchronous=True
                )

    def close(self, end: EndReport) -> None:
        """Record the weights to predict with, and how the training ended."""
        tags = {"sniper.weights": end.weights, "sniper.step": end.step, "sniper.error": end.error}
        with _impatient():
            self._set_tags({name: str(value) for name, value in tags.items() if value is not None})
            self._client.set_terminated(self._run_id, status=_STATUS[end.status])

    def _create_run(self, start: StartReport) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run_id: str = self._client.create_run(experiment_id, run_name=start.folder.name).info.run_id
        return run_id

    def _continue_run(self, run_id: str, start: StartReport) -> Run:
        """Log the experiment as parameters; a field with another value than before is a tag, since those are fixed."""
        run = self._client.get_run(run_id)
        self._run_id = run_id
        self._client.update_run(run_id, status="RUNNING")
        known = run.data.params
        fields = {key: str(value) for key, value in flatten(start.config).items()}
        params = [Param(key, value) for key, value in fields.items() if key not in known]
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MAX_PARAMS])
        changed = {key: value for key, value in fields.items() if known.get(key, value) != value}
        self._set_tags({f"resumed.{key}": value for key, value in changed.items()} | _origin_tags(start))
        return run

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _origin_tags(start: StartReport) -> dict[str, str]:
    """Return tags of where a run comes from, under MLflow's names where its pages show them."""
    origin: dict[str, Any] = {f"origin.{name}": value for name, value in start.origin.items()}
    shown = {"mlflow.source.name": "command", "mlflow.source.git.commit": "git_commit"}
    origin |= {tag: start.origin[name] for tag, name in shown.items() if name in start.origin}
    return origin | {"mlflow.source.type": "LOCAL", "sniper.run": str(start.folder.absolute())}


@contextmanager
def _impatient() -> Iterator[None]:
    """Wait for a server for seconds instead of minutes, unless the user has set how long."""
    added = {name: value for name, value in _IMPATIENCE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
