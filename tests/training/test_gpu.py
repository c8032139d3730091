"""Training on a GPU: when it synchronizes, precisions, layout, processes, resuming; also on a CPU where possible."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from sniper.chips import BoxStatus
from sniper.config.experiment import ExperimentSpec, TrainSpec
from sniper.data.batches import Batch
from sniper.data.datasets import Dataset
from sniper.models.spec import DetectorSpec, Precision
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.run import Run
from sniper.training.learner import Learner, _distributed
from tests.devices import DEVICES, GPU, full_precision
from tests.models.batches import TINY, build_batch, build_sample
from tests.training.experiments import train_killed_at, train_run, weights_of, with_train

DEFORMABLE = dataclasses.replace(
    TINY,
    backbone=dataclasses.replace(TINY.backbone, deformable=True),
    roi_head=dataclasses.replace(TINY.roi_head, pooling="deformable"),
)
# All anchors are sampled, as a GPU draws others than a CPU.
ALL_ANCHORS = dataclasses.replace(
    TINY, rpn=dataclasses.replace(TINY.rpn, batch_size_per_image=100_000, positive_fraction=1.0)
)
MODELS = pytest.mark.parametrize("model", [TINY, DEFORMABLE], ids=["plain", "deformable"])
# torch's notice at the first use of the mode.
DEBUG_MODE = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


@pytest.fixture
def restored_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def build_chips() -> Batch:
    return build_batch(
        build_sample([[16, 16, 48, 48], [70, 60, 120, 100]], [BoxStatus.VALID, BoxStatus.OUT_OF_RANGE]),
        build_sample([], []),
        build_sample([[10, 10, 60, 60]], [BoxStatus.IGNORE]),
        build_sample([[20, 30, 80, 70]], [BoxStatus.VALID]),
    )


def build_learner(model: DetectorSpec, device: str, precision: Precision = "fp32", **fields: Any) -> Learner:
    spec = ExperimentSpec(model=model, train=TrainSpec(batch_size=4, precision=precision, **fields))
    return Learner(spec, num_classes=3, device=torch.device(device), has_weights=False)


def parameters_of(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


@DEBUG_MODE
@pytest.mark.usefixtures("restored_debug_mode")
@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@MODELS
def test_losses_and_gradients_do_not_synchronize(
    model: DetectorSpec, precision: Precision, device: str
) -> None:
    learner = build_learner(model, device, precision)
    batch = build_chips()
    learner.update(batch, learning_rate=0.01, step=0)  # set-up in the first step may synchronize
    on_device = batch.to(learner.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    losses, _ = learner.compute_gradients(on_device)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss in losses.values())


@DEBUG_MODE
@pytest.mark.usefixtures("restored_debug_mode")
@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize(("precision", "num_syncs"), [("fp32", 1), ("bf16", 1), ("fp16", 2)])
@pytest.mark.parametrize("fields", [{}, {"clip_grad_norm": 1.0}, {"accumulation_steps": 2}], ids=str)
@MODELS
def test_an_update_synchronizes_once_and_with_fp16_twice(
    model: DetectorSpec, fields: dict[str, Any], precision: Precision, num_syncs: int, device: str
) -> None:
    learner = build_learner(model, device, precision, **fields)
    if precision == "fp16":
        learner._scaler = torch.amp.GradScaler(device, init_scale=1.0)  # without overflow
    batch = build_chips()
    for step in range(2):
        learner.update(batch, learning_rate=0.01, step=step)
    on_device = batch.to(learner.device)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        learner.update(on_device, learning_rate=0.01, step=2)
        torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in caught]
    assert sum("called a synchronizing CUDA operation" in message for message in messages) == num_syncs


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_and_a_cpu_compute_the_same_losses(device: str) -> None:
    on_cpu, on_device = build_learner(ALL_ANCHORS, "cpu"), build_learner(ALL_ANCHORS, device)
    on_device.model.load_state_dict(on_cpu.model.state_dict())
    for learner in (on_cpu, on_device):
        learner.model.eval()
    batch = build_chips()
    with full_precision(), torch.no_grad():
        expected = on_cpu.model.losses(batch)
        losses = on_device.model.losses(batch.to(on_device.device))
    assert expected.keys() == losses.keys()
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(float(expected[name]), rel=0.01, abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@MODELS
def test_every_precision_lowers_the_loss(model: DetectorSpec, precision: Precision, device: str) -> None:
    if device == "cpu" and precision == "fp16":
        pytest.skip("slow on a CPU, where test_learner has it")
    learner = build_learner(model, device, precision)
    batch = build_chips()
    losses = []
    for step in range(10):
        update = learner.update(batch, learning_rate=0.02, step=step)
        losses.append(sum(update.losses.values()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in learner.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_scaler_skips_updates_that_overflow(device: str) -> None:
    learner = build_learner(TINY, device, "fp16")
    learner._scaler = torch.amp.GradScaler(device, init_scale=2.0**20)
    batch, before = build_chips(), parameters_of(learner)
    learner.update(batch, learning_rate=0.01, step=0)
    assert all(map(torch.equal, before, parameters_of(learner)))
    assert learner._scaler.get_scale() == 2.0**19
    for step in range(1, 20):
        learner.update(batch, learning_rate=0.01, step=step)
        if not torch.equal(before[-1], parameters_of(learner)[-1]):
            break
    assert not torch.equal(before[-1], parameters_of(learner)[-1])
    assert learner._scaler.get_scale() == 2.0 ** (20 - step)
    assert all(torch.isfinite(parameter).all() for parameter in learner.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_weights_gradients_and_features_are_channels_last(device: str) -> None:
    learner = build_learner(TINY, device)
    batch = build_chips()
    learner.update(batch, learning_rate=0.01, step=0)
    convolutions = [module for module in learner.model.modules() if isinstance(module, torch.nn.Conv2d)]
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        gradient = convolution.weight.grad
        assert gradient is None or gradient.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(learner.model, TwoStageDetector)
    maps = learner.model.backbone(batch.to(learner.device).images)
    assert all(features.is_contiguous(memory_format=torch.channels_last) for features in maps)


@pytest.mark.slow
@pytest.mark.parametrize("device", [GPU])  # test_learner has the test on a CPU
def test_a_compiled_backbone_computes_the_same_losses(device: str) -> None:
    plain, compiled = build_learner(TINY, device), build_learner(TINY, device, compile=True)
    compiled.model.load_state_dict(plain.model.state_dict())
    batch = build_chips()
    with full_precision():
        expected = plain.update(batch, learning_rate=0.01, step=0)
        values = compiled.update(batch, learning_rate=0.01, step=0)
    assert values == pytest.approx(expected, rel=0.02, abs=1e-3)


@pytest.fixture
def single_process_group(tmp_path: Path, device: str) -> Iterator[None]:
    """A process group of this process alone, with the backends of a distributed training."""
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{tmp_path / 'processes'}",
        rank=0,
        world_size=1,
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_distributed_learner_makes_the_same_update(device: str, num_parts: int) -> None:
    plain, learner = (build_learner(TINY, device, accumulation_steps=num_parts) for _ in range(2))
    learner._losses = _distributed(learner._losses)
    batch = build_chips()
    for step in range(2):
        expected = plain.update(batch, learning_rate=0.01, step=step)
        update = learner.update(batch, learning_rate=0.01, step=step)
        assert update.losses == pytest.approx(expected.losses, rel=0.01)
        assert update.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.01)
        assert update.num_positives == expected.num_positives
    torch.testing.assert_close(parameters_of(learner), parameters_of(plain), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_training_equals_an_unbroken_one_up_to_rounding(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, device: str
) -> None:
    spec = with_train(spec, epochs=2.0)
    unbroken, broken = (Run.create(tmp_path / name, config="") for name in ("unbroken", "broken"))
    train_run(unbroken, spec, dataset, device=torch.device(device))
    # Its last checkpoint is that of step 2.
    train_killed_at(broken, spec, dataset, step=3, device=torch.device(device))
    train_run(broken, spec, dataset, device=torch.device(device))
    losses, expected_losses = ([entry["loss"] for entry in run.entries()] for run in (broken, unbroken))
    assert len(losses) > 3
    assert losses == pytest.approx(expected_losses, rel=0.02)
    torch.testing.assert_close(weights_of(broken), weights_of(unbroken), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory_contains_weights_and_gradients(device: str) -> None:
    learner = build_learner(TINY, device)
    learner.update(build_chips(), learning_rate=0.01, step=0)
    num_bytes = sum(parameter.nbytes for parameter in learner.model.parameters())
    assert 2 * num_bytes < learner.peak_memory() < 2**40
