"""The learning rate of each step."""

from sniper.engine.spec import TrainSpec


def learning_rate(spec: TrainSpec, *, step: int, epoch: float) -> float:
    """Give the rate of one step: a straight rise first, then steps down at given epochs.

    Args:
        spec: rates and times.
        step: updates made before this one.
        epoch: passes made before this step; fractions count.

    Example:
        >>> spec = TrainSpec(learning_rate=0.1, warm_up_steps=10, warm_up_rate=0.0, decay_at=(2.0,), decay=0.1)
        >>> [round(learning_rate(spec, step=s, epoch=e), 3) for s, e in [(0, 0.0), (5, 0.5), (10, 1.0), (20, 2.0)]]
        [0.0, 0.05, 0.1, 0.01]
    """
    rate = spec.learning_rate * spec.decay ** sum(epoch >= at for at in spec.decay_at)
    if step >= spec.warm_up_steps:
        return rate
    share = step / spec.warm_up_steps
    return spec.warm_up_rate + (rate - spec.warm_up_rate) * share
