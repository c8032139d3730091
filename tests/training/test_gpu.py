"""On a GPU: computing gradients does not synchronize with the device, and losses equal those of a CPU."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from sniper.chips import BoxStatus
from sniper.config.experiment import ExperimentSpec, TrainSpec
from sniper.data.batches import Batch
from sniper.models.spec import DetectorSpec, Precision
from sniper.training.learner import Learner
from tests.models.batches import TINY, build_batch, build_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DEFORMABLE = dataclasses.replace(
    TINY,
    backbone=dataclasses.replace(TINY.backbone, deformable=True),
    roi_head=dataclasses.replace(TINY.roi_head, pooling="deformable"),
)


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


def build_learner(model: DetectorSpec, device: str, precision: Precision = "fp32") -> Learner:
    spec = ExperimentSpec(model=model, train=TrainSpec(batch_size=4, precision=precision))
    return Learner(spec, num_classes=3, device=torch.device(device), has_weights=False)


@pytest.mark.usefixtures("restored_debug_mode")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [TINY, DEFORMABLE], ids=["plain", "deformable"])
def test_losses_and_gradients_do_not_synchronize(model: DetectorSpec, precision: Precision) -> None:
    learner = build_learner(model, "cuda", precision)
    batch = build_chips()
    learner.update(batch, learning_rate=0.01, step=0)  # set-up in the first step may synchronize
    on_device = batch.to(learner.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    losses = learner.compute_gradients(on_device)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_gpu_and_a_cpu_compute_the_same_losses() -> None:
    on_cpu, on_gpu = build_learner(TINY, "cpu"), build_learner(TINY, "cuda")
    on_gpu.model.load_state_dict(on_cpu.model.state_dict())
    for learner in (on_cpu, on_gpu):
        learner.model.eval()
    batch = build_chips()
    expected, losses = on_cpu.model.losses(batch), on_gpu.model.losses(batch.to(on_gpu.device))
    for name in ("rpn_box", "head_box", "head_class", "rpn_objectness"):  # the GPU samples other anchors
        assert float(losses[name]) == pytest.approx(float(expected[name]), rel=0.2, abs=0.02)
