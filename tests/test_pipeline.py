"""The stages of an experiment: each goes on where it was stopped, and none is run twice for nothing."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec
from sniper.config.loading import dump_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.errors import CheckpointError
from sniper.inference import proposals as module
from sniper.models.spec import BackboneSpec
from sniper.pipeline import train_experiment
from sniper.runs.run import Run
from sniper.training.loop import StepReport
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment

CPU = torch.device("cpu")


@pytest.fixture
def annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 2)
    return load_dataset(write_dataset(tmp_path / "world"))


@pytest.fixture
def spec(annotations: Dataset) -> ExperimentSpec:
    return dataclasses.replace(
        tiny_experiment(annotations.path),
        negatives=NegativeSpec(source="mined", min_proposals=(1,)),
        mine=MineSpec(rpn_epochs=1.0),
    )


class Killed(Exception):
    """Stands for the end of a process."""


def ignore(*_: object) -> None:
    pass


def go(
    run: Run,
    spec: ExperimentSpec,
    annotations: Dataset,
    *,
    watch: Callable[[StepReport], None] = ignore,
    watch_mining: Callable[[int, int], None] = ignore,
) -> dict[str, torch.Tensor]:
    train_experiment(run, spec, annotations, device=CPU, watch=watch, watch_mining=watch_mining)
    return run.load_weights()[0]


def metrics_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def created(folder: Path, spec: ExperimentSpec) -> Run:
    return Run.create(folder, config=dump_experiment(spec))


def test_an_experiment_is_told_stage_by_stage(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    stages: list[str] = []
    run = created(tmp_path / "run", spec)
    go(
        run,
        spec,
        annotations,
        watch=lambda report: stages.append(report.stage),
        watch_mining=lambda done, total: stages.append(f"mine {total}"),
    )
    order = list(dict.fromkeys(stages))
    assert order == ["rpn", "mine 4", "train"]
    rpn = metrics_of(Run(run.folder / "rpn"))
    assert {entry["stage"] for entry in rpn} == {"rpn"}
    assert all("head_class" not in entry and "rpn_box" in entry for entry in rpn)
    assert rpn[0]["negative_chips"] == 0
    mined, first, *rest = metrics_of(run)
    assert mined["stage"] == "mine"
    assert 0 < first["negative_chips"] <= min(mined["negative_chips_pool"], 2 * 4)
    assert first["chips"] == mined["positive_chips"] + first["negative_chips"]
    assert all(entry["stage"] == "train" and "head_class" in entry for entry in rest)


@pytest.mark.parametrize("place", ["rpn", "mine", "train"])
def test_an_experiment_that_was_killed_in_any_stage_ends_with_the_same_weights(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path, place: str
) -> None:
    unbroken = go(created(tmp_path / "unbroken", spec), spec, annotations)

    def kill(report: StepReport) -> None:
        if report.stage == place and report.progress.step == 2:
            raise Killed

    def kill_mining(num_done: int, num_images: int) -> None:
        if place == "mine" and num_done == 4:
            raise Killed

    run = created(tmp_path / "broken", spec)
    with pytest.raises(Killed):
        go(run, spec, annotations, watch=kill, watch_mining=kill_mining)
    seen: list[str] = []
    broken = go(
        run,
        spec,
        annotations,
        watch=lambda report: seen.append(report.stage),
        watch_mining=lambda done, total: seen.append(f"mine {total}"),
    )
    assert all(torch.equal(unbroken[name], broken[name]) for name in unbroken)
    assert ("rpn" in seen) == (place == "rpn")
    assert [stage for stage in seen if "mine" in stage] == {
        "rpn": ["mine 4"] * 4,
        "mine": ["mine 2"] * 2,
        "train": [],
    }[place]


def test_a_stage_is_run_again_only_when_its_inputs_change(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    def stop(report: StepReport) -> None:
        if report.stage == "train":
            raise Killed

    def stages_of(spec: ExperimentSpec, annotations: Dataset = annotations) -> list[str]:
        seen: list[str] = []

        def watch(report: StepReport) -> None:
            seen.append(report.stage)
            stop(report)

        run = created(tmp_path / "run", spec)  # as `sniper train` does, without --resume
        with pytest.raises(Killed):
            go(run, spec, annotations, watch=watch, watch_mining=lambda *_: seen.append("mine"))
        return list(dict.fromkeys(seen))

    assert stages_of(spec) == ["rpn", "mine", "train"]
    assert stages_of(spec) == ["train"]
    other_rule = dataclasses.replace(spec, negatives=dataclasses.replace(spec.negatives, rule="overlap"))
    assert stages_of(other_rule) == ["train"]  # from the same proposals
    longer = dataclasses.replace(spec, mine=MineSpec(rpn_epochs=2.0))
    assert stages_of(longer) == ["rpn", "mine", "train"]
    fewer = load_dataset(write_dataset(tmp_path / "other", boxes_per_image=2))
    assert stages_of(longer, fewer) == ["rpn", "mine", "train"]
    deeper = dataclasses.replace(
        longer,
        model=dataclasses.replace(longer.model, backbone=BackboneSpec(name="test_resnet", pretrained=False)),
    )
    assert stages_of(deeper, fewer) == ["rpn", "mine", "train"]


def test_a_finished_run_needs_its_earlier_stages_no_more(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = created(tmp_path / "run", spec)
    go(run, spec, annotations)
    shutil.rmtree(run.folder / "rpn")
    seen: list[str] = []
    longer = dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=2.0))
    go(run, longer, annotations, watch=lambda report: seen.append(report.stage))
    assert set(seen) == {"train"}
    fewer = load_dataset(write_dataset(tmp_path / "other", boxes_per_image=2))
    with pytest.raises(CheckpointError, match="learnt from other images"):
        go(run, longer, fewer, watch=lambda report: seen.append(report.stage))
    assert set(seen) == {"train"}


def test_a_stage_half_removed_is_begun_anew(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = created(tmp_path / "run", spec)
    (run.folder / "rpn.old" / "checkpoints").mkdir(parents=True)
    go(run, spec, annotations)
    assert not (run.folder / "rpn.old").exists()


def test_a_signal_ends_a_mining_at_once(annotations: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(
        spec, mine=MineSpec(rpn_epochs=1.0, every_epochs=1), train=dataclasses.replace(spec.train, epochs=2.0)
    )
    run = created(tmp_path / "run", spec)
    searched: list[int] = []

    def interrupt_second_mining(num_done: int, num_images: int) -> None:
        searched.append(num_done)
        if len(searched) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        go(run, spec, annotations, watch_mining=interrupt_second_mining)
    assert len(searched) == 5
    assert metrics_of(run)[-1]["epoch"] == 1.0


def test_negatives_are_mined_again_with_the_newest_weights(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = dataclasses.replace(
        spec,
        mine=MineSpec(rpn_epochs=1.0, every_epochs=1),
        train=dataclasses.replace(spec.train, epochs=3.0, milestones=()),
    )
    unbroken = created(tmp_path / "unbroken", spec)
    weights = go(unbroken, spec, annotations)
    assert [entry["stage"] for entry in metrics_of(unbroken)].count("mine") == 3
    assert len(list(unbroken.folder.glob("chips_*.npz"))) == 3

    broken = created(tmp_path / "broken", spec)
    num_mined = 0

    def kill_third_mining(num_done: int, num_images: int) -> None:
        nonlocal num_mined
        num_mined += num_done == 4
        if num_mined == 3:
            raise Killed

    with pytest.raises(Killed):
        go(broken, spec, annotations, watch_mining=kill_third_mining)
    again = go(broken, spec, annotations)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_an_experiment_without_mining_has_one_stage(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    plain = dataclasses.replace(spec, negatives=NegativeSpec())
    run = created(tmp_path / "run", plain)
    go(run, plain, annotations)
    assert {entry["stage"] for entry in metrics_of(run)} == {"train"}
    assert not (run.folder / "rpn").exists()


@pytest.mark.parametrize("section", [{"data": {"chips": "c.npz"}}, {"train": {"rpn_only": True}}])
def test_negatives_have_one_source(section: dict[str, dict[str, Any]], spec: ExperimentSpec) -> None:
    parts = {name: dataclasses.replace(getattr(spec, name), **values) for name, values in section.items()}
    with pytest.raises(ValueError, match=r"negatives\.source must be none"):
        dataclasses.replace(spec, **parts)
