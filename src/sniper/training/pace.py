"""How fast the parts of a training are, and how long the rest takes."""

import time
from collections.abc import Callable
from typing import Literal

Part = Literal["rpn", "mine", "train", "evaluate"]
"""Steps of the RPN stage, megapixels that are mined, steps of the training, megapixels that are evaluated on."""

SEARCH_SHARE = 0.5
"""Time to search a megapixel, merging included, relative to training on it, until it is measured.

It was 0.12 to 0.29 where it was measured (docs/negatives.md); more is assumed, so that a training ends in time.
"""

_RPN_SHARE = 0.8  # time of a step of the RPN alone relative to one of the detector, until both are measured
_HALF_LIFE = (
    120.0  # seconds after which a measurement has half its weight, since the speed of a machine varies
)
_FEW_STEPS, _FEW_SECONDS, _MANY_STEPS = 3, 10.0, 20  # steps to measure before an estimate is made


class Pace:
    """Measures the parts of a training, one after the other, and estimates the time that is left.

    Every moment belongs to a part: a lap ends where the next begins. Checkpoints and the start of an epoch therefore
    belong to the step after them.

    Args:
        clock: returns the time in seconds.

    Attributes:
        left: how much of each part is left; kept up to date by the code that works on the part.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.left: dict[Part, float] = {}
        self._rates: dict[Part, _Rate] = {}
        self._training = _Rate()  # of a megapixel
        self._mark = clock()
        self._is_first = True

    def start(self) -> None:
        """Begin the first lap of a stage. It is not counted if it is a step: set-up makes it longer than the others."""
        self._mark = self.clock()
        self._is_first = True

    def lap(self, part: Part, amount: float = 1.0, *, megapixels: float = 0.0) -> float:
        """Count the time since the last lap for a part.

        Args:
            part: that the time was spent on.
            amount: of it that was done: steps or megapixels.
            megapixels: that a step has trained on.

        Returns:
            The seconds of the lap.
        """
        now = self.clock()
        seconds, self._mark = now - self._mark, now
        is_step = part in ("rpn", "train")
        if not (is_step and self._is_first):
            self._rates.setdefault(part, _Rate()).add(seconds, amount)
            if is_step and megapixels:
                share = _RPN_SHARE if part == "rpn" else 1.0
                self._training.add(seconds / share, megapixels)
        self._is_first = self._is_first and not is_step
        return seconds

    def num_laps(self, part: Part) -> int:
        """Return how many laps of a part were counted."""
        return self._rates[part].num_laps if part in self._rates else 0

    def seconds_per(self, part: Part) -> float | None:
        """Return the seconds of one step or megapixel of a part, estimated from other parts if it was not measured.

        None if no other part has been measured either.
        """
        if part in self._rates:
            return self._rates[part].seconds_per_unit
        if part in ("mine", "evaluate"):
            other: Part = "evaluate" if part == "mine" else "mine"
            if other in self._rates:
                return self._rates[other].seconds_per_unit
            return SEARCH_SHARE * self._training.seconds_per_unit if self._training.num_laps else None
        if part == "train" and "rpn" in self._rates:
            return self._rates["rpn"].seconds_per_unit / _RPN_SHARE
        return None

    def seconds_left(self) -> float | None:
        """Return the seconds that all parts still take, the lap in progress included; None before a few steps."""
        if not self._has_measured_steps():
            return None
        total = 0.0
        for part, amount in self.left.items():
            seconds = self.seconds_per(part)
            if seconds is not None:
                total += amount * seconds
        return max(total - (self.clock() - self._mark), 0.0)

    def report(self, on_time_left: Callable[[float], None]) -> None:
        """Call a function with the seconds that all parts still take, if they are known."""
        seconds = self.seconds_left()
        if seconds is not None:
            on_time_left(seconds)

    def _has_measured_steps(self) -> bool:
        rates = [self._rates[part] for part in ("rpn", "train") if part in self._rates]
        num_laps = sum(rate.num_laps for rate in rates)
        seconds = sum(rate.total_seconds for rate in rates)
        return num_laps >= _MANY_STEPS or (num_laps >= _FEW_STEPS and seconds >= _FEW_SECONDS)


class _Rate:
    """The seconds of one unit of work: a mean over all laps in which recent ones count more."""

    def __init__(self) -> None:
        self.num_laps = 0
        self.total_seconds = 0.0
        self._seconds = self._amount = 0.0

    @property
    def seconds_per_unit(self) -> float:
        return self._seconds / self._amount

    def add(self, seconds: float, amount: float) -> None:
        decay = 0.5 ** (seconds / _HALF_LIFE)
        self._seconds = self._seconds * decay + seconds
        self._amount = self._amount * decay + amount
        self.num_laps += 1
        self.total_seconds += seconds
