"""What a training reports while it runs, and the functions that it calls with it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sniper.config.derived import DerivedSetting
from sniper.runs.checkpoints import Progress
from sniper.runs.initial import WeightsReport


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The state of a training after a step.

    Attributes:
        stage: `rpn` or `train`.
        progress: how far the run has come.
        epoch: epochs trained, fractions included.
        epochs: epochs to train.
        steps_left: steps to the end of the run, estimated from the current epoch.
        losses: by name.
        gradient_norm: norm of the gradient of the total loss, before clipping.
        learning_rate: of the step.
        seconds: duration of the step, data loading included.
        chips_per_second: over the step, on all devices.
        data_wait: fraction of the step spent waiting for data.
        megapixels: pixels of the step's chips on all devices, padding included, in millions.
        peak_memory: peak memory of the first device, bytes.
        skipped_chips: number of chips that could not be read and were replaced by others.
    """

    stage: str
    progress: Progress
    epoch: float
    epochs: float
    steps_left: int
    losses: dict[str, float]
    gradient_norm: float
    learning_rate: float
    seconds: float
    chips_per_second: float
    data_wait: float
    megapixels: float
    peak_memory: int
    skipped_chips: int = 0

    @property
    def loss(self) -> float:
        """The total loss."""
        return sum(self.losses.values())


def _ignore(*_: object) -> None:
    pass


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that a training calls, in the first process only; an exception in one ends the training.

    Attributes:
        on_step: called after every step, before its checkpoint is written.
        on_mining: called after every mined image with the number of images done and the number of all images. With
            several processes these are the images of the first.
        on_scores: called after every evaluation with the number of epochs trained and the scores by name.
        on_derived: called before the first step with the settings that were derived from a data set.
        on_weights: called before the first step with what is loaded from the detector that `model.weights_from` names.
        on_warning: called with every warning about the data sets; `warnings.warn` by default.
    """

    on_step: Callable[[StepReport], None] = _ignore
    on_mining: Callable[[int, int], None] = _ignore
    on_scores: Callable[[float, Mapping[str, float]], None] = _ignore
    on_derived: Callable[[Sequence[DerivedSetting]], None] = _ignore
    on_weights: Callable[[WeightsReport], None] = _ignore
    on_warning: Callable[[str], None] = _warn
