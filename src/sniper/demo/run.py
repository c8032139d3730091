"""The demo: train a small detector on a synthetic data set, and score it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from sniper.chips import LevelSpec, PyramidSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec
from sniper.config.loading import dump_experiment
from sniper.data.batches import ChipDataset
from sniper.data.datasets import Dataset, ImageRecord, load_dataset
from sniper.data.epoch import EpochOrder, order_chips, to_image_boxes
from sniper.data.reader import open_record
from sniper.data.spec import DataSpec, SourceSpec
from sniper.demo.shapes import ShapesSpec, draw_shapes
from sniper.errors import RunError
from sniper.evaluation.coco import score
from sniper.evaluation.diagnosis import diagnose
from sniper.evaluation.pair import EvaluationPair
from sniper.evaluation.results import save_detections
from sniper.geometry import Detections
from sniper.geometry.boxes import iou
from sniper.geometry.detections import DEFAULT_MIN_SCORE
from sniper.inference.detector import Detector, to_coco
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.pipeline import run_stages
from sniper.planning.cost import chips_megapixels, levels_megapixels
from sniper.reports.levels import draw_levels
from sniper.reports.pictures import draw_chips, draw_detections
from sniper.reports.reporter import RunReporter
from sniper.reports.scored import Subject
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks

_NUM_PICTURES = 4

WORLD = ShapesSpec(
    min_side=1000,
    max_side=1600,
    min_objects=40,
    max_objects=60,
    min_distractors=8,
    max_distractors=14,
    min_size=10.0,
    max_size=320.0,
    num_groups=3,
    background_range=0.15,  # batch norm adapts to the colours of a small batch, and misses objects on rare ones
)
"""The images of the demo. Those of a data set may differ in number only."""

LEVELS = (
    LevelSpec(factor=2.0, below=48),
    LevelSpec(factor=0.5, at_least=40, below=180),
    LevelSpec(long_side=256, at_least=150),
)
"""The levels of the demo: they show objects of 10 to 320 px at about 20 to 96 px."""


@dataclass(frozen=True, kw_only=True)
class DemoSpec:
    """How much the demo draws and trains.

    Attributes:
        seed: of the images, the initial weights and the order of the chips.
        num_train: training images.
        num_test: test images.
        epochs: passes over the training images.
        warmup_steps: steps over which the learning rate rises.
        world: the contents of the images; their number is not used.
    """

    seed: int = 0
    num_train: int = 220
    num_test: int = 20
    epochs: float = 1.0
    warmup_steps: int = 60
    world: ShapesSpec = WORLD

    def shapes(self, num_images: int) -> ShapesSpec:
        """Return a number of images of this world."""
        return replace(self.world, num_images=num_images)


def quick_look(seed: int = 0) -> DemoSpec:
    """Return a demo that takes a minute, with a third of the images."""
    return DemoSpec(seed=seed, num_train=80, num_test=5, warmup_steps=20)


def demo_experiment(data: Path, *, spec: DemoSpec = DemoSpec()) -> ExperimentSpec:
    """Return the demo's experiment, which trains from scratch on two CPU cores in a few minutes.

    Args:
        data: folder of the data set, with `train.json` and `test.json`.
        spec: seed and length.
    """
    return ExperimentSpec(
        seed=spec.seed,
        data=DataSpec(
            train=SourceSpec(annotations=str((data / "train.json").absolute())),
            test=SourceSpec(annotations=str((data / "test.json").absolute())),
            images_at_once=64,
        ),
        pyramid=PyramidSpec(chip_size=256, levels=LEVELS),
        model=DetectorSpec(
            backbone=BackboneSpec(name="test_resnet", pretrained=False, frozen_stages=0, neck="fpn"),
            rpn=RPNSpec(
                channels=48,
                anchor_sizes=(20, 32, 52, 84, 140),
                aspect_ratios=(1.0,),
                positive_iou=0.45,
                negative_iou=0.35,
                pre_nms_top_n=600,
                nms_iou=0.6,
                post_nms_top_n=200,
                post_nms_top_n_train=96,
            ),
            roi_head=RoIHeadSpec(channels=32, pool_size=5, hidden_dim=256),
        ),
        train=TrainSpec(
            epochs=spec.epochs,
            batch_size=4,
            optimizer="adamw",
            learning_rate=0.0015,
            weight_decay=0.01,
            reference_batch_size=4,
            warmup_steps=spec.warmup_steps,
            warmup_start_factor=0.1,
            schedule="cosine",
            clip_grad_norm=10.0,
        ),
        predict=PredictSpec(levels=LEVELS),
    )


def run_demo(
    folder: Path,
    *,
    device: torch.device,
    callbacks: Callbacks = Callbacks(),
    log: Callable[[str], None],
    spec: DemoSpec = DemoSpec(),
) -> dict[str, Any]:
    """Draw the data set, train on it, detect and score on its test images, and draw pictures.

    Args:
        folder: of the run; the data set and the pictures are written there, too.
        device: where to compute.
        callbacks: called while the training runs.
        log: called with a line of text at each stage.
        spec: what is drawn and how long it is trained on.

    Returns:
        Run, folder of the pictures, page of the run, minutes taken and the share of the pyramid's pixels trained on;
        then the scores, with `ar_100_any_class`: AR of the same detections without regard to their classes.

    Raises:
        RunError: if the folder already has a demo or another run.
    """
    started = time.monotonic()
    data = folder / "data"
    if data.exists():
        raise RunError(f"{folder}: already has a demo; remove it, or name another folder with --run")
    experiment = demo_experiment(data, spec=spec)
    run = Run.create(folder, config=dump_experiment(experiment))
    world = spec.world
    log(
        f"drawing {spec.num_train} training and {spec.num_test} test images of {world.min_side:,} to "
        f"{world.max_side:,} px in {data}, with objects of {world.min_size:g} to {world.max_size:g} px, and shapes "
        "that resemble them"
    )
    draw_shapes(data, spec=spec.shapes(spec.num_train), seed=2 * spec.seed + 1, name="train")
    draw_shapes(data, spec=spec.shapes(spec.num_test), seed=2 * spec.seed + 2, name="test")
    train_set = load_dataset(data / "train.json")
    test_set = load_dataset(data / "test.json")

    pictures = folder / "pictures"
    pictures.mkdir()
    order = _first_epoch(train_set, experiment)
    share = _share_of_pyramid(order, train_set, experiment.pyramid)
    draw_chips(ChipDataset(order), pictures / "chips.png")
    log(
        f"training on {len(order.table):,} chips: windows of {experiment.pyramid.chip_size} px "
        f"around the objects, each at the one of {len(LEVELS)} scales that suits it; {100 * share:.0f} % of the pixels "
        "of the images at all scales"
    )
    run_stages(run, experiment, train_set, device=device, callbacks=callbacks)

    log(f"detecting objects in the test images at all {len(LEVELS)} scales")
    results = _detect(Detector.load(run, device, spec=experiment), test_set, pictures=pictures)
    save_detections(folder / "detections.json", results)
    pair = EvaluationPair.of(results, test_set)
    (any_size,) = diagnose(pair, sizes=(0.0, math.inf)).sizes
    scores = score(pair)
    reporter = RunReporter(run=run, on_warning=callbacks.on_warning)
    reporter.save_scored(
        Subject(
            pair=pair,
            dataset=test_set,
            levels=LEVELS,
            read=experiment.data.read,
            min_score=None,
            title=f"the {len(test_set)} test images",
            step=run.progress.step,
        ),
        scores=scores,
    )
    reporter.write()
    return {
        "run": str(folder),
        "pictures": str(pictures),
        "page": str(run.report_path),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "share_of_pyramid": round(share, 4),
        **scores.as_dict(),
        "ar_100_any_class": any_size.any_class_recall,
    }


def _first_epoch(dataset: Dataset, experiment: ExperimentSpec) -> EpochOrder:
    """Return the chips of the first epoch."""
    return order_chips(
        dataset,
        experiment.pyramid,
        batch_size=experiment.train.batch_size,
        flip=experiment.data.flip,
        seed=experiment.seed,
        epoch=0,
    )


def _share_of_pyramid(order: EpochOrder, dataset: Dataset, pyramid: PyramidSpec) -> float:
    """Compute the pixels of the chips divided by those of the whole images at all levels."""
    whole = levels_megapixels(pyramid.levels, to_image_boxes(dataset))
    return chips_megapixels(pyramid, len(order.table)) / whole


def _detect(detector: Detector, dataset: Dataset, *, pictures: Path) -> list[dict[str, Any]]:
    """Detect objects in every image, return them as COCO results, and draw those of the first images."""
    results = []
    for index, (record, detections) in enumerate(zip(dataset, detector.predict_many(dataset), strict=True)):
        assert detections is not None
        results += to_coco(detections, image_id=record.image_id, categories=detector.categories)
        if index < _NUM_PICTURES:
            draw_detections(
                open_record(record, detector.data.read),
                detections,
                pictures / f"detections_{record.path.stem}.jpg",
                categories=detector.categories,
                ground_truth=record,
                min_score=DEFAULT_MIN_SCORE,
            )
        if index == 0:
            _draw_levels(detector, record, detections, pictures / "levels.jpg")
    return results


def _draw_levels(detector: Detector, record: ImageRecord, detections: Detections, path: Path) -> None:
    """Draw which level detects which object."""
    shown = detections.confident(DEFAULT_MIN_SCORE)
    sides = {"width": record.width, "height": record.height}
    draw_levels(
        open_record(record, detector.data.read),
        shown,
        path,
        levels=[level.at(**sides, index=index) for index, level in enumerate(detector.spec.levels)],
        level_of=find_levels(detector, record, shown),
        title=f"{record.path.name}: detections with a score of at least {DEFAULT_MIN_SCORE:g}, by level",
    )


def find_levels(detector: Detector, record: ImageRecord, detections: Detections) -> Int[np.ndarray, " n"]:
    """Find the level that each detection of an image is from, by searching the image at each level alone.

    Soft-NMS keeps the boxes as they are, so the level is that whose own detections have the same box and label.

    Args:
        detector: its detections are merged by NMS or soft-NMS.
        record: the image.
        detections: of the detector in this image. May be empty.

    Returns:
        (n,) indices of levels.
    """
    overlaps = [
        _best_overlap(
            replace(detector, spec=replace(detector.spec, levels=(level,))).predict(record), detections
        )
        for level in detector.spec.levels
    ]
    nearest: Int[np.ndarray, " n"] = np.stack(overlaps).argmax(axis=0)
    return nearest


def _best_overlap(candidates: Detections, detections: Detections) -> np.ndarray:
    """Return (n,) the highest IoU of each detection with a candidate of its label; 0 without one."""
    overlaps = iou(detections.boxes, candidates.boxes)  # (n, m)
    overlaps = np.where(detections.labels[:, None] == candidates.labels[None], overlaps, 0.0)
    best: np.ndarray = overlaps.max(axis=1, initial=0.0)
    return best
