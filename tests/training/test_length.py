"""The length of a training with limited time: as long as fits, without changing the steps that were made."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.config.experiment import TrainSpec
from sniper.training.length import (
    Costs,
    TimeLimit,
    correction_epochs,
    count_evaluations,
    fit_length,
    seconds_of,
)
from sniper.training.optimizer import learning_rate_at

TRAIN = TrainSpec(epochs=12.0, milestones=(9.0, 11.0), warmup_steps=20, evaluate_every=3)
STEPS = 50  # per epoch
COSTS = Costs(epoch=10.0, evaluation=1.0, end=2.0)


@given(
    epochs=st.floats(0.1, 30),
    every=st.integers(1, 8),
    after=st.integers(0, 30),
)
def test_evaluations_are_counted_as_the_loop_makes_them(epochs: float, every: int, after: int) -> None:
    spec = replace(TRAIN, epochs=epochs, evaluate_every=every)
    ends = [min(epoch + 1, epochs) for epoch in range(math.ceil(epochs))]
    due = [end for end in ends if end > after and (end >= epochs or end % every == 0)]
    assert count_evaluations(spec, after=after) == len(due)


def fit(
    train: TrainSpec = TRAIN,
    *,
    seconds: float,
    epoch: float,
    given: frozenset[str] = frozenset(),
    costs: Costs = COSTS,
) -> TrainSpec:
    """Fit a training into the seconds that are left; 2 % of a time of 1000 s stay in reserve."""
    limit = TimeLimit(seconds=1000.0, end=seconds + 20.0, given=given)
    return fit_length(train, limit, now=0.0, step=round(epoch * STEPS), epoch=epoch, costs=costs)


@given(seconds=st.floats(30, 500), epoch=st.floats(0.4, 6), evaluation=st.floats(0, 5))
def test_the_rest_fills_the_time(seconds: float, epoch: float, evaluation: float) -> None:
    costs = Costs(epoch=10.0, evaluation=evaluation, end=2.0)
    train = fit(seconds=seconds, epoch=epoch, costs=costs)
    if train == TRAIN or train.epochs < 1.11 * epoch:
        return  # little changes, or too little time is left
    assert seconds_of(train, epoch=epoch, costs=costs) <= seconds
    longer = replace(train, epochs=train.epochs + 0.002)
    assert seconds_of(longer, epoch=epoch, costs=costs) > seconds


@given(seconds=st.floats(-50, 500), num_steps=st.integers(1, 12 * STEPS - 1))
def test_steps_that_were_made_keep_their_learning_rates(seconds: float, num_steps: int) -> None:
    train = fit(seconds=seconds, epoch=num_steps / STEPS)
    assert train.epochs > num_steps / STEPS
    for step in range(num_steps):
        at = {"step": step, "epoch": step / STEPS}
        assert learning_rate_at(train, **at) == learning_rate_at(TRAIN, **at)  # type: ignore[arg-type]


def test_milestones_keep_their_shares_of_the_run() -> None:
    train = fit(seconds=235.0, epoch=1.0)
    assert 20 < train.epochs < 24
    assert [milestone / train.epochs for milestone in train.milestones] == pytest.approx(
        [9 / 12, 11 / 12], abs=1e-3
    )


def test_milestones_that_are_over_stay_and_the_next_one_begins_at_once() -> None:
    train = fit(seconds=11.5, epoch=8.9)
    assert 8.9 < train.epochs < 10
    assert train.milestones[0] == pytest.approx(8.9)
    train = fit(seconds=40.0, epoch=10.0)
    assert train.epochs > 12
    assert train.milestones[0] == 9.0
    assert train.milestones[1] > 11.0


def test_a_training_out_of_time_keeps_a_tenth_of_its_steps_for_the_low_rate() -> None:
    assert fit(seconds=-100.0, epoch=8.0).epochs == pytest.approx(8.8, abs=1e-3)


def test_what_the_user_has_set_is_not_changed() -> None:
    train = fit(seconds=235.0, epoch=1.0, given=frozenset({"milestones", "evaluate_every"}))
    assert train.epochs > 12
    assert train.milestones == TRAIN.milestones
    assert train.evaluate_every == TRAIN.evaluate_every


def test_evaluations_that_take_long_become_rarer() -> None:
    costs = Costs(epoch=10.0, evaluation=20.0)
    train = fit(seconds=200.0, epoch=1.0, costs=costs)
    assert train.evaluate_every is not None
    assert train.evaluate_every > 3
    assert (count_evaluations(train, after=1.0) - 1) * 20.0 <= 40.0
    assert fit(seconds=200.0, epoch=1.0, costs=costs, given=frozenset({"evaluate_every"})).evaluate_every == 3


def test_small_changes_are_not_made() -> None:
    assert fit(seconds=116.5, epoch=1.0) == TRAIN


def test_the_length_is_corrected_at_half_and_before_each_milestone() -> None:
    assert list(correction_epochs(TRAIN)) == pytest.approx([6.0, 8.76, 10.76])


def test_a_cosine_has_its_length_at_the_end_of_the_warm_up() -> None:
    """The cosine begins after the warm-up, so all later rates depend on the number of epochs."""
    cosine = replace(TRAIN, schedule="cosine")
    assert fit(cosine, seconds=235.0, epoch=20 / STEPS).epochs > 20
    assert fit(cosine, seconds=235.0, epoch=22 / STEPS) == cosine
