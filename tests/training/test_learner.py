"""One update: what a batch is cut into, what the weights become, and what is said when it cannot be made."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sniper.config.experiment import ExperimentSpec
from sniper.data.batches import Batch, ChipDataset, collate
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import order_chips
from sniper.errors import CheckpointError, ConfigError, OutOfMemory, TrainingDiverged
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Progress, Run
from sniper.training.learner import Learner
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment

CPU = torch.device("cpu")


@pytest.fixture
def annotations(tmp_path: Path) -> Dataset:
    return load_dataset(write_dataset(tmp_path / "world"))


@pytest.fixture
def spec(annotations: Dataset) -> ExperimentSpec:
    """Batch norm is frozen, so that a chip does not depend on those beside it."""
    spec = tiny_experiment(annotations.path)
    backbone = dataclasses.replace(spec.model.backbone, batch_norm="frozen")
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, backbone=backbone))


@pytest.fixture
def batches(annotations: Dataset, spec: ExperimentSpec) -> list[Batch]:
    plan = order_chips(annotations, spec.pyramid, batch_size=4, flip=0.0, seed=0, epoch=0)
    chips = ChipDataset(plan)
    return [collate([chips[i] for i in range(start, start + 4)]) for start in range(0, len(chips) - 3, 4)]


def changed(spec: ExperimentSpec, **fields: Any) -> ExperimentSpec:
    return dataclasses.replace(spec, train=dataclasses.replace(spec.train, **fields))


def learner_of(spec: ExperimentSpec, *, ranks: Processes = SINGLE_PROCESS) -> Learner:
    return Learner(spec, num_classes=2, device=CPU, ranks=ranks, has_weights=False)


def learnt(spec: ExperimentSpec, batches: list[Batch], *, rate: float = 0.01) -> tuple[Learner, list[float]]:
    learner = learner_of(spec)
    values = [learner.learn(batch, rate=rate, step=step) for step, batch in enumerate(batches)]
    return learner, [sum(one[name] for name in one if name != "gradient_norm") for one in values]


def test_a_batch_cut_into_parts_teaches_what_the_whole_teaches(
    spec: ExperimentSpec, batches: list[Batch]
) -> None:
    whole, losses = learnt(spec, batches)
    parts, same_losses = learnt(changed(spec, accumulation_steps=2), batches)
    assert same_losses == pytest.approx(losses, rel=1e-4)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_losses_that_count_thrice_move_the_weights_thrice_as_far_and_are_told_as_they_are(
    spec: ExperimentSpec, batches: list[Batch]
) -> None:
    spec = changed(spec, weight_decay=0.0, clip_grad_norm=None)
    once, thrice, faster = (learner_of(spec) for _ in range(3))
    told = once.learn(batches[0], rate=0.01, step=0)
    weighted = thrice.learn(batches[0], rate=0.01, step=0, weight=3.0)
    faster.learn(batches[0], rate=0.03, step=0)
    assert weighted.pop("gradient_norm") == pytest.approx(3 * told.pop("gradient_norm"), rel=1e-5)
    assert weighted == pytest.approx(told)
    for one, other in zip(thrice.model.parameters(), faster.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [{"optimizer": "adamw"}, {"precision": "bf16"}, {"precision": "fp16"}, {}])
def test_every_optimizer_and_precision_learns(
    spec: ExperimentSpec, batches: list[Batch], fields: dict[str, Any]
) -> None:
    rate = 1e-3 if fields.get("optimizer") == "adamw" else 0.03
    _, losses = learnt(changed(spec, **fields), batches[:1] * 15, rate=rate)
    assert losses[-1] < 0.9 * losses[0]


def test_the_average_of_the_weights_lags_behind_them_and_is_what_is_used(
    spec: ExperimentSpec, batches: list[Batch]
) -> None:
    learner, _ = learnt(changed(spec, ema_decay=0.999), batches[:1])
    assert learner.best is not learner.model
    first = [parameter.detach().clone() for parameter in learner.best.parameters()]
    for one, other in zip(first, learner.model.parameters(), strict=True):
        assert torch.equal(one, other)  # after one step there is nothing to average
    learner.learn(batches[0], rate=0.01, step=1)
    decay = 1 - 2 ** (-2 / 3)  # of the second step; it grows
    moved = 0
    pairs = zip(first, learner.best.parameters(), learner.model.parameters(), strict=True)
    for before, average, now in pairs:
        torch.testing.assert_close(average, decay * before + (1 - decay) * now)
        moved += int(not torch.equal(average, now))
    assert moved > 0
    assert learnt(spec, batches[:1])[0].best is not None


@pytest.mark.parametrize(
    "fields",
    [{}, {"optimizer": "adamw"}, {"precision": "fp16"}, {"ema_decay": 0.99, "accumulation_steps": 2}],
)
def test_a_learner_that_goes_on_from_disk_learns_the_same_bits(
    annotations: Dataset,
    spec: ExperimentSpec,
    batches: list[Batch],
    tmp_path: Path,
    fields: dict[str, Any],
) -> None:
    spec = changed(spec, **fields)
    unbroken, losses = learnt(spec, batches[:3])
    first, _ = learnt(spec, batches[:2])
    run = Run.create(tmp_path / "run", config="")
    first.save(run, annotations, progress=Progress(step=2, step_in_epoch=2), keep=1)
    second = learner_of(spec)
    assert second.load(run, annotations) == Progress(step=2, step_in_epoch=2)
    values = second.learn(batches[2], rate=0.01, step=2)
    assert sum(values[name] for name in values if name != "gradient_norm") == losses[2]
    for ours, theirs in ((unbroken.model, second.model), (unbroken.best, second.best)):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_a_chip_whose_loss_is_no_number_is_named(
    spec: ExperimentSpec, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(spec)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    bad, compute = batches[0].names[2], TwoStageDetector.losses

    def losses(self: TwoStageDetector, batch: Batch) -> dict[str, torch.Tensor]:
        values = compute(self, batch)
        return {name: loss * math.nan if bad in batch.names else loss for name, loss in values.items()}

    monkeypatch.setattr(TwoStageDetector, "losses", losses)
    with pytest.raises(TrainingDiverged) as caught:
        learner.learn(batches[0], rate=0.01, step=7)
    assert str(caught.value).startswith("step 7: a loss or a gradient is not finite (rpn_objectness nan, ")
    assert f"chips whose losses are not: {bad}. A new run" in str(caught.value)
    after = learner.model.parameters()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _with_room_for(
    limit: int, compute: Callable[[TwoStageDetector, Batch], Any]
) -> Callable[[TwoStageDetector, Batch], Any]:
    def losses(self: TwoStageDetector, batch: Batch) -> Any:
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return compute(self, batch)

    return losses


@pytest.mark.parametrize(
    ("limit", "answer"),
    [
        (
            3,
            "4 chips of 64×64 at a time .* memory of cpu; 3 would. .*--train.accumulation_steps 2, .*--train.batch_size 3",  # noqa: E501,
        ),
        (
            1,
            "; 1 would. Keep the batch and say --train.accumulation_steps 4, or begin .*--train.batch_size 1.$",
        ),
        (0, "do not fit into the memory of cpu, nor does one"),
    ],
)
def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(
    spec: ExperimentSpec,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    answer: str,
) -> None:
    learner = learner_of(spec)
    monkeypatch.setattr(TwoStageDetector, "losses", _with_room_for(limit, TwoStageDetector.losses))
    with pytest.raises(OutOfMemory, match=answer):
        learner.learn(batches[0], rate=0.01, step=0)


def test_an_error_that_is_none_of_memory_is_not_taken_for_one(
    spec: ExperimentSpec, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(self: TwoStageDetector, batch: Batch) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(TwoStageDetector, "losses", losses)
    with pytest.raises(RuntimeError, match="shapes differ"):
        learner_of(spec).learn(batches[0], rate=0.01, step=0)


def test_what_cannot_be_shared_is_refused(spec: ExperimentSpec) -> None:
    with pytest.raises(ConfigError, match=r"4 chips cannot be shared equally by 3 processes$"):
        learner_of(spec, ranks=Processes(count=3))
    with pytest.raises(ConfigError, match="4 chips cannot be shared equally by 4 processes in 2 parts each"):
        learner_of(changed(spec, accumulation_steps=2), ranks=Processes(count=4))
    backbone = dataclasses.replace(spec.model.backbone, batch_norm="synced")
    synced = dataclasses.replace(spec, model=dataclasses.replace(spec.model, backbone=backbone))
    with pytest.raises(ConfigError, match="torch can sync statistics on GPUs only"):
        learner_of(synced, ranks=Processes(count=2))
    assert learner_of(synced).model is not None  # alone there is nothing to sync


def test_a_full_disk_is_told_and_leaves_the_checkpoints_before(
    annotations: Dataset,
    spec: ExperimentSpec,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, _ = learnt(spec, batches[:1])
    run = Run.create(tmp_path / "run", config="")
    learner.save(run, annotations, progress=Progress(step=1), keep=1)

    def save_half(path: Path, tensors: object, *, head: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("sniper.runs.run.save_tensors", save_half)
    message = (
        r"checkpoint of step 2 cannot be written \(No space left on device\); the last one .*/00000001\. "
    )
    with pytest.raises(CheckpointError, match=message):
        learner.save(run, annotations, progress=Progress(step=2), keep=1)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["00000001"]
    assert learner_of(spec).load(run, annotations) == Progress(step=1)


@pytest.mark.slow
def test_compiling_changes_no_name_and_no_loss(spec: ExperimentSpec, batches: list[Batch]) -> None:
    plain, losses = learnt(spec, batches[:1])
    compiled, same = learnt(changed(spec, compile=True), batches[:1])
    assert same == pytest.approx(losses, rel=1e-3)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
