"""SNIPER's claim, checked: one detector from the same first weights, fed in different ways at the same cost.

    python benchmarks/proof.py runs/proof --data NAME TRAIN.json TEST.json --backbone mobilenetv2_100 --seeds 2

The ways:

- `single`: the whole image, short side 800, long side at most 1333.
- `pyramid`: the whole image at each level of the paper's pyramid, every box learnt at every level.
- `snip`: the same, with valid ranges.
- `grid`: tiles as large as a chip at the scale of the image, a fifth of overlap, tiles without a box dropped;
  `grid_empty` keeps them; `grid_twice` enlarges the images twice before.
- `sniper`: chips of the same three levels; `sniper_two` leaves out the finest; `negatives` adds mined negative chips.

All that is said in pixels is for chips of 512; with `--chip-size 256` levels, anchors and the single scale shrink to
half, and so does the scale of the grid. The budget is the megapixels that are trained on, padding
included, and those of the RPN that `negatives` mines with; what mining itself takes is told apart. Batches of whole
images hold as many pixels as a batch of chips does, as far as one image is not larger; every pixel counts as much in
all ways. Learning rate, its decay and batch norm are the same for all. A whole image is as many pixels as several chips
and has more anchors and proposals drawn to learn from (`--proposals`, `--anchors`).

Every detector is searched with as its way is meant to be, and all of them with the three levels and their ranges. AP is
compared with that of `sniper` for as many megapixels and, where there is such a budget, for a third of them. Each
finished cell is kept in the folder and not run again; cells of other ways, seeds and budgets may be added later. In the
folder stand `table.md`, `curve.png`, `results.json`; the last is printed as one line, too.
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
from cells import keep_options, run_cells
from matplotlib.figure import Figure

from sniper.chips import BoxStatus, ChipTable, LevelSpec, PyramidSpec, assign_targets
from sniper.chips.baselines import TileSpec, WholeSpec
from sniper.chips.negatives import NegativeSpec
from sniper.chips.pyramid import PAPER_LEVELS
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec, widened
from sniper.config.loading import dump_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import build_table
from sniper.data.spec import DataSpec
from sniper.evaluation.coco import evaluate
from sniper.evaluation.comparison import ResampledAP, compare
from sniper.evaluation.diagnosis import diagnose
from sniper.files import atomic_write, sha256
from sniper.geometry.boxes import size
from sniper.inference.detector import Detector, to_coco
from sniper.inference.mining import mine
from sniper.inference.proposals import add_negatives
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.pipeline import rpn_experiment
from sniper.reports.palette import PALETTE
from sniper.runs.run import Run
from sniper.training.loop import order_epoch, train

WAYS = ("single", "pyramid", "snip", "grid", "grid_twice", "grid_empty", "sniper", "sniper_two", "negatives")
PAPER_CHIP = 512
NUMBERS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_100")

Budgets = dict[float, dict[str, list[dict[str, Any]]]]
"""What finished cells tell, by megapixels and way."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its scores."""

    data: str
    way: str
    megapixels: float
    seed: int

    @classmethod
    def parse(cls, name: str) -> "Cell":
        data, way, megapixels, seed = name.split(":")
        return cls(data=data, way=way, megapixels=float(megapixels), seed=int(seed))

    def __str__(self) -> str:
        return f"{self.data}:{self.way}:{self.megapixels:g}:{self.seed}"

    def folder(self, root: Path) -> Path:
        return root / self.data / f"{self.way}_{self.megapixels:g}_{self.seed}"

    def result_path(self, root: Path) -> Path:
        folder = self.folder(root)
        return folder.parent / f"{folder.name}.json"


def main() -> None:
    options = parse_options()
    chosen = {name: str(value) for name, value in vars(options).items() if name not in FREE}
    chosen["first_weights"] = sha256(Path(options.weights)) if options.weights else "timm"
    keep_options(options.folder, chosen)
    torch.set_num_threads(options.threads)
    if options.cell:
        cell = Cell.parse(options.cell)
        (mine_chips if cell.way == "mined" else run_cell)(cell, options)
        return
    cells = [
        Cell(data=data, way=way, megapixels=megapixels, seed=seed)
        for seed in range(options.seeds)
        for megapixels in sorted(options.megapixels, reverse=True)
        for way in options.ways
        for data in dict.fromkeys(name for name, _, _ in options.data)
    ]
    mined = [mined_cell(cell, options) for cell in cells if cell.way == "negatives"]
    for some in (dict.fromkeys(mined), cells):  # what is mined serves all budgets of a seed
        missing = [cell for cell in some if not cell.result_path(options.folder).exists()]
        run_cells([str(cell) for cell in missing], jobs=options.jobs)
    tell(options)


FREE = ("folder", "data", "weights", "ways", "seeds", "megapixels", "jobs", "cell", "device")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One detector, fed in different ways at the same cost.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "TEST"))
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["sniper", "snip", "pyramid", "single", "grid"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--megapixels", nargs="+", type=float, default=[2000, 6000], help="budgets")
    parser.add_argument("--chip-size", type=int, default=PAPER_CHIP)
    parser.add_argument("--batch-size", type=int, default=16, help="chips")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--rate", type=float, default=0.03, help="learning rate of such a batch")
    parser.add_argument("--warm-up", type=int, default=60, help="steps")
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--weights", help="safetensors; timm's pretrained ones otherwise")
    parser.add_argument("--batch-norm", choices=("trained", "frozen"), default="trained")
    parser.add_argument("--head", nargs=2, type=int, default=[64, 512], help="channels and width of the head")
    parser.add_argument(
        "--proposals",
        nargs=2,
        type=int,
        default=[128, 512],
        help="to train on, of a chip and of a whole image",
    )
    parser.add_argument(
        "--anchors",
        nargs=2,
        type=int,
        default=[256, 1024],
        help="to train on, of a chip and of a whole image",
    )
    parser.add_argument("--train-images", type=int, help="this many, drawn once for all; all otherwise")
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--rpn-megapixels", type=float, default=300, help="for mining; count as the budget's")
    parser.add_argument("--at-least", nargs="+", type=int, default=list(NegativeSpec().min_proposals))
    parser.add_argument("--loader-processes", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--cell", help="run this one only")
    return parser.parse_args()


def levels_of(chip_size: int) -> tuple[LevelSpec, ...]:
    """Shrink the paper's levels as the chip is shrunk; sizes in image pixels stay."""
    share = chip_size / PAPER_CHIP
    *finer, coarsest = PAPER_LEVELS
    shrunk = [replace(level, factor=round(level.factor * share, 4)) for level in finer if level.factor]
    return (*shrunk, replace(coarsest, long_side=chip_size))


def rangeless(levels: Sequence[LevelSpec]) -> tuple[LevelSpec, ...]:
    return tuple(replace(level, at_least=0.0, below=float("inf")) for level in levels)


def experiment(cell: Cell, options: argparse.Namespace) -> ExperimentSpec:
    """Give what all ways have in common, and how this one is fed."""
    side, share = options.chip_size, options.chip_size / PAPER_CHIP
    levels = levels_of(side)
    single = LevelSpec(short_side=round(800 * share), max_long_side=round(1333 * share))
    trained = levels
    feed: dict[str, Any] = {}
    if cell.way in ("single", "pyramid", "snip"):
        own = {"single": (single,), "pyramid": rangeless(levels), "snip": levels}[cell.way]
        feed["whole"] = WholeSpec(levels=own)
    elif cell.way.startswith("grid"):
        factor = 2 * share if cell.way == "grid_twice" else share
        feed["tiles"] = TileSpec(
            side=side, factor=factor, empty="keep" if cell.way == "grid_empty" else "drop"
        )
        feed["min_visible_side"] = 0.0  # of tiles, the share that is left decides
    elif cell.way == "sniper_two":
        trained = (replace(levels[1], at_least=0.0), levels[2])
    return ExperimentSpec(
        seed=cell.seed,
        data=DataSpec(num_workers=options.num_workers, **feed),
        pyramid=PyramidSpec(chip_size=side, levels=trained),
        negatives=NegativeSpec(min_proposals=tuple(options.at_least)),
        model=DetectorSpec(
            backbone=BackboneSpec(
                name=options.backbone, weights=options.weights, batch_norm=options.batch_norm
            ),
            rpn=RPNSpec(
                channels=128,
                anchor_sizes=tuple(anchor * share for anchor in RPNSpec().anchor_sizes),
                pre_nms_top_n=1000,
                batch_size_per_image=options.anchors["whole" in feed],
                post_nms_top_n_train=options.proposals["whole" in feed],
            ),
            roi_head=RoIHeadSpec(channels=options.head[0], hidden_dim=options.head[1]),
        ),
        train=TrainSpec(
            batch_size=options.batch_size,
            reference_batch_size=options.batch_size,
            optimizer=options.optimizer,
            learning_rate=options.rate,
            warmup_start_factor=0.1,
            warmup_steps=options.warm_up,
            clip_grad_norm=10.0,
            checkpoint_minutes=2.0,
        ),
        predict=PredictSpec(levels=widened(levels)),
    )


def own_search(cell: Cell, spec: ExperimentSpec) -> PredictSpec:
    """Give how a detector is searched with that was fed in this way."""
    if spec.data.tiles is not None:
        return replace(
            spec.predict,
            levels=(LevelSpec(factor=spec.data.tiles.factor),),
            window=max(spec.data.tiles.side, 256),
        )
    if cell.way == "snip" or spec.data.whole is None:
        return replace(
            spec.predict,
            levels=widened(spec.pyramid.levels) if cell.way == "sniper_two" else spec.predict.levels,
        )
    return replace(spec.predict, levels=spec.data.whole.levels)


def with_budget(spec: ExperimentSpec, annotations: Dataset, *, megapixels: float) -> ExperimentSpec:
    """Train for so many megapixels, with the rate lowered for the last fifth."""
    table = None
    if spec.data.chips is not None:
        table = ChipTable.load(Path(spec.data.chips), pyramid=spec.pyramid, digest=annotations.digest)
    epochs = megapixels / order_epoch(spec, annotations, epoch=0, table=table).megapixels
    return replace(spec, train=replace(spec.train, epochs=epochs, milestones=(0.8 * epochs,)))


def load(path: str, count: int | None) -> Dataset:
    annotations = load_dataset(Path(path))
    if count is None or count >= len(annotations):
        return annotations
    drawn = np.random.default_rng(0).choice(len(annotations), size=count, replace=False)
    return annotations.select(np.sort(drawn))


def run_cell(cell: Cell, options: argparse.Namespace) -> None:
    started = time.monotonic()
    device = torch.device(options.device)
    train_path, test_path = paths_of(cell, options)
    train_set = load(train_path, options.train_images)
    folder = cell.folder(options.folder)
    spec = experiment(cell, options)
    told: dict[str, Any] = {"mining_minutes": 0.0, "rpn_minutes": 0.0, "rpn_megapixels": 0.0}
    if cell.way == "negatives":
        mined = mined_cell(cell, options)
        found = json.loads(mined.result_path(options.folder).read_text())
        told |= {name: found[name] for name in told}
        chips = mined.folder(options.folder).absolute() / "chips.npz"
        spec = replace(spec, data=replace(spec.data, chips=str(chips)))
    left = cell.megapixels - told["rpn_megapixels"]
    spec = with_budget(spec, train_set, megapixels=left)
    run = opened(folder, spec)
    train(run, spec, train_set, device=device, watch=lambda report: None)
    steps = [entry for entry in run.entries() if entry["stage"] == "train"]
    test_set = load(test_path, options.test_images)
    searches = {"own": own_search(cell, spec), "pyramid": spec.predict}
    results: dict[str, list[dict[str, Any]]] = {}
    for name, predict in searches.items():
        began = time.monotonic()
        if name == "pyramid" and predict == searches["own"]:
            results[name], told[name] = results["own"], told["own"]
            continue
        results[name] = search(run, replace(spec, predict=predict), test_set, device=device)
        told[name] = score(results[name], test_set) | {
            "search_minutes": round((time.monotonic() - began) / 60, 2)
        }
    with atomic_write(folder / "detections.json") as file:
        file.write(json.dumps(results).encode())
    told |= {
        "megapixels": round(sum(entry["megapixels"] for entry in steps) + told["rpn_megapixels"], 3),
        "steps": len(steps),
        "chips": sum(round(entry["chips_per_second"] * entry["seconds"]) for entry in steps),
        "train_minutes": round(sum(entry["seconds"] for entry in steps) / 60 + told["rpn_minutes"], 2),
        "megapixels_per_second": round(
            sum(entry["megapixels"] for entry in steps) / sum(entry["seconds"] for entry in steps), 3
        ),
        "peak_memory_gb": max(entry["peak_memory_gb"] for entry in steps),
        "minutes": round((time.monotonic() - started) / 60, 2),
    }
    keep_result(cell, told, train_set, options)


def opened(folder: Path, spec: ExperimentSpec) -> Run:
    """Begin a run, or go on with it."""
    if (folder / "config.yaml").exists():
        return Run.open(folder)
    return Run.create(folder, config=dump_experiment(spec))


def mined_cell(cell: Cell, options: argparse.Namespace) -> Cell:
    """Give the cell whose chips a cell with negatives is trained on."""
    return replace(cell, way="mined", megapixels=options.rpn_megapixels)


def mine_chips(cell: Cell, options: argparse.Namespace) -> None:
    """Train an RPN, mine with it, and choose negative chips."""
    device = torch.device(options.device)
    folder = cell.folder(options.folder)
    train_set = load(paths_of(cell, options)[0], options.train_images)
    spec = experiment(cell, options)
    rpn_spec = with_budget(rpn_experiment(spec), train_set, megapixels=cell.megapixels)
    run = opened(folder, rpn_spec)
    train(run, rpn_spec, train_set, device=device, watch=lambda report: None)
    began = time.monotonic()
    store = mine(run, spec, train_set, folder / "proposals", device=device, watch=lambda done, total: None)
    generator = np.random.default_rng([cell.seed, 1])
    positives = build_table(train_set, spec.pyramid, generator=generator)
    table = add_negatives(positives, store, spec.negatives, pyramid=spec.pyramid, generator=generator)
    table.save(folder / "chips.npz", pyramid=spec.pyramid, digest=train_set.digest)
    told = {
        "rpn_megapixels": round(sum(entry["megapixels"] for entry in run.entries()), 3),
        "rpn_minutes": round(sum(entry["seconds"] for entry in run.entries()) / 60, 2),
        "mining_minutes": round((time.monotonic() - began) / 60, 2),
        "positive_chips": len(positives),
        "negative_chips_pool": len(table) - len(positives),
    }
    keep_result(cell, told, train_set, options)


def keep_result(cell: Cell, told: dict[str, Any], train_set: Dataset, options: argparse.Namespace) -> None:
    head = {"cell": str(cell), "way": cell.way, "seed": cell.seed, "megapixels_asked": cell.megapixels}
    with atomic_write(cell.result_path(options.folder)) as file:
        file.write(json.dumps(head | {"trained_on": train_set.digest} | told).encode())


def paths_of(cell: Cell, options: argparse.Namespace) -> tuple[str, str]:
    return next((one, other) for name, one, other in options.data if name == cell.data)


def search(
    run: Run, spec: ExperimentSpec, test_set: Dataset, *, device: torch.device
) -> list[dict[str, Any]]:
    predictor = Detector.load(run, spec, device=device)
    results = []
    for record, found in zip(test_set, predictor.search(record.path for record in test_set), strict=True):
        assert found is not None
        results += to_coco(found, image_id=record.image_id, categories=predictor.categories)
    return results


def score(found: Sequence[dict[str, Any]], test_set: Dataset) -> dict[str, float | None]:
    truth = test_set.to_coco()
    numbers = evaluate(found, truth).as_dict()
    false = diagnose(found, truth).false_positives
    told: dict[str, float | None] = {name: numbers[name] for name in NUMBERS}
    return told | {f"false_positives_at_{recall:g}": value for recall, value in false.items()}


def tell(options: argparse.Namespace) -> None:
    """Write table, curve and results of all cells that are finished."""
    groups: dict[str, Budgets] = {}
    epochs: dict[str, dict[str, dict[str, float]]] = {}
    for name, train_path, test_path in options.data:
        truth = load(test_path, options.test_images).to_coco()
        train_set = load(train_path, options.train_images)
        epochs[name] = {way: epoch_of(name, way, train_set, options) for way in WAYS[:-1]}
        found = [json.loads(path.read_text()) for path in sorted((options.folder / name).glob("*.json"))]
        if any(cell["trained_on"] != train_set.digest for cell in found):
            raise SystemExit(f"{options.folder / name}: holds cells that were trained on other annotations")
        cells = [cell for cell in found if cell["way"] in WAYS]
        for megapixels in sorted({cell["megapixels_asked"] for cell in cells}):
            same = [cell for cell in cells if cell["megapixels_asked"] == megapixels]
            ways = {way: [cell for cell in same if cell["way"] == way] for way in WAYS}
            groups.setdefault(name, {})[megapixels] = {way: own for way, own in ways.items() if own}
        add_differences(options.folder, groups.get(name, {}), truth)
    tables = [f"{name}, an epoch of each\n\n{epochs_table(ways)}" for name, ways in epochs.items()]
    tables += [
        f"{name}, {megapixels:g} megapixels\n\n{table_of(ways)}"
        for name, budgets in groups.items()
        for megapixels, ways in budgets.items()
    ]
    (options.folder / "table.md").write_text("\n".join(tables))
    draw_curve(groups, options.folder / "curve.png")
    results = json.dumps(
        {"benchmark": "proof", "options": vars(options) | {"folder": None}, "results": groups}
    )
    (options.folder / "results.json").write_text(results + "\n")
    print(results)


def epoch_of(data: str, way: str, train_set: Dataset, options: argparse.Namespace) -> dict[str, float]:
    """Tell what an epoch of a way costs, and how many objects it teaches, each as often as it is shown."""
    spec = experiment(Cell(data=data, way=way, megapixels=0, seed=0), options)
    plan = order_epoch(spec, train_set, epoch=0)
    sizes: list[float] = []
    for index, image_index in enumerate(plan.table.image_indices.tolist()):
        chip = plan.table.chip(index)
        record = train_set[image_index]
        target = assign_targets(
            chip,
            boxes=record.boxes,
            labels=record.labels,
            is_crowd=record.is_crowd,
            is_moved_here=plan.table.moved_to[train_set.boxes_of(image_index)] == chip.level.index,
            min_visible_side=spec.data.min_visible_side,
            min_visibility=plan.min_visibility,
        )
        sizes += size(target.boxes[target.status == BoxStatus.VALID]).tolist()
    return {
        "images_or_chips": len(plan.table),
        "steps": plan.num_steps,
        "megapixels": round(plan.megapixels, 1),
        "objects": len(sizes),
        "objects_per_megapixel": round(len(sizes) / plan.megapixels, 1),
        **{f"size_{share}": round(float(np.quantile(sizes, share / 100)), 1) for share in (10, 50, 90)},
    }


def epochs_table(ways: dict[str, dict[str, float]]) -> str:
    heads = list(next(iter(ways.values())))
    lines = ["| | " + " | ".join(head.replace("_", " ") for head in heads) + " |"]
    lines.append("|---|" + "--:|" * len(heads))
    lines += [
        f"| {way} | " + " | ".join(f"{row[head]:g}" for head in heads) + " |" for way, row in ways.items()
    ]
    return "\n".join(lines) + "\n"


def add_differences(root: Path, budgets: Budgets, truth: dict[str, Any]) -> None:
    """Tell of each way how far its AP is from that of `sniper` for as much, and for a third of its megapixels."""
    against = [cell for ways in budgets.values() for cell in ways.get("sniper", [])]

    @cache
    def resampled(cell: str) -> ResampledAP:
        path = Cell.parse(cell).folder(root) / "detections.json"
        return ResampledAP(json.loads(path.read_text())["own"], truth)

    for megapixels, ways in budgets.items():
        for name, budget in (("against_sniper", megapixels), ("against_sniper_at_a_third", megapixels / 3)):
            same = {
                one["seed"]: one for one in against if isclose(one["megapixels_asked"], budget, rel_tol=0.01)
            }
            for cells in ways.values():
                pairs = [(same[cell["seed"]], cell) for cell in cells if cell["seed"] in same]
                if pairs and pairs[0][0] is not pairs[0][1]:
                    difference = compare(
                        [resampled(one["cell"]) for one, _ in pairs],
                        [resampled(other["cell"]) for _, other in pairs],
                        generator=np.random.default_rng(0),
                    )
                    cells[0][name] = vars(difference) | {"seeds": [one["seed"] for one, _ in pairs]}


COLUMNS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "S",
    "ap_medium": "M",
    "ap_large": "L",
    "ar_100": "AR",
    "false_positives_at_0.5": "FP 50",
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


def table_of(ways: dict[str, list[dict[str, Any]]]) -> str:
    gap_names = [name for name in GAPS if any(name in cells[0] for cells in ways.values())]
    heads = ["", "seeds", *COLUMNS.values(), *(GAPS[name] for name in gap_names), "AP on the same pyramid"]
    heads += [head for head, _ in COSTS.values()] + ["search, min"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for way, cells in ways.items():
        row = [way, str(len(cells))]
        row += [
            spread([cell["own"][name] for cell in cells], 3 if name != "false_positives_at_0.5" else 2)
            for name in COLUMNS
        ]
        gaps = [cells[0].get(name) for name in gap_names]
        row += [
            "" if gap is None else f"{gap['difference']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
            for gap in gaps
        ]
        row.append(spread([cell["pyramid"]["ap"] for cell in cells], 3))
        row += [
            f"{statistics.mean(cell[name] for cell in cells):.{digits}f}"
            for name, (_, digits) in COSTS.items()
        ]
        row.append(f"{statistics.mean(cell['own']['search_minutes'] for cell in cells):.1f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float | None], digits: int) -> str:
    """Give the mean over seeds, and how far they are apart."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not reached"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def draw_curve(groups: dict[str, Budgets], path: Path) -> None:
    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (name, budgets) in zip(panels, groups.items(), strict=True):
        for place, way in enumerate(WAYS):
            color = PALETTE[place % len(PALETTE)]
            line, marker = ("-", "o") if place < len(PALETTE) else ("--", "s")
            cells = [cell for ways in budgets.values() for cell in ways.get(way, [])]
            asked = sorted({cell["megapixels_asked"] for cell in cells})
            means = [
                statistics.mean(cell["own"]["ap"] for cell in cells if cell["megapixels_asked"] == megapixels)
                for megapixels in asked
            ]
            if cells:
                axes.plot(asked, means, line, marker=marker, color=color, markersize=5, label=way)
            axes.plot(
                [cell["megapixels_asked"] for cell in cells],
                [cell["own"]["ap"] for cell in cells],
                marker,
                color=color,
                markersize=3,
                alpha=0.5,
            )
        axes.set(xlabel="megapixels trained on", ylabel="AP, searched as meant to be", title=name)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
