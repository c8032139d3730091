"""From gradients to weights: the optimizer, the learning rate of each step, and the average of the weights."""

import math

import torch
from torch import nn

from sniper.spec import TrainSpec


def build_optimizer(spec: TrainSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters that learn."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = scaled(spec.learning_rate, spec)
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=spec.weight_decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=spec.momentum, weight_decay=spec.weight_decay)


def scaled(rate: float, spec: TrainSpec, *, relative_size: float = 1.0) -> float:
    """Bring a rate from the reference batch to the batch that is used.

    In proportion for SGD (Goyal et al. 2017), with the square root for AdamW, whose steps do not grow with the
    gradient (Malladi et al. 2022).

    Args:
        rate: for the reference batch.
        spec: the sizes of both.
        relative_size: how many times a mean batch this one is, where batches differ. So all images count alike.

    Example:
        >>> scaled(0.12, TrainSpec(batch_size=16, reference_batch=128))
        0.015
    """
    ratio = spec.batch_size / spec.reference_batch * relative_size
    return rate * (math.sqrt(ratio) if spec.optimizer == "adamw" else ratio)


def learning_rate(spec: TrainSpec, *, step: int, epoch: float, relative_size: float = 1.0) -> float:
    """Give the rate of one step: a straight rise first, then steps down at given epochs.

    Args:
        spec: rates and times.
        step: updates made before this one.
        epoch: passes made before this step; fractions count.
        relative_size: see `scaled`.

    Example:
        >>> spec = TrainSpec(
        ...     learning_rate=0.1, reference_batch=128, warm_up_steps=10, warm_up_rate=0.0, decay_at=(2.0,), decay=0.1
        ... )
        >>> [round(learning_rate(spec, step=s, epoch=e), 3) for s, e in [(0, 0.0), (5, 0.5), (10, 1.0), (20, 2.0)]]
        [0.0, 0.05, 0.1, 0.01]
    """
    rate, first = (
        scaled(one, spec, relative_size=relative_size) for one in (spec.learning_rate, spec.warm_up_rate)
    )
    rate *= spec.decay ** sum(epoch >= at for at in spec.decay_at)
    return rate if step >= spec.warm_up_steps else first + (rate - first) * step / spec.warm_up_steps
