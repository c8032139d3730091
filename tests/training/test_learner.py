"""One update: how a batch is divided, what the weights become, and the errors when it cannot be made."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sniper.chips.baselines import WholeSpec
from sniper.config.experiment import ExperimentSpec
from sniper.data.batches import Batch, ChipDataset, collate
from sniper.data.datasets import Dataset
from sniper.data.epoch import order_chips
from sniper.errors import CheckpointError, ConfigError, OutOfMemory, TrainingDiverged
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.checkpoints import Checkpoint, Progress
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Run
from sniper.training.learner import Learner, Update
from tests.training.experiments import CPU, tiny_experiment, with_data, with_train


@pytest.fixture
def spec(dataset: Dataset) -> ExperimentSpec:
    """Batch norm is frozen, so that the losses of a chip do not depend on the other chips of its batch."""
    return with_batch_norm(tiny_experiment(dataset.path), "frozen")


@pytest.fixture
def batches(dataset: Dataset, spec: ExperimentSpec) -> list[Batch]:
    order = order_chips(dataset, spec.pyramid, batch_size=4, flip=0.0, seed=0, epoch=0)
    chips = ChipDataset(order)
    return [collate([chips[i] for i in range(start, start + 4)]) for start in range(0, len(chips) - 3, 4)]


def with_batch_norm(spec: ExperimentSpec, batch_norm: Any) -> ExperimentSpec:
    backbone = dataclasses.replace(spec.model.backbone, batch_norm=batch_norm)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, backbone=backbone))


def build_learner(spec: ExperimentSpec, *, processes: Processes = SINGLE_PROCESS) -> Learner:
    return Learner(spec, num_classes=2, device=CPU, processes=processes, has_weights=False)


def total(update: Update) -> float:
    return sum(update.losses.values())


def train_on(
    spec: ExperimentSpec, batches: list[Batch], *, learning_rate: float = 0.01
) -> tuple[Learner, list[float]]:
    """Make an update for each batch; returns the learner and the total loss of each."""
    learner = build_learner(spec)
    losses = [
        total(learner.update(batch, learning_rate=learning_rate, step=step))
        for step, batch in enumerate(batches)
    ]
    return learner, losses


def test_accumulating_gradients_equals_one_large_batch(spec: ExperimentSpec, batches: list[Batch]) -> None:
    whole, losses = train_on(spec, batches)
    accumulated, accumulated_losses = train_on(with_train(spec, accumulation_steps=2), batches)
    assert accumulated_losses == pytest.approx(losses, rel=1e-4)
    first, second = (build_learner(with_train(spec, accumulation_steps=n)) for n in (1, 2))
    counted, summed = (made.update(batches[0], learning_rate=0.01, step=0) for made in (first, second))
    assert 0 < counted.num_positives == summed.num_positives
    assert counted.num_correct == summed.num_correct
    for parameter, other in zip(whole.model.parameters(), accumulated.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


def test_a_weight_scales_the_update_but_not_the_reported_losses(
    spec: ExperimentSpec, batches: list[Batch]
) -> None:
    spec = with_train(spec, weight_decay=0.0, clip_grad_norm=None)
    plain, weighted, faster = (build_learner(spec) for _ in range(3))
    update = plain.update(batches[0], learning_rate=0.01, step=0)
    weighted_update = weighted.update(batches[0], learning_rate=0.01, step=0, weight=3.0)
    faster.update(batches[0], learning_rate=0.03, step=0)
    assert weighted_update.gradient_norm == pytest.approx(3 * update.gradient_norm, rel=1e-5)
    assert weighted_update.losses == pytest.approx(update.losses)
    for parameter, other in zip(weighted.model.parameters(), faster.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [{"optimizer": "adamw"}, {"precision": "bf16"}, {"precision": "fp16"}, {}])
def test_every_optimizer_and_precision_lowers_the_loss(
    spec: ExperimentSpec, batches: list[Batch], fields: dict[str, Any]
) -> None:
    learning_rate = 1e-3 if fields.get("optimizer") == "adamw" else 0.03
    _, losses = train_on(with_train(spec, **fields), batches[:1] * 15, learning_rate=learning_rate)
    assert losses[-1] < 0.9 * losses[0]


def test_the_moving_average_follows_the_weights_and_is_used_for_inference(
    spec: ExperimentSpec, batches: list[Batch]
) -> None:
    learner, _ = train_on(with_train(spec, ema_decay=0.999), batches[:1])
    assert learner.inference_model is not learner.model
    before = [parameter.detach().clone() for parameter in learner.inference_model.parameters()]
    for average, parameter in zip(before, learner.model.parameters(), strict=True):
        assert torch.equal(average, parameter)  # after one step there is nothing to average
    learner.update(batches[0], learning_rate=0.01, step=1)
    decay = 1 - 2 ** (-2 / 3)  # of the second step; it grows
    num_different = 0
    triples = zip(before, learner.inference_model.parameters(), learner.model.parameters(), strict=True)
    for first, average, parameter in triples:
        torch.testing.assert_close(average, decay * first + (1 - decay) * parameter)
        num_different += int(not torch.equal(average, parameter))
    assert num_different > 0


def test_without_a_moving_average_the_model_is_used_for_inference(spec: ExperimentSpec) -> None:
    learner = build_learner(spec)
    assert learner.inference_model is learner.model


def test_evaluating_restores_weights_and_training_mode(spec: ExperimentSpec, batches: list[Batch]) -> None:
    learner, _ = train_on(with_batch_norm(spec, "trained"), batches[:1])
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    with learner.evaluating() as model:
        assert model is learner.model
        assert not model.training
        model.load_state_dict({name: tensor * 2 for name, tensor in before.items()})
    assert learner.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [{}, {"optimizer": "adamw"}, {"precision": "fp16"}, {"ema_decay": 0.99, "accumulation_steps": 2}],
)
def test_a_learner_loaded_from_disk_continues_bit_for_bit(
    dataset: Dataset, spec: ExperimentSpec, batches: list[Batch], tmp_path: Path, fields: dict[str, Any]
) -> None:
    spec = with_train(spec, **fields)
    unbroken, losses = train_on(spec, batches[:3])
    first, _ = train_on(spec, batches[:2])
    run = Run.create(tmp_path / "run", config="")
    first.save(run, dataset.identity, progress=Progress(step=2, step_in_epoch=2), keep=1)
    second = build_learner(spec)
    assert second.load(run, dataset.identity) == Progress(step=2, step_in_epoch=2)
    assert total(second.update(batches[2], learning_rate=0.01, step=2)) == losses[2]
    pairs = ((unbroken.model, second.model), (unbroken.inference_model, second.inference_model))
    for expected, model in pairs:
        state = model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "train"),
    [
        ({"neck": "fpn"}, {}),
        ({"num_feature_maps": 1}, {"momentum": 0.0}),
        ({"deformable": True, "frozen_stages": 1}, {"optimizer": "adamw"}),
        ({}, {"rpn_only": True}),
    ],
)
def test_every_trained_parameter_has_a_state_after_one_update(
    dataset: Dataset,
    spec: ExperimentSpec,
    batches: list[Batch],
    tmp_path: Path,
    backbone: dict[str, Any],
    train: dict[str, Any],
) -> None:
    sizes = (8, 16, 32, 64, 128) if "neck" in backbone else spec.model.rpn.anchor_sizes
    model = dataclasses.replace(
        spec.model,
        backbone=dataclasses.replace(spec.model.backbone, **backbone),
        rpn=dataclasses.replace(spec.model.rpn, anchor_sizes=sizes),
    )
    spec = with_train(dataclasses.replace(spec, model=model), **train)
    run = Run.create(tmp_path / "run", config="")
    train_on(spec, batches[:1])[0].save(run, dataset.identity, progress=Progress(step=1), keep=1)
    build_learner(spec).load(run, dataset.identity)  # refuses a state that is missing


def test_what_changes_bits_is_warned_of_when_a_run_continues(
    dataset: Dataset,
    spec: ExperimentSpec,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run.create(tmp_path / "run", config="")
    train_on(spec, batches[:1])[0].save(
        run, dataset.identity, progress=Progress(step=1, step_in_epoch=1), keep=1
    )
    build_learner(spec).load(run, dataset.identity)  # nothing differs, and warnings are errors
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found: list[str] = []
    changed = build_learner(with_train(spec, accumulation_steps=2))
    changed.load(run, dataset.identity, on_warning=found.append)
    assert found == [
        f"{run.checkpoints[-1]}: the run continues, but its weights will not equal those of an uninterrupted run to "
        "the last bit: the number of threads was 1 and is 3; train.accumulation_steps was 1 and is 2"
    ]
    with pytest.warns(UserWarning, match="the number of threads was 1 and is 3"):
        build_learner(spec).load(run, dataset.identity)
    second = build_learner(spec, processes=Processes(rank=1, world_size=1))
    second.load(run, dataset.identity)  # the first process warns


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"scale": -1.0}, {"growth_interval": 2.5}, {"more": 1}])
def test_a_loss_scale_of_other_values_is_refused(
    dataset: Dataset, spec: ExperimentSpec, batches: list[Batch], tmp_path: Path, change: dict[str, float]
) -> None:
    spec = with_train(spec, precision="fp16")
    run = Run.create(tmp_path / "run", config="")
    learner = train_on(spec, batches[:1])[0]
    learner.save(run, dataset.identity, progress=Progress(step=1, step_in_epoch=1), keep=1)
    saved = Checkpoint.load(run.checkpoints[-1])
    counters = dataclasses.replace(saved.counters, loss_scale={**saved.counters.loss_scale, **change})
    dataclasses.replace(saved, counters=counters).save(run.folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: loss_scale: expected values such as"):
        build_learner(spec).load(run, dataset.identity)


def test_a_chip_whose_loss_is_not_finite_is_named(
    spec: ExperimentSpec, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = build_learner(spec)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    bad, compute = batches[0].names[2], TwoStageDetector.losses_and_counts

    def losses(self: TwoStageDetector, batch: Batch) -> Any:
        values, counts = compute(self, batch)
        return {
            name: loss * math.nan if bad in batch.names else loss for name, loss in values.items()
        }, counts

    monkeypatch.setattr(TwoStageDetector, "losses_and_counts", losses)
    with pytest.raises(TrainingDiverged) as caught:
        learner.update(batches[0], learning_rate=0.01, step=7)
    assert str(caught.value).startswith("step 7: a loss or a gradient is not finite (rpn_objectness nan, ")
    assert f"chips with such a loss: {bad}. Start a new run" in str(caught.value)
    after = learner.model.parameters()
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({}, "at 4 chips of 64×64; reduce train.batch_size or raise train.accumulation_steps"),
        ({"whole": WholeSpec()}, "at 4 chips of 64×64; reduce data.whole.batch_megapixels or raise train"),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_answered_with_advice(
    spec: ExperimentSpec,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    advice: str,
) -> None:
    def losses(self: TwoStageDetector, batch: Batch) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(TwoStageDetector, "losses_and_counts", losses)
    with pytest.raises(OutOfMemory, match=f"step 3: cpu is out of memory {advice}"):
        build_learner(with_data(spec, **fields)).update(batches[0], learning_rate=0.01, step=3)


def test_another_error_is_not_taken_for_lack_of_memory(
    spec: ExperimentSpec, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(self: TwoStageDetector, batch: Batch) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(TwoStageDetector, "losses_and_counts", losses)
    with pytest.raises(RuntimeError, match="shapes differ"):
        build_learner(spec).update(batches[0], learning_rate=0.01, step=0)


@pytest.mark.parametrize(
    ("world_size", "accumulation_steps", "message"),
    [
        (3, 1, r"4 chips cannot be divided equally among 3 processes$"),
        (4, 2, r"4 chips cannot be divided equally among 4 processes in 2 parts each$"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(
    spec: ExperimentSpec, world_size: int, accumulation_steps: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_learner(
            with_train(spec, accumulation_steps=accumulation_steps),
            processes=Processes(world_size=world_size),
        )


def test_synced_batch_norm_needs_gpus_unless_there_is_one_process(spec: ExperimentSpec) -> None:
    synced = with_batch_norm(spec, "synced")
    with pytest.raises(ConfigError, match="torch synchronizes statistics on GPUs only"):
        build_learner(synced, processes=Processes(world_size=2))
    assert build_learner(synced).model is not None


def test_a_full_disk_is_reported_and_earlier_checkpoints_are_kept(
    dataset: Dataset,
    spec: ExperimentSpec,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, _ = train_on(spec, batches[:1])
    run = Run.create(tmp_path / "run", config="")
    learner.save(run, dataset.identity, progress=Progress(step=1), keep=1)

    def save_half(path: Path, tensors: object, *, head: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("sniper.runs.checkpoints.save_tensors", save_half)
    message = (
        r"checkpoint of step 2 cannot be written \(No space left on device; free space on its disk, or use a folder "
        r"on another one\); the newest complete one is "
        r".*/00000001\. "
    )
    with pytest.raises(CheckpointError, match=message):
        learner.save(run, dataset.identity, progress=Progress(step=2), keep=1)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["00000001"]
    assert build_learner(spec).load(run, dataset.identity) == Progress(step=1)


@pytest.mark.slow
def test_compiling_changes_no_name_and_no_loss(spec: ExperimentSpec, batches: list[Batch]) -> None:
    plain, losses = train_on(spec, batches[:1])
    compiled, compiled_losses = train_on(with_train(spec, compile=True), batches[:1])
    assert compiled_losses == pytest.approx(losses, rel=1e-3)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
