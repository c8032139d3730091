"""The time that is left: measured by a simulated clock, from stages whose speed is not known in advance."""

import random

import pytest

from sniper.training.pace import SEARCH_SHARE, Pace, Part


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(
    parts: list[tuple[Part, float, float]], *, left: dict[Part, float], spread: float = 0.0
) -> list[tuple[float, float, float]]:
    """Simulate laps of (part, amount, seconds), whose durations vary at random.

    Returns:
        The seconds since the start, the seconds that are left, and their estimate, after each lap with an estimate.
    """
    clock, generator = Clock(), random.Random(0)
    pace = Pace(clock)
    pace.left.update(left)
    pace.start()
    times = []
    for part, amount, seconds in parts:
        clock.now += seconds * generator.uniform(1 - spread, 1 + spread)
        pace.lap(part, amount, megapixels=1.0 if part in ("rpn", "train") else 0.0)
        pace.left[part] -= amount
        times.append((clock.now, pace.seconds_left()))
    return [(now - 100.0, clock.now - now, left) for now, left in times if left is not None]


EVALUATION: tuple[Part, float, float] = ("evaluate", 20.0, 12.0)
EPOCH: list[tuple[Part, float, float]] = [("train", 1.0, 1.0)] * 50


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_time_left_is_right_within_a_fifth_after_a_minute(spread: float) -> None:
    parts = [*EPOCH, EVALUATION] * 8
    times = run(parts, left={"train": 400, "evaluate": 160}, spread=spread)
    late = [(actual, estimate) for since, actual, estimate in times if since > 60 and actual > 20]
    assert len(late) > 300
    assert all(estimate == pytest.approx(actual, rel=0.2) for actual, estimate in late)


def test_stages_that_have_not_begun_are_estimated_from_the_first() -> None:
    """The steps of the detector take 1.3 times as long as those of the RPN; searching costs 0.4 of training."""
    rpn: list[tuple[Part, float, float]] = [("rpn", 1.0, 0.77)] * 100
    mining: list[tuple[Part, float, float]] = [("mine", 2.0, 0.8)] * 50
    parts = [*rpn, *mining, *EPOCH, EVALUATION, *EPOCH, EVALUATION]
    times = run(parts, left={"rpn": 100, "mine": 100, "train": 100, "evaluate": 40}, spread=0.3)
    late = [(actual, estimate) for since, actual, estimate in times if since > 60 and actual > 20]
    assert len(late) > 100
    assert all(estimate == pytest.approx(actual, rel=0.2) for actual, estimate in late)


def test_the_first_step_and_few_steps_are_not_counted() -> None:
    times = run([("train", 1.0, 60.0), *EPOCH], left={"train": 51})
    first, *_ = times
    assert first[0] == 60 + 10
    assert first[2] == pytest.approx(40)


def test_the_time_left_follows_a_machine_that_becomes_slower() -> None:
    slower: list[tuple[Part, float, float]] = [("train", 1.0, 2.0)] * 400
    times = run([*EPOCH, *slower], left={"train": 450})
    assert next(estimate for since, _, estimate in times if since > 300) > 1.7 * 275


def test_time_that_passes_within_a_step_is_subtracted() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.left["train"] = 100
    assert pace.seconds_left() is None
    for _ in range(30):
        clock.now += 1.0
        pace.lap("train", megapixels=1.0)
    assert pace.seconds_left() == pytest.approx(100)
    clock.now += 5.0
    assert pace.seconds_left() == pytest.approx(95)
    clock.now += 500.0
    assert pace.seconds_left() == 0.0


def test_a_part_is_estimated_from_others_until_it_is_measured() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_per("evaluate") is None
    for _ in range(3):
        clock.now += 2.0
        pace.lap("train", megapixels=4.0)
    assert pace.seconds_per("train") == pytest.approx(2.0)
    assert pace.seconds_per("evaluate") == pytest.approx(2.0 * SEARCH_SHARE / 4.0)
    clock.now += 3.0
    pace.lap("evaluate", 10.0)
    assert pace.seconds_per("evaluate") == pace.seconds_per("mine") == pytest.approx(0.3)
    assert pace.num_laps("train") == 2
