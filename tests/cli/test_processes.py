"""Commands in processes of their own: killed, interrupted, and several together under torchrun."""

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sniper.cli.progress import ProgressBars
from sniper.config.loading import dump_experiment
from sniper.runs.run import Run
from tests.campaigns.campaign import (
    PATIENCE,
    Ended,
    Experiment,
    descendants_of,
    end_of,
    have_ended,
    kill_one,
    loaders_of,
    num_logged,
    num_lost,
    parent_of,
    send_to_group,
    wait_for_step,
    wait_until,
)
from tests.cli.commands import SNIPER, CommandLine, start, start_changed, start_machines, start_two
from tests.data.tiny import write_dataset
from tests.models.torchvision_detectors.specs import SPECS
from tests.training.experiments import tiny_experiment


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


def check_alike(path: Path, other: Path) -> None:
    """Check that two files have the same detections, up to the last digit that they are rounded to.

    Windows of several images are searched in one batch, and the sums of a convolution depend on its size in their last
    bits. A run that is resumed, and one of several processes, has other batches.
    """
    ours, theirs = (json.loads(each.read_text()) for each in (path, other))
    assert len(ours) == len(theirs) > 0
    columns = [
        (
            np.array([(row["image_id"], row["category_id"]) for row in rows]),
            np.array([row["bbox"] for row in rows]),
            np.array([row["score"] for row in rows]),
        )
        for rows in (ours, theirs)
    ]
    (keys, boxes, scores), (other_keys, other_boxes, other_scores) = columns
    partners = []
    for key, box, score in zip(keys, boxes, scores, strict=True):
        is_alike = (other_keys == key).all(axis=1) & (np.abs(other_boxes - box) < 0.021).all(axis=1)
        partners.append(np.flatnonzero(is_alike & (np.abs(other_scores - score) < 2.1e-5)))
    assert all(len(rows) for rows in partners), ours[[len(rows) for rows in partners].index(0)]
    assert len(np.unique(np.concatenate(partners))) == len(theirs)


def training(folder: Path, name: str, *options: str) -> tuple[str, ...]:
    return ("train", str(folder / "experiment.yaml"), "--run", str(folder / name), *options)


@pytest.mark.processes
def test_a_killed_process_leaves_a_run_that_ends_with_the_same_weights(
    folder: Path, sniper: CommandLine
) -> None:
    options = ("--train.epochs", "3", "--data.num_workers", "1")
    killed = start(*training(folder, "killed", *options))
    wait_until(killed, lambda: Run(folder / "killed").checkpoints)
    killed.kill()
    killed.communicate()
    sniper.json(*training(folder, "killed", *options, "--resume"))
    sniper.json(*training(folder, "unbroken", *options))
    check_equal_weights(folder / "unbroken", folder / "killed")


def check_stopped(ended: Ended, code: int, run: Run) -> None:
    """Check that a training has ended by a signal, without a traceback, and has saved its last step."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    step = run.entries()[-1]["step"]
    assert f"stopped after step {step:,}, which is saved; to continue: sniper train" in ended.err
    assert int(run.checkpoints[-1].name) == step


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.processes),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.processes),
    ],
)
def test_a_signal_to_all_processes_loses_no_step(folder: Path, number: int, code: int) -> None:
    options = ("--train.epochs", "500", "--train.checkpoint_minutes", "99", "--data.num_workers", "2")
    process = start(*training(folder, "run", *options))
    run = Run(folder / "run")
    wait_for_step(process, run, 5)
    loaders = loaders_of(process)
    send_to_group(process, number)
    check_stopped(end_of(process), code, run)
    assert have_ended(loaders)


HANG_AT_STEP_3 = """
import hashlib, sys
from sniper.training import learner

class Learner(learner.Learner):
    def update(self, batch, *, step, **options):
        if step == 3:
            sys.stderr.write("in step 4\\n")
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes
        return super().update(batch, step=step, **options)

learner.Learner = Learner
"""


@pytest.mark.processes
def test_a_second_signal_ends_a_training_at_once(folder: Path) -> None:
    process = start_changed(HANG_AT_STEP_3, *training(folder, "run", "--train.checkpoint_minutes", "1e-9"))
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert "in step 4\n" in lines
    loaders = loaders_of(process)
    process.send_signal(signal.SIGTERM)
    assert any(
        "SIGTERM: the step in progress is completed and saved; a second signal ends" in line for line in lines
    )
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    ended = end_of(process)
    assert (ended.code, ended.err, ended.out) == (130, "", "")
    assert have_ended(loaders)
    assert int(Run(folder / "run").checkpoints[-1].name) == 3


TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.processes
def test_a_closed_terminal_stops_a_training_and_loses_no_step(folder: Path) -> None:
    terminal, device = pty.openpty()
    options = ("--train.epochs", "500", "--train.checkpoint_minutes", "99")
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, SNIPER, *training(folder, "run", *options)],
        stdin=device,
        stdout=device,
        stderr=device,
        start_new_session=True,
        text=True,
    )
    os.close(device)
    run = Run(folder / "run")
    wait_until(process, lambda: os.read(terminal, 65536) and num_logged(run) >= 5)
    os.close(terminal)
    assert process.wait(timeout=PATIENCE) == 129
    assert num_lost(run) == 0


@pytest.mark.processes
def test_a_killed_loader_ends_a_training_with_advice(folder: Path) -> None:
    options = ("--train.epochs", "500", "--train.checkpoint_minutes", "99", "--data.num_workers", "2")
    experiment = Experiment.write(folder / "six_steps", *options)
    process = experiment.start("run")
    run = experiment.run("run")
    while process.poll() is None:  # one that has read all of an epoch is not missed
        wait_for_step(process, run, num_logged(run) + 1)
        kill_one(loaders_of(process), random.Random(0))
    ended = end_of(process)
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    assert re.search(
        r"^error: a process that reads images was killed \(SIGKILL\), .*\(data\.num_workers: 1 instead of 2\); "
        rf"step {num_logged(run):,} is saved, and --resume continues from it$",
        ended.err,
        re.MULTILINE,
    )
    assert num_lost(run) == 0


@pytest.mark.processes
def test_loaders_end_with_a_killed_training(folder: Path) -> None:
    process = start(*training(folder, "run", "--train.epochs", "500", "--data.num_workers", "2"))
    wait_until(process, lambda: len(loaders_of(process)) == 2)
    loaders = loaders_of(process)
    process.kill()
    end_of(process)
    assert have_ended(loaders)


@pytest.mark.processes
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_signal_keeps_the_images_that_were_searched(
    trained_folder: Path, command: str, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sides = trained_folder / "run", [(200, 200)] * 60
    annotations = write_dataset(trained_folder, name="many", sides=sides)
    arguments: dict[str, tuple[object, ...]] = {
        "predict": ("predict", run, "--annotations", annotations, "-o", trained_folder / "detections.json"),
        "evaluate": ("evaluate", run, annotations, "-o", trained_folder),
    }
    process = start(*arguments[command])
    part = trained_folder / ".detections.json.parts" / "000.boxes"
    wait_until(process, lambda: part.exists() and part.stat().st_size > 1000)
    send_to_group(process, signal.SIGTERM)
    ended = end_of(process)
    assert ended.code == 143, ended.err
    assert "Traceback" not in ended.err
    assert "stopped; the images searched so far are kept, and " in ended.err
    left: list[int] = []
    monkeypatch.setattr(ProgressBars, "predicting", lambda _, __, num_images: left.append(num_images))
    sniper.text(*arguments[command], *(("--resume",) if command == "predict" else ()))
    assert 0 < left[0] < len(sides)
    target = trained_folder / "detections.json"
    os.replace(target, trained_folder / "resumed.json")
    sniper.text(*arguments["predict"])
    check_alike(trained_folder / "resumed.json", target)


COUNT_THREADS = """
import sys
from pathlib import Path
import torch
from sniper.cli import run

folder = Path(sys.argv[1])
numbers = [torch.get_num_threads()]
for command in (
    f"train {folder}/experiment.yaml --run {folder}/run --negatives.source rpn --mine.rpn_epochs 0.2 "
    "--train.epochs 0.2",
    f"predict {folder}/run",
    f"mine {folder}/run/rpn",
    f"evaluate {folder}/run --details",
    f"chips {folder}/train.json -o {folder}/chips.npz",
    f"plan {folder}/train.json -o {folder}/plan",
):
    assert run(command.split()) == 0, command
    numbers.append(torch.get_num_threads())
sys.stderr.write(f"threads {numbers}")
"""


@pytest.mark.processes
@pytest.mark.parametrize("variables", [{"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}, {}])
def test_no_command_changes_the_threads_of_torch(folder: Path, variables: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS, folder],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stderr.rpartition("threads ")[2])
    assert len(set(numbers)) == 1
    if variables:
        assert numbers[0] == 1


@pytest.mark.processes
@pytest.mark.parametrize(
    "source",
    [
        ("--negatives.source", "rpn", "--mine.rpn_epochs", "2"),
        (
            *("--negatives.source", "self", "--negatives.min_score", "0"),
            *("--mine.start", "0.3", "--mine.every_epochs", "1"),
        ),
        ("--model.focus", "true"),
    ],
)
def test_two_processes_learn_what_one_learns(
    folder: Path, source: Sequence[str], sniper: CommandLine
) -> None:
    options = (
        *("--train.epochs", "4", "--train.checkpoint_minutes", "99", "--train.evaluate_every", "4"),
        *("--model.backbone.batch_norm", "frozen", "--train.accumulation_steps", "2"),
        *("--train.trackers", "[tensorboard]"),
        *source,
    )
    together = start_two(*training(folder, "together", *options))
    num_steps = sniper.json(*training(folder, "alone", *options, "--device", "cpu"))["step"]
    assert json.loads(finish(together))["step"] == num_steps >= 12
    weights, others = weights_of(folder / "alone"), weights_of(folder / "together")
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5)
    metrics = [Run(folder / name).entries() for name in ("alone", "together")]
    assert [entry["stage"] for entry in metrics[0]] == [entry["stage"] for entry in metrics[1]]
    for ours, theirs in zip(*metrics, strict=True):
        for key in ours.keys() & {"loss", "chips", "learning_rate", "ap"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-3), (key, ours, theirs)
    check_recorded_once(Run(folder / "together"))


def check_recorded_once(run: Run) -> None:
    """Check that the page, and one file of events, have all steps of a training in several processes."""
    from tests.training.trackers.test_tensorboard import points_of

    assert len([*(run.folder / "tensorboard").iterdir()]) == 1
    steps = [entry["step"] for entry in run.entries() if entry["stage"] == "train"]
    assert [step for step, _ in points_of(run.folder, "train/loss")] == steps
    page = run.report_path.read_text()
    assert f"Trained for 4.00 of 4.00 epochs: {len(steps)} steps" in page
    assert 'id="errors"' in page


@pytest.mark.processes
@pytest.mark.parametrize("name", ["retinanet", pytest.param("faster_rcnn", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns_with_a_detector_of_torchvision(
    folder: Path, name: str, sniper: CommandLine
) -> None:
    spec = replace(tiny_experiment(folder / "train.json"), model=SPECS[name])
    (folder / "experiment.yaml").write_text(dump_experiment(spec))
    options = ("--train.epochs", "2", "--model.backbone.batch_norm", "frozen")
    together = start_two(*training(folder, "together", *options))
    alone = training(folder, "alone", *options, "--train.accumulation_steps", "2", "--device", "cpu")
    assert sniper.json(*alone)["step"] == json.loads(finish(together))["step"]
    weights, others = weights_of(folder / "alone"), weights_of(folder / "together")
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.processes
def test_launchers_on_two_machines_share_a_run(folder: Path, sniper: CommandLine) -> None:
    options = ("--train.epochs", "2", "--model.backbone.batch_norm", "frozen")
    machines = start_machines(*training(folder, "together", *options))
    num_steps = sniper.json(*training(folder, "alone", *options, "--device", "cpu"))["step"]
    (printed,) = filter(None, map(finish, machines))  # only the first process prints
    assert json.loads(printed)["step"] == num_steps
    weights, others = weights_of(folder / "alone"), weights_of(folder / "together")
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_machines_train_mine_and_predict_though_one_is_killed(folder: Path, sniper: CommandLine) -> None:
    options = (
        *("--train.epochs", "6", "--train.checkpoint_minutes", "1e-9", "--train.evaluate_every", "6"),
        *("--model.backbone.batch_norm", "frozen", "--negatives.source", "rpn", "--mine.rpn_epochs", "1"),
    )
    run = Run(folder / "together")
    machines = start_machines(*training(folder, "together", *options))
    wait_until(machines[0], lambda: run.checkpoints)
    assert (run.folder / "mined").is_dir()
    for pid in [machines[1].pid, *descendants_of(machines[1].pid)]:  # a machine that loses its power
        os.kill(pid, signal.SIGKILL)
    ended = [end_of(machine) for machine in machines]
    assert all(each.code != 0 for each in ended)
    step = int(run.checkpoints[-1].name)
    machines = start_machines(*training(folder, "together", *options, "--resume"))
    num_steps = sniper.json(*training(folder, "alone", *options, "--device", "cpu"))["step"]
    (printed,) = filter(None, map(finish, machines))
    assert json.loads(printed)["step"] == num_steps > step
    weights, others = weights_of(folder / "alone"), weights_of(folder / "together")
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5)

    searching = ("predict", folder / "together", "-o")
    machines = start_machines(*searching, folder / "together.json")
    sniper.json(*searching, folder / "one.json", "--device", "cpu")
    (printed,) = filter(None, map(finish, machines))
    assert json.loads(printed)["num_images"] == 4
    check_alike(folder / "together.json", folder / "one.json")


def test_two_processes_detect_what_one_detects(trained_folder: Path, sniper: CommandLine) -> None:
    together = start_two("predict", trained_folder / "run", "-o", trained_folder / "together.json")
    alone = sniper.json(
        "predict", trained_folder / "run", "-o", trained_folder / "alone.json", "--device", "cpu"
    )
    assert json.loads(finish(together))["num_detections"] == alone["num_detections"] > 0
    check_alike(trained_folder / "together.json", trained_folder / "alone.json")
    assert not list(trained_folder.glob(".*part*"))


@pytest.mark.processes
def test_two_stopped_processes_continue_together(folder: Path) -> None:
    options = ("--train.epochs", "400", "--train.checkpoint_minutes", "99")
    process = start_two(*training(folder, "run", *options))
    metrics = folder / "run" / "metrics.jsonl"
    wait_until(process, metrics.exists)
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
def test_a_killed_loader_of_one_process_saves_the_step_of_both(folder: Path) -> None:
    experiment = Experiment.write(folder / "six_steps")
    run = experiment.run("run")
    options = ("--run", run.folder, "--train.epochs", "500")
    process = start_two("train", experiment.folder / "experiment.yaml", *options)
    wait_for_step(process, run, 1)
    trainer = next(pid for pid in descendants_of(process.pid) if parent_of(pid) == process.pid)
    while process.poll() is None:  # a loader that had read all that was left of the epoch is not missed
        kill_one([pid for pid in loaders_of(process) if parent_of(pid) == trainer], random.Random(0))
        wait_for_step(process, run, num_logged(run) + 1)
    ended = end_of(process)
    assert ended.code != 0
    step = num_logged(run)
    assert step > 0
    for message in ("a process that reads images was killed", "another process of this training has failed"):
        assert re.search(rf"error: {message}.*; step {step:,} is saved", ended.err), ended.err
    assert num_lost(run) == 0


@pytest.mark.processes
def test_a_killed_process_ends_the_other_with_an_explanation(folder: Path) -> None:
    process = start_two(*training(folder, "run", "--train.epochs", "500", "--data.num_workers", "1"))
    wait_for_step(process, Run(folder / "run"), 5)
    others = descendants_of(process.pid)
    trainers = {parent for pid in loaders_of(process) if (parent := parent_of(pid)) is not None}
    assert len(trainers) == 2
    kill_one([*trainers], random.Random(0))
    ended = end_of(process)
    assert "another process has ended, see its error" in ended.err
    assert have_ended(others)
    assert Run(folder / "run").checkpoints


@pytest.mark.processes
def test_an_error_in_one_process_ends_all_and_is_printed(folder: Path) -> None:
    path = folder / "images" / "train_2.png"
    path.write_bytes(path.read_bytes()[:-2000])  # its sides can still be read
    process = start_two(*training(folder, "run", "--data.num_workers", "1"))
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert re.search(r"error: \S*train_2\.png: cannot be read as an image", " ".join(err.split())), err
