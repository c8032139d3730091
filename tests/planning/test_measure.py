"""A few training steps are measured, and nothing of them stays."""

from dataclasses import replace
from typing import Any

import pytest

from sniper.config.experiment import ExperimentSpec
from sniper.data.batches import Batch
from sniper.data.datasets import Dataset
from sniper.errors import ImageError
from sniper.planning.measure import measure
from sniper.planning.plan import plan
from sniper.training.epochs import order_epoch
from sniper.training.learner import Learner, Update


def test_minutes_follow_from_the_seconds_of_a_step(dataset: Dataset, spec: ExperimentSpec) -> None:
    measured = measure(spec, dataset, device="cpu")
    steps = order_epoch(spec, dataset, epoch=0).num_steps
    assert measured.seconds_per_step > 0
    assert measured.minutes_per_epoch == pytest.approx(measured.seconds_per_step * steps / 60)
    assert measured.minutes == pytest.approx(measured.minutes_per_epoch * spec.train.epochs)
    assert measured.peak_memory > 100e6  # resident, with torch loaded
    assert measured.device == "cpu"


def test_no_step_is_begun_after_the_time_is_over(
    dataset: Dataset, spec: ExperimentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    update = Learner.update

    def count(learner: Learner, batch: Batch, **arguments: Any) -> Update:
        steps.append(arguments["step"])
        return update(learner, batch, **arguments)

    monkeypatch.setattr(Learner, "update", count)
    assert measure(spec, dataset, device="cpu", max_seconds=0.0).seconds_per_step > 0
    assert steps == [0, 1]


def test_a_plan_measures_its_experiment_on_request(dataset: Dataset, spec: ExperimentSpec) -> None:
    assert plan(dataset, experiment=spec).measurement is None
    page = plan(dataset, experiment=spec, is_measured=True, device="cpu")
    assert page.measurement is not None
    assert page.as_dict()["measured"]["device"] == "cpu"


def test_measuring_needs_the_images(dataset: Dataset, spec: ExperimentSpec) -> None:
    for image in dataset.image_root.glob("*.png"):
        image.unlink()
    with pytest.raises(ImageError, match="train_"):
        measure(replace(spec, seed=1), dataset, device="cpu")
