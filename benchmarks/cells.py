"""Experiments made of many cells: each runs in a process of its own, and a finished one is not run again."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def keep_options(folder: Path, chosen: Mapping[str, Any]) -> None:
    """Refuse to mix the cells of different experiments."""
    path = folder / "options.json"
    told = json.dumps(chosen)
    if path.exists() and json.loads(path.read_text()) != json.loads(told):
        raise SystemExit(f"{folder}: holds cells of {path.read_text()}, not {told}; name another")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(told)


def run_cells(cells: Sequence[str], *, jobs: int) -> None:
    """Run this script again for each cell, some at a time."""
    waiting = list(cells)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(subprocess.Popen([sys.executable, *sys.argv, "--cell", waiting.pop(0)]))
        time.sleep(1)
        for process in [one for one in running if one.poll() is not None]:
            running.remove(process)
            if process.returncode:
                for other in running:
                    other.terminate()
                raise SystemExit(f"a cell failed with {process.returncode}")
