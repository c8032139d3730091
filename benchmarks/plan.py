"""Time `sniper plan` from start to page: print one JSON line, with ratios to `sniper chips` on the same file.

    python benchmarks/plan.py instances_val2017.json deeppcb/train.json

Seconds are of the processor, all threads together, start-up included; the least of some runs, after one that compiles.
`sniper chips` starts as `plan` does, reads the file and chooses the chips once. Two versions are compared by running
this file with each on PYTHONPATH.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("annotations", type=Path, nargs="+", help="COCO JSON files")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    files = [time_file(path, repeats=options.repeats) for path in options.annotations]
    print(json.dumps({"benchmark": "plan", "cores": os.cpu_count(), "files": files}))


def time_file(annotations: Path, *, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        plan = time_command("plan", annotations, output=Path(folder) / "plan", repeats=repeats)
        chips = time_command("chips", annotations, output=Path(folder) / "chips.npz", repeats=repeats)
    return {
        "file": "/".join(annotations.parts[-2:]),
        "plan_seconds": round(plan, 3),
        "chips_seconds": round(chips, 3),
        "ratio": round(plan / chips, 2),
    }


def time_command(name: str, annotations: Path, *, output: Path, repeats: int) -> float:
    sniper = Path(sys.executable).parent / "sniper"
    command = [sniper, name, annotations, "-o", output, "--json"]
    seconds = []
    for _ in range(repeats + 1):
        before = processor_seconds()
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        seconds.append(processor_seconds() - before)
    return min(seconds[1:])


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
