"""The length of a training that has a limited time: how many epochs fit, corrected while it runs.

Only what the steps so far do not depend on is changed, so that the final configuration describes the whole run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sniper.config.experiment import TrainSpec
from sniper.training.optimizer import learning_rate_at

EVALUATION_SHARE = 0.2
"""Of the time that evaluations while training may take."""

_AIM = 0.98  # share of the time that is planned with; the speed of the last steps is unknown
_SMALLEST_CHANGE = 0.01  # of the epochs; less is not worth it
_SHORTEST_REST = 0.1  # of the epochs so far: the steps with a low learning rate are the most valuable ones
_MARGIN = 0.02  # of the epochs before a milestone


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """When a training is to end.

    Attributes:
        seconds: that the whole command may take.
        end: when they are over, on the clock of `Pace`.
        given: fields of `TrainSpec` that the user has set, which are not changed.
    """

    seconds: float
    end: float
    given: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the rest of a training costs, seconds.

    Attributes:
        epoch: of training.
        evaluation: while it trains.
        end: of everything after the last evaluation.
    """

    epoch: float
    evaluation: float = 0.0
    end: float = 0.0


def count_evaluations(train: TrainSpec, *, after: float) -> int:
    """Count the evaluations after some epochs, the one at the end of the training included.

    Example:
        >>> spec = TrainSpec(epochs=7.5, evaluate_every=2)
        >>> [count_evaluations(spec, after=epoch) for epoch in (0, 1.9, 2, 6, 7.5)]
        [4, 4, 3, 1, 0]
    """
    every, epochs = train.evaluate_every, train.epochs
    if every is None or after >= epochs:
        return 0
    num_whole = math.floor(epochs / every) - math.floor(after / every)
    return num_whole + (epochs % every != 0)


def fit_length(
    train: TrainSpec, limit: TimeLimit, *, now: float, step: int, epoch: float, costs: Costs
) -> TrainSpec:
    """Return the training that ends in time: with other epochs, milestones at the same shares of the run.

    Args:
        train: as configured so far.
        limit: when it is to end.
        now: the time.
        step: steps made.
        epoch: epochs trained, fractions included.
        costs: of the rest.

    Returns:
        The same specification if the steps so far would have had other learning rates, or little would change.
    """
    seconds = limit.end - (1 - _AIM) * limit.seconds - now
    has_shares = "milestones" not in limit.given
    changed = _fit_epochs(train, seconds=seconds, epoch=epoch, costs=costs, has_shares=has_shares)
    if "evaluate_every" not in limit.given and changed.evaluate_every is not None:
        for every in range(changed.evaluate_every, math.ceil(changed.epochs) + 1):
            scored = replace(train, evaluate_every=every)
            changed = _fit_epochs(scored, seconds=seconds, epoch=epoch, costs=costs, has_shares=has_shares)
            if (count_evaluations(changed, after=epoch) - 1) * costs.evaluation <= EVALUATION_SHARE * seconds:
                break
    is_small = abs(changed.epochs - train.epochs) < _SMALLEST_CHANGE * train.epochs
    if (is_small and changed.evaluate_every == train.evaluate_every) or not _has_equal_rates(
        train, changed, step=step, epoch=epoch
    ):
        return train
    return changed


def seconds_of(train: TrainSpec, *, epoch: float, costs: Costs) -> float:
    """Return the seconds that a training takes after some epochs."""
    num_evaluations = count_evaluations(train, after=epoch)
    return (train.epochs - epoch) * costs.epoch + num_evaluations * costs.evaluation + costs.end


def correction_epochs(train: TrainSpec) -> Iterator[float]:
    """Iterate over the epochs after which the length is corrected again, after warm-up: half, before each milestone."""
    yield 0.5 * train.epochs
    for milestone in train.milestones:
        yield milestone - _MARGIN * train.epochs


def _fit_epochs(
    train: TrainSpec, *, seconds: float, epoch: float, costs: Costs, has_shares: bool
) -> TrainSpec:
    """Return the training with the most epochs that take some seconds; milestones may keep their shares of it."""
    low = (1 + _SHORTEST_REST) * epoch
    high = max(epoch + seconds / costs.epoch, low)
    for _ in range(40):
        middle = (low + high) / 2
        takes = seconds_of(replace(train, epochs=middle), epoch=epoch, costs=costs)
        low, high = (middle, high) if takes <= seconds else (low, middle)
    epochs = max(math.floor(low * 1000) / 1000, 0.001)
    scale = epochs / train.epochs
    soonest = math.ceil(epoch * 10000) / 10000
    milestones = tuple(
        milestone if milestone <= epoch or not has_shares else max(round(milestone * scale, 3), soonest)
        for milestone in train.milestones
    )
    return replace(train, epochs=epochs, milestones=milestones)


def _has_equal_rates(train: TrainSpec, other: TrainSpec, *, step: int, epoch: float) -> bool:
    """Check that the steps so far have the same learning rates in two trainings."""
    positions = [{"step": index, "epoch": epoch * index / step} for index in range(step)]
    return all(learning_rate_at(train, **at) == learning_rate_at(other, **at) for at in positions)  # type: ignore[arg-type]
