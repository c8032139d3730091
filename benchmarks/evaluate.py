"""Measure what scoring a results file costs, from the files to the numbers: prints one JSON line a method.

    python benchmarks/evaluate.py FOLDER

The files are drawn from a seed and written to the folder: 500,000 detections of 80 classes in 5,000 images, in the
order of the images, and 36,000 objects. The methods, each in a process of its own:

- `sniper`: the command `sniper evaluate`, with precision, recall and F1 of each class, and the confusion matrix.
- `named`: the same with a `category_name` in every entry, as `sniper predict` writes them.
- `details`: `sniper evaluate --details`.
- `json`: both files as dictionaries, scored by hotcoco.
- `hotcoco`: both files read and scored by hotcoco.
- `pycocotools`: both files read and scored by pycocotools.

CPU seconds are of all threads, after the modules are imported; `start` is the CPU time of the process before.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUM_IMAGES, NUM_CLASSES = 5_000, 80
IMAGE_SIDES = (640, 480)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--objects", type=int, default=36_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--method", choices=METHODS, help="run this one here, and print its figures")
    options = parser.parse_args()
    if options.method is not None:
        print(json.dumps(measure(options.folder, METHODS[options.method])))
        return
    write_files(options.folder, num_detections=options.detections, num_objects=options.objects)
    medians: dict[str, float] = {}
    for method in options.methods:
        command = [sys.executable, __file__, str(options.folder), "--method", method]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(options.repeats)
        ]
        medians[method] = statistics.median(run["cpu_s"] for run in runs)
        result = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
        ratios = {
            f"times_{other}": round(medians[method] / medians[other], 2)
            for other in medians
            if other != method
        }
        print(json.dumps({"benchmark": "evaluate", "method": method, **result, **ratios}), flush=True)


def write_files(folder: Path, *, num_detections: int, num_objects: int) -> None:
    """Write `truth.json`, `found.json`, and `named.json` with names of categories."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = np.sort(rng.integers(NUM_IMAGES, size=num_objects))
    labels = rng.integers(NUM_CLASSES, size=num_objects)
    sides = np.exp(rng.uniform(np.log(8), np.log(200), (num_objects, 2)))
    boxes = np.concatenate([rng.uniform(size=(num_objects, 2)) * (IMAGE_SIDES - sides), sides], axis=1)
    rows = zip((images + 1).tolist(), (labels + 1).tolist(), boxes.round(2).tolist(), strict=True)
    truth = {
        "images": [
            {"id": number + 1, "file_name": f"{number:012d}.jpg", "width": 640, "height": 480}
            for number in range(NUM_IMAGES)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, (image_id, category_id, box) in enumerate(rows, start=1)
        ],
        "categories": [{"id": label + 1, "name": f"class {label}"} for label in range(NUM_CLASSES)],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    seen = np.sort(rng.integers(num_objects, size=num_detections))
    moved = boxes[seen] * rng.uniform(0.9, 1.1, (num_detections, 4))
    is_right = rng.random(num_detections) < 0.8
    guessed = np.where(is_right, labels[seen], rng.integers(NUM_CLASSES, size=num_detections))
    found = [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for image_id, category_id, box, score in zip(
            (images[seen] + 1).tolist(),
            (guessed + 1).tolist(),
            moved.round(2).tolist(),
            rng.random(num_detections).round(5).tolist(),
            strict=True,
        )
    ]
    named = [{**entry, "category_name": f"class {entry['category_id'] - 1}"} for entry in found]
    for name, entries in (("found.json", found), ("named.json", named)):
        (folder / name).write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")


def measure(folder: Path, load: Callable[[], Callable[[Path], float]]) -> dict[str, Any]:
    """Import what a method needs, and measure the method."""
    method = load()
    start = time.process_time()
    ap = method(folder)
    return {
        "ap": round(ap, 6),
        "cpu_s": time.process_time() - start,
        "start_cpu_s": start,
        "peak_mb": peak_memory(),
    }


def peak_memory() -> float:
    """Return the peak memory of this process, MB; that of `getrusage` includes the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def with_sniper(name: str = "found.json", *options: str) -> Callable[[Path], float]:
    from sniper.cli import run
    from sniper.evaluation import coco, confusion, diagnosis, operating_point, pair, results  # noqa: F401
    from sniper.reports import scores  # noqa: F401

    def method(folder: Path) -> float:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run(["evaluate", str(folder / name), str(folder / "truth.json"), "--json", *options])
        return float(json.loads(printed.getvalue())["ap"])

    return method


def with_hotcoco(read: Callable[[Path], Any]) -> Callable[[Path], float]:
    from hotcoco import COCO, COCOeval

    def method(folder: Path) -> float:
        truth = COCO(read(folder / "truth.json"))
        return run_eval(COCOeval(truth, truth.load_res(read(folder / "found.json")), "bbox"))

    return method


def with_pycocotools() -> Callable[[Path], float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def method(folder: Path) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(folder / "truth.json"))
            return run_eval(COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox"))

    return method


def run_eval(evaluation: Any) -> float:
    evaluation.evaluate()
    evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return float(evaluation.stats[0])


METHODS: dict[str, Callable[[], Callable[[Path], float]]] = {
    "sniper": with_sniper,
    "named": lambda: with_sniper("named.json"),
    "details": lambda: with_sniper("found.json", "--details"),
    "json": lambda: with_hotcoco(lambda path: json.loads(path.read_bytes())),
    "hotcoco": lambda: with_hotcoco(str),
    "pycocotools": with_pycocotools,
}


if __name__ == "__main__":
    main()
