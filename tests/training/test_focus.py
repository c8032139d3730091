"""A focus head in training: resumed to the same bits, and refused where it has nothing to learn."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sniper.chips.baselines import WholeSpec
from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.pipeline import train
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks
from tests.data.tiny import write_dataset
from tests.training.experiments import check_resumed, tiny_experiment, train_run, with_data


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path / "data"))


def focus_experiment(dataset: Dataset) -> ExperimentSpec:
    spec = tiny_experiment(dataset.path)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, focus=True))


def test_a_training_that_was_killed_and_resumed_ends_with_the_same_weights(
    dataset: Dataset, tmp_path: Path
) -> None:
    spec = focus_experiment(dataset)
    unbroken = check_resumed(spec, dataset, tmp_path)
    losses = [entry["focus"] for entry in unbroken.entries() if "learning_rate" in entry]
    assert any(loss > 0 for loss in losses)


def test_a_detector_can_start_from_one_without_the_head(dataset: Dataset, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "plain", config="")
    train_run(run, tiny_experiment(dataset.path), dataset)
    weights = str(run.checkpoints[-1] / "weights.safetensors")
    spec, reports = focus_experiment(dataset), list[Any]()
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, weights_from=weights))
    train(spec, run=tmp_path / "run", device="cpu", callbacks=Callbacks(on_weights=reports.append))
    (report,) = reports
    assert report.transfer.renewed
    assert all(name.startswith("focus_head.") for name in report.transfer.renewed)
    assert not report.transfer.unused


def test_a_head_that_has_nothing_to_learn_is_refused(dataset: Dataset) -> None:
    spec = focus_experiment(dataset)
    *_, coarsest = spec.pyramid.levels
    one = dataclasses.replace(spec.pyramid, levels=(dataclasses.replace(coarsest, at_least=0.0),))
    with pytest.raises(ValueError, match=r"model\.focus must be false: no level of pyramid\.levels leaves"):
        dataclasses.replace(spec, pyramid=one)
    with pytest.raises(ValueError, match=r"model\.focus must be false with data\.whole"):
        with_data(spec, whole=WholeSpec())
