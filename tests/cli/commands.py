"""Run commands of the command line in this process or in others, for the tests."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sniper.cli import run

ANNOUNCEMENTS = (
    *("compiling kernels", "download: ", "training: ", "evaluation: ", "checkpoint: ", "focus: "),
    *("pyramid: ", "val: ", "remote images: "),
)
SNIPER = str(Path(sys.executable).parent / "sniper")


class Printed(NamedTuple):
    """What a command prints to standard output and to standard error."""

    out: str
    err: str


@dataclass(frozen=True)
class CommandLine:
    """The command line, run in this process."""

    capsys: pytest.CaptureFixture[str]

    def json(self, *arguments: object) -> dict[str, Any]:
        """Run a command with --json; its standard output must be one JSON object and nothing else."""
        result = json.loads(self.text(*arguments, "--json").out)
        assert isinstance(result, dict)
        return result

    def text(self, *arguments: object) -> Printed:
        """Run a command that must succeed."""
        code = run([*map(str, arguments)])
        printed = Printed(*self.capsys.readouterr())
        assert code == 0, printed.err
        return printed

    def error(self, *arguments: object) -> str:
        """Run a command that must exit with 2, nothing on standard output, one paragraph on standard error.

        Lines with what the command was about to do may come before it.
        """
        code = run([*map(str, arguments)])
        printed = self.capsys.readouterr()
        assert code == 2, printed.err
        assert printed.out == ""
        lines = printed.err.splitlines()
        while lines and lines[0].startswith(ANNOUNCEMENTS):
            lines.pop(0)
        assert lines
        assert lines[0].startswith("error: ")
        assert "Traceback" not in printed.err
        return " ".join(printed.err.split())


def start(*arguments: object, num_threads: int | None = None) -> "subprocess.Popen[str]":
    """Start a command with --json in a process of its own, with some OpenMP threads."""
    return _open([SNIPER, *map(str, arguments), "--json"], num_threads=num_threads)


def start_changed(change: str, *arguments: object) -> "subprocess.Popen[str]":
    """Start a command as `start` does, after Python code that changes the package."""
    program = f"{change}\nfrom sniper.cli import main\nmain()"
    return _open([sys.executable, "-c", program, *map(str, arguments), "--json"])


def start_two(*arguments: object, num_threads: int | None = None) -> "subprocess.Popen[str]":
    """Start a command in two processes on the CPU, by torchrun, with some OpenMP threads each."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
    command = [*launcher, SNIPER, *map(str, arguments), "--device", "cpu", "--json"]
    return _open(command, num_threads=num_threads)


def start_machines(*arguments: object) -> list["subprocess.Popen[str]"]:
    """Start a command by two launchers of one process each, which meet as those of two machines do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    rendezvous = ("--rdzv-id", "run", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    command = ["--no-python", "--", SNIPER, *map(str, arguments), "--device", "cpu", "--json"]
    return [_open([*launcher, *rendezvous, *command]) for _ in range(2)]


def _open(command: list[str], *, num_threads: int | None = None) -> "subprocess.Popen[str]":
    """Start a command in a session of its own, so that tests can send signals to all its processes."""
    variables = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | variables,
    )
