"""Check SNIPER's claim: one detector, trained on different inputs at the same cost.

    python benchmarks/proof.py runs/proof --data NAME TRAIN.json TEST.json --backbone mobilenetv2_100 --seeds 2

The variants:

- `single`: whole images, short side 800, long side at most 1333.
- `pyramid`: whole images at each level of the paper's pyramid, without valid ranges.
- `snip`: the same, with valid ranges.
- `grid`: tiles as large as a chip, at the scale of the image, with an overlap of a fifth, without empty tiles;
  `grid_empty` keeps the empty tiles; `grid_twice` enlarges the images twice before.
- `sniper`: positive chips of the same three levels; `sniper_two` omits the finest level; `negatives` adds mined
  negative chips.

All sizes in pixels are for chips of 512; with `--chip-size 256` the levels, the anchors, the single scale and the scale
of the grid are halved. The budget is the megapixels trained on, padding included, and those of the RPN that
`negatives` mines with; the time of mining is reported separately. A batch of whole images has as many pixels as a batch
of chips, unless one image has more; each pixel has the same weight in all variants. Learning rate, schedule and batch
norm are the same for all. More anchors and proposals are sampled from a whole image than from a chip, since it has the
pixels of several chips (`--proposals`, `--anchors`).

Each detector is searched as its variant is trained, and with the three levels and their ranges. AP is compared with
that of `sniper` for the same megapixels and, where there is such a budget, for a third of them. Each finished cell is
kept in the folder and not run again; cells of other variants, seeds and budgets may be added later. Writes `table.md`,
`curve.png` and `results.json` to the folder, and prints the last as one line.

With `--lines` the result of each cell is appended to a file as soon as it exists, a failed cell does not end the
others, and tables are left to a later call without it. `--until` stops the cells in progress at a time; a later call
continues them from their checkpoints. `--cells` lists the cells in the order in which to start them; one that cannot
end in time, by the speed of those that have ended, is started after those that can.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cells import ResultLines, keep_options, last_lines, run_cells, run_cells_until
from matplotlib.figure import Figure

from sniper.chips import BoxStatus, ChipTable, LevelSpec, PyramidSpec, assign_targets
from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.chips.negatives import NegativeSpec
from sniper.chips.pyramid import PAPER_LEVELS
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec, widened
from sniper.config.loading import dump_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.data.spec import DataSpec
from sniper.evaluation import coco
from sniper.evaluation.comparison import ResampledAP, compare
from sniper.evaluation.pair import EvaluationPair, GroundTruth
from sniper.files import atomic_write, sha256
from sniper.geometry.boxes import size
from sniper.inference.detector import Detector, to_coco
from sniper.inference.mining import mine
from sniper.inference.proposals import add_negatives
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.pipeline import rpn_experiment, run_stages
from sniper.reports.palette import PALETTE
from sniper.runs.run import Run
from sniper.training.epochs import order_epoch

VARIANTS = (
    "single",
    "pyramid",
    "snip",
    "grid",
    "grid_twice",
    "grid_empty",
    "sniper",
    "sniper_two",
    "negatives",
)
PAPER_CHIP_SIZE = 512
NUMBERS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_100")

Budgets = dict[float, dict[str, list[dict[str, Any]]]]
"""The results of finished cells, by megapixels and variant."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its scores."""

    data: str
    variant: str
    megapixels: float
    seed: int

    @classmethod
    def parse(cls, name: str) -> "Cell":
        """Read the name of a cell; argparse reports the ValueError of a wrong one."""
        data, variant, megapixels, seed = name.split(":")
        return cls(data=data, variant=variant, megapixels=float(megapixels), seed=int(seed))

    def __str__(self) -> str:
        return f"{self.data}:{self.variant}:{self.megapixels:g}:{self.seed}"

    def folder(self, root: Path) -> Path:
        return root / self.data / f"{self.variant}_{self.megapixels:g}_{self.seed}"

    def result_path(self, root: Path) -> Path:
        folder = self.folder(root)
        return folder.parent / f"{folder.name}.json"


def main() -> None:
    options = parse_options()
    chosen = {name: str(value) for name, value in vars(options).items() if name not in FREE_OPTIONS}
    chosen["first_weights"] = sha256(Path(options.weights)) if options.weights else "timm"
    keep_options(options.folder, chosen)
    torch.set_num_threads(options.threads)
    if options.cell:
        cell = Cell.parse(options.cell)
        (mine_chips if cell.variant == "mined" else run_cell)(cell, options)
        return
    cells = options.cells or [
        Cell(data=data, variant=variant, megapixels=megapixels, seed=seed)
        for seed in range(options.seeds)
        for megapixels in sorted(options.megapixels, reverse=True)
        for variant in options.variants
        for data in dict.fromkeys(name for name, _, _ in options.data)
    ]
    if options.lines is not None:
        prove_until(cells, options)
        return
    mined = [mined_cell(cell, options) for cell in cells if cell.variant == "negatives"]
    for stage in (dict.fromkeys(mined), cells):  # all budgets of a seed share the mined chips
        missing = [cell for cell in stage if not cell.result_path(options.folder).exists()]
        run_cells([str(cell) for cell in missing], jobs=options.jobs)
    write_results(options)


FREE_OPTIONS = (
    *("folder", "data", "weights", "variants", "seeds", "megapixels", "jobs", "cell", "device"),
    *("cells", "lines", "until"),
)
"""The options that may differ between the cells of a folder."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One detector, trained on different inputs at the same cost."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "TEST"))
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["sniper", "snip", "pyramid", "single", "grid"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--megapixels", nargs="+", type=float, default=[2000, 6000], help="budgets")
    parser.add_argument("--chip-size", type=int, default=PAPER_CHIP_SIZE)
    parser.add_argument("--batch-size", type=int, default=16, help="number of chips")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--learning-rate", type=float, default=0.03, help="for this batch size")
    parser.add_argument("--warmup-steps", type=int, default=60)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="safetensors; timm's pretrained weights if not given")
    parser.add_argument("--batch-norm", choices=("trained", "frozen"), default="trained")
    parser.add_argument(
        "--head", nargs=2, type=int, default=[64, 512], help="channels and hidden_dim of the RoI head"
    )
    parser.add_argument(
        "--proposals",
        nargs=2,
        type=int,
        default=[128, 512],
        help="trained on for each chip and each whole image",
    )
    parser.add_argument(
        "--anchors",
        nargs=2,
        type=int,
        default=[256, 1024],
        help="sampled from each chip and each whole image",
    )
    parser.add_argument("--train-images", type=int, help="a random subset, the same for all cells")
    parser.add_argument("--test-images", type=int, help="a random subset, the same for all cells")
    parser.add_argument("--rpn-megapixels", type=float, default=300, help="of the budget, for mining")
    parser.add_argument("--min-proposals", nargs="+", type=int, default=list(NegativeSpec().min_proposals))
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument(
        "--cells",
        nargs="+",
        type=Cell.parse,
        metavar="DATA:VARIANT:MEGAPIXELS:SEED",
        help="instead of the product of variants, budgets, data sets and seeds",
    )
    parser.add_argument("--lines", type=Path, help="append the result of each cell to this file")
    parser.add_argument("--until", type=float, help="Unix time to stop at; needs --lines")
    parser.add_argument("--cell", help="run only this cell")
    options = parser.parse_args()
    if options.until is not None and options.lines is None:
        parser.error("--until needs --lines")
    names = [name for name, _, _ in options.data]
    for cell in options.cells or []:
        if cell.data not in names or cell.variant not in VARIANTS:
            parser.error(f"--cells: {cell}: expected data of {names} and a variant of {list(VARIANTS)}")
    return options


def levels_of(chip_size: int) -> tuple[LevelSpec, ...]:
    """Return the paper's levels, scaled with the chip size; valid ranges are in image pixels and stay."""
    ratio = chip_size / PAPER_CHIP_SIZE
    *finer, coarsest = PAPER_LEVELS
    scaled = [replace(level, factor=round(level.factor * ratio, 4)) for level in finer if level.factor]
    return (*scaled, replace(coarsest, long_side=chip_size))


def without_ranges(levels: Sequence[LevelSpec]) -> tuple[LevelSpec, ...]:
    return tuple(replace(level, at_least=0.0, below=float("inf")) for level in levels)


def experiment(cell: Cell, options: argparse.Namespace) -> ExperimentSpec:
    """Return the experiment of a cell; variants differ in levels, windows, and the anchors and proposals sampled."""
    chip_size, ratio = options.chip_size, options.chip_size / PAPER_CHIP_SIZE
    levels = levels_of(chip_size)
    single = LevelSpec(short_side=round(800 * ratio), max_long_side=round(1333 * ratio))
    chip_levels = levels
    windows: dict[str, Any] = {}
    if cell.variant in ("single", "pyramid", "snip"):
        whole_levels = {"single": (single,), "pyramid": without_ranges(levels), "snip": levels}
        windows["whole"] = WholeSpec(levels=whole_levels[cell.variant])
    elif cell.variant.startswith("grid"):
        factor = 2 * ratio if cell.variant == "grid_twice" else ratio
        windows["tiles"] = TileSpec(
            side=chip_size, factor=factor, empty="keep" if cell.variant == "grid_empty" else "drop"
        )
        windows["min_visible_side"] = 0.0  # tiles use min_visibility
    elif cell.variant == "sniper_two":
        chip_levels = (replace(levels[1], at_least=0.0), levels[2])
    return ExperimentSpec(
        seed=cell.seed,
        data=DataSpec(num_workers=options.num_workers, **windows),
        pyramid=PyramidSpec(chip_size=chip_size, levels=chip_levels),
        negatives=NegativeSpec(min_proposals=tuple(options.min_proposals)),
        model=DetectorSpec(
            backbone=BackboneSpec(
                name=options.backbone, weights=options.weights, batch_norm=options.batch_norm
            ),
            rpn=RPNSpec(
                channels=128,
                anchor_sizes=tuple(anchor * ratio for anchor in RPNSpec().anchor_sizes),
                pre_nms_top_n=1000,
                batch_size_per_image=options.anchors["whole" in windows],
                post_nms_top_n_train=options.proposals["whole" in windows],
            ),
            roi_head=RoIHeadSpec(channels=options.head[0], hidden_dim=options.head[1]),
        ),
        train=TrainSpec(
            batch_size=options.batch_size,
            reference_batch_size=options.batch_size,
            optimizer=options.optimizer,
            learning_rate=options.learning_rate,
            warmup_start_factor=0.1,
            warmup_steps=options.warmup_steps,
            clip_grad_norm=10.0,
            checkpoint_minutes=2.0,
        ),
        predict=PredictSpec(levels=widened(levels)),
    )


def search_as_trained(cell: Cell, spec: ExperimentSpec) -> PredictSpec:
    """Return the search that corresponds to the training of a variant."""
    if spec.data.tiles is not None:
        return replace(
            spec.predict,
            levels=(LevelSpec(factor=spec.data.tiles.factor),),
            window=max(spec.data.tiles.side, 256),
        )
    if cell.variant == "snip" or spec.data.whole is None:
        return replace(
            spec.predict,
            levels=widened(spec.pyramid.levels) if cell.variant == "sniper_two" else spec.predict.levels,
        )
    return replace(spec.predict, levels=spec.data.whole.levels)


def with_budget(spec: ExperimentSpec, train_set: Dataset, *, megapixels: float) -> ExperimentSpec:
    """Set the epochs to train for these megapixels, with a lower learning rate in the last fifth."""
    table = None
    if spec.data.chips is not None:
        path, images = Path(spec.data.chips), to_image_boxes(train_set)
        table = ChipTable.load(path, pyramid=spec.pyramid, images=images, digest=train_set.digest)
    order = order_epoch(spec, train_set, epoch=0, table=table, dose=spec.negatives.first_dose)
    epochs = megapixels / order.megapixels
    return replace(spec, train=replace(spec.train, epochs=epochs, milestones=(0.8 * epochs,)))


def load(path: str, count: int | None) -> Dataset:
    dataset = load_dataset(Path(path))
    if count is None or count >= len(dataset):
        return dataset
    drawn = np.random.default_rng(0).choice(len(dataset), size=count, replace=False)
    return dataset.select(np.sort(drawn))


def run_cell(cell: Cell, options: argparse.Namespace) -> None:
    started = time.monotonic()
    device = torch.device(options.device)
    train_path, test_path = paths_of(cell, options)
    train_set = load(train_path, options.train_images)
    folder = cell.folder(options.folder)
    spec = experiment(cell, options)
    result: dict[str, Any] = {"mining_minutes": 0.0, "rpn_minutes": 0.0, "rpn_megapixels": 0.0}
    if cell.variant == "negatives":
        mined = mined_cell(cell, options)
        mining = json.loads(mined.result_path(options.folder).read_text())
        result |= {name: mining[name] for name in result}
        chips = mined.folder(options.folder).absolute() / "chips.npz"
        spec = replace(spec, data=replace(spec.data, chips=str(chips)))
    spec = with_budget(spec, train_set, megapixels=cell.megapixels - result["rpn_megapixels"])
    run = open_or_create(folder, spec)
    run_stages(run, spec, train_set, device=device)
    steps = [entry for entry in run.entries() if entry["stage"] == "train"]
    test_set = load(test_path, options.test_images)
    searches = {"as_trained": search_as_trained(cell, spec), "pyramid": spec.predict}
    detections: dict[str, list[dict[str, Any]]] = {}
    for name, predict in searches.items():
        search_started = time.monotonic()
        if name == "pyramid" and predict == searches["as_trained"]:
            result[name] = result["as_trained"]
            continue
        detections[name] = search(run, replace(spec, predict=predict), test_set, device=device)
        result[name] = score(detections[name], test_set) | {
            "search_minutes": round((time.monotonic() - search_started) / 60, 2)
        }
    with atomic_write(folder / "detections.json") as file:
        file.write(json.dumps(detections).encode())
    result |= {
        "megapixels": round(sum(entry["megapixels"] for entry in steps) + result["rpn_megapixels"], 3),
        "steps": len(steps),
        "chips": sum(round(entry["chips_per_second"] * entry["seconds"]) for entry in steps),
        "train_minutes": round(sum(entry["seconds"] for entry in steps) / 60 + result["rpn_minutes"], 2),
        "megapixels_per_second": round(
            sum(entry["megapixels"] for entry in steps) / sum(entry["seconds"] for entry in steps), 3
        ),
        "peak_memory_gb": max(entry["peak_memory_gb"] for entry in steps),
        "minutes": round((time.monotonic() - started) / 60, 2),
    }
    save_result(cell, result, train_set, options)


def open_or_create(folder: Path, spec: ExperimentSpec) -> Run:
    """Open a run that was stopped, or create it."""
    if (folder / "config.yaml").exists():
        return Run.open(folder)
    return Run.create(folder, config=dump_experiment(spec))


def mined_cell(cell: Cell, options: argparse.Namespace) -> Cell:
    """Return the cell that mines the chips of a cell with negatives."""
    return replace(cell, variant="mined", megapixels=options.rpn_megapixels)


def mine_chips(cell: Cell, options: argparse.Namespace) -> None:
    """Train an RPN, mine proposals, and select negative chips."""
    device = torch.device(options.device)
    folder = cell.folder(options.folder)
    train_set = load(paths_of(cell, options)[0], options.train_images)
    spec = experiment(cell, options)
    num_steps = order_epoch(spec, train_set, epoch=0).num_steps
    rpn_spec = with_budget(rpn_experiment(spec, num_steps=num_steps), train_set, megapixels=cell.megapixels)
    run = open_or_create(folder, rpn_spec)
    run_stages(run, rpn_spec, train_set, device=device)
    mining_started = time.monotonic()
    store = mine(
        run, spec, train_set, folder / "proposals", device=device, on_progress=lambda done, total: None
    )
    generator = np.random.default_rng([cell.seed, 1])
    positives = choose_positive_chips(train_set, spec.pyramid, generator=generator)
    table = add_negatives(positives, store, spec.negatives, pyramid=spec.pyramid, generator=generator)
    table.save(folder / "chips.npz", pyramid=spec.pyramid, digest=train_set.digest)
    steps = [entry for entry in run.entries() if entry["stage"] == "rpn"]
    result = {
        "rpn_megapixels": round(sum(entry["megapixels"] for entry in steps), 3),
        "rpn_minutes": round(sum(entry["seconds"] for entry in steps) / 60, 2),
        "mining_minutes": round((time.monotonic() - mining_started) / 60, 2),
        "positive_chips": len(positives),
        "negative_chips_pool": len(table) - len(positives),
    }
    save_result(cell, result, train_set, options)


def save_result(cell: Cell, result: dict[str, Any], train_set: Dataset, options: argparse.Namespace) -> None:
    head = {
        "cell": str(cell),
        "variant": cell.variant,
        "seed": cell.seed,
        "megapixels_budget": cell.megapixels,
    }
    with atomic_write(cell.result_path(options.folder)) as file:
        file.write(json.dumps(head | {"trained_on": train_set.digest} | result).encode())


def paths_of(cell: Cell, options: argparse.Namespace) -> tuple[str, str]:
    return next((train, test) for name, train, test in options.data if name == cell.data)


def search(
    run: Run, spec: ExperimentSpec, test_set: Dataset, *, device: torch.device
) -> list[dict[str, Any]]:
    detector = Detector.load(run, device, spec=spec)
    results = []
    for record, detections in zip(
        test_set, detector.predict_many(record.path for record in test_set), strict=True
    ):
        assert detections is not None
        results += to_coco(detections, image_id=record.image_id, categories=detector.categories)
    return results


def score(results: Sequence[dict[str, Any]], test_set: Dataset) -> dict[str, float | None]:
    pair = EvaluationPair.of(results, test_set)
    result = coco.score(pair)
    numbers = result.as_dict()
    scores: dict[str, float | None] = {name: numbers[name] for name in NUMBERS}
    return scores | {
        f"false_positives_at_{row.recall:g}": row.per_image for row in result.false_positives.points
    }


def prove_until(cells: Sequence[Cell], options: argparse.Namespace) -> None:
    """Run the cells that have no line until the time is up, and add a line for each that ends."""
    root = options.folder
    lines = ResultLines(options.lines, benchmark="proof", deadline=options.until)
    for cell in cells:
        if not lines.has_result(str(cell)) and cell.result_path(root).exists():
            lines.add(str(cell), json.loads(cell.result_path(root).read_text()))
    names: list[str] = []
    needs: dict[str, str] = {}
    for cell in cells:
        if lines.has_result(str(cell)):
            continue
        mined = mined_cell(cell, options)
        if cell.variant == "negatives" and not mined.result_path(root).exists():
            needs[str(cell)] = str(mined)
            names.append(str(mined))
        names.append(str(cell))

    def log_path(name: str) -> Path:
        return Cell.parse(name).result_path(root).with_suffix(".log")

    def add_line(name: str, status: int) -> None:
        result = Cell.parse(name).result_path(root)
        if status == 0:
            lines.add(name, json.loads(result.read_text()))
        else:
            lines.add(name, {"error": f"exit status {status}", "output": last_lines(log_path(name))})

    def fits(name: str) -> bool:
        speeds = [line["megapixels_per_second"] for line in lines.results if "megapixels_per_second" in line]
        if options.until is None or not speeds:
            return True
        expected = CELL_OVERHEAD_SECONDS + Cell.parse(name).megapixels / min(speeds)
        return expected < options.until - time.time()

    run_cells_until(
        list(dict.fromkeys(names)),
        jobs=options.jobs,
        until=options.until,
        on_end=add_line,
        needs=needs,
        fits=fits,
        log_path=log_path,
    )
    failed = [name for name in names if name in lines and not lines.has_result(name)]
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed; a later call runs them again")


CELL_OVERHEAD_SECONDS = 30.0
"""A guess of what a cell takes beside its training: imports, the tests, scores."""


def load_finished(root: Path, data: str) -> list[dict[str, Any]]:
    """Load the results of the finished cells of a data set, those that only mined among them."""
    return [json.loads(path.read_text()) for path in sorted((root / data).glob("*.json"))]


def group_cells(cells: Sequence[dict[str, Any]]) -> Budgets:
    """Group the results of the cells of a data set by megapixels and variant."""
    return {
        megapixels: {
            variant: of_variant
            for variant in VARIANTS
            if (
                of_variant := [
                    cell
                    for cell in cells
                    if cell["megapixels_budget"] == megapixels and cell["variant"] == variant
                ]
            )
        }
        for megapixels in sorted({cell["megapixels_budget"] for cell in cells if cell["variant"] in VARIANTS})
    }


def write_results(options: argparse.Namespace) -> None:
    """Write table, curve and results of all finished cells."""
    groups: dict[str, Budgets] = {}
    epochs: dict[str, dict[str, dict[str, float]]] = {}
    for name, train_path, test_path in options.data:
        ground_truth = GroundTruth.of(load(test_path, options.test_images))
        train_set = load(train_path, options.train_images)
        epochs[name] = {
            variant: describe_epoch(name, variant, train_set, options) for variant in VARIANTS[:-1]
        }
        finished = load_finished(options.folder, name)
        if any(cell["trained_on"] != train_set.digest for cell in finished):
            raise SystemExit(f"{options.folder / name}: has cells that were trained on other annotations")
        if budgets := group_cells(finished):
            groups[name] = budgets
        add_differences(options.folder, groups.get(name, {}), ground_truth)
    tables = [f"{name}, one epoch of each\n\n{epochs_table(variants)}" for name, variants in epochs.items()]
    tables += [
        f"{name}, {megapixels:g} megapixels\n\n{scores_table(variants)}"
        for name, budgets in groups.items()
        for megapixels, variants in budgets.items()
    ]
    (options.folder / "table.md").write_text("\n".join(tables))
    draw_curve(groups, options.folder / "curve.png")
    results = json.dumps(
        {"benchmark": "proof", "options": vars(options) | {"folder": None}, "results": groups}, default=str
    )
    (options.folder / "results.json").write_text(results + "\n")
    print(results)


def describe_epoch(
    data: str, variant: str, train_set: Dataset, options: argparse.Namespace
) -> dict[str, float]:
    """Compute the cost of an epoch, and the number and sizes of its valid objects, each as often as it is shown."""
    spec = experiment(Cell(data=data, variant=variant, megapixels=0, seed=0), options)
    order = order_epoch(spec, train_set, epoch=0)
    sizes: list[float] = []
    for index, image_index in enumerate(order.table.image_indices.tolist()):
        chip = order.table.chip(index)
        record = train_set[image_index]
        target = assign_targets(
            chip,
            boxes=record.boxes,
            labels=record.labels,
            is_crowd=record.is_crowd,
            is_moved_here=order.table.moved_to[train_set.boxes_of(image_index)] == chip.level.index,
            min_visible_side=spec.data.min_visible_side,
            min_visibility=order.min_visibility,
        )
        sizes += size(target.boxes[target.status == BoxStatus.VALID]).tolist()
    return {
        "images_or_chips": len(order.table),
        "steps": order.num_steps,
        "megapixels": round(order.megapixels, 1),
        "objects": len(sizes),
        "objects_per_megapixel": round(len(sizes) / order.megapixels, 1),
        **{f"size_{percent}": round(float(np.quantile(sizes, percent / 100)), 1) for percent in (10, 50, 90)},
    }


def epochs_table(variants: dict[str, dict[str, float]]) -> str:
    heads = list(next(iter(variants.values())))
    lines = ["| | " + " | ".join(head.replace("_", " ") for head in heads) + " |"]
    lines.append("|---|" + "--:|" * len(heads))
    lines += [
        f"| {variant} | " + " | ".join(f"{row[head]:g}" for head in heads) + " |"
        for variant, row in variants.items()
    ]
    return "\n".join(lines) + "\n"


def add_differences(root: Path, budgets: Budgets, ground_truth: GroundTruth) -> None:
    """Compare the AP of each variant with that of `sniper` for the same megapixels, and for a third of them."""
    references = [cell for variants in budgets.values() for cell in variants.get("sniper", [])]

    @cache
    def resampled(cell: str) -> ResampledAP:
        path = Cell.parse(cell).folder(root) / "detections.json"
        detections = json.loads(path.read_text())["as_trained"]
        return ResampledAP(EvaluationPair.of(detections, ground_truth))

    for megapixels, variants in budgets.items():
        for name, budget in (("against_sniper", megapixels), ("against_sniper_at_a_third", megapixels / 3)):
            by_seed = {
                cell["seed"]: cell
                for cell in references
                if isclose(cell["megapixels_budget"], budget, rel_tol=0.01)
            }
            for cells in variants.values():
                pairs = [(by_seed[cell["seed"]], cell) for cell in cells if cell["seed"] in by_seed]
                if pairs and pairs[0][0] is not pairs[0][1]:
                    difference = compare(
                        [resampled(reference["cell"]) for reference, _ in pairs],
                        [resampled(cell["cell"]) for _, cell in pairs],
                        generator=np.random.default_rng(0),
                    )
                    seeds = [cell["seed"] for _, cell in pairs]
                    cells[0][name] = vars(difference) | {"seeds": seeds}


COLUMNS = {
    "ap": ("AP", 3),
    "ap50": ("AP50", 3),
    "ap75": ("AP75", 3),
    "ap_small": ("S", 3),
    "ap_medium": ("M", 3),
    "ap_large": ("L", 3),
    "ar_100": ("AR", 3),
    "false_positives_at_0.5": ("FP 50", 2),
}
GAPS = {
    "against_sniper": "AP minus that of sniper (95 %, test images only)",
    "against_sniper_at_a_third": "AP minus that of sniper at a third of the megapixels",
}
COSTS = {
    "megapixels": ("Mpx", 0),
    "chips": ("images or chips", 0),
    "steps": ("steps", 0),
    "train_minutes": ("train, min", 1),
    "megapixels_per_second": ("Mpx/s", 2),
    "mining_minutes": ("mining, min", 1),
    "peak_memory_gb": ("peak, GB", 1),
}


def scores_table(variants: dict[str, list[dict[str, Any]]]) -> str:
    gap_names = [name for name in GAPS if any(name in cells[0] for cells in variants.values())]
    heads = [
        "",
        "seeds",
        *(head for head, _ in COLUMNS.values()),
        *(GAPS[name] for name in gap_names),
        "AP on the same pyramid",
    ]
    heads += [head for head, _ in COSTS.values()] + ["search, min"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for variant, cells in variants.items():
        row = [variant, str(len(cells))]
        row += [
            mean_and_deviation([cell["as_trained"][name] for cell in cells], digits)
            for name, (_, digits) in COLUMNS.items()
        ]
        gaps = [cells[0].get(name) for name in gap_names]
        row += [
            "" if gap is None else f"{gap['difference']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
            for gap in gaps
        ]
        row.append(mean_and_deviation([cell["pyramid"]["ap"] for cell in cells], 3))
        row += [
            f"{statistics.mean(cell[name] for cell in cells):.{digits}f}"
            for name, (_, digits) in COSTS.items()
        ]
        row.append(f"{statistics.mean(cell['as_trained']['search_minutes'] for cell in cells):.1f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: Sequence[float | None], digits: int) -> str:
    """Format the mean over seeds and their standard deviation."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not reached"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def draw_curve(groups: dict[str, Budgets], path: Path) -> None:
    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (name, budgets) in zip(panels, groups.items(), strict=True):
        for index, variant in enumerate(VARIANTS):
            color = PALETTE[index % len(PALETTE)]
            line, marker = ("-", "o") if index < len(PALETTE) else ("--", "s")
            cells = [cell for variants in budgets.values() for cell in variants.get(variant, [])]
            tried = sorted({cell["megapixels_budget"] for cell in cells})
            means = [
                statistics.mean(
                    cell["as_trained"]["ap"] for cell in cells if cell["megapixels_budget"] == megapixels
                )
                for megapixels in tried
            ]
            if cells:
                axes.plot(tried, means, line, marker=marker, color=color, markersize=5, label=variant)
            axes.plot(
                [cell["megapixels_budget"] for cell in cells],
                [cell["as_trained"]["ap"] for cell in cells],
                marker,
                color=color,
                markersize=3,
                alpha=0.5,
            )
        axes.set(xlabel="megapixels trained on", ylabel="AP, searched as trained", title=name)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
