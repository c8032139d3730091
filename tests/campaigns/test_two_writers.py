"""Campaign: two commands that write to one place, at random offsets: one works, the other is refused in a second.

`pytest tests/campaigns/test_two_writers.py -m slow -n 0 -s` prints the figures that docs/reliability.md quotes.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sniper.config.loading import dump_experiment, load_experiment
from sniper.files import is_temporary
from sniper.runs.lock import FOLDER_LOCK
from sniper.runs.run import Run
from tests.campaigns.campaign import PATIENCE, SEED, wait_until
from tests.cli.commands import SNIPER, start
from tests.cli.test_processes import finish
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment

NUM_IMAGES = 300  # so that mining and prediction take longer than the largest offset
MAX_OFFSET = 3.0  # seconds
LIMIT = 1.0  # seconds, beside those that `sniper --version` takes
STOPPED = {0, 128 + signal.SIGINT, 128 + signal.SIGTERM}

TRAIN = "train experiment.yaml --run run --train.epochs 500"
NEW = TRAIN.replace("--run run", "--run new")
RESUME = f"{TRAIN} --resume"
PAIRS = (
    (NEW, NEW),
    (NEW, "train train.json --run new --epochs 500 --model.backbone.pretrained false"),
    (NEW, "demo --run new"),
    (RESUME, RESUME),
    (RESUME, "mine run"),
    ("mine run", RESUME),
    ("mine run -o proposals", "mine run -o proposals"),
    ("predict run", "predict run"),
    ("predict run -o run/evaluation/detections.json", "evaluate run"),
    ("evaluate run", "evaluate run"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a data set, its experiment, and a short run of it."""
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, sides=[(160, 120)] * NUM_IMAGES)
    (folder / "experiment.yaml").write_text(dump_experiment(tiny_experiment(folder / "train.json")))
    finish(start("train", folder / "experiment.yaml", "--run", folder / "run", "--train.epochs", "0.05"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_one_of_two_commands_works_and_the_other_explains_why_not(
    number: int, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(f"{SEED} {number}")
    monkeypatch.chdir(world)
    _remove_outputs()
    commands = [_marked(command, keep=keep) for command, keep in zip(PAIRS[number], (31, 32), strict=True)]
    first = start(*commands[0])
    if generator.random() < 0.5:
        wait_until(first, lambda: _locks(world))
        offset = generator.uniform(0.0, MAX_OFFSET)
    else:
        offset = generator.uniform(0.0, 0.2)
    time.sleep(offset)
    begun = time.monotonic()
    second = start(*commands[1])
    processes = [first, second]
    wait_until(first, lambda: second.poll() is not None)
    loser = processes.index(second if second.poll() is not None else first)
    winner = 1 - loser
    seconds = time.monotonic() - begun
    out, err = processes[loser].communicate()
    start_up = _seconds_to_start()
    try:
        assert processes[loser].returncode == 2, (out, err)
        assert out == ""
        assert "another process writes there: sniper " in " ".join(err.split())
        assert f"(process {processes[winner].pid} on " in " ".join(err.split())
        assert seconds < start_up + LIMIT
        assert processes[winner].poll() is None
    finally:
        folder = world / ("new" if "new" in commands[winner] else "run")
        result = _end(processes[winner], folder if commands[winner][0] in ("train", "demo") else None)
    if "--train.keep_checkpoints" in commands[winner]:
        assert load_experiment(folder / "config.yaml").train.keep_checkpoints == (31, 32)[winner]
    if commands[winner][0] in ("train", "demo"):
        steps = [entry["step"] for entry in Run(folder).entries() if entry["stage"] == "train"]
        assert steps == list(range(1, len(steps) + 1))
    else:
        assert result["num_images"] == NUM_IMAGES
    assert not _locks(world)
    assert not [path for path in world.rglob(".*") if is_temporary(path.name)]
    sys.stdout.write(
        f"\n{PAIRS[number][loser]} | {PAIRS[number][winner]} | {seconds:.2f} s | {seconds - start_up:+.2f} s\n"
    )


def _remove_outputs() -> None:
    for folder in ("new", "proposals", "run/evaluation", "run/proposals"):
        shutil.rmtree(folder, ignore_errors=True)
    Path("run/detections.json").unlink(missing_ok=True)


def _marked(command: str, *, keep: int) -> list[str]:
    """Return the arguments of a command; a training gets a field by which its configuration is recognised."""
    mark = ["--train.keep_checkpoints", str(keep)] if command.startswith("train") else []
    return [*command.split(), *mark]


def _seconds_to_start() -> float:
    """Measure how long a command takes that does nothing."""
    begun = time.monotonic()
    subprocess.run([SNIPER, "--version"], capture_output=True, check=True)
    return time.monotonic() - begun


def _locks(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name in (FOLDER_LOCK, ".detections.json.lock")]


def _end(process: "subprocess.Popen[str]", run: Path | None) -> dict[str, object]:
    """Wait for the end of a command, and return what it prints; a training is stopped after some steps."""
    if run is not None:
        metrics = Run(run).metrics_path
        size = metrics.stat().st_size if metrics.exists() else 0
        wait_until(process, lambda: metrics.exists() and metrics.stat().st_size > size)
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in STOPPED, err
    return dict(json.loads(out)) if out else {}
