"""The optimizer, and the learning rate of each step."""

import math

import torch
from torch import nn

from sniper.config.experiment import TrainSpec


def build_optimizer(spec: TrainSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of all trainable parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learning_rate = base_learning_rate(spec)
    assert spec.weight_decay is not None  # set by TrainSpec
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=spec.weight_decay)
    return torch.optim.SGD(
        parameters, lr=learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
    )


def base_learning_rate(spec: TrainSpec) -> float:
    """Return the learning rate after warm-up, scaled from the reference batch size to the actual one.

    The scaling is linear for SGD (Goyal et al. 2017), and with the square root for AdamW, whose updates do not grow
    with the gradient (Malladi et al. 2022).

    Example:
        >>> base_learning_rate(TrainSpec(learning_rate=0.12, batch_size=16, reference_batch_size=128))
        0.015
    """
    assert spec.learning_rate is not None  # set by TrainSpec
    ratio = spec.batch_size / spec.reference_batch_size
    return spec.learning_rate * (math.sqrt(ratio) if spec.optimizer == "adamw" else ratio)


def learning_rate_at(spec: TrainSpec, *, step: int, epoch: float) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule.

    The warm-up rises to the learning rate of the schedule. The cosine begins after it.

    Args:
        spec: the schedule.
        step: updates made before this one.
        epoch: epochs trained before this step, fractions included.

    Example:
        >>> spec = TrainSpec(
        ...     learning_rate=0.1, reference_batch_size=128, warmup_steps=10, warmup_start_factor=0.0, milestones=(2.0,)
        ... )
        >>> steps = [(0, 0.0), (5, 0.5), (10, 1.0), (20, 2.0)]
        >>> [round(learning_rate_at(spec, step=step, epoch=epoch), 3) for step, epoch in steps]
        [0.0, 0.05, 0.1, 0.01]
    """
    base = base_learning_rate(spec)
    rate = base * _schedule(spec, step=step, epoch=epoch)
    if step >= spec.warmup_steps:
        return rate
    first = base * spec.warmup_start_factor
    return first + (rate - first) * step / spec.warmup_steps


def _schedule(spec: TrainSpec, *, step: int, epoch: float) -> float:
    """Return the learning rate of a step as a share of that after warm-up."""
    if spec.schedule == "steps":
        return spec.gamma ** sum(epoch >= milestone for milestone in spec.milestones)
    if step <= spec.warmup_steps:
        return 1.0
    first_epoch = epoch * spec.warmup_steps / step
    return 0.5 + 0.5 * math.cos(math.pi * min((epoch - first_epoch) / (spec.epochs - first_epoch), 1.0))
