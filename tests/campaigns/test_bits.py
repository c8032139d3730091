"""The same training in other processes, threads and loaders: where it ends with the same bits, and how close elsewhere.

`pytest -m slow -n 0 -s tests/campaigns/test_bits.py` prints the table that `docs/reliability.md` has.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sniper.runs.run import Run
from tests.campaigns.campaign import PLAIN, Experiment, end_of
from tests.cli.commands import start, start_two

_OPTIONS = (*PLAIN, "--model.backbone.batch_norm", "frozen")
_TOLERANCE = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_bits_depend_on_processes_and_threads_but_not_on_loaders(tmp_path: Path, num_processes: int) -> None:
    experiment = Experiment.write(tmp_path, *_OPTIONS)
    runs = {
        (num_threads, num_loaders): train(experiment, num_processes, num_threads, num_loaders)
        for num_threads in (1, 2)
        for num_loaders in (0, 1, 2)
    }
    alone = train(experiment, 1, 1, 0, name="alone")
    for (num_threads, num_loaders), run in runs.items():
        figures = {
            "processes": num_processes,
            "threads": num_threads,
            "loaders": num_loaders,
            "from no loader": difference(run, runs[num_threads, 0]),
            "from one process and thread": difference(run, alone),
        }
        sys.stdout.write(f"{figures}\n")
        assert figures["from no loader"] == 0
        assert figures["from one process and thread"] <= _TOLERANCE


def train(
    experiment: Experiment, num_processes: int, num_threads: int, num_loaders: int, *, name: str = ""
) -> Run:
    """Train in some processes, each with some threads and loaders; the batch has two parts in any case."""
    run = experiment.run(name or f"run_{num_threads}_{num_loaders}")
    options: Sequence[object] = (
        *("train", experiment.folder / "experiment.yaml", "--run", run.folder, *experiment.options),
        *("--data.num_workers", num_loaders, "--train.accumulation_steps", 2 // num_processes),
    )
    command = start if num_processes == 1 else start_two
    ended = end_of(command(*options, num_threads=num_threads))
    assert ended.code == 0, ended.err
    return run


def difference(run: Run, other: Run) -> float:
    """Return the largest difference of two weights, relative to the largest of their tensor; 0 for equal bits."""
    weights, others = (each.load_weights("last")[0] for each in (run, other))
    differences = [
        float((others[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-3))
        for name, tensor in weights.items()
        if not torch.equal(others[name], tensor)
    ]
    return max(differences, default=0.0)
