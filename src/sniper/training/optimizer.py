"""From gradients to weights: the optimizer, the learning rate of each step, and the average of the weights."""

import math

import torch
from torch import nn

from sniper.config.experiment import TrainSpec


def build_optimizer(spec: TrainSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters that learn."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = scaled(spec.learning_rate, spec)
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=spec.weight_decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=spec.momentum, weight_decay=spec.weight_decay)


def scaled(rate: float, spec: TrainSpec) -> float:
    """Bring a rate from the reference batch to the batch that is used.

    In proportion for SGD (Goyal et al. 2017), with the square root for AdamW, whose steps do not grow with the
    gradient (Malladi et al. 2022).

    Example:
        >>> scaled(0.12, TrainSpec(batch_size=16, reference_batch_size=128))
        0.015
    """
    ratio = spec.batch_size / spec.reference_batch_size
    return rate * (math.sqrt(ratio) if spec.optimizer == "adamw" else ratio)


def learning_rate(spec: TrainSpec, *, step: int, epoch: float) -> float:
    """Give the rate of one step: a straight rise first, then steps down at given epochs.

    Args:
        spec: rates and times.
        step: updates made before this one.
        epoch: passes made before this step; fractions count.

    Example:
        >>> spec = TrainSpec(
        ...     learning_rate=0.1, reference_batch_size=128, warmup_steps=10, warmup_start_factor=0.0, milestones=(2.0,)
        ... )
        >>> [round(learning_rate(spec, step=s, epoch=e), 3) for s, e in [(0, 0.0), (5, 0.5), (10, 1.0), (20, 2.0)]]
        [0.0, 0.05, 0.1, 0.01]
    """
    rate = scaled(spec.learning_rate, spec) * spec.gamma ** sum(epoch >= at for at in spec.milestones)
    if step >= spec.warmup_steps:
        return rate
    first = scaled(spec.learning_rate, spec) * spec.warmup_start_factor
    return first + (rate - first) * step / spec.warmup_steps
