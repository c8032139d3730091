"""Train variants of the experiment that is derived from a data set, for equal megapixels, and compare their scores.

A part of each training set is held out, the same for all seeds, and scored on. Images that nothing was chosen on are
given with `--val`. Finished cells are kept in the folder and not run again.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
from cells import keep_options

from sniper.chips import PyramidSpec
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_experiment, load_partial, to_plain
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import to_image_boxes
from sniper.data.holdout import draw_images, hold_out
from sniper.data.loader import load_batches
from sniper.evaluation.coco import evaluate
from sniper.files import atomic_write
from sniper.inference.detector import Detector, to_coco
from sniper.pipeline import run_stages
from sniper.planning.auto import derive
from sniper.planning.given import Given
from sniper.planning.suggest import suggest_pyramid
from sniper.runs.run import Run
from sniper.training.epochs import order_epoch
from sniper.training.learner import Learner
from sniper.training.mining import expected_dose

_PAIRS = 6  # of steps that are measured to compare costs, after one that is not counted


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a benchmark compares.

    Attributes:
        description: of the benchmark.
        variants: changes by name: fields of the experiment, and `useful_sizes`, the sizes in chip pixels that
            `suggest_pyramid` takes for useful.
        base: the variant that the others are compared with.
        bases: other variants that some are compared with instead.
        costly: variants that make a megapixel more expensive. They are trained for those that take the same processor
            time, by steps of both that are measured in turn.
        columns: of the table, beside AP and its differences.
    """

    description: str
    variants: Mapping[str, Mapping[str, Any]]
    base: str
    costly: Sequence[str] = ()
    columns: Sequence[str] = ("ap50",)
    bases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        data: name of the data set.
        variant: its name.
        megapixels: to train for.
        seed: of the training.
    """

    data: str
    variant: str
    megapixels: float
    seed: int

    def __str__(self) -> str:
        return f"{self.data}/{self.variant}/{self.megapixels:g}/{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "Cell":
        data, variant, megapixels, seed = text.split("/")
        return cls(data, variant, float(megapixels), int(seed))


def parser_for(study: Study) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=study.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs=2, action="append", metavar=("NAME", "TRAIN"), default=[])
    parser.add_argument("--weights", help="safetensors file of the backbone; by default timm's")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[500.0], help="to train for")
    parser.add_argument("--variants", nargs="+", choices=study.variants, default=list(study.variants))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--val",
        nargs=2,
        action="append",
        metavar=("NAME", "VAL"),
        default=[],
        help="score a data set on these images; none is held out",
    )
    parser.add_argument(
        "--images", type=int, help="how many of a data set to use, drawn at random; default: all"
    )
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the images")
    parser.add_argument("--device", default="cpu", help="to train on; the experiment is derived for a CPU")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--until", type=float, help="Unix time after which no further training starts")
    return parser


def run_study(study: Study, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the cells that are not finished, write `table.md`, and return all results."""
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(options, name) for name in ("weights", "images", "held_out", "val", "device")}
    keep_options(options.folder, json.loads(json.dumps(kept, default=str)))
    cells = [
        Cell(name, variant, megapixels, seed)
        for megapixels in options.megapixels
        for seed in options.seeds
        for variant in options.variants
        for name, _ in options.data
    ]
    waiting = [cell for cell in cells if not result_path(options.folder, cell).exists()]
    failed = train_cells(study, waiting, options)
    results = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*/*/*/*/result.json"))]
    text = table(study, results)
    with atomic_write(options.folder / "table.md") as file:
        file.write(text.encode())
    print(text)
    if failed:
        raise SystemExit("\n".join(f"{cell}: {error!r}" for cell, error in failed.items()))
    return results


def train_cells(
    study: Study, cells: Sequence[Cell], options: argparse.Namespace
) -> dict[Cell, BaseException]:
    """Run cells in `--jobs` processes, which are started once; return the exceptions of those that failed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        futures = {pool.submit(run_cell, study, cell, options): cell for cell in cells}
        errors = {futures[future]: future.exception() for future in as_completed(futures)}
    return {cell: error for cell, error in errors.items() if error is not None}


def result_path(folder: Path, cell: Cell) -> Path:
    return folder / str(cell) / "result.json"


def experiment(
    changes: Mapping[str, Any], *, seed: int, train_set: Dataset, weights: str | None
) -> ExperimentSpec:
    """Return the derived experiment with changes."""
    changed = {"seed": seed, "data.num_workers": 0, **changes}
    if weights is not None:
        changed["model.backbone.weights"] = weights
    useful_sizes = changed.pop("useful_sizes", None)
    if useful_sizes is not None:
        suggestion = suggest_pyramid(to_image_boxes(train_set), useful_sizes=useful_sizes)
        assert suggestion is not None
        changed |= plain_pyramid(suggestion.pyramid)
    texts = {name: json.dumps(value) for name, value in changed.items()}
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
    """Set the epochs to train for these megapixels, with schedule and warm-up as shares of the run as derived.

    Negative chips count, as many as are expected. An RPN that mines them, and mining, are not counted.
    """
    order = order_epoch(spec, train_set, epoch=0)
    epochs = megapixels / order.megapixels
    spec = with_epochs(spec, epochs, num_steps=order.num_steps)
    return with_epochs(spec, epochs / (1 + expected_dose(spec)), num_steps=order.num_steps)


def with_epochs(spec: ExperimentSpec, epochs: float, *, num_steps: int) -> ExperimentSpec:
    """Return an experiment of another length; an epoch has a number of steps."""
    train = spec.train
    return replace(
        spec,
        train=replace(
            train,
            epochs=epochs,
            milestones=tuple(epochs * milestone / train.epochs for milestone in train.milestones),
            warmup_steps=min(int(0.05 * epochs * num_steps), 500),
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


def run_cell(study: Study, cell: Cell, options: argparse.Namespace) -> None:
    """Train and score one variant, unless the time is up."""
    if options.until is not None and time.time() > options.until:
        return
    device = torch.device(options.device)
    path = next(path for name, path in options.data if name == cell.data)
    dataset = load_dataset(path)
    if options.images is not None:
        dataset = draw_images(dataset, num_images=options.images, seed=1)
    val = dict(options.val).get(cell.data)
    if val is not None:
        train_set, held_out = dataset, load_dataset(val)
    else:
        train_set, held_out = hold_out(dataset, share=options.held_out, seed=0)
    derived: dict[str, Any] = {"seed": cell.seed, "train_set": train_set, "weights": options.weights}
    spec = experiment(study.variants[cell.variant], **derived)
    ratio = 1.0
    if cell.variant in study.costly:
        ratio = relative_cost(spec, experiment(study.variants[study.base], **derived), train_set)
    spec = with_megapixels(spec, train_set, megapixels=cell.megapixels / ratio)
    folder = options.folder / str(cell)
    is_new = not (folder / "config.yaml").exists()
    run = Run.create(folder, config=dump_experiment(spec)) if is_new else Run.open(folder)
    started, started_at = time.process_time(), time.monotonic()
    run_stages(run, spec, train_set, device=device)
    seconds = time.process_time() - started
    minutes = (time.monotonic() - started_at) / 60
    detector = Detector.load(run, device, spec=spec)
    results: list[dict[str, Any]] = []
    for record, detections in zip(held_out, detector.predict_many(held_out), strict=True):
        assert detections is not None
        results += to_coco(detections, image_id=record.image_id, categories=detector.categories)
    entries = run.entries()
    steps = [entry for entry in entries if entry["stage"] == "train"]
    result = {
        "cell": str(cell),
        "images": len(held_out),
        "steps": len(steps),
        "megapixels": round(sum(step["megapixels"] for step in steps), 1),
        "negative_share": round(
            sum(step.get("negative_chips", 0) for step in steps)
            / sum(step.get("chips", 0) for step in steps),
            3,
        ),
        "mining_seconds": sum(entry["seconds"] for entry in entries if entry["stage"] == "mine"),
        "relative_cost": round(ratio, 3),
        "processor_minutes": round(seconds / 60, 2),
        "minutes": round(minutes, 2),
        "search_seconds": round(time.process_time() - started - seconds, 1),
        **evaluate(results, held_out).as_dict(),
    }
    with atomic_write(folder / "detections.json") as file:
        file.write(json.dumps(results).encode())
    with atomic_write(result_path(options.folder, cell)) as file:
        file.write(json.dumps(result).encode())
    print(json.dumps(result), flush=True)


def table(study: Study, results: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each data set, budget and variant: scores, and differences to the base of the same seed."""
    by_cell = {Cell.parse(result["cell"]): result for result in results}
    names = ("seeds", "steps", "AP", "difference in AP, by seed", *study.columns, "processor minutes")
    lines = [
        "| data | megapixels | variant | " + " | ".join(names) + " |",
        "|---|--:|---|" + "--:|" * len(names),
    ]
    order = list(study.variants)
    rows = sorted(
        {(cell.data, cell.megapixels, order.index(cell.variant)) for cell in by_cell},
    )
    for data, megapixels, index in rows:
        seeds = [cell.seed for cell in by_cell if (cell.data, cell.megapixels) == (data, megapixels)]
        cells = [Cell(data, order[index], megapixels, seed) for seed in sorted(set(seeds))]
        cells = [cell for cell in cells if cell in by_cell]
        base = study.bases.get(order[index], study.base)
        bases = {cell: replace(cell, variant=base) for cell in cells}
        differences = [
            f"{by_cell[cell]['ap'] - by_cell[base]['ap']:+.3f}"
            for cell, base in bases.items()
            if base in by_cell and base != cell
        ]
        texts = [
            str(len(cells)),
            mean([by_cell[cell]["steps"] for cell in cells], digits=0),
            mean([by_cell[cell]["ap"] for cell in cells]),
            ", ".join(differences),
            *(mean([by_cell[cell].get(column) for cell in cells]) for column in study.columns),
            mean([by_cell[cell]["processor_minutes"] for cell in cells], digits=1),
        ]
        lines.append(f"| {data} | {megapixels:g} | {order[index]} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def mean(values: Sequence[float | None], *, digits: int = 3) -> str:
    """Return the mean, or a dash if a value is undefined."""
    known = [value for value in values if value is not None and value >= 0]  # COCO's -1 is undefined
    return f"{statistics.mean(known):.{digits}f}" if len(known) == len(values) else "–"
