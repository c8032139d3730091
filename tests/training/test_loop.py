"""Training: what is drawn depends on the place in the run alone, and nothing that goes wrong is hidden."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sniper.chips import LevelSpec, PyramidSpec
from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import build_table
from sniper.errors import (
    AnnotationError,
    CheckpointError,
    ChipTableError,
    ConfigError,
    RunError,
    TrainingDiverged,
)
from sniper.models.build import autocast, build_detector
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.run import Run
from sniper.training.loop import StepReport, order_epoch, train
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment

CPU = torch.device("cpu")


@pytest.fixture
def annotations(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path / "world"))


@pytest.fixture
def spec(annotations: Dataset) -> ExperimentSpec:
    return tiny_experiment(annotations.path)


def ignore(report: StepReport) -> None:
    pass


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return run.load_weights()[0]


def metrics_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def drawn_metrics_of(run: Run) -> list[dict[str, Any]]:
    """Leave out what the clock and the memory say."""
    measured = {"seconds", "chips_per_second", "data_wait", "peak_memory_gb"}
    return [{k: v for k, v in entry.items() if k not in measured} for entry in metrics_of(run)]


class Killed(Exception):
    """Stands for the end of a process, at any step."""


def train_killed_at(run: Run, spec: ExperimentSpec, annotations: Dataset, *, step: int) -> None:
    def kill(report: StepReport) -> None:
        if report.progress.step == step:
            raise Killed

    with pytest.raises(Killed):
        train(run, spec, annotations, device=CPU, watch=kill)


def test_a_run_that_was_killed_and_goes_on_ends_with_the_same_weights(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=2.5))
    unbroken = Run.create(tmp_path / "unbroken", config="")
    train(unbroken, spec, annotations, device=CPU, watch=ignore)
    num_steps = metrics_of(unbroken)[-1]["step"]
    assert num_steps > 6
    broken = Run.create(tmp_path / "broken", config="")
    for step in (1, 3, num_steps - 2):  # the watcher is told before the checkpoint: one step is made again
        train_killed_at(broken, spec, annotations, step=step)
    train(broken, spec, annotations, device=CPU, watch=ignore)

    one, other = weights_of(unbroken), weights_of(broken)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert drawn_metrics_of(unbroken) == drawn_metrics_of(broken)


WHOLE = WholeSpec(
    levels=(LevelSpec(factor=1.0, below=40), LevelSpec(long_side=64, at_least=24)), batch_megapixels=0.08
)


@pytest.mark.parametrize(
    "feed", [{"whole": WHOLE}, {"tiles": TileSpec(side=64, empty="drop")}, {"tiles": TileSpec(side=64)}]
)
def test_whole_images_and_tiles_are_learnt_from_and_runs_of_them_go_on(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path, feed: dict[str, Any]
) -> None:
    spec = dataclasses.replace(
        spec,
        data=dataclasses.replace(spec.data, **feed),
        train=dataclasses.replace(spec.train, batch_size=2, epochs=1.5),
    )
    unbroken = Run.create(tmp_path / "unbroken", config="")
    train(unbroken, spec, annotations, device=CPU, watch=ignore)
    entries = metrics_of(unbroken)
    first = order_epoch(spec, annotations, epoch=0)
    own = entries[: first.num_steps]
    assert sum(entry["megapixels"] for entry in own) == pytest.approx(first.megapixels, abs=1e-3)
    assert own[0]["chips"] == len(first.table)
    broken = Run.create(tmp_path / "broken", config="")
    train_killed_at(broken, spec, annotations, step=3)
    train(broken, spec, annotations, device=CPU, watch=ignore)
    one, other = weights_of(unbroken), weights_of(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert drawn_metrics_of(unbroken) == drawn_metrics_of(broken)


def test_whole_images_are_learnt_from_in_parts(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = dataclasses.replace(
        spec,
        data=dataclasses.replace(spec.data, whole=WHOLE),
        train=dataclasses.replace(spec.train, epochs=1.0, accumulation_steps=2),
    )
    run = Run.create(tmp_path / "run", config="")
    train(run, spec, annotations, device=CPU, watch=ignore)
    assert (np.diff(order_epoch(spec, annotations, epoch=0, num_shares=2).offsets) % 2 == 0).all()
    assert all(math.isfinite(entry["loss"]) for entry in metrics_of(run))


def test_a_run_of_whole_images_goes_on_with_as_many_parts_as_its_epoch_was_begun_with(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, whole=WHOLE))
    run = Run.create(tmp_path / "run", config="")
    train_killed_at(run, spec, annotations, step=3)
    halved = dataclasses.replace(spec, train=dataclasses.replace(spec.train, accumulation_steps=2))
    with pytest.raises(ConfigError, match=r"was 1 and is 2; go on with 1, or from a checkpoint at the end"):
        train(run, halved, annotations, device=CPU, watch=ignore)
    train(run, spec, annotations, device=CPU, watch=ignore)


def test_a_chip_table_gives_every_epoch_its_chips_also_when_the_file_is_gone(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    table = build_table(annotations, spec.pyramid, generator=np.random.default_rng(8))
    table.save(tmp_path / "table.npz", pyramid=spec.pyramid, digest=annotations.digest)
    spec = dataclasses.replace(
        spec, data=dataclasses.replace(spec.data, chips=str(tmp_path / "table.npz"), flip=0.0)
    )
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=2.0))
    unbroken = Run.create(tmp_path / "unbroken", config="")
    train(unbroken, spec, annotations, device=CPU, watch=ignore)
    assert {entry["chips"] for entry in metrics_of(unbroken) if "chips" in entry} == {len(table)}
    broken = Run.create(tmp_path / "broken", config="")
    train_killed_at(broken, spec, annotations, step=3)
    (tmp_path / "table.npz").unlink()
    train(broken, spec, annotations, device=CPU, watch=ignore)
    one, other = weights_of(unbroken), weights_of(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_chip_table_in_the_runs_own_place_is_kept(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    own = tmp_path / "run" / "chips.npz"
    own.parent.mkdir()
    table = build_table(annotations, spec.pyramid, generator=np.random.default_rng(8))
    table.save(own, pyramid=spec.pyramid, digest=annotations.digest)
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, chips=str(own)))
    train(Run.create(tmp_path / "run", config=""), spec, annotations, device=CPU, watch=ignore)
    assert own.exists()


def test_a_chip_table_of_another_pyramid_is_refused(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    table = build_table(annotations, PyramidSpec(), generator=np.random.default_rng(8))
    table.save(tmp_path / "table.npz", pyramid=PyramidSpec(), digest=annotations.digest)
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, chips=str(tmp_path / "table.npz")))
    with pytest.raises(ChipTableError, match=r"table\.npz: made with another pyramid"):
        train(Run.create(tmp_path / "run", config=""), spec, annotations, device=CPU, watch=ignore)


def test_loader_processes_change_no_weight(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    runs = []
    for count in (0, 1):
        data = dataclasses.replace(spec.data, num_workers=count)
        run = Run.create(tmp_path / f"with_{count}", config="")
        train(run, dataclasses.replace(spec, data=data), annotations, device=CPU, watch=ignore)
        runs.append(weights_of(run))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_fraction_of_an_epoch_makes_a_fraction_of_its_steps(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    reports: list[StepReport] = []
    train(Run.create(tmp_path / "run", config=""), spec, annotations, device=CPU, watch=reports.append)
    per_epoch = sum(report.epoch <= 1 for report in reports)
    assert len(reports) == pytest.approx(1.5 * per_epoch, abs=2)
    assert reports[-1].epoch == pytest.approx(1.5, abs=0.2)
    assert reports[-1].steps_left == 0
    assert reports[0].learning_rate == pytest.approx(0.01 / 30)
    assert reports[-1].learning_rate == pytest.approx(0.001)


def test_a_run_may_be_lengthened_and_takes_the_rest_of_the_epoch_first(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    whole = Run.create(tmp_path / "whole", config="")
    parts = Run.create(tmp_path / "parts", config="")
    plain = dataclasses.replace(spec.train, milestones=())
    for run, epochs in ((whole, 2.0), (parts, 0.5), (parts, 1.3), (parts, 2.0)):
        longer = dataclasses.replace(spec, train=dataclasses.replace(plain, epochs=epochs))
        train(run, longer, annotations, device=CPU, watch=ignore)
    one, other = weights_of(whole), weights_of(parts)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_metrics_hold_a_line_for_each_step(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    train(run, spec, annotations, device=CPU, watch=ignore)
    entries = metrics_of(run)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[0]["chips"] > 0
    assert set(entries[1]) >= {"epoch", "loss", "rpn_objectness", "rpn_box", "head_class", "head_box"}


def test_only_the_newest_checkpoints_are_kept(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    train(run, spec, annotations, device=CPU, watch=ignore)
    last = metrics_of(run)[-1]["step"]
    assert [path.name for path in run.checkpoints] == [f"{last - 1:08d}", f"{last:08d}"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_images(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    wild = dataclasses.replace(spec.train, learning_rate=1e30, warmup_steps=0, milestones=())
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(
        TrainingDiverged,
        match=r"step \d+: a loss or a gradient is not finite \(.*\); chips.*: train_\d\.png \(level \d, x ",
    ):
        train(run, dataclasses.replace(spec, train=wild), annotations, device=CPU, watch=ignore)
    assert all(math.isfinite(entry["loss"]) for entry in metrics_of(run))


def test_gradients_are_clipped_when_asked(annotations: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    numbers = itertools.count()

    def step_length(clip: float | None) -> float:
        changed = dataclasses.replace(
            spec.train, clip_grad_norm=clip, epochs=0.1, warmup_steps=0, milestones=(), weight_decay=0.0
        )
        run = Run.create(tmp_path / f"run_{next(numbers)}", config="")
        model = build_detector(spec.model, num_classes=2, seed=spec.seed)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(run, dataclasses.replace(spec, train=changed), annotations, device=CPU, watch=ignore)
        assert metrics_of(run)[-1]["step"] == 1
        after = weights_of(run)
        return math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in before))

    assert step_length(0.1) == pytest.approx(0.1 * 0.01, rel=1e-2)
    assert step_length(None) > step_length(0.1)


def test_a_checkpoint_of_another_model_is_refused(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    train(run, spec, annotations, device=CPU, watch=ignore)
    wider = dataclasses.replace(spec.model, roi_head=dataclasses.replace(spec.model.roi_head, hidden_dim=40))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: belongs to another model: roi_head"):
        train(run, dataclasses.replace(spec, model=wider), annotations, device=CPU, watch=ignore)


def test_a_checkpoint_cut_short_is_refused(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run", config="")
    train(run, spec, annotations, device=CPU, watch=ignore)
    path = run.checkpoints[-1] / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: cannot be read as a checkpoint"):
        train(run, spec, annotations, device=CPU, watch=ignore)


def test_annotations_without_a_single_box_are_refused(spec: ExperimentSpec, tmp_path: Path) -> None:
    empty = load_dataset(write_dataset(tmp_path / "empty", boxes_per_image=0))
    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(AnnotationError, match=r"train\.json: has no box to learn from"):
        train(run, spec, empty, device=CPU, watch=ignore)


def test_the_seed_decides_the_first_weights_and_touches_no_global_generator(spec: ExperimentSpec) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, other = (build_detector(spec.model, num_classes=2, seed=spec.seed).state_dict() for _ in range(2))
    third = build_detector(spec.model, num_classes=2, seed=1).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)
    assert torch.equal(state, torch.get_rng_state())


def test_precision_is_what_was_asked_for() -> None:
    assert autocast("bf16", CPU).fast_dtype == torch.bfloat16
    assert not autocast("fp32", CPU)._enabled
    assert autocast("bf16", CPU)._enabled


def test_scores_are_told_after_epochs_and_once_also_if_the_run_is_killed_before_them(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, epochs=3.5, evaluate_every=2))
    told: list[float] = []

    def score(model: TwoStageDetector, epoch: float) -> dict[str, float]:
        assert not model.training
        told.append(epoch)
        if told == [2.0, 3.5]:
            raise Killed
        return {"ap": 0.5}

    run = Run.create(tmp_path / "run", config="")
    with pytest.raises(Killed):
        train(run, spec, annotations, device=CPU, watch=ignore, score=score)
    model = train(run, spec, annotations, device=CPU, watch=ignore, score=score)
    assert model.training
    train(run, spec, annotations, device=CPU, watch=ignore, score=score)
    assert told == [2.0, 3.5, 3.5]
    entries = metrics_of(run)
    scored = [entry for entry in entries if entry["stage"] == "evaluate"]
    assert [(entry["epoch"], entry["ap"]) for entry in scored] == [(2.0, 0.5), (3.5, 0.5)]
    assert scored[-1]["step"] == entries[-2]["step"]


def test_metrics_go_to_tensorboard_too(annotations: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, tensorboard=True))
    run = Run.create(tmp_path / "run", config="")
    train_killed_at(run, spec, annotations, step=3)
    train(run, spec, annotations, device=CPU, watch=ignore)
    board = events.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    wanted = metrics_of(run)
    written = board.Scalars("train/loss")
    assert [point.step for point in written] == [entry["step"] for entry in wanted]
    assert [point.value for point in written] == pytest.approx([entry["loss"] for entry in wanted])


def test_without_tensorboard_a_run_that_asks_for_it_is_refused(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, tensorboard=True))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'sniper-det\[tensorboard\]'"):
        train(Run.create(tmp_path / "run", config=""), spec, annotations, device=CPU, watch=ignore)


def test_a_run_goes_back_to_an_older_checkpoint_when_asked_and_loses_nothing(
    annotations: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, keep_checkpoints=3))
    run = Run.create(tmp_path / "run", config="")
    train(run, spec, annotations, device=CPU, watch=ignore)
    before = weights_of(run)
    older, last = run.checkpoints[-2:]
    path = last / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    message = rf"optimizer\.safetensors: cannot be read .*--resume --step {int(older.name)}, or by"
    with pytest.raises(CheckpointError, match=message):
        train(run, spec, annotations, device=CPU, watch=ignore)
    with pytest.raises(RunError, match=r"has no checkpoint of step 999; there are \d+, "):
        run.go_back_to(999)
    run.go_back_to(int(older.name))
    assert run.checkpoints[-1] == older
    assert (last.parent / f"{last.name}.aside" / "weights.safetensors").is_file()
    train(run, spec, annotations, device=CPU, watch=ignore)
    after = weights_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
