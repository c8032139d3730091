"""Time the choice of chips: print one JSON line, with ratios to a plain NumPy greedy algorithm of the same run.

    python benchmarks/chips.py instances_val2017.json --plot growth.png

`coco` covers all images of the file on one core; `huge` is one image of 12,000×9,000 px with 500 boxes; `command` is
all of `sniper chips`, from shell to file; `open_images` repeats the file's records up to 1.7 million images, in its own
process for a separate peak memory; `growth` are the seconds by number of images.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.cover import cover
from sniper.chips.pyramid import Level
from sniper.data.datasets import load_dataset
from sniper.data.epoch import to_image_boxes
from sniper.geometry.boxes import is_inside
from sniper.planning.cost import compute_cost

OPEN_IMAGES = 1_700_000
NAIVE_IMAGES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("annotations", type=Path, help="COCO JSON, for example that of val2017")
    parser.add_argument("--plot", type=Path, help="write a chart of the time by number of images")
    options = parser.parse_args()
    images = to_image_boxes(load_dataset(options.annotations, has_images=False))
    growth = time_growth(images)
    results = {
        "benchmark": "chips",
        "cores": os.cpu_count(),
        "coco": time_coco(images),
        "huge": time_huge(),
        "command": time_command(options.annotations),
        "open_images": time_open_images(options.annotations),
        "growth": growth,
    }
    if options.plot is not None:
        draw_growth(growth, options.plot)
    print(json.dumps(results))


def time_coco(images: ImageBoxes) -> dict[str, Any]:
    config: Any = numba.config
    num_threads, config.NUMBA_NUM_THREADS = config.NUMBA_NUM_THREADS, 1
    ours = median_seconds(lambda: choose(images)) / len(images)
    sample = images.select(np.flatnonzero(images.has_required)[:NAIVE_IMAGES])
    naive = median_seconds(lambda: choose_naively(sample), repeats=3) / len(sample)
    config.NUMBA_NUM_THREADS = num_threads
    return {
        "images": len(images),
        "ms_per_image": ours * 1e3,
        "naive_ms_per_image": naive * 1e3,
        "ratio": naive / ours,
        "chips_over_naive": len(choose(sample)) / choose_naively(sample),
    }


def time_huge() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(6), np.log(600), (500, 2)))
    low = rng.uniform(0, 1, (500, 2)) * (np.array([12_000, 9_000]) - sides)
    image = ImageBoxes(
        widths=np.array([12_000]),
        heights=np.array([9_000]),
        offsets=np.array([0, 500]),
        boxes=np.concatenate([low, low + sides], axis=1),
        is_required=np.ones(500, dtype=bool),
    )
    ours = median_seconds(lambda: choose(image), repeats=21)
    naive = median_seconds(lambda: choose_naively(image), repeats=1)
    return {"ms": ours * 1e3, "naive_ms": naive * 1e3, "ratio": naive / ours}


def time_command(annotations: Path) -> dict[str, Any]:
    sniper = Path(sys.executable).parent / "sniper"
    with tempfile.TemporaryDirectory() as folder:
        command: list[str | Path] = [sniper, "chips", annotations, "-o", Path(folder) / "chips.npz", "--json"]

        def run() -> None:
            subprocess.run([*map(str, command)], check=True, capture_output=True)

        seconds = median_seconds(run, repeats=5)
        num_bytes = (Path(folder) / "chips.npz").stat().st_size
    return {"seconds": seconds, "file_bytes": num_bytes}


def time_open_images(annotations: Path) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_choose_open_images, (annotations,))


def _choose_open_images(annotations: Path) -> dict[str, Any]:
    images = repeated(to_image_boxes(load_dataset(annotations, has_images=False)), OPEN_IMAGES)
    choose(images.select(np.arange(1000)))  # compile first
    before = peak_gigabytes()
    started = time.perf_counter()
    table = choose(images)
    chosen = time.perf_counter()
    cost = compute_cost(table, images, pyramid=PyramidSpec())
    measured = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table.save(Path(folder) / "chips.npz", pyramid=PyramidSpec(), digest="")
    saved = time.perf_counter()
    return {
        "images": len(images),
        "boxes": len(images.boxes),
        "chips": len(table),
        "uncovered_boxes": cost.num_uncovered,
        "seconds": saved - started,
        "seconds_choosing": chosen - started,
        "seconds_measuring": measured - chosen,
        "seconds_saving": saved - measured,
        "records_gigabytes": before,
        "peak_gigabytes": peak_gigabytes(),
    }


def time_growth(images: ImageBoxes) -> list[dict[str, Any]]:
    rows = []
    for count in (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000):
        many = repeated(images, count)
        seconds = median_seconds(partial(choose, many), repeats=3)
        rows.append({"images": count, "boxes": len(many.boxes), "seconds": seconds})
    return rows


def draw_growth(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    counts, seconds = ([row[name] for row in rows] for name in ("images", "seconds"))
    axes.loglog(counts, seconds, "o-", color="#0072B2", label="measured")
    per_image = seconds[-1] / counts[-1]
    axes.loglog(counts, [count * per_image for count in counts], "--", color="#8a8f98", label="in proportion")
    axes.set_xlabel("images")
    axes.set_ylabel("seconds to choose all chips")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def choose(images: ImageBoxes) -> ChipTable:
    return cover(PyramidSpec(), images, generator=np.random.default_rng(0))


def choose_naively(images: ImageBoxes) -> int:
    """Count the chips of a greedy algorithm that compares every window of a level with every box."""
    pyramid, num_chips = PyramidSpec(), 0
    for image in range(len(images)):
        rows = slice(images.offsets[image], images.offsets[image + 1])
        boxes = images.boxes[rows][images.is_required[rows]]
        for level in pyramid.at(width=int(images.widths[image]), height=int(images.heights[image])):
            members = level.to_level(boxes[level.valid_range.contains(boxes)])
            if len(members):
                windows = every_window(level, pyramid)
                covers = is_inside(members - [-1e-9, -1e-9, 1e-9, 1e-9], windows).T  # (windows, boxes)
                covers = covers[:, covers.any(axis=0)]
                while covers.shape[1]:
                    best = covers.sum(axis=1).argmax()
                    covers = covers[:, ~covers[best]]
                    num_chips += 1
    return num_chips


def every_window(level: Level, pyramid: PyramidSpec) -> np.ndarray:
    last = (max(level.width - pyramid.chip_size, 0), max(level.height - pyramid.chip_size, 0))
    xs, ys = (np.unique(np.append(np.arange(0, end, pyramid.stride), end)) for end in last)
    corners = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.float64)
    return np.concatenate([corners, corners + pyramid.chip_size], axis=1)


def repeated(images: ImageBoxes, count: int) -> ImageBoxes:
    """Repeat the images up to a number of them."""
    return images.select(np.arange(count) % len(images))


def median_seconds(action: Callable[[], Any], *, repeats: int = 7) -> float:
    if repeats > 1:
        action()  # warm up
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
