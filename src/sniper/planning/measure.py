"""Measure a few training steps of an experiment: what an epoch takes in minutes and memory on this machine."""

import math
import time
from dataclasses import dataclass, replace

import torch

from sniper.config.experiment import ExperimentSpec
from sniper.data.datasets import Dataset
from sniper.data.loader import load_batches
from sniper.runs.processes import select_device
from sniper.training.epochs import order_epoch
from sniper.training.learner import Learner

_NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What training takes on one device.

    Attributes:
        device: the device, as torch names it.
        seconds_per_step: mean of the measured steps, reading images included.
        peak_memory: allocated on the GPU, or resident in the process on a CPU, bytes.
        minutes_per_epoch: for all steps of an epoch.
        minutes: for all epochs.
    """

    device: str
    seconds_per_step: float
    peak_memory: int
    minutes_per_epoch: float
    minutes: float


def measure(
    experiment: ExperimentSpec,
    dataset: Dataset,
    *,
    device: str | torch.device | None = None,
    num_steps: int = _NUM_STEPS,
    max_seconds: float = math.inf,
) -> Measurement:
    """Train for a few steps from random weights, and discard the result.

    Args:
        experiment: the experiment.
        dataset: its training set, with image files.
        device: where to compute; by default a GPU if there is one.
        num_steps: steps to measure, after one that is not counted.
        max_seconds: after which no further step is begun, except the first that is counted.

    Raises:
        AnnotationError: if the data set has no box to learn from.
        ConfigError: if the device or the batch size cannot be used.
        ImageError: if an image cannot be read.
        OutOfMemory: if a batch does not fit into memory.
    """
    chosen = select_device(device)
    learner = Learner(experiment, num_classes=len(dataset.categories), device=chosen, has_weights=False)
    order = order_epoch(experiment, dataset, epoch=0)
    steps = range(min(num_steps + 1, order.num_steps))
    batches = load_batches(order, replace(experiment.data, num_workers=0), steps=steps, device=chosen)
    seconds = []
    first = started = time.monotonic()
    for step, batch in enumerate(batches):
        learner.update(batch, learning_rate=1e-6, step=step, weight=order.weight(step))
        now = time.monotonic()
        seconds.append(now - started)
        started = now
        if len(seconds) > 1 and now - first > max_seconds:
            break
    counted = seconds[1:] or seconds
    mean = sum(counted) / len(counted)
    per_epoch = mean * order.num_steps / 60
    return Measurement(
        device=str(chosen),
        seconds_per_step=mean,
        peak_memory=learner.peak_memory(),
        minutes_per_epoch=per_epoch,
        minutes=per_epoch * experiment.train.epochs,
    )
