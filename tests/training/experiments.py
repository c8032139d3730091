"""A tiny experiment that trains in a second."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec
from sniper.config.loading import dump_experiment
from sniper.data.batches import ChipTransform
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import EpochOrder
from sniper.data.spec import DataSpec, SourceSpec
from sniper.models.protocol import DetectorModel
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport
from sniper.training.epochs import load_configured_chips, order_epoch
from sniper.training.length import TimeLimit
from sniper.training.loop import Evaluator, train
from sniper.training.pace import Pace
from tests.chips.worlds import SMALL_PYRAMID
from tests.data.tiny import write_dataset
from tests.models.batches import TINY

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for the end of a process, before which nothing can be saved."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run of the tiny experiment that is complete.

    Attributes:
        run: its folder.
        spec: the experiment.
        dataset: its training and test set.
        reports: of all steps.
    """

    run: Run
    spec: ExperimentSpec
    dataset: Dataset
    reports: list[StepReport]


def tiny_experiment(annotations: Path) -> ExperimentSpec:
    source = SourceSpec(annotations=str(annotations))
    return ExperimentSpec(
        data=DataSpec(train=source, test=source, num_workers=0),
        pyramid=SMALL_PYRAMID,
        model=TINY,
        train=TrainSpec(
            epochs=1.5,
            batch_size=4,
            learning_rate=0.01,
            reference_batch_size=4,
            warmup_steps=1,
            milestones=(1.0,),
            precision="fp32",
            checkpoint_minutes=1e-9,  # after every step
            keep_checkpoints=3,
        ),
        predict=PredictSpec(levels=SMALL_PYRAMID.levels, precision="fp32"),
    )


def with_train(spec: ExperimentSpec, **fields: Any) -> ExperimentSpec:
    """Change fields of the section `train`."""
    return replace(spec, train=replace(spec.train, **fields))


def with_data(spec: ExperimentSpec, **fields: Any) -> ExperimentSpec:
    """Change fields of the section `data`."""
    return replace(spec, data=replace(spec.data, **fields))


@dataclass(frozen=True, kw_only=True)
class FixedScores:
    """An evaluator that searches nothing.

    Attributes:
        score: returns the AP of a detector.
        num_scored: images that it would search while training.
        num_images: images that it would search at the end.
    """

    score: Callable[[DetectorModel], float]
    num_scored: int = 4
    num_images: int = 4

    def megapixels(self, *, on_all: bool) -> float:
        return 0.03 * (self.num_images if on_all else self.num_scored)

    def __call__(self, model: DetectorModel, *, step: int, on_all: bool) -> Mapping[str, float]:
        return {"ap": self.score(model)}


def train_run(
    run: Run,
    spec: ExperimentSpec,
    dataset: Dataset,
    *,
    callbacks: Callbacks = Callbacks(),
    evaluate: Evaluator | None = None,
    transform: ChipTransform | None = None,
    device: torch.device = CPU,
    pace: Pace | None = None,
    limit: TimeLimit | None = None,
) -> DetectorModel:
    """Train a run to its end on the chips that the experiment configures."""
    table = load_configured_chips(run, spec, dataset)

    def order_of_epoch(epoch: int) -> EpochOrder:
        num_shares = spec.train.accumulation_steps
        return order_epoch(spec, dataset, epoch=epoch, table=table, num_shares=num_shares)

    return train(
        run,
        spec,
        order_of_epoch,
        identity=dataset.identity,
        device=device,
        callbacks=callbacks,
        evaluate=evaluate,
        transform=transform,
        pace=pace,
        limit=limit,
    )


def train_killed_at(
    run: Run, spec: ExperimentSpec, dataset: Dataset, *, step: int, device: torch.device = CPU
) -> None:
    """Train a run until the end of a step, as if the process were killed there."""

    def kill(report: StepReport) -> None:
        if report.progress.step == step:
            raise Killed

    with pytest.raises(Killed):
        train_run(run, spec, dataset, device=device, callbacks=Callbacks(on_step=kill))


def check_resumed(
    spec: ExperimentSpec,
    dataset: Dataset,
    folder: Path,
    *,
    before_resuming: Callable[[], object] = lambda: None,
) -> Run:
    """Check that a run that is killed at step 2 and resumed ends as one that is not, and return the latter."""
    unbroken, broken = (Run.create(folder / name, config="") for name in ("unbroken", "broken"))
    train_run(unbroken, spec, dataset)
    assert int(unbroken.checkpoints[-1].name) > 2
    train_killed_at(broken, spec, dataset, step=2)
    before_resuming()
    train_run(broken, spec, dataset)
    assert have_equal_weights(unbroken, broken)
    assert deterministic_metrics(unbroken) == deterministic_metrics(broken)
    return unbroken


def train_tiny(folder: Path) -> TrainedRun:
    """Write a tiny data set and train on it."""
    dataset = load_dataset(write_dataset(folder / "world"))
    spec = tiny_experiment(dataset.path)
    run = Run.create(folder / "run", config=dump_experiment(spec))
    reports: list[StepReport] = []
    train_run(run, spec, dataset, callbacks=Callbacks(on_step=reports.append))
    return TrainedRun(run=run, spec=spec, dataset=dataset, reports=reports)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return run.load_weights("last")[0]


def have_equal_weights(run: Run, other: Run) -> bool:
    """Check that the newest weights of two runs are equal bit for bit."""
    weights, other_weights = weights_of(run), weights_of(other)
    return weights.keys() == other_weights.keys() and all(
        torch.equal(weights[name], other_weights[name]) for name in weights
    )


def deterministic_metrics(run: Run) -> list[dict[str, Any]]:
    """Read the metrics without what depends on time and memory."""
    measured = {"seconds", "chips_per_second", "data_wait", "peak_memory_gb", "minutes"}
    return [{k: v for k, v in entry.items() if k not in measured} for entry in run.entries()]
