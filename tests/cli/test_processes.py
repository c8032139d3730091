"""Commands in processes of their own: killed, interrupted, and several together under torchrun."""

import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sniper.runs.run import Run
from tests.cli.commands import CommandLine, start, start_two

PATIENCE = 600  # seconds after which a process hangs; a busy machine is no fault


def wait_for(process: "subprocess.Popen[str]", is_there: Callable[[], object]) -> None:
    """Wait until a condition is true or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a process that must succeed, and return its standard output."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return Run(folder).load_weights("last")[0]


def check_equal_weights(folder: Path, other: Path) -> None:
    weights, others = weights_of(folder), weights_of(other)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def training(folder: Path, name: str, *options: str) -> tuple[str, ...]:
    return ("train", str(folder / "experiment.yaml"), "--run", str(folder / name), *options)


@pytest.mark.processes
def test_a_killed_process_leaves_a_run_that_ends_with_the_same_weights(folder: Path) -> None:
    options = ("--train.epochs", "3", "--data.num_workers", "1")
    unbroken = start(*training(folder, "unbroken", *options))
    killed = start(*training(folder, "killed", *options))
    wait_for(killed, lambda: Run(folder / "killed").checkpoints)
    killed.kill()
    killed.communicate()
    resumed = start(*training(folder, "killed", *options, "--resume"))
    finish(unbroken)
    finish(resumed)
    check_equal_weights(folder / "unbroken", folder / "killed")


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_weights(folder: Path) -> None:
    options = ("--train.epochs", "120", "--data.num_workers", "1", "--train.ema_decay", "0.99")
    finish(start(*training(folder, "unbroken", *options)))
    generator = random.Random(0)
    num_killed = 0
    for _ in range(10):
        more = ("--resume",) if Run(folder / "killed").checkpoints else ()
        process = start(*training(folder, "killed", *options, *more))
        wait_for(process, lambda: Run(folder / "killed").checkpoints)
        try:
            process.communicate(timeout=generator.uniform(0, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            num_killed += 1
    assert num_killed >= 8
    finish(start(*training(folder, "killed", *options, "--resume")))
    check_equal_weights(folder / "unbroken", folder / "killed")


@pytest.mark.parametrize(
    "signal_number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.processes)]
)
def test_a_process_asked_to_stop_saves_first(folder: Path, signal_number: int) -> None:
    options = ("--train.epochs", "500", "--train.checkpoint_minutes", "99")
    process = start(*training(folder, "run", *options))
    metrics = folder / "run" / "metrics.jsonl"
    wait_for(process, metrics.exists)
    process.send_signal(signal_number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert out == ""
    assert "stopped" in err
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert [path.name for path in Run(folder / "run").checkpoints][-1] == f"{last['step']:08d}"


@pytest.mark.processes
def test_two_processes_learn_what_one_learns(folder: Path) -> None:
    options = (
        *("--train.epochs", "7", "--train.checkpoint_minutes", "99", "--train.evaluate_every", "7"),
        *("--model.backbone.batch_norm", "frozen", "--train.accumulation_steps", "2"),
        *("--negatives.source", "mined"),
    )
    alone = start(*training(folder, "alone", *options))
    together = start_two(*training(folder, "together", *options))
    steps = [json.loads(finish(process))["step"] for process in (alone, together)]
    assert steps[0] == steps[1] >= 20
    weights, others = weights_of(folder / "alone"), weights_of(folder / "together")
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5)
    metrics = [Run(folder / name).entries() for name in ("alone", "together")]
    assert [entry["stage"] for entry in metrics[0]] == [entry["stage"] for entry in metrics[1]]
    for ours, theirs in zip(*metrics, strict=True):
        for key in ours.keys() & {"loss", "chips", "learning_rate", "ap"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-3), (key, ours, theirs)


def test_two_processes_detect_what_one_detects(trained_folder: Path, sniper: CommandLine) -> None:
    together = start_two("predict", trained_folder / "run", "-o", trained_folder / "together.json")
    alone = sniper.json(
        "predict", trained_folder / "run", "-o", trained_folder / "alone.json", "--device", "cpu"
    )
    assert json.loads(finish(together))["num_detections"] == alone["num_detections"] > 0
    assert (trained_folder / "together.json").read_bytes() == (trained_folder / "alone.json").read_bytes()
    assert not list(trained_folder.glob(".*part*"))


@pytest.mark.processes
def test_two_stopped_processes_continue_together(folder: Path) -> None:
    options = ("--train.epochs", "400", "--train.checkpoint_minutes", "99")
    process = start_two(*training(folder, "run", *options))
    metrics = folder / "run" / "metrics.jsonl"
    wait_for(process, metrics.exists)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0, err
    (checkpoint,) = Run(folder / "run").checkpoints
    last = Run(folder / "run").entries()[-1]
    assert int(checkpoint.name) == last["step"]
    length = ("--train.epochs", str(last["epoch"] + 1))
    finish(start_two(*training(folder, "run", *length, "--resume")))
    steps = [entry["step"] for entry in Run(folder / "run").entries() if entry["stage"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] > last["step"]


@pytest.mark.processes
def test_an_error_in_one_process_ends_all_and_is_printed(folder: Path) -> None:
    path = folder / "images" / "train_2.png"
    path.write_bytes(path.read_bytes()[:-2000])  # its sides can still be read
    process = start_two(*training(folder, "run", "--data.num_workers", "1"))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert re.search(r"error: \S*train_2\.png: cannot be read as an image", " ".join(err.split())), err
