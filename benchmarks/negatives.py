"""What negative chips are good for: the same training with and without them, on the made-up world.

    python benchmarks/negatives.py runs/negatives --weights mobilenetv2_100.safetensors --seeds 3 --steps 600

The world has few objects and much clutter: figures that resemble an object and are none, most of them far from any
chip that is cut around an object. The detector is MobileNetV2 from ImageNet weights. Both ways make the same number of
steps of the same batch size from the same first weights; the mined one has trained an RPN before, which is counted
apart. What differs besides: the mined one sees each positive chip less often, since some of its chips are negative
ones, and keeps one choice of positive chips, where the other chooses anew each epoch. M is the same at all levels. Each
finished cell is kept in the folder and not run again. Prints one JSON line; `table.md` and `worst.png` (the best scored
false positives of the first seed, before and after) stand in the folder.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cells import keep_options, run_cells
from PIL import Image, ImageDraw

from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec
from sniper.config.loading import dump_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import order_chips
from sniper.data.images.files import load_image
from sniper.demo.run import demo_experiment
from sniper.demo.shapes import ShapesSpec, draw_shapes
from sniper.evaluation.coco import evaluate
from sniper.geometry.boxes import from_xywh, iou
from sniper.inference.detector import Detector, to_coco
from sniper.models.spec import BackboneSpec
from sniper.pipeline import train_experiment
from sniper.runs.run import Run

WAYS = ("positive", "mined")
CPU = torch.device("cpu")
RECALLS = (60, 80, 90, 95)
NUMBERS = ("ap", "ap50", "ar_100", *(f"fp_{recall}" for recall in RECALLS), "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description="What negative chips are good for, on the made-up world.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="timm's mobilenetv2_100, safetensors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=100, help="to train on; half as many to test on")
    parser.add_argument(
        "--at-least", type=int, default=6, help="leftover proposals that make a negative chip"
    )
    parser.add_argument("--per-image", type=int, default=6, help="negative chips drawn an epoch, at most")
    parser.add_argument("--rpn-epochs", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--cell", help="run this one only, WAY:SEED")
    options = parser.parse_args()
    names = ("steps", "images", "at_least", "per_image", "rpn_epochs")
    chosen = {name: getattr(options, name) for name in names}
    keep_options(options.folder, chosen)
    draw_world(options.folder, num_images=options.images)
    if options.cell:
        way, seed = options.cell.split(":")
        spec = experiment(
            options.folder / "world",
            weights=options.weights,
            seed=int(seed),
            steps=options.steps,
            negatives=NegativeSpec(
                source="mined" if way == "mined" else "none",
                min_proposals=(options.at_least,),
                per_image=options.per_image,
            ),
            mine=MineSpec(rpn_epochs=options.rpn_epochs),
        )
        run_cell(options.folder, way, int(seed), spec)
        return
    cells = [f"{way}:{seed}" for seed in range(options.seeds) for way in reversed(WAYS)]
    run_cells(
        [cell for cell in cells if not result_path(options.folder, *cell.split(":")).exists()],
        jobs=options.jobs,
    )
    results = {
        way: [json.loads(result_path(options.folder, way, seed).read_text()) for seed in range(options.seeds)]
        for way in WAYS
    }
    truth = load_dataset(options.folder / "world" / "test.json").to_coco()
    for way, cells_of_way in results.items():
        for seed, cell in enumerate(cells_of_way):
            found = json.loads((options.folder / f"{way}_{seed}" / "detections.json").read_text())
            cells_of_way[seed] = cell | count_false(found, truth)
    draw_worst(options.folder)
    (options.folder / "table.md").write_text(tell(results))
    print(json.dumps({"benchmark": "negatives", "steps": options.steps, "results": results}))


def draw_world(folder: Path, *, num_images: int) -> None:
    spec = ShapesSpec(
        num_images=num_images,
        shortest_side=600,
        longest_side=1000,
        fewest_objects=8,
        most_objects=16,
        fewest_clutter=12,
        most_clutter=24,
        largest=240,
    )
    for name, seed, count in (("train", 1, num_images), ("test", 2, num_images // 2)):
        if not (folder / "world" / f"{name}.json").exists():
            draw_shapes(folder / "world", spec=replace(spec, num_images=count), seed=seed, name=name)


def run_cell(folder: Path, way: str, seed: int, spec: ExperimentSpec) -> None:
    torch.set_num_threads(1)
    train_set = load_dataset(folder / "world" / "train.json")
    run_folder = folder / f"{way}_{seed}"
    run = (
        Run(run_folder)
        if (run_folder / "checkpoints").exists()
        else Run.create(run_folder, config=dump_experiment(spec))
    )
    spent = {"rpn": 0.0, "mine": 0.0, "train": 0.0}
    last = time.monotonic()

    def note(stage: str) -> None:
        nonlocal last
        now = time.monotonic()
        spent[stage] += now - last
        last = now

    train_experiment(
        run,
        spec,
        train_set,
        device=CPU,
        watch=lambda report: note(report.stage),
        watch_mining=lambda done, total: note("mine"),
    )
    test_set = load_dataset(folder / "world" / "test.json")
    found = detect(Detector.load(run, spec, device=CPU), test_set)
    (run_folder / "detections.json").write_text(json.dumps(found))
    truth = test_set.to_coco()
    metrics = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    told = {
        "way": way,
        "seed": seed,
        **evaluate(found, truth).as_dict(),
        "steps": metrics[-1]["step"],
        "minutes": {stage: round(seconds / 60, 2) for stage, seconds in spent.items()},
        "chips": [entry["chips"] for entry in metrics if "chips" in entry],
        "negative_chips": [entry["negative_chips"] for entry in metrics if "chips" in entry],
        "pool": next((entry["negative_chips_pool"] for entry in metrics if entry["stage"] == "mine"), 0),
    }
    result_path(folder, way, seed).write_text(json.dumps(told))


def experiment(
    world: Path, *, weights: Path, seed: int, steps: int, negatives: NegativeSpec, mine: MineSpec
) -> ExperimentSpec:
    """Give the demo's experiment on a larger trunk; how many epochs it is follows from the chips that an epoch has."""
    spec = demo_experiment(world)
    spec = replace(
        spec,
        seed=seed,
        model=replace(
            spec.model,
            backbone=BackboneSpec(name="mobilenetv2_100", weights=str(weights.absolute())),
            roi_head=replace(spec.model.roi_head, channels=64, hidden_dim=512),
        ),
        negatives=negatives,
        mine=mine,
    )
    train_set = load_dataset(world / "train.json")
    plan = order_chips(
        train_set, spec.pyramid, batch_size=spec.train.batch_size, flip=0.5, seed=seed, epoch=0
    )
    epochs = steps / plan.num_steps
    if negatives.source == "mined":  # so many more chips of each image, if it has so many
        epochs = steps / (plan.num_steps + negatives.per_image * len(train_set) / spec.train.batch_size)
    return replace(spec, train=replace(spec.train, epochs=epochs, milestones=(0.8 * epochs,)))


def detect(predictor: Detector, test_set: Dataset) -> list[dict[str, Any]]:
    found = []
    for record in test_set:
        detections = predictor(load_image(record.path))
        found += to_coco(detections, image_id=record.image_id, categories=predictor.categories)
    return found


def count_false(found: Sequence[dict[str, Any]], truth: dict[str, Any]) -> dict[str, float | None]:
    """Count false positives per image where shares of all objects are found, IoU 0.5, class by class."""
    hits, num_objects = matched(found, truth)
    recalls, misses = np.cumsum(hits) / num_objects, np.cumsum(~hits)
    told: dict[str, float | None] = {"recall": float(recalls[-1]) if len(recalls) else 0.0}
    for wanted in RECALLS:
        reached = np.flatnonzero(recalls >= wanted / 100)
        told[f"fp_{wanted}"] = float(misses[reached[0]] / len(truth["images"])) if len(reached) else None
    return told


def matched(found: Sequence[dict[str, Any]], truth: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Tell which detections, from the best score on, hit an object that no better one has hit."""
    objects: dict[tuple[int, int], list[list[float]]] = {}
    for one in truth["annotations"]:
        objects.setdefault((one["image_id"], one["category_id"]), []).append(one["bbox"])
    boxes = {key: from_xywh(np.array(own)) for key, own in objects.items()}
    is_free = {key: np.ones(len(own), dtype=bool) for key, own in boxes.items()}
    hits = np.zeros(len(found), dtype=bool)
    for place, one in enumerate(sorted(found, key=lambda one: -one["score"])):
        key = (one["image_id"], one["category_id"])
        if key in boxes:
            overlaps = iou(from_xywh(np.array([one["bbox"]])), boxes[key])[0] * is_free[key]
            if overlaps.max() >= 0.5:
                is_free[key][overlaps.argmax()] = False
                hits[place] = True
    return hits, len(truth["annotations"])


def draw_worst(folder: Path, *, count: int = 12, side: int = 180) -> None:
    """Draw the best scored false positives, a row for each way."""
    test_set = load_dataset(folder / "world" / "test.json")
    records = {record.image_id: record for record in test_set}
    sheet = Image.new("RGB", (count * (side + 6) + 6, len(WAYS) * (side + 30) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for row, way in enumerate(WAYS):
        found = json.loads((folder / f"{way}_0" / "detections.json").read_text())
        hits, _ = matched(found, test_set.to_coco())
        ranked = sorted(found, key=lambda one: -one["score"])
        worst = [one for one, is_hit in zip(ranked, hits, strict=True) if not is_hit][:count]
        for column, one in enumerate(worst):
            x, y, width, height = one["bbox"]
            reach = max(width, height) * 0.75
            middle = (x + width / 2, y + height / 2)
            crop = Image.fromarray(load_image(records[one["image_id"]].path)).crop(
                (
                    round(middle[0] - reach),
                    round(middle[1] - reach),
                    round(middle[0] + reach),
                    round(middle[1] + reach),
                )
            )
            place = (6 + column * (side + 6), 6 + row * (side + 30))
            sheet.paste(crop.resize((side, side)), place)
            name = test_set.categories[one["category_id"] - 1].name
            draw.text((place[0], place[1] + side + 4), f"{way}: {name} {one['score']:.2f}", fill="black")
    sheet.save(folder / "worst.png")


def tell(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | " + " | ".join(NUMBERS) + " |", "|---|" + "--:|" * len(NUMBERS)]
    for way, cells in results.items():
        columns = []
        for name in NUMBERS:
            values = [cell[name] for cell in cells]
            if None in values:
                columns.append("not reached by all")
            else:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                columns.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {way} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def result_path(folder: Path, way: str, seed: int | str) -> Path:
    return folder / f"{way}_{seed}.json"


if __name__ == "__main__":
    main()
