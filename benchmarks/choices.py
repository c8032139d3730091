"""Measure the choices that `sniper train DATA` makes for every data set: one is changed at a time.

    python benchmarks/choices.py runs/choices --data NAME TRAIN.json --weights mobilenetv2.safetensors --seeds 2

A part of each training set is held out, the same for all seeds, and scored on; no test image is used. Each cell trains
with the settings that are derived from the data set and the change, for the same megapixels; where a change makes a
pixel more expensive (`concat`, `batch8`), for those that take the same processor time, by steps of both that are
measured in turn. Finished cells are kept in the folder and not run again. Writes `table.md` to the folder.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
from cells import keep_options, run_cells

from sniper.chips import PyramidSpec
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_experiment, load_partial, to_plain
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import to_image_boxes
from sniper.data.holdout import hold_out
from sniper.data.loader import load_batches
from sniper.evaluation.coco import evaluate
from sniper.files import atomic_write
from sniper.inference.detector import Detector, to_coco
from sniper.pipeline import run_stages
from sniper.planning.auto import Given, derive
from sniper.planning.suggest import suggest_pyramid
from sniper.runs.run import Run
from sniper.training.epochs import order_epoch
from sniper.training.learner import Learner

CHOICES: dict[str, Mapping[str, Any]] = {
    "derived": {},
    "concat": {"model.backbone.neck": "concat"},
    "cosine": {"train.schedule": "cosine"},
    "ema": {"train.ema_decay": 0.998},
    "color": {"data.color_jitter": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.02}},
    "scale": {"data.scale_jitter": 0.25},
    "from_8": {"useful_sizes": (8.0, 480.0)},
    "from_12": {"useful_sizes": (12.0, 480.0)},
    "from_24": {"useful_sizes": (24.0, 480.0)},
    "from_32": {"useful_sizes": (32.0, 480.0)},
    "sgd": {"train.optimizer": "sgd"},
    "rate_half": {"train.learning_rate": 0.00025},
    "rate_double": {"train.learning_rate": 0.001},
    "batch8": {"train.batch_size": 8},
}
"""Changes by name: fields of the experiment, and the sizes in chip pixels that `suggest_pyramid` takes for useful."""

_COSTLY = ("concat", "batch8")
_PAIRS = 6  # of steps that are measured to compare costs, after one that is not counted


def main() -> None:
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(options, name) for name in ("weights", "megapixels", "held_out")}
    keep_options(options.folder, json.loads(json.dumps(kept, default=str)))
    if options.cell is not None:
        run_cell(options.cell, options)
        return
    cells = [
        f"{name}/{choice}/{seed}"
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for choice in options.choices
        for name, _ in options.data
    ]
    run_cells([cell for cell in cells if not result_path(options.folder, cell).exists()], jobs=options.jobs)
    with atomic_write(options.folder / "table.md") as file:
        file.write(table(options.folder).encode())
    print(table(options.folder))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs=2, action="append", metavar=("NAME", "TRAIN"), required=True)
    parser.add_argument("--weights", help="safetensors file of the backbone; by default timm's")
    parser.add_argument("--megapixels", type=float, default=500.0, help="to train for")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the images")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def result_path(folder: Path, cell: str) -> Path:
    return folder / cell / "result.json"


def experiment(choice: str, seed: int, train_set: Dataset, options: argparse.Namespace) -> ExperimentSpec:
    """Return the derived experiment with a change."""
    changes = {"seed": seed, "data.num_workers": 0, **CHOICES[choice]}
    if options.weights is not None:
        changes["model.backbone.weights"] = options.weights
    useful_sizes = changes.pop("useful_sizes", None)
    if useful_sizes is not None:
        suggestion = suggest_pyramid(to_image_boxes(train_set), useful_sizes=useful_sizes)
        assert suggestion is not None
        changes |= plain_pyramid(suggestion.pyramid)
    texts = {name: json.dumps(value) for name, value in changes.items()}
    spec, names = load_partial(None, overrides=texts)
    given = Given(config=None, overrides=texts, spec=spec, names=names)
    derived = derive(train_set, given, data=spec.data, validation="", device=torch.device("cpu"))
    return replace(derived.experiment, train=replace(derived.experiment.train, evaluate_every=None))


def plain_pyramid(pyramid: PyramidSpec) -> dict[str, Any]:
    plain = to_plain(pyramid)
    levels = [
        {name: value for name, value in level.items() if value not in (None, float("inf"))}
        for level in plain["levels"]
    ]
    return {"pyramid.chip_size": pyramid.chip_size, "pyramid.levels": levels}


def with_megapixels(spec: ExperimentSpec, train_set: Dataset, *, megapixels: float) -> ExperimentSpec:
    """Set the epochs to train for these megapixels, with schedule and warm-up as shares of the run as derived."""
    order = order_epoch(spec, train_set, epoch=0)
    epochs = megapixels / order.megapixels
    train = spec.train
    return replace(
        spec,
        train=replace(
            train,
            epochs=epochs,
            milestones=tuple(epochs * milestone / train.epochs for milestone in train.milestones),
            warmup_steps=min(int(0.05 * epochs * order.num_steps), 500),
        ),
    )


def relative_cost(spec: ExperimentSpec, base: ExperimentSpec, train_set: Dataset) -> float:
    """Return the processor time of a megapixel, relative to that of another experiment: median of steps in turn."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    learners, batches = [], []
    for each in (spec, base):
        order = order_epoch(each, train_set, epoch=0)
        learners.append(Learner(each, num_classes=len(train_set.categories), device=torch.device("cpu")))
        batches.append(list(load_batches(order, each.data, steps=range(_PAIRS + 1))))
    for step in range(_PAIRS + 1):
        for index, learner in enumerate(learners):
            started = time.process_time()
            batch = batches[index][step]
            learner.update(batch, learning_rate=1e-6, step=step)
            megapixels = batch.images[:, 0].numel() / 1e6
            if step:
                seconds[index].append((time.process_time() - started) / megapixels)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def run_cell(cell: str, options: argparse.Namespace) -> None:
    name, choice, seed = cell.split("/")
    path = next(path for other, path in options.data if other == name)
    train_set, held_out = hold_out(load_dataset(path), share=options.held_out, seed=0)
    spec = experiment(choice, int(seed), train_set, options)
    ratio = 1.0
    if choice in _COSTLY:
        ratio = relative_cost(spec, experiment("derived", int(seed), train_set, options), train_set)
    spec = with_megapixels(spec, train_set, megapixels=options.megapixels / ratio)
    folder = options.folder / cell
    run = (
        Run.open(folder)
        if (folder / "config.yaml").exists()
        else Run.create(folder, config=dump_experiment(spec))
    )
    started = time.process_time()
    run_stages(run, spec, train_set, device=torch.device("cpu"))
    seconds = time.process_time() - started
    detector = Detector.load(run, "cpu", spec=spec)
    results: list[dict[str, Any]] = []
    for record, detections in zip(held_out, detector.predict_many(held_out), strict=True):
        assert detections is not None
        results += to_coco(detections, image_id=record.image_id, categories=detector.categories)
    steps = [entry for entry in run.entries() if entry["stage"] == "train"]
    result = {
        "cell": cell,
        "images": len(held_out),
        "steps": len(steps),
        "megapixels": round(sum(step["megapixels"] for step in steps), 1),
        "relative_cost": round(ratio, 3),
        "processor_minutes": round(seconds / 60, 2),
        "search_seconds": round(time.process_time() - started - seconds, 1),
        **evaluate(results, held_out).as_dict(),
    }
    with atomic_write(result_path(options.folder, cell)) as file:
        file.write(json.dumps(result).encode())
    print(json.dumps(result), flush=True)


def table(folder: Path) -> str:
    """Return a row for each choice and data set: scores, and differences to the derived settings of the same seed."""
    results = {}
    for path in sorted(folder.glob("*/*/*/result.json")):
        result = json.loads(path.read_text())
        name, choice, seed = result["cell"].split("/")
        results[name, choice, int(seed)] = result
    lines = [
        "| data | choice | seeds | steps | AP | AP50 | difference in AP, by seed | processor minutes |",
        "|---|---|--:|--:|--:|--:|---|--:|",
    ]
    rows: dict[tuple[str, str], list[int]] = {}
    for name, choice, seed in results:
        rows.setdefault((name, choice), []).append(seed)
    for (name, choice), seeds in sorted(
        rows.items(), key=lambda row: (row[0][0], list(CHOICES).index(row[0][1]))
    ):
        cells = [results[name, choice, seed] for seed in seeds]
        differences = [
            f"{results[name, choice, seed]['ap'] - results[name, 'derived', seed]['ap']:+.3f}"
            for seed in seeds
            if (name, "derived", seed) in results and choice != "derived"
        ]

        def mean(key: str, cells: list[dict[str, Any]] = cells) -> float:
            return statistics.mean(cell[key] for cell in cells)

        lines.append(
            f"| {name} | {choice} | {len(seeds)} | {mean('steps'):.0f} | {mean('ap'):.3f} | {mean('ap50'):.3f} | "
            f"{', '.join(differences)} | {mean('processor_minutes'):.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
