"""Cells of a benchmark that run one after the other in one process on a device, with time and memory of each."""

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import ResultLines

Cell = Callable[[], Mapping[str, Any]]
"""Measures one cell and returns its result."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the benchmarks of a device share."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--lines", type=Path, help="file of results, JSON lines; finished cells are not repeated"
    )
    parser.add_argument("--deadline", type=float, help="Unix time after which no further cell starts")
    parser.add_argument("--only", nargs="+", default=[""], help="first letters of the cells to run")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to rehearse every cell on a CPU")


def run_in_turn(
    cells: Mapping[str, Cell], lines: ResultLines, device: torch.device, *, only: Sequence[str] = ("",)
) -> None:
    """Run the cells that have no result yet, in their order, until the deadline; `only` those with these beginnings.

    A cell that raises an exception has the result `error`. After an error from which CUDA does not recover, this
    process replaces itself by a fresh one, which runs the rest.
    """
    for name, measure in cells.items():
        if name in lines or not name.startswith(tuple(only)):
            continue
        if not lines.has_time():
            print(f"{name} and the cells after it did not start before the deadline", file=sys.stderr)
            return
        started = time.time()
        release(device)
        try:
            result = dict(measure())
        except Exception as error:  # every cell is independent of the others
            result = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        lines.add(name, {**result, "wall_seconds": round(time.time() - started, 2)})
        if "error" in result and not is_usable(device):
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *sys.argv])


def open_lines(options: argparse.Namespace, benchmark: str) -> ResultLines:
    """Open the file of results; on a GPU there always is one, since a process may have to replace itself."""
    if options.lines is None and torch.device(options.device).type == "cuda":
        options.lines = Path(tempfile.mkdtemp()) / "lines.jsonl"
        sys.argv += ["--lines", str(options.lines)]
    return ResultLines(options.lines, benchmark=benchmark, deadline=options.deadline)


def is_usable(device: torch.device) -> bool:
    """Check whether the device still computes; after some errors CUDA fails until the process ends."""
    try:
        torch.ones(1, device=device).sum().item()
        synchronize(device)
    except RuntimeError:
        return False
    return True


def release(device: torch.device) -> None:
    """Free the memory of earlier cells, and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(
    call: Callable[[int], object], device: torch.device, *, count: int, warmup: int = 2
) -> float:
    """Return the duration of a call, which takes its number.

    On a GPU it is the mean of `count` calls in a row with one synchronization at the end, as in a loop. On a CPU it is
    the median, since other processes may disturb single calls.
    """
    for number in range(warmup):
        call(number)
    synchronize(device)
    ends = [time.perf_counter()]
    for number in range(warmup, warmup + count):
        call(number)
        ends.append(time.perf_counter())
    if device.type == "cuda":
        synchronize(device)
        return (time.perf_counter() - ends[0]) / count
    return statistics.median(end - start for start, end in itertools.pairwise(ends))


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table, the first column as text and the others as numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
