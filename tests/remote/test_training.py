"""A training whose images are remote learns what one from the disk does, whatever the server does."""

import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sniper.config.loading import dump_experiment, load_experiment
from sniper.runs.run import Run
from tests.campaigns.campaign import end_of, have_ended, loaders_of, send_to_group, wait_until
from tests.cli.commands import CommandLine, start
from tests.data.tiny import write_dataset
from tests.remote.server import Server
from tests.training.experiments import tiny_experiment


@pytest.fixture
def experiment(served: Path, tmp_path: Path) -> Path:
    annotations = write_dataset(served, sides=[(160, 120), (96, 200), (200, 200), (150, 90)] * 3)
    (tmp_path / "experiment.yaml").write_text(dump_experiment(tiny_experiment(annotations)))
    return tmp_path / "experiment.yaml"


def options(server: Server, *others: str, timeout: int = 1) -> Sequence[str]:
    return (
        *("--data.train.annotations", f"{server.url}/train.json"),
        *("--data.test.annotations", f"{server.url}/train.json", "--data.remote.timeout", f"{timeout}"),
        *others,
    )


def check_equal(run: Path, other: Path) -> None:
    weights, others = (Run(folder).load_weights("last")[0] for folder in (run, other))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_that_stalls_and_fails_changes_nothing(
    num_workers: int, server: Server, experiment: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    workers = ("--data.num_workers", str(num_workers))
    sniper.text("train", experiment, "--run", tmp_path / "local", *workers)
    for name, fault in (("3", "stall"), ("5", "500"), ("7", "reset"), ("8", "short")):
        server.faults[f"/images/train_{name}.png"] = [fault]  # type: ignore[list-item]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tried again")
        sniper.text("train", experiment, "--run", tmp_path / "remote", *workers, *options(server))
    assert not any(server.faults.values())
    check_equal(tmp_path / "local", tmp_path / "remote")
    spec = load_experiment(tmp_path / "remote" / "config.yaml")
    assert spec.data.train.annotations == f"{server.url}/train.json"
    images = {name: count for name, count in server.requests.items() if name.startswith("GET /images/")}
    assert len(images) == 12
    # Once each, in however many epochs it is read, unless two processes need it at the same time.
    assert 12 + 4 <= sum(images.values()) <= 12 * max(num_workers, 1) + 4


def test_an_image_that_fails_each_time_counts_as_bad(
    server: Server, experiment: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    given = options(server, "--data.remote.tries", "2")
    server.faults["/images/train_5.png"] = ["503"] * 99
    message = sniper.error("train", experiment, "--run", tmp_path / "run", *given)
    assert f"{server.url}/images/train_5.png: cannot be read as an image" in message
    assert "the server answered with status 503, 2 times" in message
    with pytest.warns(UserWarning, match=r"train_5.png: .*; skipped"):
        sniper.text("train", experiment, "--run", tmp_path / "other", *given, "--data.on_bad_image", "skip")
    assert any(entry.get("skipped_chips") for entry in Run(tmp_path / "other").entries())


def test_a_stopped_training_continues_as_an_unbroken_one(
    server: Server, experiment: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    sniper.text("train", experiment, "--run", unbroken, *options(server), "--train.epochs", "2")
    sniper.text("train", experiment, "--run", stopped, *options(server), "--train.epochs", "0.7")
    sniper.text("train", stopped / "config.yaml", "--run", stopped, "--resume", "--train.epochs", "2")
    check_equal(unbroken, stopped)


def test_credentials_are_in_no_file_of_a_run_and_in_no_message(
    server: Server, experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.authorization = "Basic bWU6dG9wc2VjcmV0"  # me:topsecret
    url = server.url.replace("//", "//me:topsecret@")
    given = ("--data.train.annotations", f"{url}/train.json?sig=signature", "--train.report", "true")
    process = start(
        "train", experiment, "--run", tmp_path / "run", *given, "--data.test.annotations", f"{url}/train.json"
    )
    ended = end_of(process)
    assert ended.code == 0, ended.err
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert server.url.encode() in written
    for text in (written, ended.err.encode(), ended.out.encode()):
        assert b"topsecret" not in text
        assert b"signature" not in text


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_an_interrupt_ends_a_training_that_waits_for_a_server(
    num_workers: str, server: Server, experiment: Path, tmp_path: Path
) -> None:
    given = options(server, "--data.num_workers", num_workers, "--train.epochs", "99", timeout=60)
    for number in range(1, 12):
        server.faults[f"/images/train_{number}.png"] = ["stall"] * 9
    process = start("train", experiment, "--run", tmp_path / "run", *given)
    wait_until(process, lambda: sum(len(faults) < 9 for faults in server.faults.values()) >= 8)
    assert process.poll() is None, end_of(process).err
    time.sleep(0.5)
    loaders = loaders_of(process)
    send_to_group(process, signal.SIGINT)
    started = time.monotonic()
    ended = end_of(process)
    assert time.monotonic() - started < 5
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert have_ended(loaders)
