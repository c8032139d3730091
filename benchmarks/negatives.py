"""Measure the benefit of negative chips: the same training with and without them, on a synthetic data set.

    python benchmarks/negatives.py runs/negatives --weights mobilenetv2_100.safetensors --seeds 3 --steps 600

The images have few objects and many distractors, most of which lie in no positive chip. The detector is MobileNetV2
with ImageNet weights. Both variants start from the same weights and make the same number of steps with the same batch
size. `mined` trains an RPN before, whose time is reported separately. It sees each positive chip less often, since
some of its chips are negative, and keeps one selection of positive chips, which `positive` draws anew each epoch. M
(`--min-proposals`) is the same at all levels.

Each finished cell is kept in the folder and not run again. Prints one JSON line; writes `table.md` and `worst.png` (the
false positives with the highest scores of the first seed, a row for each variant) to the folder.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cells import keep_options, run_cells
from PIL import Image, ImageDraw

from sniper.chips import LevelSpec, PyramidSpec
from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec, TrainSpec
from sniper.config.loading import dump_experiment
from sniper.data.datasets import Dataset, ImageRecord, load_dataset
from sniper.data.epoch import order_chips
from sniper.data.images.files import load_image
from sniper.data.spec import DataSpec, SourceSpec
from sniper.demo.shapes import ShapesSpec, draw_shapes
from sniper.evaluation.coco import evaluate
from sniper.evaluation.false_positives import count_false_positives
from sniper.evaluation.matching import match_detections, match_pair
from sniper.evaluation.pair import EvaluationPair
from sniper.geometry import Detections
from sniper.geometry.boxes import from_xywh
from sniper.inference.detector import Detector, to_coco
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.pipeline import run_stages
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks

VARIANTS = ("positive", "mined")
CPU = torch.device("cpu")
RECALLS = (60, 80, 90, 95)  # percent
LEVELS = (
    LevelSpec(factor=3.0, below=40),
    LevelSpec(factor=1.0, at_least=32, below=120),
    LevelSpec(factor=0.4, at_least=96, below=360),
    LevelSpec(long_side=256, at_least=320),
)
NUMBERS = ("ap", "ap50", "ar_100", *(f"fp_{recall}" for recall in RECALLS), "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the benefit of negative chips.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="timm's mobilenetv2_100, safetensors")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=100, help="to train on; half as many to test on")
    parser.add_argument("--min-proposals", type=int, default=6, help="of a negative chip")
    parser.add_argument(
        "--per-image", type=int, default=6, help="most negative chips of an image in an epoch"
    )
    parser.add_argument("--rpn-epochs", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--cell", help="run only this cell, VARIANT:SEED")
    options = parser.parse_args()
    names = ("steps", "images", "min_proposals", "per_image", "rpn_epochs")
    chosen = {name: getattr(options, name) for name in names}
    keep_options(options.folder, chosen)
    draw_data(options.folder / "data", num_images=options.images)
    if options.cell:
        variant, seed = options.cell.split(":")
        spec = experiment(
            options.folder / "data",
            weights=options.weights,
            seed=int(seed),
            steps=options.steps,
            negatives=NegativeSpec(
                source="mined" if variant == "mined" else "none",
                min_proposals=(options.min_proposals,),
                per_image=options.per_image,
            ),
            mine=MineSpec(rpn_epochs=options.rpn_epochs),
        )
        run_cell(options.folder, variant, int(seed), spec)
        return
    cells = [f"{variant}:{seed}" for seed in range(options.seeds) for variant in reversed(VARIANTS)]
    run_cells(
        [cell for cell in cells if not result_path(options.folder, *cell.split(":")).exists()],
        jobs=options.jobs,
    )
    test_set = load_dataset(options.folder / "data" / "test.json")
    results = {
        variant: [
            json.loads(result_path(options.folder, variant, seed).read_text())
            | count_errors(load_results(options.folder, variant, seed), test_set)
            for seed in range(options.seeds)
        ]
        for variant in VARIANTS
    }
    draw_worst(options.folder, test_set)
    (options.folder / "table.md").write_text(format_table(results))
    print(json.dumps({"benchmark": "negatives", "steps": options.steps, "results": results}))


def draw_data(folder: Path, *, num_images: int) -> None:
    spec = ShapesSpec(
        num_images=num_images,
        min_side=600,
        max_side=1000,
        min_objects=8,
        max_objects=16,
        min_distractors=12,
        max_distractors=24,
        max_size=240,
    )
    for name, seed, count in (("train", 1, num_images), ("test", 2, num_images // 2)):
        if not (folder / f"{name}.json").exists():
            draw_shapes(folder, spec=replace(spec, num_images=count), seed=seed, name=name)


def run_cell(folder: Path, variant: str, seed: int, spec: ExperimentSpec) -> None:
    torch.set_num_threads(1)
    train_set = load_dataset(folder / "data" / "train.json")
    run_folder = folder / f"{variant}_{seed}"
    run = (
        Run(run_folder)
        if (run_folder / "checkpoints").exists()
        else Run.create(run_folder, config=dump_experiment(spec))
    )
    seconds = {"rpn": 0.0, "mine": 0.0, "train": 0.0}
    last = time.monotonic()

    def measure(stage: str) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[stage] += now - last
        last = now

    callbacks = Callbacks(
        on_step=lambda report: measure(report.stage), on_mining=lambda done, total: measure("mine")
    )
    run_stages(run, spec, train_set, device=CPU, callbacks=callbacks)
    test_set = load_dataset(folder / "data" / "test.json")
    results = detect(Detector.load(run, CPU, spec=spec), test_set)
    (run_folder / "detections.json").write_text(json.dumps(results))
    metrics = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    cell = {
        "variant": variant,
        "seed": seed,
        **evaluate(results, test_set).as_dict(),
        "steps": metrics[-1]["step"],
        "minutes": {stage: round(taken / 60, 2) for stage, taken in seconds.items()},
        "chips": [entry["chips"] for entry in metrics if "chips" in entry],
        "negative_chips": [entry["negative_chips"] for entry in metrics if "chips" in entry],
        "pool": next((entry["negative_chips_pool"] for entry in metrics if entry["stage"] == "mine"), 0),
    }
    result_path(folder, variant, seed).write_text(json.dumps(cell))


def experiment(
    data: Path, *, weights: Path, seed: int, steps: int, negatives: NegativeSpec, mine: MineSpec
) -> ExperimentSpec:
    """Return an experiment of as many epochs as make this number of steps."""
    spec = ExperimentSpec(
        seed=seed,
        data=DataSpec(
            train=SourceSpec(annotations=str((data / "train.json").absolute())),
            test=SourceSpec(annotations=str((data / "test.json").absolute())),
        ),
        pyramid=PyramidSpec(chip_size=256, levels=LEVELS),
        negatives=negatives,
        mine=mine,
        model=DetectorSpec(
            backbone=BackboneSpec(name="mobilenetv2_100", weights=str(weights.absolute())),
            rpn=RPNSpec(
                channels=96, anchor_sizes=(24, 48, 96, 160), pre_nms_top_n=1000, post_nms_top_n_train=64
            ),
            roi_head=RoIHeadSpec(channels=64, hidden_dim=512),
        ),
        train=TrainSpec(
            batch_size=8,
            learning_rate=0.03,
            reference_batch_size=8,
            warmup_steps=50,
            warmup_start_factor=2 / 15,
            clip_grad_norm=10.0,
        ),
        predict=PredictSpec(levels=LEVELS),
    )
    train_set = load_dataset(data / "train.json")
    order = order_chips(
        train_set, spec.pyramid, batch_size=spec.train.batch_size, flip=0.5, seed=seed, epoch=0
    )
    epochs = steps / order.num_steps
    if negatives.source == "mined":  # assumes that each image has so many negative chips
        epochs = steps / (order.num_steps + negatives.per_image * len(train_set) / spec.train.batch_size)
    return replace(spec, train=replace(spec.train, epochs=epochs, milestones=(0.8 * epochs,)))


def detect(detector: Detector, test_set: Dataset) -> list[dict[str, Any]]:
    results = []
    for record in test_set:
        detections = detector.predict(load_image(record.path))
        results += to_coco(detections, image_id=record.image_id, categories=detector.categories)
    return results


def count_errors(results: Sequence[dict[str, Any]], test_set: Dataset) -> dict[str, float | None]:
    """Count false positives per image at some recalls, and compute the recall of all detections (IoU 0.5)."""
    counts = count_false_positives(
        match_pair(EvaluationPair.of(results, test_set)), recalls=[recall / 100 for recall in RECALLS]
    )
    num_matched = sum(
        int(match_detections(detections, record).is_true_positive.sum())
        for record, detections in by_image(results, test_set)
    )
    return {
        "recall": num_matched / len(test_set.boxes),
        **{f"fp_{recall}": row.per_image for recall, row in zip(RECALLS, counts.points, strict=True)},
    }


def by_image(
    results: Sequence[dict[str, Any]], test_set: Dataset
) -> Iterator[tuple[ImageRecord, Detections]]:
    """Iterate over the images with their detections, highest score first."""
    labels = {category.category_id: label for label, category in enumerate(test_set.categories)}
    of_image: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for entry in sorted(results, key=lambda entry: -entry["score"]):
        of_image[entry["image_id"]].append(entry)
    for record in test_set:
        entries = of_image[record.image_id]
        yield (
            record,
            Detections(
                boxes=from_xywh(np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)),
                scores=np.array([entry["score"] for entry in entries], dtype=np.float64),
                labels=np.array([labels[entry["category_id"]] for entry in entries], dtype=np.int64),
            ),
        )


def draw_worst(folder: Path, test_set: Dataset, *, count: int = 12, side: int = 180) -> None:
    """Draw the false positives with the highest scores, a row for each variant."""
    sheet = Image.new("RGB", (count * (side + 6) + 6, len(VARIANTS) * (side + 30) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for row, variant in enumerate(VARIANTS):
        false_positives = [
            (float(detections.scores[index]), record, detections.boxes[index], int(detections.labels[index]))
            for record, detections in by_image(load_results(folder, variant, 0), test_set)
            for index in np.flatnonzero(~match_detections(detections, record).is_true_positive).tolist()
        ]
        false_positives.sort(key=lambda entry: -entry[0])
        for column, (score, record, (x1, y1, x2, y2), label) in enumerate(false_positives[:count]):
            reach = max(x2 - x1, y2 - y1) * 0.75
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            window = (round(x - reach), round(y - reach), round(x + reach), round(y + reach))
            crop = Image.fromarray(load_image(record.path)).crop(window)
            left, upper = 6 + column * (side + 6), 6 + row * (side + 30)
            sheet.paste(crop.resize((side, side)), (left, upper))
            name = test_set.categories[label].name
            draw.text((left, upper + side + 4), f"{variant}: {name} {score:.2f}", fill="black")
    sheet.save(folder / "worst.png")


def format_table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | " + " | ".join(NUMBERS) + " |", "|---|" + "--:|" * len(NUMBERS)]
    for variant, cells in results.items():
        columns = []
        for name in NUMBERS:
            values = [cell[name] for cell in cells]
            if None in values:
                columns.append("not reached by all")
            else:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                columns.append(f"{statistics.mean(values):.3f} ± {deviation:.3f}")
        lines.append(f"| {variant} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def load_results(folder: Path, variant: str, seed: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((folder / f"{variant}_{seed}" / "detections.json").read_text())
    return results


def result_path(folder: Path, variant: str, seed: int | str) -> Path:
    return folder / f"{variant}_{seed}.json"


if __name__ == "__main__":
    main()
