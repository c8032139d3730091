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
