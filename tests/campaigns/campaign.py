"""Start a tiny training in a session of its own, disturb it at a chosen step, and compare where it ends.

Processes are found in `/proc`, so these helpers need Linux.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sniper.config.loading import dump_experiment
from sniper.files import sha256
from sniper.runs.run import Run
from tests.cli.commands import start
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment, with_data, with_train

PATIENCE = 600  # seconds after which a process hangs; a busy machine is no fault
LOADER_NAME = "pt_data_worker"  # that torch gives to its loader processes

PLAIN = ("--train.epochs", "12")
MINED = (
    *("--train.epochs", "6", "--negatives.source", "rpn", "--negatives.min_proposals", "[1]"),
    *("--negatives.min_score", "0", "--negatives.dose", "null", "--negatives.per_image", "2"),
    *("--mine.rpn_epochs", "4", "--mine.every_epochs", "2"),
)
SELF = (
    *("--train.epochs", "10", "--negatives.source", "self", "--negatives.min_score", "0"),
    *("--mine.start", "0.3", "--mine.every_epochs", "2"),
)
"""Options of a training of 72 steps without mining, of one with an RPN stage and three rounds of mining, and of one
that mines itself in four rounds."""


SEED = int(os.environ.get("SNIPER_SEED", "0"))
"""The seed of a campaign."""


def num_trials(default: int) -> int:
    """Return the number of trials of a campaign: `SNIPER_TRIALS`, or a few."""
    return int(os.environ.get("SNIPER_TRIALS", default))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: its exit code.
        out: its standard output.
        err: its standard error.
    """

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Experiment:
    """A tiny experiment, trained by the command line in sessions of their own.

    Attributes:
        folder: of its data, its `experiment.yaml` and its runs.
        options: of all its trainings.
    """

    folder: Path
    options: tuple[str, ...] = ()

    @classmethod
    def write(cls, folder: Path, *options: str) -> "Experiment":
        """Write the data and the experiment: six steps an epoch, saved at its end alone, read by two processes."""
        sides = [(160, 120), (96, 200), (200, 200), (150, 90)] * 2
        annotations = write_dataset(folder, sides=sides)
        spec = with_train(tiny_experiment(annotations), checkpoint_minutes=99.0, keep_checkpoints=1)
        (folder / "experiment.yaml").write_text(dump_experiment(with_data(spec, num_workers=2)))
        return cls(folder, options)

    def run(self, name: str) -> Run:
        """Return a run, which may not have been started."""
        return Run(self.folder / name)

    def start(self, name: str) -> "subprocess.Popen[str]":
        """Start a run, or resume it."""
        run = self.run(name)
        resume = ("--resume",) if run.config_path.exists() else ()
        return start("train", self.folder / "experiment.yaml", "--run", run.folder, *self.options, *resume)

    def complete(self, name: str) -> str:
        """Run to the end, and return the digest of the weights."""
        ended = end_of(self.start(name))
        assert ended.code == 0, ended.err
        return digest_of(self.run(name))


def digest_of(run: Run) -> str:
    """Return the SHA-256 digest of the newest weights of a run."""
    return sha256(run.find_weights("last"))


def stages_of(run: Run) -> tuple[Run, Run]:
    """Return the run of the RPN stage, which may be absent, and the run."""
    return Run(run.folder / "rpn"), run


def num_logged(run: Run) -> int:
    """Return the number of steps that a run and its RPN stage have logged."""
    return sum(max((entry["step"] for entry in read_metrics(stage)), default=0) for stage in stages_of(run))


def num_lost(run: Run) -> int:
    """Return the number of logged steps that no checkpoint has."""
    return num_logged(run) - sum(
        int(stage.checkpoints[-1].name) for stage in stages_of(run) if stage.checkpoints
    )


def read_metrics(run: Run) -> Iterable[dict[str, int]]:
    """Iterate over the complete lines of the metrics while they are written."""
    if run.metrics_path.exists():
        for line in run.metrics_path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def wait_until(
    process: "subprocess.Popen[str]", is_true: Callable[[], object], *, seconds: float = 0.01
) -> None:
    """Wait until a condition is true or the process has ended; look again after some seconds."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not is_true():
        assert time.monotonic() < deadline
        time.sleep(seconds)


def wait_for_step(process: "subprocess.Popen[str]", run: Run, step: int) -> None:
    """Wait until a run has logged a number of steps."""
    wait_until(process, lambda: num_logged(run) >= step)


def end_of(process: "subprocess.Popen[str]") -> Ended:
    """Wait for the end of a process, and of all that have inherited its output."""
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(code=process.returncode, out=out, err=err)


def send_to_group(process: "subprocess.Popen[str]", number: int) -> None:
    """Send a signal as `timeout` does: to the process, and to all processes of its group."""
    process.send_signal(number)
    os.killpg(process.pid, number)


def descendants_of(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        parent = parent_of(int(path.name))
        if parent is not None:
            children.setdefault(parent, []).append(int(path.name))
    descendants = [pid]
    for each in descendants:
        descendants += children.get(each, [])
    return descendants[1:]


def loaders_of(process: "subprocess.Popen[str]") -> list[int]:
    """Return the loader processes of a training."""
    return [pid for pid in descendants_of(process.pid) if _name_of(pid) == LOADER_NAME]


def parent_of(pid: int) -> int | None:
    """Return the process that has started another; None if that has ended."""
    fields = _stat_of(pid)
    return None if fields is None else int(fields[1])


def is_running(pid: int) -> bool:
    """Check whether a process exists and has not ended."""
    fields = _stat_of(pid)
    return fields is not None and fields[0] not in "ZX"


def have_ended(pids: Sequence[int]) -> bool:
    """Check that processes end, within the time that a busy machine may need."""
    deadline = time.monotonic() + PATIENCE
    while any(map(is_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def kill_one(pids: list[int], random_state: random.Random) -> None:
    """Kill one of some processes as the kernel does when memory is short, if it has not ended meanwhile."""
    if pids:
        try:
            os.kill(random_state.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return


def _stat_of(pid: int) -> list[str] | None:
    """Return the state of a process, its parent and so on; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
