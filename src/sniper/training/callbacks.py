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
        num_positives: positive proposals of the second stage.
        num_correct: those of them whose most probable class is right.
        num_negative_chips: chips of the batch without a valid box.
        negative_loss: mean over these chips of the classification losses of both stages; None if there are none.
        positive_loss: the same over the other chips.
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
    num_positives: int = 0
    num_correct: int = 0
    num_negative_chips: int = 0
    negative_loss: float | None = None
    positive_loss: float | None = None

    @property
    def loss(self) -> float:
        """The total loss."""
        return sum(self.losses.values())


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """What a training is about to do, before the first step and before anything is downloaded.

    Attributes:
        steps: of the training of the detector; an estimate if epochs differ in their number of chips.
        steps_done: steps made before, if the run is continued.
        epochs: of the training of the detector.
        rpn_steps: of the RPN stage; 0 if there is none, or none is left to make.
        num_mined: images to mine after that stage.
        num_evaluations: on validation images, while it trains and at the end.
        num_scored: images of such an evaluation.
        num_images: validation images; all are evaluated on at the end.
        download: weights that must be downloaded; None if there are none.
    """

    steps: int
    steps_done: int
    epochs: float
    rpn_steps: int
    num_mined: int
    num_evaluations: int
    num_scored: int
    num_images: int
    download: str | None


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """The means of an epoch, and the scores after it.

    Attributes:
        stage: `rpn` or `train`.
        epoch: epochs trained, fractions included.
        epochs: epochs to train.
        loss: mean of the total loss; None if an earlier version trained the epoch.
        positive_accuracy: share of the positive proposals whose most probable class is right; None without any.
        scores: on validation images, by name; None if they were not evaluated on.
        num_scored: validation images that were evaluated on.
        num_images: all validation images.
        is_best: whether no earlier checkpoint has a better AP.
    """

    stage: str
    epoch: float
    epochs: float
    loss: float | None
    positive_accuracy: float | None
    scores: Mapping[str, float] | None = None
    num_scored: int = 0
    num_images: int = 0
    is_best: bool = False


def _ignore(*_: object) -> None:
    pass


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that a training calls, in the first process only; an exception in one ends the training.

    Attributes:
        on_step: called after every step, before its checkpoint is written. After an exception it is written, too.
        on_mining: called after every mined image with the number of images done and the number of all images. With
            several processes these are the images of the first.
        on_start: called before the first step.
        on_evaluation: called after every evaluated image, as `on_mining`.
        on_scores: called after every evaluation with the number of epochs trained and the scores by name.
        on_epoch: called after every epoch, and after its evaluation.
        on_time_left: called after steps and images with the seconds that all stages still take, once they are known.
        on_notice: called with a line of text where steps are measured, or the training changes its course: another
            length, an early stop.
        on_derived: called before the first step with the settings that were derived from a data set.
        on_weights: called before the first step with what is loaded from the detector that `model.weights_from` names.
        on_warning: called with every warning about the data sets; `warnings.warn` by default.
    """

    on_step: Callable[[StepReport], None] = _ignore
    on_mining: Callable[[int, int], None] = _ignore
    on_start: Callable[[StartReport], None] = _ignore
    on_evaluation: Callable[[int, int], None] = _ignore
    on_scores: Callable[[float, Mapping[str, float]], None] = _ignore
    on_epoch: Callable[[EpochReport], None] = _ignore
    on_time_left: Callable[[float], None] = _ignore
    on_notice: Callable[[str], None] = _ignore
    on_derived: Callable[[Sequence[DerivedSetting]], None] = _ignore
    on_weights: Callable[[WeightsReport], None] = _ignore
    on_warning: Callable[[str], None] = _warn
