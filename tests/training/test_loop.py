"""The training loop: all random draws depend on the position in the run only, and no error is hidden."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sniper.chips import LevelSpec
from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_experiment, load_experiment
from sniper.data.batches import Batch
from sniper.data.datasets import Dataset
from sniper.errors import CheckpointError, ConfigError, TrainingDiverged
from sniper.models.build import autocast, build_detector
from sniper.models.protocol import DetectorModel
from sniper.runs.run import Run
from sniper.training import workers
from sniper.training.callbacks import Callbacks, EpochReport, StepReport
from sniper.training.epochs import order_epoch
from sniper.training.learner import Learner, Update
from sniper.training.length import TimeLimit
from sniper.training.pace import Pace
from tests.training.experiments import (
    CPU,
    FixedScores,
    Killed,
    TrainedRun,
    deterministic_metrics,
    have_equal_weights,
    train_killed_at,
    train_run,
    weights_of,
    with_data,
    with_train,
)


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


def test_more_loader_processes_from_a_step_on_do_not_change_the_weights(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_NUM_SKIPPED", 1)
    monkeypatch.setattr(workers, "_NUM_STEPS", 1)
    monkeypatch.setattr(workers, "_WAITING_SHARE", -1.0)
    monkeypatch.setattr(workers, "_usable_cores", lambda: 2)
    run = Run.create(tmp_path / "run", config="")
    notices: list[str] = []
    spec = with_data(trained.spec, num_workers=None)
    train_run(run, spec, trained.dataset, callbacks=Callbacks(on_notice=notices.append))
    assert [notice.partition(" ")[0] for notice in notices] == ["2"]
    assert have_equal_weights(run, trained.run)
    assert deterministic_metrics(run) == deterministic_metrics(trained.run)


def test_a_fraction_of_an_epoch_makes_a_fraction_of_its_steps(trained: TrainedRun) -> None:
    reports = trained.reports
    per_epoch = sum(report.epoch <= 1 for report in reports)
    assert len(reports) == pytest.approx(1.5 * per_epoch, abs=2)
    assert reports[-1].epoch == pytest.approx(1.5, abs=0.2)
    assert reports[-1].steps_left == 0
    assert reports[0].learning_rate == pytest.approx(0.01 / 30)
    assert reports[-1].learning_rate == pytest.approx(0.001)


def test_a_length_that_is_rounded_to_a_whole_epoch_is_reported_as_it_is_set(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    reports: list[EpochReport] = []
    run = Run.create(tmp_path / "run", config="")
    train_run(run, with_train(spec, epochs=0.99), dataset, callbacks=Callbacks(on_epoch=reports.append))
    progress = run.progress
    assert (progress.epoch, progress.step_in_epoch) == (1, 0)
    assert [report.epoch for report in reports] == [0.99]


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
        match=r"step \d+: a loss or a gradient is not finite \(.*\); chips.*: train_\d\.png \(×[\d.]+, x ",
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
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: does not fit the model: roi_head"):
        train_run(trained.run, spec, trained.dataset)


def test_another_environment_is_reported_when_a_run_continues(
    trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    warned: list[str] = []
    train_run(trained.run, trained.spec, trained.dataset, callbacks=Callbacks(on_warning=warned.append))
    assert len(warned) == 1
    assert "the number of threads was 1 and is 3" in warned[0]


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

    def count(model: DetectorModel) -> float:
        nonlocal num_evaluations
        assert not model.training
        num_evaluations += 1
        if num_evaluations == 2:
            raise Killed
        return 0.5

    evaluate = FixedScores(score=count)
    callbacks = Callbacks(on_scores=lambda report: reported.append((report.epoch, report.scores["ap"])))
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


def test_the_means_of_an_epoch_are_those_of_its_steps(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(spec, epochs=1.5)
    reports: list[EpochReport] = []
    run = Run.create(tmp_path / "run", config="")
    train_killed_at(run, spec, dataset, step=3)  # the means are of all steps, also of those before
    train_run(run, spec, dataset, callbacks=Callbacks(on_epoch=reports.append))
    entries = run.entries()
    epochs = [entry for entry in entries if entry["stage"] == "epoch"]
    assert [report.epoch for report in reports] == [1.0, 1.5]
    first = 0
    for epoch, report in zip(epochs, reports, strict=True):
        steps = [
            entry for entry in entries if entry["stage"] == "train" and first < entry["step"] <= epoch["step"]
        ]
        first = epoch["step"]
        num_positives = sum(entry["positives"] for entry in steps)
        num_correct = sum(entry["positives"] * entry.get("positive_accuracy", 0) for entry in steps)
        assert num_positives > 0
        assert epoch["positive_accuracy"] == pytest.approx(num_correct / num_positives, abs=1e-4)
        assert epoch["loss"] == pytest.approx(sum(entry["loss"] for entry in steps) / len(steps), abs=1e-5)
        assert (report.loss, report.positive_accuracy) == (epoch["loss"], epoch["positive_accuracy"])
    assert all(
        entry["loss"]
        == pytest.approx(sum(entry[name] for name in ("rpn_objectness", "rpn_box", "head_class", "head_box")))
        for entry in entries
        if entry["stage"] == "train"
    )


def scored(*aps: float, **fields: int) -> FixedScores:
    """Return an evaluator that gives a detector one score after the other."""
    values = iter(aps)
    return FixedScores(score=lambda _: next(values), **fields)


def test_the_best_checkpoint_is_kept_beside_the_newest(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(spec, epochs=4.0, evaluate_every=1, keep_checkpoints=1, ema_decay=0.9)
    reports: list[EpochReport] = []
    run = Run.create(tmp_path / "run", config="")
    train_run(
        run,
        spec,
        dataset,
        evaluate=scored(0.1, 0.5, 0.3, 0.2),
        callbacks=Callbacks(on_epoch=reports.append),
    )
    assert [report.is_best for report in reports] == [True, True, False, False]
    best = run.best
    assert best is not None
    assert (best.epoch, best.ap) == (2, 0.5)
    assert [int(path.name) for path in run.checkpoints] == [best.step, num_steps_of(run)]
    assert run.weights_path == run.checkpoints[0] / "ema.safetensors"
    train_run(run, with_train(spec, epochs=5.0), dataset, evaluate=scored(0.6))
    assert [int(path.name) for path in run.checkpoints] == [num_steps_of(run)]
    assert run.best is not None
    assert run.best.epoch == 5


def test_the_best_checkpoint_is_scored_on_all_images_at_the_end(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(spec, epochs=3.0, evaluate_every=1)
    run = Run.create(tmp_path / "run", config="")
    seen: list[dict[str, torch.Tensor]] = []
    values = iter([0.1, 0.5, 0.3, 0.45])

    def score(model: DetectorModel) -> float:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(values)

    evaluate = FixedScores(score=score, num_scored=2, num_images=4)
    model = train_run(run, spec, dataset, evaluate=evaluate)
    second, last, final = seen[1:]
    assert all(torch.equal(second[name], tensor) for name, tensor in final.items())
    assert all(torch.equal(last[name], tensor) for name, tensor in model.state_dict().items())
    scores = run.best_scores()
    assert scores is not None
    assert (scores["ap"], scores["num_images"], scores["epoch"]) == (0.45, 4, 2)
    train_run(run, spec, dataset, evaluate=evaluate)
    assert len(seen) == 4


@pytest.mark.parametrize("killed_at", [None, 2, 4])
def test_evaluations_without_a_better_score_end_the_training(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, killed_at: int | None
) -> None:
    spec = with_train(spec, epochs=9.0, evaluate_every=1, patience=2)
    scores = [0.2, 0.4, 0.4, 0.3, 0.9]
    run = Run.create(tmp_path / "run", config="")
    num_evaluations = 0
    notices: list[str] = []

    def score(_: DetectorModel) -> float:
        nonlocal num_evaluations, killed_at
        num_evaluations += 1
        if num_evaluations == killed_at:
            num_evaluations -= 1
            killed_at = None
            raise Killed
        return scores[num_evaluations - 1]

    def train() -> None:
        callbacks = Callbacks(on_notice=notices.append)
        train_run(run, spec, dataset, evaluate=FixedScores(score=score), callbacks=callbacks)

    if killed_at is not None:
        with pytest.raises(Killed):
            train()
    train()
    train()  # a run that has stopped is complete
    assert num_evaluations == 4
    assert run.entries()[-1]["epoch"] == 4
    assert "2 evaluations without a better AP than 0.400" in notices[-1]


def test_undefined_scores_do_not_end_the_training(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_train(spec, epochs=3.0, evaluate_every=1, patience=1)
    run = Run.create(tmp_path / "run", config="")
    train_run(run, spec, dataset, evaluate=scored(-1.0, -1.0, -1.0))
    assert run.entries()[-1]["epoch"] == 3


class Clock:
    """A clock that advances by the seconds of each step and evaluation."""

    def __init__(self, seconds_of_step: Callable[[int], float]) -> None:
        self.now = 0.0
        self.seconds_of_step = seconds_of_step

    def __call__(self) -> float:
        return self.now

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        update = Learner.update

        def timed(learner: Learner, batch: Batch, **arguments: Any) -> Update:
            self.now += self.seconds_of_step(arguments["step"])
            return update(learner, batch, **arguments)

        monkeypatch.setattr(Learner, "update", timed)

    def score(self, _: DetectorModel) -> float:
        self.now += 4.0
        return 0.5


def test_no_time_is_left_after_the_last_evaluation(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_train(spec, epochs=4.0, evaluate_every=2)
    clock = Clock(lambda _: 20.0)
    clock.install(monkeypatch)
    left: list[float] = []
    train_run(
        Run.create(tmp_path / "run", config=""),
        spec,
        dataset,
        evaluate=FixedScores(score=clock.score),
        callbacks=Callbacks(on_time_left=left.append),
        pace=Pace(clock),
    )
    assert left[-1] == 0.0
    assert left[-2] > 0.0


@pytest.mark.parametrize(
    ("seconds", "epochs"),
    [(lambda _: 2.5, 3.0), (lambda _: 2.5, 20.0), (lambda step: 2.5 if step < 6 else 3.5, 6.0)],
)
def test_a_limited_training_ends_in_time_and_its_configuration_reproduces_it(
    dataset: Dataset,
    spec: ExperimentSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    epochs: float,
) -> None:
    """The epochs at the start are a wrong estimate; 100 seconds are given."""
    milestones = (round(0.75 * epochs, 3), round(0.92 * epochs, 3))
    spec = with_train(
        spec,
        epochs=epochs,
        milestones=milestones,
        evaluate_every=4,
        warmup_steps=3,
        checkpoint_minutes=10.0,
    )
    clock = Clock(seconds)
    notices: list[str] = []
    clock.install(monkeypatch)
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    train_run(
        run,
        spec,
        dataset,
        evaluate=FixedScores(score=clock.score),
        callbacks=Callbacks(on_notice=notices.append),
        pace=Pace(clock),
        limit=TimeLimit(seconds=100.0, end=100.0),
    )
    assert 95 <= clock.now <= 100 + seconds(1000)  # a step that has begun is completed
    corrected = load_experiment(run.config_path)
    assert notices
    assert corrected.train.epochs != epochs
    assert dataclasses.replace(corrected, train=spec.train) == spec
    first, second = (milestone / corrected.train.epochs for milestone in corrected.train.milestones)
    assert (first, second) == pytest.approx((0.75, 0.92), abs=0.03)
    again = Run.create(tmp_path / "again", config="")
    train_run(again, corrected, dataset, evaluate=FixedScores(score=clock.score))
    assert have_equal_weights(run, again)
    steps, steps_again = (
        [entry for entry in deterministic_metrics(made) if entry["stage"] == "train"] for made in (run, again)
    )
    assert steps == steps_again


def test_a_limited_training_that_was_killed_continues_with_the_corrected_length(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_train(
        spec, epochs=4.0, milestones=(3.0,), warmup_steps=2, checkpoint_minutes=10.0, evaluate_every=None
    )
    clock = Clock(lambda _: 1.0)
    clock.install(monkeypatch)

    def kill(report: StepReport) -> None:
        if report.epochs > 4 and report.progress.step > 12:
            raise Killed

    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    limit = TimeLimit(seconds=30.0, end=30.0)
    with pytest.raises(Killed):
        train_run(run, spec, dataset, callbacks=Callbacks(on_step=kill), pace=Pace(clock), limit=limit)
    corrected = load_experiment(run.config_path)
    assert corrected.train.epochs > 6
    train_run(run, corrected, dataset)
    unbroken = Run.create(tmp_path / "unbroken", config="")
    train_run(unbroken, corrected, dataset)
    assert have_equal_weights(run, unbroken)


def test_a_training_that_becomes_slow_at_its_end_is_completed_with_a_warning(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_train(spec, epochs=12.0, milestones=(9.0,), warmup_steps=2, checkpoint_minutes=10.0)
    num_steps = 12 * order_epoch(spec, dataset, epoch=0).num_steps
    clock = Clock(lambda step: 1.0 if step < 0.8 * num_steps else 4.0)
    warnings: list[str] = []
    clock.install(monkeypatch)
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    train_run(
        run,
        spec,
        dataset,
        callbacks=Callbacks(on_warning=warnings.append),
        pace=Pace(clock),
        limit=TimeLimit(seconds=1.02 * num_steps, end=1.02 * num_steps),
    )
    assert [entry["stage"] for entry in run.entries()].count("length") == 0
    assert run.entries()[-1]["epoch"] == 12
    assert len(warnings) == 1
    assert "longer than --time; it is not cut off" in warnings[0]
