"""Detectors of torchvision under our loop: resumed to the same bits, with negatives, averages and weights of others."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec
from sniper.config.loading import dump_experiment, load_experiment
from sniper.data.datasets import Dataset
from sniper.errors import ConfigError
from sniper.inference.detector import Detector
from sniper.models.torchvision_detectors.weights import load_library_weights
from sniper.pipeline import run_stages, train
from sniper.runs.initial import InitialWeights
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks
from tests.models.torchvision_detectors.specs import SPECS, SSD
from tests.training.experiments import CPU, check_resumed, with_train


def with_detector(spec: ExperimentSpec, name: str, **fields: Any) -> ExperimentSpec:
    """Return an experiment of a few steps with a detector of torchvision."""
    spec = with_train(spec, epochs=0.5, batch_size=2, optimizer="adamw", learning_rate=1e-3, milestones=())
    return dataclasses.replace(spec, model=SPECS[name], **fields)


@pytest.mark.parametrize(
    "name",
    [
        "fcos",
        "retinanet",
        pytest.param("faster_rcnn", marks=pytest.mark.slow),
        pytest.param(SSD, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_and_resumed_ends_with_the_same_weights(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, name: str
) -> None:
    spec = with_train(with_detector(spec, name), ema_decay=0.9, accumulation_steps=2)
    check_resumed(spec, dataset, tmp_path, before_resuming=lambda: torch.manual_seed(5))


@pytest.mark.parametrize(
    ("name", "source", "stages"),
    [
        ("fcos", "self", ["train", "mine", "chips", "train"]),
        pytest.param("faster_rcnn", "rpn", ["mine", "train"], marks=pytest.mark.slow),
    ],
)
def test_negative_chips_are_mined_with_any_detector(
    dataset: Dataset,
    spec: ExperimentSpec,
    tmp_path: Path,
    name: str,
    source: Literal["self", "rpn"],
    stages: list[str],
) -> None:
    negatives = NegativeSpec(source=source, min_proposals=(1,), min_score=0.0, dose="auto")
    changed = with_detector(spec, name, negatives=negatives, mine=MineSpec(start=0.5, rpn_epochs=0.2))
    changed = with_train(changed, epochs=2.0, batch_size=4)
    run = Run.create(tmp_path / "run", config=dump_experiment(changed))
    run_stages(run, changed, dataset, device=CPU)
    entries = [entry for entry in run.entries() if entry["stage"] != "epoch"]
    seen = [entry["stage"] for entry in entries]
    assert [stage for index, stage in enumerate(seen) if seen[index - 1 : index] != [stage]] == stages
    assert sum(entry.get("negative_chips_in_batch", 0) for entry in entries) > 0
    assert all(entry["negative_loss"] > 0 for entry in entries if entry.get("negative_chips_in_batch"))


def test_an_rpn_that_a_detector_does_not_have_is_refused(spec: ExperimentSpec) -> None:
    with pytest.raises(
        ValueError, match=r"negatives\.source must not be rpn for model\.name fcos, which has no"
    ):
        with_detector(spec, "fcos", negatives=NegativeSpec(source="rpn"))
    with pytest.raises(ValueError, match=r"train\.rpn_only must be false for model\.name retinanet"):
        with_train(with_detector(spec, "retinanet"), rpn_only=True)


def test_a_run_is_loaded_scored_and_started_from(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(with_detector(spec, "retinanet"), evaluate_every=1)
    # It is scored on the images that it is trained on, which is warned of.
    run = train(spec, run=tmp_path / "run", callbacks=Callbacks(on_warning=lambda _: None))
    assert load_experiment(run.config_path).model == SPECS["retinanet"]
    assert run.best_scores() is not None
    detections = Detector.load(run, "cpu").predict(dataset[0].path)
    assert len(detections) > 0
    initial = InitialWeights.load(run.folder)
    assert "with the scores of 2 classes (dark, bright)" in str(initial.check(spec, dataset.categories))
    other = dataclasses.replace(spec, model=SPECS["fcos"])
    with pytest.raises(ConfigError, match=r"model\.name is retinanet there and fcos here"):
        initial.check(other, dataset.categories)
    with pytest.raises(ConfigError, match=r"model\.kind is torchvision there and two_stage here"):
        initial.check(dataclasses.replace(spec, model=type(spec.model)()), dataset.categories)


def test_a_run_starts_from_weights_of_torchvision(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    net = SPECS[SSD]
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.save(
        ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).state_dict(), tmp_path / "w.pth"
    )
    started = dataclasses.replace(net, weights=str(tmp_path / "w.pth"))
    spec = dataclasses.replace(
        with_train(with_detector(spec, SSD), epochs=0.1, learning_rate=1e-12), model=started
    )
    reports: list[str] = []
    run = train(
        spec, run=tmp_path / "run", callbacks=Callbacks(on_weights=lambda report: reports.append(str(report)))
    )
    assert "w.pth: loaded" in reports[0]
    assert "made anew: the scores of 2 classes (dark, bright)" in reports[0]
    again = InitialWeights.load(run.folder).model
    assert again is not None
    assert (again.name, again.weights) == (SSD, None)
    assert json.loads(run.metrics_path.read_text().splitlines()[0])["new_classes"] == ["dark", "bright"]
    expected = load_library_weights(started).tensors["net.backbone.features.0.0.0.weight"]
    weights, _, _ = run.load_weights("last")
    torch.testing.assert_close(weights["net.backbone.features.0.0.0.weight"], expected, rtol=0, atol=1e-6)
