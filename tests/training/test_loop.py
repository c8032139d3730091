"""The training loop: all random draws depend on the position in the run only, and no error is hidden."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sniper.chips import LevelSpec
from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset
from sniper.errors import CheckpointError, ConfigError, TrainingDiverged
from sniper.models.build import autocast, build_detector
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport
from sniper.training.epochs import order_epoch
from tests.training.experiments import (
    CPU,
    FixedScores,
    Killed,
    TrainedRun,
    deterministic_metrics,
    have_equal_weights,
    train_run,
    weights_of,
    with_data,
    with_train,
)


def train_killed_at(run: Run, spec: ExperimentSpec, dataset: Dataset, *, step: int) -> None:
    def kill(report: StepReport) -> None:
        if report.progress.step == step:
            raise Killed

    with pytest.raises(Killed):
        train_run(run, spec, dataset, callbacks=Callbacks(on_step=kill))


def test_a_run_that_was_killed_and_resumed_ends_with_the_same_weights(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(spec, epochs=2.5)
    unbroken = Run.create(tmp_path / "unbroken", config="")
    train_run(unbroken, spec, dataset)
    num_steps = num_steps_of(unbroken)
    assert num_steps > 6
    broken = Run.create(tmp_path / "broken", config="")
    for step in (1, 3, num_steps - 2):  # killed before the checkpoint of that step: it is made again
        train_killed_at(broken, spec, dataset, step=step)
    train_run(broken, spec, dataset)
    assert have_equal_weights(unbroken, broken)
    assert deterministic_metrics(unbroken) == deterministic_metrics(broken)


def num_steps_of(run: Run) -> int:
    return int(run.checkpoints[-1].name)


WHOLE = WholeSpec(
    levels=(LevelSpec(factor=1.0, below=40), LevelSpec(long_side=64, at_least=24)), batch_megapixels=0.08
)


@pytest.mark.parametrize(
    "fields", [{"whole": WHOLE}, {"tiles": TileSpec(side=64, empty="drop")}, {"tiles": TileSpec(side=64)}]
)
def test_runs_on_whole_images_and_tiles_train_and_resume(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, fields: dict[str, Any]
) -> None:
    spec = with_train(with_data(spec, **fields), batch_size=2, epochs=1.5)
    unbroken = Run.create(tmp_path / "unbroken", config="")
    train_run(unbroken, spec, dataset)
    first = order_epoch(spec, dataset, epoch=0)
    entries = unbroken.entries()[: first.num_steps]
    assert sum(entry["megapixels"] for entry in entries) == pytest.approx(first.megapixels, abs=1e-3)
    assert entries[0]["chips"] == len(first.table)
    broken = Run.create(tmp_path / "broken", config="")
    train_killed_at(broken, spec, dataset, step=3)
    train_run(broken, spec, dataset)
    assert have_equal_weights(unbroken, broken)
    assert deterministic_metrics(unbroken) == deterministic_metrics(broken)


def test_whole_images_train_with_gradient_accumulation(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(with_data(spec, whole=WHOLE), epochs=1.0, accumulation_steps=2)
    run = Run.create(tmp_path / "run", config="")
    train_run(run, spec, dataset)
    assert (np.diff(order_epoch(spec, dataset, epoch=0, num_shares=2).offsets) % 2 == 0).all()
    assert all(math.isfinite(entry["loss"]) for entry in run.entries())


def test_an_epoch_of_whole_images_resumes_with_the_same_division_of_batches(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_data(spec, whole=WHOLE)
    run = Run.create(tmp_path / "run", config="")
    train_killed_at(run, spec, dataset, step=3)
    with pytest.raises(
        ConfigError, match=r"was 1 and is 2; continue with 1, or from a checkpoint at the end"
    ):
        train_run(run, with_train(spec, accumulation_steps=2), dataset)
    train_run(run, spec, dataset)


def test_loader_processes_do_not_change_the_weights(trained: TrainedRun, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config="")
    train_run(run, with_data(trained.spec, num_workers=1), trained.dataset)
    assert have_equal_weights(run, trained.run)


def test_a_fraction_of_an_epoch_makes_a_fraction_of_its_steps(trained: TrainedRun) -> None:
    reports = trained.reports
    per_epoch = sum(report.epoch <= 1 for report in reports)
    assert len(reports) == pytest.approx(1.5 * per_epoch, abs=2)
    assert reports[-1].epoch == pytest.approx(1.5, abs=0.2)
    assert reports[-1].steps_left == 0
    assert reports[0].learning_rate == pytest.approx(0.01 / 30)
    assert reports[-1].learning_rate == pytest.approx(0.001)


def test_a_lengthened_run_completes_its_last_epoch_first(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    whole = Run.create(tmp_path / "whole", config="")
    parts = Run.create(tmp_path / "parts", config="")
    for run, epochs in ((whole, 2.0), (parts, 0.5), (parts, 1.3), (parts, 2.0)):
        train_run(run, with_train(spec, milestones=(), epochs=epochs), dataset)
    assert have_equal_weights(whole, parts)


def test_metrics_have_a_line_for_each_step(trained: TrainedRun) -> None:
    entries = [entry for entry in trained.run.entries() if entry["stage"] == "train"]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[0]["chips"] > 0
    assert set(entries[1]) >= {"epoch", "loss", "rpn_objectness", "rpn_box", "head_class", "head_box"}


def test_a_loss_that_is_not_finite_stops_and_names_the_images(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(
        TrainingDiverged,
        match=r"step \d+: a loss or a gradient is not finite \(.*\); chips.*: train_\d\.png \(level \d, x ",
    ):
        train_run(run, with_train(spec, learning_rate=1e30, warmup_steps=0, milestones=()), dataset)
    assert all(math.isfinite(entry["loss"]) for entry in run.entries())


def test_gradients_are_clipped_if_configured(dataset: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    numbers = itertools.count()

    def step_length(clip: float | None) -> float:
        changed = with_train(
            spec, clip_grad_norm=clip, epochs=0.1, warmup_steps=0, milestones=(), weight_decay=0.0
        )
        run = Run.create(tmp_path / f"run_{next(numbers)}", config="")
        model = build_detector(spec.model, num_classes=2, seed=spec.seed)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_run(run, changed, dataset)
        assert run.entries()[-1]["step"] == 1
        after = weights_of(run)
        return math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in before))

    assert step_length(0.1) == pytest.approx(0.1 * 0.01, rel=1e-2)
    assert step_length(None) > step_length(0.1)


def test_a_checkpoint_of_another_model_is_refused(trained: TrainedRun) -> None:
    model = trained.spec.model
    wider = dataclasses.replace(model, roi_head=dataclasses.replace(model.roi_head, hidden_dim=40))
    spec = dataclasses.replace(trained.spec, model=wider)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: belongs to another model: roi_head"):
        train_run(trained.run, spec, trained.dataset)


def test_a_checkpoint_cut_short_is_refused(trained: TrainedRun) -> None:
    path = trained.run.checkpoints[-1] / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: cannot be read as a checkpoint"):
        train_run(trained.run, trained.spec, trained.dataset)


def test_the_seed_decides_the_first_weights_and_no_global_generator_is_used(spec: ExperimentSpec) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again = (build_detector(spec.model, num_classes=2, seed=spec.seed).state_dict() for _ in range(2))
    other = build_detector(spec.model, num_classes=2, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


def test_precision_selects_the_autocast_type() -> None:
    assert autocast("bf16", CPU).fast_dtype == torch.bfloat16
    assert not autocast("fp32", CPU)._enabled
    assert autocast("bf16", CPU)._enabled


def test_scores_are_computed_once_even_if_the_run_was_killed_before_them(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(spec, epochs=3.5, evaluate_every=2)
    num_evaluations = 0
    reported: list[tuple[float, float]] = []

    def count(model: TwoStageDetector) -> float:
        nonlocal num_evaluations
        assert not model.training
        num_evaluations += 1
        if num_evaluations == 2:
            raise Killed
        return 0.5

    evaluate = FixedScores(score=count)
    callbacks = Callbacks(on_scores=lambda epoch, scores: reported.append((epoch, scores["ap"])))
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(Killed):
        train_run(run, spec, dataset, evaluate=evaluate, callbacks=callbacks)
    model = train_run(run, spec, dataset, evaluate=evaluate, callbacks=callbacks)
    assert model.training
    train_run(run, spec, dataset, evaluate=evaluate, callbacks=callbacks)
    assert num_evaluations == 3
    assert reported == [(2.0, 0.5), (3.5, 0.5)]
    entries = run.entries()
    scored = [entry for entry in entries if entry["stage"] == "evaluate"]
    assert [(entry["epoch"], entry["ap"]) for entry in scored] == reported
    assert scored[-1]["step"] == entries[-2]["step"] == num_steps_of(run)


def test_metrics_are_written_for_tensorboard(dataset: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    spec = with_train(spec, tensorboard=True)
    run = Run.create(tmp_path / "run", config="")
    train_killed_at(run, spec, dataset, step=3)
    train_run(run, spec, dataset)
    board = events.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    expected = [entry for entry in run.entries() if entry["stage"] == "train"]
    written = board.Scalars("train/loss")
    assert [point.step for point in written] == [entry["step"] for entry in expected]
    assert [point.value for point in written] == pytest.approx([entry["loss"] for entry in expected])


def test_a_run_that_needs_tensorboard_is_refused_without_it(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'sniper-det\[tensorboard\]'"):
        train_run(Run.create(tmp_path / "run", config=""), with_train(spec, tensorboard=True), dataset)
