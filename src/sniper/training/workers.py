"""How many processes read chips: as configured, or more as long as the training waits for them."""

import os

import torch

_FIRST_ON_GPU = 4
_NUM_SKIPPED, _NUM_STEPS = 5, 30  # steps that are not measured after a start, and steps to measure
_WAITING_SHARE = 0.1  # of the time of these steps, from which on the number is doubled


class Workers:
    """The number of processes that read chips for one training process.

    Without a configured number it starts with 1 on a CPU, whose cores compute the steps, and with 4 on a GPU, and is
    doubled while steps spend a tenth of their time waiting, up to the number of cores. Batches do not depend on it.

    Args:
        configured: the number; None chooses it.
        device: of the training.
        num_cores: of the machine; by default those that this process may use, divided among the processes of torchrun.

    Attributes:
        count: the number at present.
    """

    def __init__(self, configured: int | None, *, device: torch.device, num_cores: int | None = None) -> None:
        self._is_chosen = configured is None
        self._num_cores = num_cores or max(_usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
        first = _FIRST_ON_GPU if device.type == "cuda" else 1
        self.count = min(first, self._num_cores) if configured is None else configured
        self._waiting_share = 0.0
        self._num_skipped = 0
        self._steps: list[tuple[float, float]] = []

    def restart(self) -> None:
        """Note that the processes are started, as in each epoch: the next steps wait for that, and do not count."""
        self._num_skipped = _NUM_SKIPPED

    def grow(self, *, seconds: float, data_wait: float) -> bool:
        """Count a step, and return whether the number is to be larger from the next step on.

        Args:
            seconds: of the step.
            data_wait: seconds of these that it waited for its batch.
        """
        if not self._is_chosen or self.count >= self._num_cores:
            return False
        if self._num_skipped:
            self._num_skipped -= 1
            return False
        self._steps.append((seconds, data_wait))
        if len(self._steps) < _NUM_STEPS:
            return False
        total, waited = (sum(values) for values in zip(*self._steps, strict=True))
        self._steps.clear()
        self._waiting_share = waited / total
        if self._waiting_share <= _WAITING_SHARE:
            return False
        self.count = min(2 * self.count, self._num_cores)
        return True

    def describe(self) -> str:
        """Describe the last change for the user."""
        return (
            f"{self.count} processes read chips from now on, since steps waited {self._waiting_share:.0%} of their "
            "time for them (data.num_workers)"
        )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
