"""Experiments of many cells: each cell runs in its own process, and a complete one is not repeated."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def keep_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Store the options of an experiment, and refuse to mix its cells with those of other options."""
    path = folder / "options.json"
    text = json.dumps(options)
    if path.exists() and json.loads(path.read_text()) != json.loads(text):
        raise SystemExit(f"{folder}: has cells of {path.read_text()}, not {text}; name another folder")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run_cells(cells: Sequence[str], *, jobs: int) -> None:
    """Run this script again for each cell, several at a time."""
    waiting = list(cells)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(subprocess.Popen([sys.executable, *sys.argv, "--cell", waiting.pop(0)]))
        time.sleep(1)
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            if process.returncode:
                for other in running:
                    other.terminate()
                raise SystemExit(f"a cell failed with {process.returncode}")


class ResultLines:
    """Results of a benchmark as JSON lines, written as soon as each cell ends; a cell with a line is not run again.

    Args:
        path: of the file, which several benchmarks may share; None keeps nothing and runs every cell.
        benchmark: name of this benchmark, the first key of its lines.
        deadline: `time.time()` after which no further cell may start; None has no limit.
    """

    def __init__(self, path: Path | None, *, benchmark: str, deadline: float | None = None) -> None:
        self._path, self._benchmark, self._deadline = path, benchmark, deadline
        self._finished: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            lines = map(json.loads, path.read_text().splitlines())
            self._finished = {line["cell"]: line for line in lines if line["benchmark"] == benchmark}

    def __contains__(self, cell: str) -> bool:
        return cell in self._finished

    @property
    def results(self) -> list[dict[str, Any]]:
        """The lines of this benchmark, of this call and of earlier ones."""
        return list(self._finished.values())

    def add(self, cell: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a cell, and print it."""
        line = {"benchmark": self._benchmark, "cell": cell, **result}
        self._finished[cell] = line
        print(json.dumps(line), flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def has_time(self) -> bool:
        """Check whether another cell may start."""
        return self._deadline is None or time.time() < self._deadline
