"""The number of processes that read chips grows while the training waits for them, and no further."""

import pytest
import torch

from sniper.training.workers import Workers

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def count_after(workers: Workers, *, waits: float, steps: int) -> int:
    """Make steps of a second, with a start of the processes before them and wherever their number changes."""
    workers.restart()
    for _ in range(steps):
        if workers.grow(seconds=1.0, data_wait=waits):
            workers.restart()
    return workers.count


@pytest.mark.parametrize(
    ("device", "num_cores", "waits", "counts"),
    [
        (GPU, 16, 0.3, [4, 8, 16, 16]),
        (GPU, 16, 0.05, [4, 4, 4, 4]),
        (GPU, 6, 0.3, [4, 6, 6, 6]),
        (GPU, 2, 0.3, [2, 2, 2, 2]),
        (CPU, 16, 0.05, [1, 1, 1, 1]),
        (CPU, 16, 0.3, [1, 2, 8, 16]),
    ],
)
def test_workers_are_doubled_while_steps_wait(
    device: torch.device, num_cores: int, waits: float, counts: list[int]
) -> None:
    workers = Workers(None, device=device, num_cores=num_cores)
    assert [count_after(workers, waits=waits, steps=35 * n) for n in (0, 1, 2, 1)] == counts
    assert ("waited 30% of their time" in workers.describe()) == (waits == 0.3 and num_cores > 2)


def test_a_configured_number_is_kept() -> None:
    assert count_after(Workers(0, device=GPU, num_cores=16), waits=0.9, steps=100) == 0
    assert count_after(Workers(3, device=CPU, num_cores=2), waits=0.9, steps=100) == 3


def test_steps_that_wait_for_the_start_of_the_processes_are_not_measured() -> None:
    workers = Workers(None, device=GPU, num_cores=16)
    for _ in range(10):  # short epochs, each of which starts them
        workers.restart()
        for step in range(8):
            assert not workers.grow(seconds=10.0, data_wait=10.0 if step < 5 else 0.9)
    assert workers.count == 4


def test_cores_are_divided_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sniper.training.workers._usable_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Workers(None, device=GPU).count == 2
