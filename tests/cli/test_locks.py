"""Commands that write to the same place: the second is refused at once, and the first is not disturbed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from sniper.errors import RunError
from sniper.runs.lock import FOLDER_LOCK, lock_file, lock_folder
from sniper.runs.run import Run
from tests.campaigns.campaign import PATIENCE, loaders_of, wait_until
from tests.cli.commands import CommandLine, start, start_two
from tests.cli.test_processes import finish, training
from tests.runs.locks import held_by_another_thread, identities

Lock = Callable[[Path], AbstractContextManager[None]]


def lock_of_run(folder: Path) -> AbstractContextManager[None]:
    return lock_folder(folder / "run", option="--run")


def lock_of_proposals(folder: Path) -> AbstractContextManager[None]:
    return lock_folder(folder / "proposals", option="-o")


def lock_of_results(folder: Path) -> AbstractContextManager[None]:
    return lock_file(folder / "run" / "detections.json", option="-o")


def lock_of_evaluation(folder: Path) -> AbstractContextManager[None]:
    return lock_file(folder / "run" / "evaluation" / "detections.json", option="-o")


def lock_of_output(folder: Path) -> AbstractContextManager[None]:
    return lock_file(folder / "output", option="-o")


@pytest.mark.parametrize(
    ("lock", "command", "option"),
    [
        (lock_of_run, "train experiment.yaml --run run", "--run"),
        (lock_of_run, "train experiment.yaml --run run --resume", "--run"),
        (lock_of_run, "train train.json --run run", "--run"),
        (lock_of_run, "demo --run run", "--run"),
        (lock_of_run, "mine run", "-o"),
        (lock_of_run, "mine run -o run/other", "-o"),
        (lock_of_proposals, "mine run -o proposals", "-o"),
        (lock_of_proposals, "mine train.json --from none.json -o proposals", "-o"),
        (lock_of_run, "mine run --to yolo -o output", "-o"),
        (lock_of_output, "mine run --to yolo -o output", "-o"),
        (lock_of_results, "predict run", "-o"),
        (lock_of_results, "predict run train.json -o run/detections.json", "-o"),
        (lock_of_output, "predict run -o output", "-o"),
        (lock_of_evaluation, "evaluate run", "-o"),
        (lock_of_evaluation, "evaluate run train.json", "-o"),
        (lock_of_evaluation, "predict run -o run/evaluation/detections.json", "-o"),
        (lock_of_results, "evaluate run -o run", "-o"),
        (lock_of_output, "chips train.json -o output", "-o"),
        (lock_of_output, "convert train.json output --to yolo", "OUT"),
    ],
)
def test_a_second_writer_is_refused(
    lock: Lock,
    command: str,
    option: str,
    trained_folder: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(trained_folder)
    before = identities(trained_folder)
    with held_by_another_thread(lock(trained_folder)):
        message = sniper.error(*command.split())
    assert "another process writes there: " in message
    assert f"(process {os.getpid()} on " in message
    assert message.endswith(f"or write elsewhere ({option}).")
    assert identities(trained_folder) == before


REFUSED = """
import sys
from sniper.cli import run
assert run(sys.argv[1:]) == 2
assert not {"torch", "numba", "numpy"} & sys.modules.keys()
"""


def test_a_command_is_refused_before_anything_slow_is_imported(trained_folder: Path) -> None:
    with held_by_another_thread(lock_of_run(trained_folder)):
        command = [sys.executable, "-c", REFUSED, *training(trained_folder, "run", "--resume")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "another process writes there" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "train experiment.yaml --run none/run --resume",
        "train nothing.yaml --run none/run",
        "mine none",
        "predict none",
        "predict run --checkpoint 99 -o none/output.json",
        "chips train.json -o none/output.npz",
        "convert nothing.json none/output --to coco",
    ],
)
def test_a_command_that_fails_leaves_neither_lock_nor_folder(
    command: str, trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_folder)
    before = sorted(trained_folder.rglob("*"))
    sniper.error(*command.split())
    assert sorted(trained_folder.rglob("*")) == before


def test_a_command_leaves_no_lock(
    trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained_folder)
    for command in ("mine run", "mine run", "predict run", "chips train.json -o chips.npz"):
        sniper.text(*command.split())
    hidden = {path.name for path in trained_folder.rglob(".*")}
    assert hidden == {".detections.json.source"}


@contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """Stop a training at the end of a block, also if that fails."""
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


@pytest.mark.processes
def test_a_killed_training_is_continued_while_its_loaders_live(folder: Path) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("loader processes are found in /proc")
    options = ("--train.epochs", "500", "--data.num_workers", "2")
    killed = start(*training(folder, "run", *options))
    wait_until(killed, lambda: Run(folder / "run").checkpoints)
    wait_until(killed, lambda: len(loaders_of(killed)) >= 2)
    loaders = loaders_of(killed)
    for loader in loaders:
        os.kill(loader, signal.SIGSTOP)  # so that they outlive the training
    try:
        killed.kill()
        assert killed.wait(PATIENCE) == -signal.SIGKILL
        assert (folder / "run" / FOLDER_LOCK).exists()
        step = int(Run(folder / "run").checkpoints[-1].name)
        epochs = str(Run(folder / "run").progress.epoch + 1)
        resumed = start(*training(folder, "run", "--train.epochs", epochs, "--resume"))
        assert json.loads(finish(resumed))["step"] > step
        for loader in loaders:
            os.kill(loader, 0)  # they live
    finally:
        for loader in loaders:
            os.kill(loader, signal.SIGKILL)
        killed.communicate()
    hidden = [path.name for path in (folder / "run").rglob(".*")]
    assert not hidden


@pytest.mark.processes
def test_a_second_torchrun_is_refused_and_the_first_goes_on(folder: Path) -> None:
    options = ("--train.epochs", "500", "--train.checkpoint_minutes", "99")
    with ended(start_two(*training(folder, "run", *options))) as first:
        _check_refused_beside(first, folder, options)
    steps = [entry["step"] for entry in Run(folder / "run").entries() if entry["stage"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def _check_refused_beside(first: "subprocess.Popen[str]", folder: Path, options: tuple[str, ...]) -> None:
    metrics, config = folder / "run" / "metrics.jsonl", folder / "run" / "config.yaml"
    wait_until(first, metrics.exists)
    before = config.read_bytes(), config.stat().st_ino
    second = start_two(*training(folder, "run", *options, "--seed", "7"))
    _, err = second.communicate(timeout=PATIENCE)
    assert second.returncode != 0
    assert "another process writes there: sniper train" in " ".join(err.split())
    assert (config.read_bytes(), config.stat().st_ino) == before
    num_lines = len(metrics.read_text().splitlines())
    wait_until(first, lambda: len(metrics.read_text().splitlines()) > num_lines)
    assert first.poll() is None


@pytest.mark.processes
def test_a_run_is_read_while_it_is_trained(folder: Path, sniper: CommandLine) -> None:
    options = ("--train.epochs", "5000", "--train.keep_checkpoints", "1")
    with ended(start(*training(folder, "run", *options))) as process:
        _check_readable(process, folder, sniper)


def _check_readable(process: "subprocess.Popen[str]", folder: Path, sniper: CommandLine) -> None:
    run = Run(folder / "run")
    wait_until(process, lambda: run.checkpoints)
    steps = set()
    for choice in ("best", "last") * 100:
        steps.add(int(run.load_weights(choice)[2].parent.name))
    assert len(steps) > 1
    result = sniper.json("predict", folder / "run", folder / "images")
    assert result["num_images"] == 4
    sniper.json("evaluate", folder / "run")
    with pytest.raises(RunError, match=f"there is no checkpoint of step {min(steps)}; there are"):
        run.load_weights(min(steps))
    assert process.poll() is None
