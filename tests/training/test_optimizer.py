"""The learning rate: linear warm-up, then multiplied at milestones or along a cosine."""

from typing import Literal

import pytest
import torch

from sniper.config.experiment import TrainSpec
from sniper.training.optimizer import build_optimizer, learning_rate_at

PAPER = TrainSpec()


@pytest.mark.parametrize(
    ("step", "epoch", "rate"),
    [
        (0, 0.0, 0.004),
        (500, 0.05, (0.004 + 0.12) / 2),
        (1000, 0.09, 0.12),
        (50_000, 10.6699, 0.12),
        (50_001, 10.67, 0.012),
    ],
)
def test_the_learning_rate_follows_the_papers_schedule(step: int, epoch: float, rate: float) -> None:
    assert learning_rate_at(PAPER, step=step, epoch=epoch) == pytest.approx(rate)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.12 / 16), ("adamw", 0.0014 / 4)])
def test_the_learning_rate_is_scaled_with_the_batch_size(
    optimizer: Literal["sgd", "adamw"], rate: float
) -> None:
    spec = TrainSpec(optimizer=optimizer, batch_size=8)
    assert learning_rate_at(spec, step=1000, epoch=1.0) == pytest.approx(rate)
    assert learning_rate_at(spec, step=0, epoch=0.0) == pytest.approx(rate / 30)
    (group,) = build_optimizer(spec, torch.nn.Linear(2, 2)).param_groups
    assert group["lr"] == pytest.approx(rate)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate_at(TrainSpec(warmup_steps=0, milestones=()), step=0, epoch=0.0) == 0.12


def test_the_rate_is_multiplied_at_every_milestone() -> None:
    spec = TrainSpec(warmup_steps=0, milestones=(1.0, 1.5), gamma=0.5)
    assert learning_rate_at(spec, step=9, epoch=1.6) == pytest.approx(0.03)


def test_the_cosine_falls_from_the_end_of_the_warm_up_to_zero_at_the_end() -> None:
    spec = TrainSpec(
        epochs=10, warmup_steps=10, warmup_start_factor=0.0, schedule="cosine", milestones=(1.0,)
    )
    rates = [learning_rate_at(spec, step=step, epoch=step / 10) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0.0, 0.06, 0.12, 0.06, 0.0])
    assert learning_rate_at(spec, step=101, epoch=10.1) == pytest.approx(0.0)


def test_the_cosine_is_the_one_of_torch() -> None:
    spec = TrainSpec(epochs=4, warmup_steps=0, schedule="cosine", batch_size=128)
    optimizer = build_optimizer(spec, torch.nn.Linear(2, 2))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(spec, step=step, epoch=step / 5) == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("optimizer", "learning_rate", "weight_decay"), [("sgd", 0.12, 1.25e-5), ("adamw", 0.0014, 0.01)]
)
def test_each_optimizer_has_its_own_rate_and_weight_decay(
    optimizer: Literal["sgd", "adamw"], learning_rate: float, weight_decay: float
) -> None:
    spec = TrainSpec(optimizer=optimizer)
    assert (spec.learning_rate, spec.weight_decay) == (learning_rate, weight_decay)
    given = TrainSpec(optimizer=optimizer, learning_rate=0.001, weight_decay=0.0)
    assert (given.learning_rate, given.weight_decay) == (0.001, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs\n  Input should be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate\n  Input should be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay\n  Input should be greater than or equal to 0"),
        ({"batch_size": 0}, "batch_size\n  Input should be greater than 0"),
        (
            {"batch_size": 10, "accumulation_steps": 4},
            "accumulation_steps: a batch of 10 chips cannot be split into 4 equal parts",
        ),
        ({"ema_decay": 1.0}, "ema_decay\n  Input should be less than 1"),
        ({"evaluate_every": 0}, "evaluate_every\n  Input should be greater than 0"),
        ({"evaluate_every": 1, "rpn_only": True}, "evaluate_every must be null with rpn_only"),
        ({"warmup_start_factor": 1.1}, "warmup_start_factor\n  Input should be less than or equal to 1"),
        (
            {"optimizer": "adamw", "learning_rate": 0.12},
            r"learning_rate: 0.12 is a rate for sgd; adamw's own is 0.0014 \(null\)",
        ),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm\n  Input should be greater than 0"),
    ],
)
def test_invalid_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSpec(**fields)  # type: ignore[arg-type]
