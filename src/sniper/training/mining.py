"""When negative chips are mined, and how many of them a training has."""

import math

from sniper.config.experiment import ExperimentSpec, MineSpec

_RPN_EPOCHS, _RPN_STEPS = 4.0, 500  # the paper's passes over positive chips; fewest steps for small data sets


def first_epoch(spec: ExperimentSpec) -> int:
    """Return the epoch at whose start negative chips are mined first, 0 before the first."""
    if spec.negatives.source != "self":
        return 0
    return min(math.ceil(spec.mine.start * spec.train.epochs), max(math.ceil(spec.train.epochs) - 1, 0))


def num_rounds(spec: ExperimentSpec) -> int:
    """Return how often all training images are searched for negative chips."""
    if spec.negatives.source == "none":
        return 0
    every = spec.mine.every_epochs
    return math.ceil((spec.train.epochs - first_epoch(spec)) / every) if every else 1


def searched_share(spec: ExperimentSpec) -> float:
    """Return the share of the training images that a round searches; an RPN searches all."""
    return spec.mine.share if spec.negatives.source == "self" else 1.0


def expected_dose(spec: ExperimentSpec) -> float:
    """Estimate how many negative chips a training has for each positive chip, all epochs together.

    It has fewer where too few are mined, or where they have little to teach.
    """
    if spec.negatives.source == "none":
        return 0.0
    return (spec.negatives.first_dose or 0.0) * (1 - first_epoch(spec) / spec.train.epochs)


def rpn_epochs(mine: MineSpec, *, num_steps: int) -> float:
    """Return the epochs that train the RPN alone.

    Args:
        mine: the specification.
        num_steps: of an epoch.
    """
    if mine.rpn_epochs is not None:
        return mine.rpn_epochs
    return max(_RPN_EPOCHS, float(math.ceil(_RPN_STEPS / num_steps)))
