"""On a GPU: nothing in a step waits for it but the reading of the losses, and it learns what a CPU learns."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from sniper.chips import BoxStatus
from sniper.config.experiment import ExperimentSpec, TrainSpec
from sniper.data.batches import Batch
from sniper.models.spec import DetectorSpec
from sniper.runs.processes import SINGLE_PROCESS
from sniper.training.learner import Learner
from tests.models.batches import TINY, build_batch, build_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU"),
]

DEFORMABLE = dataclasses.replace(
    TINY,
    backbone=dataclasses.replace(TINY.backbone, deformable=True),
    roi_head=dataclasses.replace(TINY.roi_head, pooling="deformable"),
)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def some_chips() -> Batch:
    chips = [
        build_sample([[16, 16, 48, 48], [70, 60, 120, 100]], [BoxStatus.VALID, BoxStatus.OUT_OF_RANGE]),
        build_sample([], []),
        build_sample([[10, 10, 60, 60]], [BoxStatus.IGNORE]),
        build_sample([[20, 30, 80, 70]], [BoxStatus.VALID]),
    ]
    return build_batch(*chips)


def learner_of(model: DetectorSpec, device: str, precision: str = "fp32") -> Learner:
    train = TrainSpec(batch_size=4, precision=precision)  # type: ignore[arg-type]
    spec = ExperimentSpec(model=model, train=train)
    return Learner(spec, num_classes=3, device=torch.device(device), ranks=SINGLE_PROCESS, has_weights=False)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [TINY, DEFORMABLE], ids=["plain", "deformable"])
def test_losses_and_gradients_wait_for_nothing(model: DetectorSpec, precision: str) -> None:
    learner = learner_of(model, "cuda", precision)
    batch = some_chips()
    learner.learn(batch, rate=0.01, step=0)  # what is set up once may wait
    on_device = batch.to(learner.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    losses = learner._try_gradients(on_device)
    torch.cuda.set_sync_debug_mode("default")
    assert losses is not None
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_gpu_and_a_cpu_compute_the_same_losses() -> None:
    on_cpu, on_gpu = learner_of(TINY, "cpu"), learner_of(TINY, "cuda")
    on_gpu.model.load_state_dict(on_cpu.model.state_dict())
    for learner in (on_cpu, on_gpu):
        learner.model.eval()
    batch = some_chips()
    wanted, found = on_cpu.model.losses(batch), on_gpu.model.losses(batch.to(on_gpu.device))
    for name in ("rpn_box", "head_box", "head_class", "rpn_objectness"):  # other anchors are drawn there
        assert float(found[name]) == pytest.approx(float(wanted[name]), rel=0.2, abs=0.02)
