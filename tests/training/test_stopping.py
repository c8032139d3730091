"""Whatever ends a training, the last whole step is saved first, and the run continues as if nothing had happened."""

import errno
import itertools
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.errors import ImageError, LoaderError, OutOfMemory, RunError, TransformError
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport
from sniper.training.epochs import order_epoch
from sniper.training.signals import STOP_SIGNALS, Stopped
from tests.data.tiny import write_dataset
from tests.training.experiments import (
    deterministic_metrics,
    have_equal_weights,
    tiny_experiment,
    train_run,
    with_data,
    with_train,
)

SIDES = [(160, 120), (96, 200), (200, 200), (150, 90)] * 2  # six steps an epoch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_dataset(tmp_path_factory.mktemp("world"), sides=SIDES))


@pytest.fixture(scope="module")
def spec(dataset: Dataset) -> ExperimentSpec:
    """Return an experiment that saves at the end of an epoch alone."""
    return with_train(tiny_experiment(dataset.path), checkpoint_minutes=99.0)


@pytest.fixture(scope="module")
def unbroken(dataset: Dataset, spec: ExperimentSpec, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("unbroken") / "run", config="")
    train_run(run, spec, dataset)
    return run


class CountedTransform:
    """A transform that changes nothing, and calls a function at the chip of a number."""

    def __init__(self, number: int, action: Any) -> None:
        self._number, self._action = number, action
        self._count = 0

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._count += 1
        if self._count == self._number:
            self._action()
        return image, target


def at_step(step: int, action: Any) -> Callbacks:
    """Return callbacks that call a function after a step."""

    def on_step(report: StepReport) -> None:
        if report.progress.step == step:
            action()

    return Callbacks(on_step=on_step)


def fail() -> None:
    raise ZeroDivisionError("a fault")


def check_continues(run: Run, spec: ExperimentSpec, dataset: Dataset, *, saved: int, unbroken: Run) -> None:
    """Check which step is saved, and that the run ends with the weights and metrics of an unbroken one."""
    assert [int(path.name) for path in run.checkpoints] == [saved]
    train_run(run, spec, dataset)
    assert have_equal_weights(run, unbroken)
    assert deterministic_metrics(run) == deterministic_metrics(unbroken)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_the_step_in_progress(
    dataset: Dataset, spec: ExperimentSpec, unbroken: Run, tmp_path: Path, number: int
) -> None:
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(Stopped) as stop:
        train_run(run, spec, dataset, callbacks=at_step(3, lambda: os.kill(os.getpid(), number)))
    assert stop.value.number == number
    check_continues(run, spec, dataset, saved=3, unbroken=unbroken)


def test_a_signal_interrupts_the_wait_for_a_batch(
    dataset: Dataset, spec: ExperimentSpec, unbroken: Run, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    transform = CountedTransform(2 * spec.train.batch_size + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train_run(run, spec, dataset, transform=transform)
    check_continues(run, spec, dataset, saved=2, unbroken=unbroken)


def test_a_signal_before_the_first_step_saves_nothing(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    transform = CountedTransform(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train_run(run, spec, dataset, transform=transform)
    assert run.checkpoints == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_loader_is_explained(
    dataset: Dataset, spec: ExperimentSpec, unbroken: Run, tmp_path: Path, num_workers: int
) -> None:
    def kill_loader() -> None:
        worker = multiprocessing.active_children()[-1]
        worker.kill()
        worker.join()  # the next batch may be read already, and would be used until the loader has ended

    spec = with_data(spec, num_workers=num_workers)
    run = Run.create(tmp_path / "run", config="")
    advice = {
        1: r"read them in the training process \(data\.num_workers: 0\)",
        2: r"use fewer of them \(data\.num_workers: 1 instead of 2\)",
    }
    with pytest.raises(
        LoaderError,
        match=rf"\(SIGKILL\), probably since the machine ran out of memory; {advice[num_workers]}; step 3 is saved",
    ):
        train_run(run, spec, dataset, callbacks=at_step(3, kill_loader))
    assert multiprocessing.active_children() == []
    check_continues(run, spec, dataset, saved=3, unbroken=unbroken)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_read_is_explained(
    spec: ExperimentSpec, tmp_path: Path, num_workers: int
) -> None:
    dataset = load_dataset(write_dataset(tmp_path / "world", sides=SIDES))
    spec = with_data(spec, num_workers=num_workers, images_at_once=1)
    order = order_epoch(spec, dataset, epoch=0)
    images = order.table.image_indices[order.chip_indices].tolist()
    damaged = images[len(order.table) - 1]
    num_steps = images.index(damaged) // spec.train.batch_size
    assert num_steps > 0
    path = dataset[damaged].path
    path.write_bytes(path.read_bytes()[:-2000])
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(
        ImageError,
        match=rf"^\S*{path.name}: .* set data\.on_bad_image to skip; step {num_steps} is saved, and --resume continues",
    ):
        train_run(run, spec, dataset)
    assert [int(path.name) for path in run.checkpoints] == [num_steps]


def test_a_transform_that_fails_is_explained(
    dataset: Dataset, spec: ExperimentSpec, unbroken: Run, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    transform = CountedTransform(3 * spec.train.batch_size, fail)
    with pytest.raises(
        TransformError,
        match=r"train_\d\.png .*: the transform failed \(ZeroDivisionError: a fault\); step 2 is saved",
    ):
        train_run(run, spec, dataset, transform=transform)
    check_continues(run, spec, dataset, saved=2, unbroken=unbroken)


def test_a_batch_that_does_not_fit_into_memory_leaves_the_state_of_the_last_step(
    dataset: Dataset, spec: ExperimentSpec, unbroken: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", config="")
    backward = torch.Tensor.backward
    num_calls = itertools.count()

    def fail_fourth(self: torch.Tensor) -> None:
        if next(num_calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward(self)  # type: ignore[no-untyped-call]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", fail_fourth)
        with pytest.raises(OutOfMemory, match=r"raise train\.accumulation_steps; step 3 is saved"):
            train_run(run, spec, dataset)
    check_continues(run, spec, dataset, saved=3, unbroken=unbroken)


def test_an_error_in_a_callback_is_raised_after_the_step_is_saved(
    dataset: Dataset, spec: ExperimentSpec, unbroken: Run, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(ZeroDivisionError):
        train_run(run, spec, dataset, callbacks=at_step(3, fail))
    check_continues(run, spec, dataset, saved=3, unbroken=unbroken)


def refuse_lines_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the metrics refuse lines from a step on, as on a full disk."""
    log = Run.log

    def log_until_full(run: Run, entry: Mapping[str, Any]) -> None:
        if entry["step"] >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.metrics_path))
        log(run, entry)

    monkeypatch.setattr(Run, "log", log_until_full)


def test_a_step_that_cannot_be_logged_is_saved(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", config="")
    with monkeypatch.context() as patch:
        refuse_lines_from(3, patch)
        message = (
            r"metrics\.jsonl: No space left on device; free space on its disk, or use a folder on another one; step 3 "
            r"is saved"
        )
        with pytest.raises(RunError, match=message):
            train_run(run, spec, dataset)
    assert [int(path.name) for path in run.checkpoints] == [3]


def test_if_neither_line_nor_checkpoint_can_be_written_both_are_named(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run.create(tmp_path / "run", config="")
    refuse_lines_from(3, monkeypatch)
    monkeypatch.setattr("sniper.runs.checkpoints.save_tensors", refuse)
    with pytest.raises(
        RunError, match=r"metrics\.jsonl: No space left .*; .*the checkpoint of step 3 cannot be written"
    ):
        train_run(run, spec, dataset)
    assert run.checkpoints == []
