"""Experiments of many cells: each cell runs in its own process, and a complete one is not repeated."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE_SECONDS = 15.0
"""The time that a cell has to save its state after SIGTERM."""


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
    """Run this script again for each cell, several at a time; the first failure ends all."""

    def check(cell: str, status: int) -> None:
        if status:
            raise SystemExit(f"{cell} failed with {status}")

    run_cells_until(cells, jobs=jobs, until=None, on_end=check)


def run_cells_until(
    cells: Sequence[str],
    *,
    jobs: int,
    until: float | None,
    on_end: Callable[[str, int], None],
    needs: Mapping[str, str] | None = None,
    fits: Callable[[str], bool] = lambda _: True,
    log_path: Callable[[str], Path] | None = None,
) -> None:
    """Run this script again for each cell, several at a time, until all have ended or the time is up.

    Args:
        cells: in the order to start them.
        jobs: number of cells at a time.
        until: `time.time()` at which the cells in progress are stopped: by SIGTERM, and by SIGKILL after
            `GRACE_SECONDS`. None has no limit.
        on_end: called with each cell that ended by itself, and its exit status.
        needs: by cell, another of the cells that has to succeed before. Without it the cell is not started.
        fits: checks whether a cell can end in the time left. Cells that cannot are started after those that can.
        log_path: where the output of a cell is appended; by default it is that of this process.
    """
    waiting, needs = list(cells), needs or {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: set[str] = set()
    try:
        while (waiting or running) and (until is None or time.time() < until):
            waiting = [cell for cell in waiting if needs.get(cell) not in failed]
            ready = [cell for cell in waiting if not {*waiting, *running} & {needs.get(cell)}]
            while ready and len(running) < jobs:
                cell = next((cell for cell in ready if fits(cell)), ready[0])
                ready.remove(cell)
                waiting.remove(cell)
                running[cell] = start_cell(cell, log_path and log_path(cell))
            time.sleep(0.5)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                status = running.pop(cell).returncode
                if status:
                    failed.add(cell)
                on_end(cell, status)
    finally:
        for process in running.values():
            process.terminate()
        give_up = time.time() + GRACE_SECONDS
        for process in running.values():
            try:
                process.wait(max(give_up - time.time(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_cell(cell: str, log: Path | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, *sys.argv, "--cell", cell]
    if log is None:
        return subprocess.Popen(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def last_lines(log: Path, count: int = 30) -> list[str]:
    """Return the end of a log, long lines cut."""
    if not log.exists():
        return []
    return [line[-500:] for line in log.read_text(errors="replace").splitlines()[-count:]]


class ResultLines:
    """Results of a benchmark as JSON lines, written as soon as each cell ends; a cell with a line is not run again.

    The result of a cell that failed has the key `error`.

    Args:
        path: of the file, which several benchmarks may share; None keeps nothing and runs every cell.
        benchmark: name of this benchmark, the first key of its lines.
        deadline: `time.time()` after which no further cell may start; None has no limit.
    """

    def __init__(self, path: Path | None, *, benchmark: str, deadline: float | None = None) -> None:
        self._path, self._benchmark, self._deadline = path, benchmark, deadline
        self._lines: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            lines = read_lines(path)
            self._lines = {line["cell"]: line for line in lines if line["benchmark"] == benchmark}

    def __contains__(self, cell: str) -> bool:
        return cell in self._lines

    def has_result(self, cell: str) -> bool:
        """Check whether a cell has a line without an error."""
        return cell in self._lines and "error" not in self._lines[cell]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The newest line of each cell, of this call and of earlier ones."""
        return list(self._lines.values())

    def add(self, cell: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a cell, and print it."""
        line = {"benchmark": self._benchmark, "cell": cell, **result}
        self._lines[cell] = line
        print(json.dumps(line), flush=True)
        if self._path is not None:
            text = json.dumps(line) + "\n"
            with self._path.open("a+b") as file:
                if file.tell() and not _ends_with_newline(self._path):  # a process was killed while it wrote
                    text = "\n" + text
                file.write(text.encode())

    def has_time(self) -> bool:
        """Check whether another cell may start."""
        return self._deadline is None or time.time() < self._deadline


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a line that was cut off is reported and left out."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text) if text else None
        except json.JSONDecodeError:
            print(f"{path}:{number}: ignored, the line is incomplete: {text[:80]}", file=sys.stderr)
            continue
        if line is not None:
            lines.append(line)
    return lines
