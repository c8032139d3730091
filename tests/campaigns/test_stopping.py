"""Trainings that are stopped or killed at random moments: nothing is lost, and the weights are the same.

`SNIPER_TRIALS=20 pytest -m slow -s tests/campaigns/test_stopping.py` prints the figures of twenty trials each.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from sniper.files import is_temporary
from sniper.runs.run import Run
from tests.campaigns.campaign import (
    MINED,
    PLAIN,
    SEED,
    SELF,
    Ended,
    Experiment,
    descendants_of,
    end_of,
    have_ended,
    kill_one,
    loaders_of,
    num_logged,
    num_lost,
    num_trials,
    send_to_group,
    wait_for_step,
    wait_until,
)

_STOPS_PER_RUN = 5

Stop = Callable[["subprocess.Popen[str]", Experiment, str, random.Random], None]
"""Makes a training end, given its process, its experiment and the name of its run."""


def terminate(process: "subprocess.Popen[str]", experiment: Experiment, name: str, _: random.Random) -> None:
    send_to_group(process, signal.SIGTERM)


def kill_loader(
    process: "subprocess.Popen[str]", experiment: Experiment, name: str, random_state: random.Random
) -> None:
    """Kill a loader, and another where the first had read all that was left of the epoch."""
    run = experiment.run(name)
    while process.poll() is None:
        before = num_logged(run)
        wait_until(process, lambda: loaders_of(process))
        kill_one(loaders_of(process), random_state)
        wait_for_step(process, run, before + 8)  # more than an epoch


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, MINED, SELF], ids=["plain", "mined", "self"])
@pytest.mark.parametrize(("stop", "code"), [(terminate, 143), (kill_loader, 2)], ids=["sigterm", "loader"])
def test_a_stopped_training_loses_nothing(
    tmp_path: Path, options: Sequence[str], stop: Stop, code: int, request: pytest.FixtureRequest
) -> None:
    random_state = random.Random(f"{SEED} {request.node.name}")
    experiment = Experiment.write(tmp_path, *options)
    digest = experiment.complete("unbroken")
    num_steps = num_logged(experiment.run("unbroken"))
    lost: list[int] = []
    num_runs = num_equal = 0
    left = num_trials(2)
    while left > 0:
        name = f"stopped_{num_runs}"
        # The last epochs are left, for loaders that are killed after they have read all of one.
        steps = sorted(random_state.sample(range(num_steps - 24), min(left, _STOPS_PER_RUN)))
        for step in steps:
            run = experiment.run(name)
            at_least = max(step, num_logged(run) + 1)
            process = experiment.start(name)
            wait_for_step(process, run, at_least)
            time.sleep(random_state.uniform(0, 0.2))
            others = descendants_of(process.pid)
            stop(process, experiment, name, random_state)
            ended = end_of(process)
            check_ended(ended, code)
            assert have_ended(others)
            lost.append(num_lost(run))
        left -= len(steps)
        num_equal += experiment.complete(name) == digest
        num_runs += 1
    figures = {
        "campaign": request.node.name,
        "trials": len(lost),
        "steps lost at most": max(lost),
        "runs": num_runs,
        "runs with equal weights": num_equal,
    }
    sys.stdout.write(f"{figures}\n")
    assert max(lost) == 0
    assert num_equal == num_runs


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, MINED, SELF], ids=["plain", "mined", "self"])
def test_a_killed_training_ends_with_the_same_weights(
    tmp_path: Path, options: Sequence[str], request: pytest.FixtureRequest
) -> None:
    random_state = random.Random(f"{SEED} {request.node.name}")
    experiment = Experiment.write(tmp_path, *options, "--train.checkpoint_minutes", "0.0001")  # every step
    digest = experiment.complete("unbroken")
    num_steps = num_logged(experiment.run("unbroken"))
    num_runs = num_equal = num_killed = num_unfinished = 0
    left = num_trials(2)
    while left > 0:
        name = f"killed_{num_runs}"
        run = experiment.run(name)
        steps = sorted(random_state.sample(range(num_steps - 6), min(left, _STOPS_PER_RUN)))
        for index, step in enumerate(steps):
            process = experiment.start(name)
            wait_for_step(process, run, step)
            if index % 2:
                wait_until(process, partial(unfinished_in, run), seconds=0.0)
            else:
                time.sleep(random_state.uniform(0, 0.5))
            others = descendants_of(process.pid)
            process.kill()
            ended = end_of(process)
            num_killed += ended.code == -signal.SIGKILL
            num_unfinished += bool(unfinished_in(run))
            assert "Traceback" not in ended.err
            assert have_ended(others)
        left -= len(steps)
        num_equal += experiment.complete(name) == digest
        assert not unfinished_in(run)
        num_runs += 1
    figures = {
        "campaign": request.node.name,
        "killed": num_killed,
        "while a file was written": num_unfinished,
        "runs": num_runs,
        "runs with equal weights": num_equal,
    }
    sys.stdout.write(f"{figures}\n")
    assert num_killed > 0
    assert num_equal == num_runs


def unfinished_in(run: Run) -> list[Path]:
    """Return the temporary files and folders of a run."""
    return [path for path in run.folder.rglob(".*") if is_temporary(path.name)]


def check_ended(ended: Ended, code: int) -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
