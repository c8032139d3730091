"""What a training reports while it runs, and who it reports it to: trackers, or functions."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

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
        folder: of the run.
        config: the experiment with all its fields, as in `config.yaml`.
        origin: what trains: device, versions, command, git commit; see `sniper.runs.origin`.
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
    folder: Path
    config: Mapping[str, Any]
    origin: Mapping[str, str]


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


@dataclass(frozen=True, kw_only=True)
class ScoresReport:
    """The scores of an evaluation on validation images.

    Attributes:
        step: of the evaluated weights.
        epoch: epochs trained to these weights, fractions included.
        scores: by name, with the number of images as `num_images`.
        is_final: whether these are the scores of the best checkpoint on all images, at the end of a training that was
            evaluated on a subset.
    """

    step: int
    epoch: float
    scores: Mapping[str, float]
    is_final: bool = False


@dataclass(frozen=True, kw_only=True)
class EndReport:
    """What a training has come to when it ends, for whatever reason but a kill.

    Attributes:
        status: `completed`; `stopped` by Ctrl-C or a signal; or `failed` with an error.
        folder: of the run.
        step: of the newest checkpoint; 0 if there is none.
        weights: the weights to predict with, those of the best checkpoint; None if there is no checkpoint.
        scores: of these weights on validation images, as in the metrics; None if they were not evaluated.
        error: what has ended a failed training.
    """

    status: Literal["completed", "stopped", "failed"]
    folder: Path
    step: int
    weights: Path | None
    scores: Mapping[str, Any] | None
    error: BaseException | None = None


@runtime_checkable
class Tracker(Protocol):
    """Follows a training; `sniper.train(callbacks=...)` takes an object with these methods, or several.

    It may have other methods of `Callbacks`, too, such as `on_start`. All are called in the first process only. An
    exception in one ends the training after its last whole step is saved.
    """

    def on_step(self, report: StepReport, /) -> Any:
        """Take the report of a step, before its checkpoint is written."""

    def on_scores(self, report: ScoresReport, /) -> Any:
        """Take the scores of an evaluation."""

    def on_end(self, report: EndReport, /) -> Any:
        """Take what the training has come to, also after an error; this is the last call."""


def _ignore(*_: object) -> None:
    pass


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """A tracker made of functions, which a training calls in the first process; an exception in one ends the training.

    Attributes:
        on_step: called after every step, before its checkpoint is written. After an exception it is written, too.
        on_scores: called after every evaluation.
        on_end: called once, at the end; also after an error, a signal or an exception in another of these functions.
        on_start: called before the first step.
        on_epoch: called after every epoch, and after its evaluation.
        on_mining: called after every mined image with the number of images done and the number of all images. With
            several processes these are the images of the first.
        on_evaluation: called after every evaluated image, as `on_mining`.
        on_time_left: called after steps and images with the seconds that all stages still take, once they are known.
        on_notice: called with a line of text where steps are measured, where the training changes its course, such as
            another length or an early stop, and where a tracker records it.
        on_derived: called before the first step with the settings that were derived from a data set.
        on_weights: called before the first step with what is loaded from the detector that `model.weights_from` names.
        on_warning: called with every warning about data sets and trackers; `warnings.warn` by default.
    """

    on_step: Callable[[StepReport], Any] = _ignore
    on_scores: Callable[[ScoresReport], Any] = _ignore
    on_end: Callable[[EndReport], Any] = _ignore
    on_start: Callable[[StartReport], Any] = _ignore
    on_epoch: Callable[[EpochReport], Any] = _ignore
    on_mining: Callable[[int, int], Any] = _ignore
    on_evaluation: Callable[[int, int], Any] = _ignore
    on_time_left: Callable[[float], Any] = _ignore
    on_notice: Callable[[str], Any] = _ignore
    on_derived: Callable[[Sequence[DerivedSetting]], Any] = _ignore
    on_weights: Callable[[WeightsReport], Any] = _ignore
    on_warning: Callable[[str], Any] = _warn

    @classmethod
    def of(cls, trackers: Tracker | Iterable[Tracker]) -> "Callbacks":
        """Return functions that call those of one or several trackers, in their order.

        Raises:
            TypeError: if an object lacks a method of a tracker, or has another one whose name starts with `on_`.
        """
        if isinstance(trackers, cls):
            return trackers
        parts = list(trackers) if isinstance(trackers, Iterable) else [trackers]
        for part in parts:
            check_tracker(part)
        calls = {field.name: _calls(parts, field.name, default=field.default) for field in fields(cls)}
        return cls(**{name: call_each(functions) for name, functions in calls.items() if functions})


def check_tracker(tracker: object) -> None:
    """Check that an object has the methods of a tracker, and no other one whose name starts with `on_`.

    Raises:
        TypeError: if it does not.
    """
    kind = type(tracker).__name__
    lacking = [
        name for name in ("on_step", "on_scores", "on_end") if not callable(getattr(tracker, name, None))
    ]
    if lacking:
        raise TypeError(
            f"callbacks: {kind} has no {' and no '.join(lacking)}; expected sniper.Callbacks, an object with the "
            "methods on_step, on_scores and on_end, or a list of these"
        )
    known = [field.name for field in fields(Callbacks)]
    unknown = [name for name in dir(tracker) if name.startswith("on_") and name not in known]
    if unknown:
        raise TypeError(f"callbacks: {kind}.{unknown[0]} is never called; known are {', '.join(known)}")


def _calls(trackers: Iterable[object], name: str, *, default: Any) -> list[Callable[..., Any]]:
    """Return the functions of a name that are not the default."""
    functions = [getattr(tracker, name, default) for tracker in trackers]
    return [function for function in functions if function is not default]


def call_each(functions: Sequence[Callable[..., Any]]) -> Callable[..., None]:
    """Return a function that calls functions with its arguments, in their order."""

    def call(*arguments: Any) -> None:
        for function in functions:
            function(*arguments)

    return call
