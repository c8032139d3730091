"""Score the demo with several seeds, each in its own process on one thread.

A seed draws other images, starts from other weights and trains in another order. Seeds that are complete are not run
again. The folder of each seed is that of `sniper demo`, with its pictures. Prints a table in Markdown.

    python benchmarks/demo.py runs/demos
"""

import argparse
import json
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from cells import run_cells

from sniper.demo.run import DemoSpec, quick_look, run_demo

NUMBERS = ("ap", "ap50", "ar_100", "ar_100_any_class")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the demo with several seeds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="as `sniper demo --quick`")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one thread each")
    parser.add_argument("--cell", help="run only this seed")
    options = parser.parse_args()
    if options.cell:
        run_seed(options.folder, int(options.cell), is_quick=options.quick)
        return
    waiting = [str(seed) for seed in options.seeds if not result_path(options.folder, seed).exists()]
    run_cells(waiting, jobs=options.jobs)
    results = [json.loads(result_path(options.folder, seed).read_text()) for seed in options.seeds]
    print(format_table(results))


def run_seed(folder: Path, seed: int, *, is_quick: bool) -> None:
    """Run the demo with a seed, and keep its scores with the processor time it took."""
    torch.set_num_threads(1)
    run = folder / str(seed)
    shutil.rmtree(run, ignore_errors=True)  # of a call that was interrupted
    result = run_demo(
        run,
        device=torch.device("cpu"),
        log=print,
        spec=quick_look(seed) if is_quick else DemoSpec(seed=seed),
    )
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    result_path(folder, seed).write_text(
        json.dumps({"seed": seed, "processor_seconds": round(seconds), **result})
    )


def result_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed}.json"


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, one line for each seed."""
    lines = [
        "| seed | AP | AP50 | AR | AR, any class | minutes | processor seconds |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        scores = " | ".join(f"{result[name]:.3f}" for name in NUMBERS)
        lines.append(
            f"| {result['seed']} | {scores} | {result['minutes']:.1f} | {result['processor_seconds']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
