"""The pipeline: what `sniper.train` runs; each stage continues where it was stopped, and none is repeated in vain."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import sniper
from sniper import pipeline
from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec
from sniper.config.loading import dump_experiment, load_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.errors import AnnotationError, CheckpointError, ConfigError, InUseError, RunError, SniperError
from sniper.inference.calibration import load_calibration
from sniper.inference.proposals import open_proposals
from sniper.models.spec import BackboneSpec
from sniper.pipeline import run_stages, train
from sniper.runs.lock import lock_folder
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, EndReport, ScoresReport, StartReport, StepReport
from tests.data.tiny import write_dataset
from tests.runs.locks import held_by_another_thread, identities
from tests.training.experiments import (
    CPU,
    Killed,
    TrainedRun,
    have_equal_weights,
    tiny_experiment,
    with_data,
    with_train,
)


def mining_experiment(dataset: Dataset) -> ExperimentSpec:
    return dataclasses.replace(
        tiny_experiment(dataset.path),
        negatives=NegativeSpec(source="rpn", min_proposals=(1,)),
        mine=MineSpec(rpn_epochs=1.0),
    )


@pytest.fixture
def spec(dataset: Dataset) -> ExperimentSpec:
    return mining_experiment(dataset)


Unbroken = Callable[[Callable[[Dataset], ExperimentSpec]], Run]
"""Returns the run of an experiment on an equal data set, which was never stopped."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Each experiment is trained once."""

    @functools.cache
    def train_once(build: Callable[[Dataset], ExperimentSpec]) -> Run:
        folder = tmp_path_factory.mktemp("unbroken")
        dataset = load_dataset(write_dataset(folder / "world"))
        spec = build(dataset)
        run = create(folder / "run", spec)
        run_all(run, spec, dataset)
        return run

    return train_once


@pytest.fixture
def plain(spec: ExperimentSpec) -> ExperimentSpec:
    """The experiment without mining, of a single step."""
    return with_train(dataclasses.replace(spec, negatives=NegativeSpec()), epochs=0.2)


def create(folder: Path, spec: ExperimentSpec) -> Run:
    return Run.create(folder, config=dump_experiment(spec))


def run_all(run: Run, spec: ExperimentSpec, dataset: Dataset, *, callbacks: Callbacks = Callbacks()) -> None:
    run_stages(run, spec, dataset, device=CPU, callbacks=callbacks)


class Stages:
    """Records the stages that a training reports, and ends it at one of them.

    Args:
        ends: whether a stage and its number of steps or images are the end.
    """

    def __init__(self, ends: Callable[[str, int], bool] = lambda stage, count: False) -> None:
        self.seen: list[str] = []
        self.ends = ends

    @property
    def callbacks(self) -> Callbacks:
        return Callbacks(on_step=self._on_step, on_mining=self._on_mining)

    @property
    def distinct(self) -> list[str]:
        return list(dict.fromkeys(self.seen))

    def _on_step(self, report: StepReport) -> None:
        self._record(report.stage, report.progress.step)

    def _on_mining(self, num_done: int, num_images: int) -> None:
        self._record("mine", num_done)

    def _record(self, stage: str, count: int) -> None:
        self.seen.append(stage)
        if self.ends(stage, count):
            raise Killed


def test_mined_negatives_are_reported_stage_by_stage(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    stages = Stages()
    run = create(tmp_path / "run", spec)
    run_all(run, spec, dataset, callbacks=stages.callbacks)
    assert stages.distinct == ["rpn", "mine", "train"]
    assert stages.seen.count("mine") == len(dataset)
    rpn = Run(run.folder / "rpn").entries()
    assert {entry["stage"] for entry in rpn} == {"rpn", "epoch"}
    assert all("head_class" not in entry and "rpn_box" in entry for entry in rpn if entry["stage"] == "rpn")
    assert rpn[0]["negative_chips"] == 0
    mined, first, *rest = [entry for entry in run.entries() if entry["stage"] != "epoch"]
    assert mined["stage"] == "mine"
    assert 0 < first["negative_chips"] <= min(mined["negative_chips_pool"], 2 * 4)
    assert first["chips"] == mined["positive_chips"] + first["negative_chips"]
    assert all(entry["stage"] == "train" and "head_class" in entry for entry in rest)


@pytest.mark.parametrize(
    ("stage", "count", "repeats_rpn", "num_mined"),
    [("rpn", 2, True, 4), ("mine", 2, False, 2), ("train", 2, False, 0)],
)
def test_an_experiment_killed_in_any_stage_ends_with_the_same_weights(
    dataset: Dataset,
    spec: ExperimentSpec,
    tmp_path: Path,
    unbroken: Unbroken,
    stage: str,
    count: int,
    repeats_rpn: bool,
    num_mined: int,
) -> None:
    broken = create(tmp_path / "broken", spec)
    with pytest.raises(Killed):
        run_all(broken, spec, dataset, callbacks=Stages(lambda *at: at == (stage, count)).callbacks)
    stages = Stages()
    run_all(broken, spec, dataset, callbacks=stages.callbacks)
    assert have_equal_weights(unbroken(mining_experiment), broken)
    assert ("rpn" in stages.seen) == repeats_rpn
    assert stages.seen.count("mine") == num_mined


def test_a_stage_is_repeated_only_when_its_inputs_change(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    def stages_of(spec: ExperimentSpec, dataset: Dataset = dataset) -> list[str]:
        stages = Stages(lambda stage, _: stage == "train")
        with pytest.raises(Killed):
            run_all(create(tmp_path / "run", spec), spec, dataset, callbacks=stages.callbacks)
        return stages.distinct

    assert stages_of(spec) == ["rpn", "mine", "train"]
    assert stages_of(spec) == ["train"]
    other_rule = dataclasses.replace(spec, negatives=dataclasses.replace(spec.negatives, rule="overlap"))
    assert stages_of(other_rule) == ["train"]  # on the same proposals
    longer = dataclasses.replace(spec, mine=MineSpec(rpn_epochs=2.0))
    assert stages_of(longer) == ["rpn", "mine", "train"]
    fewer = load_dataset(write_dataset(tmp_path / "other", boxes_per_image=2))
    assert stages_of(longer, fewer) == ["rpn", "mine", "train"]
    deeper = dataclasses.replace(
        longer,
        model=dataclasses.replace(longer.model, backbone=BackboneSpec(name="test_resnet", pretrained=False)),
    )
    assert stages_of(deeper, fewer) == ["rpn", "mine", "train"]


def test_a_complete_run_does_not_need_its_earlier_stages(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = create(tmp_path / "run", spec)
    run_all(run, spec, dataset)
    shutil.rmtree(run.folder / "rpn")
    stages = Stages()
    longer = with_train(spec, epochs=2.0)
    run_all(run, longer, dataset, callbacks=stages.callbacks)
    assert stages.distinct == ["train"]
    fewer = load_dataset(write_dataset(tmp_path / "other", boxes_per_image=2))
    with pytest.raises(CheckpointError, match="trained on other images"):
        run_all(run, longer, fewer, callbacks=stages.callbacks)
    assert stages.distinct == ["train"]


def test_a_stage_of_other_inputs_is_started_over_and_leaves_nothing(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = create(tmp_path / "run", spec)
    stage = Run.create(run.folder / "rpn", config="other: 1")
    (stage.folder / "notes.txt").touch()
    run_all(run, spec, dataset)
    assert stage.checkpoints
    assert not (stage.folder / "notes.txt").exists()
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".") or "old" in path.name]


def test_a_run_that_another_process_works_on_is_refused_and_unchanged(trained: TrainedRun) -> None:
    folder = trained.run.folder
    before = identities(folder)
    with held_by_another_thread(lock_folder(folder, option="--run")):
        for resume in (False, True):
            with pytest.raises(
                InUseError, match=r"trained: another process .*elsewhere \(--run, run=\.\.\.\)"
            ):
                train(trained.spec, run=folder, resume=resume, epochs=9, device="cpu")
    assert identities(folder) == before


def test_a_signal_interrupts_mining_at_once(dataset: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    spec = with_train(dataclasses.replace(spec, mine=MineSpec(rpn_epochs=1.0, every_epochs=1)), epochs=2.0)
    run = create(tmp_path / "run", spec)
    searched: list[int] = []

    def interrupt_second_mining(num_done: int, num_images: int) -> None:
        searched.append(num_done)
        if len(searched) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_all(run, spec, dataset, callbacks=Callbacks(on_mining=interrupt_second_mining))
    assert len(searched) == 5
    assert run.entries()[-1]["epoch"] == 1.0
    assert run.entries()[-1]["stage"] == "epoch"


def test_negatives_are_mined_again_with_the_newest_weights(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(
        dataclasses.replace(spec, mine=MineSpec(rpn_epochs=1.0, every_epochs=1)), epochs=3.0, milestones=()
    )
    unbroken = create(tmp_path / "unbroken", spec)
    run_all(unbroken, spec, dataset)
    assert [entry["stage"] for entry in unbroken.entries()].count("mine") == 3
    assert len(list(unbroken.folder.glob("chips_*.npz"))) == 3

    broken = create(tmp_path / "broken", spec)
    num_mined = 0

    def kill_third_mining(num_done: int, num_images: int) -> None:
        nonlocal num_mined
        num_mined += num_done == 4
        if num_mined == 3:
            raise Killed

    with pytest.raises(Killed):
        run_all(broken, spec, dataset, callbacks=Callbacks(on_mining=kill_third_mining))
    run_all(broken, spec, dataset)
    assert have_equal_weights(unbroken, broken)


def mining_twice(dataset: Dataset) -> ExperimentSpec:
    """Return an experiment of three epochs that mines false alarms after the first, and again after the second."""
    return with_train(
        dataclasses.replace(
            tiny_experiment(dataset.path),
            negatives=NegativeSpec(source="self", min_score=0.0),
            mine=MineSpec(start=0.3, every_epochs=1),
        ),
        epochs=3.0,
        milestones=(),
    )


def mining_once(dataset: Dataset) -> ExperimentSpec:
    """Return the same experiment without the second time."""
    return dataclasses.replace(mining_twice(dataset), mine=MineSpec(start=0.3, share=0.7))


@pytest.fixture
def self_mining(dataset: Dataset) -> ExperimentSpec:
    return mining_twice(dataset)


def test_a_detector_mines_its_own_false_alarms(
    dataset: Dataset, self_mining: ExperimentSpec, tmp_path: Path
) -> None:
    stages = Stages()
    run = create(tmp_path / "run", self_mining)
    run_all(run, self_mining, dataset, callbacks=stages.callbacks)
    order = [stage for stage, _ in itertools.groupby(stages.seen)]
    assert order == ["train", "mine", "train", "mine", "train"]
    entries = run.entries()
    first_of_epochs = [entry for entry in entries if "chips" in entry]
    mined = [entry for entry in entries if entry["stage"] == "mine"]
    chosen = [entry for entry in entries if entry["stage"] == "chips"]
    means = [entry for entry in entries if entry["stage"] == "epoch"]
    assert [entry["epoch"] for entry in mined] == [entry["epoch"] for entry in chosen] == [1, 2]
    assert all(entry["false_alarms"] > 0 for entry in mined)
    assert first_of_epochs[0]["negative_chips"] == 0
    for entry, first in zip(chosen, first_of_epochs[1:], strict=True):
        assert entry["dose"] == 0.5  # losses of earlier rounds do not count
        assert 0 < entry["negative_chips"] <= 0.5 * entry["positive_chips"]
        assert first["negative_chips"] == entry["negative_chips"]
        assert first["chips"] == entry["positive_chips"] + entry["negative_chips"]
    assert "negative_loss" not in means[0]
    assert all(entry["negative_loss"] > 0 and entry["positive_loss"] > 0 for entry in means[1:])


def test_each_round_searches_a_share_of_the_images_drawn_anew(
    dataset: Dataset, self_mining: ExperimentSpec, tmp_path: Path
) -> None:
    half = dataclasses.replace(self_mining, mine=dataclasses.replace(self_mining.mine, share=0.5))
    run = create(tmp_path / "run", half)
    run_all(run, half, dataset)
    num_images = -(-len(dataset) // 2)
    assert [entry["images"] for entry in run.entries() if entry["stage"] == "mine"] == [num_images] * 2
    stores = [open_proposals(run.folder / f"alarms_{epoch:03d}", dataset) for epoch in (1, 2)]
    searched = [np.flatnonzero(store.counts).tolist() for store in stores]
    assert all(0 < len(images) <= num_images for images in searched)
    assert searched[0] != searched[1]


def test_the_dose_follows_the_losses_of_the_epoch_before(
    dataset: Dataset, self_mining: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sniper.chips.negatives._FULL_DOSE_RATIO", 2.0)  # so that the dose falls
    once = dataclasses.replace(self_mining, mine=MineSpec(start=0.3))
    run = create(tmp_path / "run", once)
    run_all(run, once, dataset)
    entries = run.entries()
    doses = [entry["dose"] for entry in entries if entry["stage"] == "chips"]
    losses = next(entry for entry in entries if entry["stage"] == "epoch" and entry["epoch"] == 2.0)
    expected = 0.5 * min(losses["negative_loss"] / losses["positive_loss"] / 2.0, 1)
    assert expected < 0.5
    assert doses == [0.5, pytest.approx(expected)]
    assert [entry["stage"] for entry in entries].count("mine") == 1


@pytest.mark.parametrize("build", [mining_twice, mining_once])
@pytest.mark.parametrize(
    ("stage", "count"), [("mine", 2), ("mine", 4), ("train", 1), ("train", 7), ("train", 9)]
)
def test_a_run_that_mines_itself_and_is_killed_ends_with_the_same_weights(
    dataset: Dataset,
    tmp_path: Path,
    unbroken: Unbroken,
    stage: str,
    count: int,
    build: Callable[[Dataset], ExperimentSpec],
) -> None:
    spec, expected = build(dataset), unbroken(build)
    broken = create(tmp_path / "broken", spec)
    with pytest.raises(Killed):
        run_all(broken, spec, dataset, callbacks=Stages(lambda *at: at == (stage, count)).callbacks)
    run_all(broken, spec, dataset)
    assert have_equal_weights(expected, broken)
    kinds = [[entry["stage"] for entry in run.entries()] for run in (expected, broken)]
    assert kinds[0] == kinds[1]


def test_a_run_that_mines_itself_and_is_made_longer_ends_with_the_same_weights(
    dataset: Dataset, tmp_path: Path, unbroken: Unbroken
) -> None:
    spec = mining_once(dataset)
    longer = create(tmp_path / "longer", spec)
    run_all(longer, with_train(spec, epochs=2.6), dataset)
    assert longer.progress.step_in_epoch > 0
    longer.save_config(dump_experiment(spec))
    run_all(longer, spec, dataset)
    assert have_equal_weights(unbroken(mining_once), longer)


def test_without_a_dose_positive_chips_are_placed_on_false_alarms(
    dataset: Dataset, self_mining: ExperimentSpec, tmp_path: Path
) -> None:
    none = dataclasses.replace(self_mining, negatives=dataclasses.replace(self_mining.negatives, dose=0.0))
    run = create(tmp_path / "run", none)
    run_all(run, none, dataset)
    first_of_epochs = [entry for entry in run.entries() if "chips" in entry]
    assert [entry["negative_chips"] for entry in first_of_epochs] == [0, 0, 0]
    assert len({entry["chips"] for entry in first_of_epochs}) == 1


@pytest.mark.parametrize("section", [{"data": {"chips": "c.npz"}}, {"train": {"rpn_only": True}}])
def test_negatives_have_one_source(section: dict[str, dict[str, Any]], spec: ExperimentSpec) -> None:
    parts = {name: dataclasses.replace(getattr(spec, name), **values) for name, values in section.items()}
    with pytest.raises(ValueError, match=r"negatives\.source must be none"):
        dataclasses.replace(spec, **parts)


@pytest.mark.filterwarnings("ignore:.*of data.test are in data.train too")
def test_training_in_python_mines_and_scores_as_configured(spec: ExperimentSpec, tmp_path: Path) -> None:
    scores: list[float] = []
    warnings: list[str] = []
    stages = Stages()
    run = sniper.train(
        spec,
        run=tmp_path / "run",
        device="cpu",
        epochs=1,
        overrides={"train.evaluate_every": 1},
        callbacks=dataclasses.replace(
            stages.callbacks,
            on_scores=lambda report: scores.append(report.scores["ap"]),
            on_warning=warnings.append,
        ),
    )
    assert ["are in data.train too" in warning for warning in warnings] == [True]
    assert stages.distinct == ["rpn", "mine", "train"]
    assert [entry["stage"] for entry in run.entries()][-1] == "evaluate"
    assert len(scores) == 1
    assert run.entries()[-1]["ap"] == scores[0]
    assert run.entries()[-1]["num_clean_images"] == 0
    calibration = load_calibration(run)
    assert calibration is not None
    assert calibration.step == run.entries()[-1]["step"]
    assert (calibration.merge, calibration.num_images, calibration.candidates) == ("gaussian", 4, ())
    assert len(sniper.Detector.load(run).categories) == 2


@pytest.mark.filterwarnings("ignore:.*of data.test are in data.train too")
def test_what_is_to_be_done_is_reported_before_it_is_done(spec: ExperimentSpec, tmp_path: Path) -> None:
    starts: list[StartReport] = []
    searched: list[tuple[int, int]] = []
    scores: list[Mapping[str, float]] = []
    stages = Stages()

    def start(report: StartReport) -> None:
        assert not stages.seen
        starts.append(report)

    callbacks = dataclasses.replace(
        stages.callbacks,
        on_start=start,
        on_evaluation=lambda *counts: searched.append(counts),
        on_scores=lambda report: scores.append(report.scores),
    )
    overrides = {"train.evaluate_every": 1, "train.evaluate_images": 3, "train.epochs": 2.0}
    run = sniper.train(spec, run=tmp_path / "run", device="cpu", overrides=overrides, callbacks=callbacks)
    (report,) = starts
    assert report.rpn_steps == stages.seen.count("rpn")
    assert report.num_mined == stages.seen.count("mine") == 4
    assert report.steps >= stages.seen.count("train")  # not all images have as many negative chips
    assert (report.num_evaluations, report.num_scored, report.num_images) == (2, 3, 4)
    assert report.download is None
    assert searched == [(1, 3), (2, 3), (3, 3)] * 2 + [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [named["num_images"] for named in scores] == [3, 3, 4]
    *_, final = run.entries()
    assert (final["stage"], final["num_images"]) == ("final", 4)
    starts.clear()
    stages.seen.clear()
    again = {**overrides, "train.epochs": 3.0}
    sniper.train(spec, run=tmp_path / "run", resume=True, device="cpu", overrides=again, callbacks=callbacks)
    (report,) = starts
    assert (report.rpn_steps, report.num_mined, report.num_evaluations) == (0, 0, 1)
    assert report.steps - report.steps_done == pytest.approx(stages.seen.count("train"), abs=1)


class Listener:
    """A tracker of a user's own, which may fail at a step."""

    def __init__(self, *, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls: list[str] = []
        self.end: EndReport | None = None
        self._fails_at, self._error = fails_at, error

    def on_step(self, report: StepReport) -> None:
        self.calls.append(f"step {report.progress.step}")
        if report.progress.step == self._fails_at and self._error is not None:
            raise self._error

    def on_scores(self, report: ScoresReport) -> None:
        self.calls.append(f"scores {report.step}")

    def on_end(self, report: EndReport) -> None:
        self.calls.append("end")
        self.end = report


class Unfinished(Listener):
    """A tracker one of whose names is no method."""

    on_scores: Any = None


@pytest.mark.filterwarnings("ignore:.*of data.test are in data.train too")
def test_a_tracker_is_told_of_steps_scores_and_the_end(plain: ExperimentSpec, tmp_path: Path) -> None:
    listener = Listener()
    starts: list[StartReport] = []
    others = Callbacks(on_start=starts.append)
    overrides = {"train.evaluate_every": 1, "train.evaluate_images": 3}
    run = sniper.train(
        plain, run=tmp_path / "run", device="cpu", overrides=overrides, callbacks=[listener, others]
    )
    assert listener.calls == ["step 1", "scores 1", "scores 1", "end"]
    assert listener.end is not None
    assert (listener.end.status, listener.end.step, listener.end.error) == ("completed", 1, None)
    assert listener.end.weights == run.weights_path
    assert listener.end.scores == run.best_scores()
    (start,) = starts
    assert start.folder == run.folder
    assert start.config == yaml.safe_load(run.config_path.read_text())
    assert start.origin["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError("mine"), "failed"), (KeyboardInterrupt(), "stopped")]
)
def test_an_exception_of_a_users_tracker_ends_the_training_after_its_step_is_saved(
    plain: ExperimentSpec, tmp_path: Path, error: BaseException, status: str
) -> None:
    listener = Listener(fails_at=1, error=error)
    with pytest.raises(type(error)):
        sniper.train(plain, run=tmp_path / "run", device="cpu", callbacks=listener)
    assert listener.calls == ["step 1", "end"]
    assert listener.end is not None
    assert listener.end.status == status
    assert isinstance(listener.end.error, type(error))
    if status == "failed":  # Ctrl-C is handled by a signal, not by an exception
        assert listener.end.step == 1


def test_an_object_that_is_no_tracker_is_refused_before_the_run(
    plain: ExperimentSpec, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="Unfinished"):
        sniper.train(plain, run=tmp_path / "run", callbacks=[Unfinished()])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    plain: ExperimentSpec, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"train\.trackers: .* pip install 'sniper-det\[{name}\]'"):
        sniper.train(plain, run=tmp_path / "run", overrides={"train.trackers": [name]})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_killed_run_and_the_resumed_one_are_tracked_as_one(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    spec = with_train(spec, trackers=(name,))
    run = create(tmp_path / "run", spec)
    stages = Stages(lambda stage, count: (stage, count) == ("train", 2))
    with pytest.raises(Killed):
        run_all(run, spec, dataset, callbacks=stages.callbacks)
    notices: list[str] = []
    again = Callbacks(on_notice=notices.append, on_warning=pytest.fail)
    run_all(run, spec, dataset, callbacks=again)
    state = json.loads((run.folder / f"trackers/{name}.json").read_text())
    rpn = Run(run.folder / "rpn")
    assert state["lines"] == {"train": len(run.entries()), "rpn": len(rpn.entries())}
    assert [notice.partition(":")[0] for notice in notices] == [name]


def test_no_download_is_announced_where_a_detector_is_started_from(
    plain: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "find_download", lambda _: "weights, 14 MB")
    starts: list[StartReport] = []
    callbacks = Callbacks(on_start=starts.append)
    first = sniper.train(plain, run=tmp_path / "first", epochs=0.2, device="cpu", callbacks=callbacks)
    sniper.train(
        plain, run=tmp_path / "second", epochs=0.2, device="cpu", weights_from=first, callbacks=callbacks
    )
    assert [report.download for report in starts] == ["weights, 14 MB", None]


def test_an_experiment_file_names_the_run(
    plain: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(dump_experiment(plain))
    run = train("mine.yaml", device="cpu")
    assert run.folder == Path("runs/mine")
    spec = load_experiment(run.config_path)
    assert {entry["stage"] for entry in run.entries()} == {"train", "epoch"}
    assert not (run.folder / "rpn").exists()
    assert spec == plain


def test_a_recipe_is_found_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.annotations is missing"):
        train("coco_r50_fpn", device="cpu")


@pytest.mark.parametrize("value", [2, "2"])
def test_overrides_are_values_or_yaml_and_stored_with_the_run(
    plain: ExperimentSpec, tmp_path: Path, value: object
) -> None:
    run = train(
        plain,
        run=tmp_path / "run",
        device="cpu",
        overrides={"train.batch_size": value, "train.learning_rate": 1e-5, "train.milestones": (0.1,)},
    )
    spec = load_experiment(run.config_path)
    assert (spec.train.batch_size, spec.train.learning_rate) == (2, 1e-5)
    assert spec.train.milestones == (0.1,)


def test_a_resumed_training_keeps_what_is_not_set_again(plain: ExperimentSpec, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tmp_path / "short.yaml"
    train(plain, run=folder, device="cpu")
    config.write_text("train: {epochs: 1.0}")
    run = train(config, run=folder, resume=True, device="cpu")
    assert load_experiment(run.config_path) == with_train(plain, epochs=1.0)
    steps = [int(path.name) for path in run.checkpoints]
    again = train(config, run=folder, resume=True, step=steps[0], device="cpu", epochs=2.0)
    assert (folder / "checkpoints" / f"{steps[-1]:08d}.old").exists() or steps[-1] == steps[0]
    assert again.entries()[-1]["step"] > steps[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": 3}, ConfigError, "step: needs resume"),
        ({"run": None}, ConfigError, "run: name the folder"),
        ({"resume": True}, RunError, "there is no run"),
        ({"device": "abacus"}, ConfigError, "device abacus: there is no such device"),
        ({"overrides": {"train.epoch": 3}}, ConfigError, r"did you mean train\.epochs\?"),
        ({"overrides": {"data.train.annotations": ""}}, ConfigError, r"data\.train\.annotations"),
    ],
)
def test_unusable_arguments_are_refused(
    plain: ExperimentSpec, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(plain, **({"run": tmp_path / "run"} | arguments))


def test_scoring_needs_test_images_of_a_common_category(
    plain: ExperimentSpec, tmp_path: Path, trained: TrainedRun
) -> None:
    scored = with_train(plain, evaluate_every=1)
    without = with_data(scored, test=dataclasses.replace(scored.data.test, annotations=""))
    with pytest.raises(ConfigError, match=r"train\.evaluate_every: data\.test\.annotations is missing"):
        train(without, run=tmp_path / "without", device="cpu")
    text = trained.dataset.path.read_text()
    other = tmp_path / "other.json"
    other.write_text(text.replace('"bright"', '"light"').replace('"dark"', '"black"'))
    named = dataclasses.replace(
        scored.data.test, annotations=str(other), images=str(trained.dataset.image_root)
    )
    with pytest.raises(AnnotationError, match=r"train\.json and .*other\.json have no category name in"):
        train(with_data(scored, test=named), run=tmp_path / "other", device="cpu")


def test_scores_while_training_do_not_depend_on_ids_of_the_test_categories(
    plain: ExperimentSpec, tmp_path: Path, trained: TrainedRun
) -> None:
    """The categories of the test images have the ids of each other, and a third one that no image shows."""
    content = json.loads(trained.dataset.path.read_text())
    first, second = (category["id"] for category in content["categories"])
    content["categories"] = [
        {"id": {first: second, second: first}[category["id"]], "name": category["name"]}
        for category in content["categories"]
    ] + [{"id": 99, "name": "other"}]
    for entry in content["annotations"]:
        entry["category_id"] = {first: second, second: first}[entry["category_id"]]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    warnings: list[str] = []
    scores = []
    for annotations in (trained.dataset.path, other):
        spec = with_train(plain, evaluate_every=1)
        test = dataclasses.replace(
            spec.data.test, annotations=str(annotations), images=str(trained.dataset.image_root)
        )
        run = train(
            with_data(spec, test=test),
            run=tmp_path / annotations.stem,
            device="cpu",
            callbacks=Callbacks(on_warning=warnings.append),
        )
        (entry,) = [entry for entry in run.entries() if entry["stage"] == "evaluate"]
        scores.append({name: value for name, value in entry.items() if name not in ("time", "seconds")})
    assert scores[0] == scores[1]
    assert any("matched by name" in warning for warning in warnings)
    assert any("cannot be detected: 'other'" in warning for warning in warnings)


def test_a_transform_is_applied_to_the_chips(plain: ExperimentSpec, tmp_path: Path) -> None:
    num_chips = 0

    def count(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal num_chips
        num_chips += 1
        assert isinstance(image, torch.Tensor)
        return image, target

    train(plain, run=tmp_path / "run", device="cpu", transform=count)
    assert num_chips == 4


def test_warnings_about_the_data_set_are_reported(
    plain: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_with_warning(*args: Any, **kwargs: Any) -> Dataset:
        return dataclasses.replace(load_dataset(*args, **kwargs), warnings=("a box was clipped",))

    monkeypatch.setattr("sniper.pipeline.load_dataset", load_with_warning)
    warnings: list[str] = []
    train(plain, run=tmp_path / "run", device="cpu", callbacks=Callbacks(on_warning=warnings.append))
    assert warnings == ["a box was clipped"]
    with pytest.warns(UserWarning, match="a box was clipped"):
        train(plain, run=tmp_path / "other", device="cpu")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"train.evaluate_every": 1, "data.test.annotations": "''"},
            ConfigError,
            "data.test.annotations is missing",
        ),
        (
            {"train.batch_size": 4, "train.accumulation_steps": 4, "data.chips": "none.npz"},
            SniperError,
            "none.npz",
        ),
    ],
)
def test_a_refused_training_creates_no_folder(
    plain: ExperimentSpec, overrides: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train(plain, run=tmp_path / "run", device="cpu", overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(plain: ExperimentSpec, tmp_path: Path) -> None:
    run = train(plain, run=tmp_path / "run", device="cpu")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"data\.test\.annotations is missing"):
        train(
            plain,
            run=run.folder,
            resume=True,
            device="cpu",
            overrides={"train.evaluate_every": 1, "data.test.annotations": "''"},
        )
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:.*of data.test are in data.train too")
def test_a_damaged_calibration_is_refused_before_the_training_continues(
    plain: ExperimentSpec, tmp_path: Path
) -> None:
    run = train(plain, run=tmp_path / "run", device="cpu")
    run.calibration_path.write_text("[")
    longer = {"train.epochs": 1.0}
    with pytest.raises(RunError, match=r"calibration\.json: cannot be read .*; delete it"):
        train(
            plain,
            run=run.folder,
            resume=True,
            device="cpu",
            overrides={**longer, "train.evaluate_every": 1},
        )
    num_entries = len(run.entries())
    train(plain, run=run.folder, resume=True, device="cpu", overrides=longer)
    assert len(run.entries()) > num_entries


def test_overrides_may_be_numpy_numbers_tuples_and_specs(plain: ExperimentSpec, tmp_path: Path) -> None:
    overrides = {"train.batch_size": np.int64(2), "train.milestones": (1, 2.5), "mine": MineSpec(nms_iou=0.5)}
    run = train(plain, run=tmp_path / "run", device="cpu", epochs=np.float64(0.1), overrides=overrides)
    used = load_experiment(run.config_path)
    assert (used.train.batch_size, used.train.epochs) == (2, 0.1)
    assert (used.train.milestones, used.mine.nms_iou) == ((1.0, 2.5), 0.5)


def test_an_override_that_yaml_has_no_word_for_is_refused(plain: ExperimentSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: .* is no number, text, list or mapping"):
        train(plain, run=tmp_path / "run", overrides={"train.epochs": object()})


def check_shared_images(warning: str) -> None:
    """Accept the warning that the images are trained and scored on."""
    assert "are in data.train too" in warning


def test_the_page_is_written_at_every_epoch_and_shows_the_last_evaluation(
    dataset: Dataset, plain: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(plain, epochs=2.0, evaluate_every=1)
    run = create(tmp_path / "run", spec)
    pages: list[str] = []
    callbacks = Callbacks(
        on_step=lambda report: (
            pages.append(run.report_path.read_text()) if report.progress.step_in_epoch == 1 else None
        ),
        on_epoch=lambda report: pages.append(run.report_path.read_text()),
        on_warning=check_shared_images,
    )
    run_all(run, spec, dataset, callbacks=callbacks)
    before, *_, after = pages
    assert "No step has been made yet" in before
    assert "Epoch 1, a row for each level" in before
    assert "Trained for 2.00 of 2.00 epochs" in after
    assert "Epoch 2, a row for each level" in after
    assert f"Detections of step {run.progress.step} on the {len(dataset)} validation images" in after
    assert after == run.report_path.read_text()


def test_weights_do_not_depend_on_the_page(dataset: Dataset, plain: ExperimentSpec, tmp_path: Path) -> None:
    spec = with_train(plain, epochs=1.0, evaluate_every=1)
    runs = []
    for name, report in (("with", True), ("without", False)):
        changed = with_train(spec, report=report)
        runs.append(create(tmp_path / name, changed))
        run_all(runs[-1], changed, dataset, callbacks=Callbacks(on_warning=check_shared_images))
    assert have_equal_weights(*runs)
    assert [run.report_path.exists() for run in runs] == [True, False]


def test_a_page_that_cannot_be_written_is_a_warning_and_ends_no_training(
    dataset: Dataset, plain: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(plain, epochs=1.0, evaluate_every=1)
    run = create(tmp_path / "run", spec)
    run.report_folder.touch()
    run.report_path.mkdir()
    warnings: list[str] = []
    run_all(run, spec, dataset, callbacks=Callbacks(on_warning=warnings.append))
    assert run.progress.epoch == 1
    warnings = [warning for warning in warnings if "are in data.train too" not in warning]
    assert set(warnings) == {
        f"{run.report_path}: is not up to date ({path}: {reason})"
        for path, reason in (
            (run.report_folder, "File exists; choose another name, or remove it"),
            (run.report_path, "Is a directory; name a file, not a folder"),
        )
    }


def test_derived_settings_are_on_the_page(dataset: Dataset, tmp_path: Path) -> None:
    run = train(
        dataset.path,
        run=tmp_path / "run",
        epochs=1,
        overrides={
            "model.backbone.name": "test_resnet",
            "model.backbone.pretrained": False,
            "train.evaluate_every": None,
            "train.batch_size": 2,
            "data.num_workers": 0,
        },
        device="cpu",
    )
    html = run.report_path.read_text()
    assert "<code>--epochs" in html
    assert "option that sets another" in html
