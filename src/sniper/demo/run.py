"""The demo: train a small detector on a synthetic data set, and score it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sniper.chips import LevelSpec, PyramidSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec
from sniper.config.loading import dump_experiment
from sniper.data.batches import ChipDataset
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import order_chips
from sniper.data.reader import open_record
from sniper.data.spec import DataSpec, SourceSpec
from sniper.demo.shapes import ShapesSpec, draw_shapes
from sniper.errors import RunError
from sniper.evaluation.coco import evaluate
from sniper.evaluation.results import save_detections
from sniper.inference.detector import Detector, to_coco
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.pipeline import run_stages
from sniper.reports.pictures import draw_chips, draw_detections
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport

_NUM_TRAIN, _NUM_TEST, _NUM_PICTURES = 80, 20, 4


def demo_experiment(data: Path) -> ExperimentSpec:
    """Return the demo's experiment, which trains from scratch on two CPU cores in a few minutes.

    Args:
        data: folder of the data set, with `train.json` and `test.json`.
    """
    levels = (
        LevelSpec(factor=3.0, below=40),
        LevelSpec(factor=1.0, at_least=32, below=120),
        LevelSpec(factor=0.4, at_least=96, below=360),
        LevelSpec(long_side=256, at_least=320),
    )
    return ExperimentSpec(
        data=DataSpec(
            train=SourceSpec(annotations=str((data / "train.json").absolute())),
            test=SourceSpec(annotations=str((data / "test.json").absolute())),
        ),
        pyramid=PyramidSpec(chip_size=256, levels=levels),
        model=DetectorSpec(
            backbone=BackboneSpec(name="test_resnet", pretrained=False, frozen_stages=0),
            rpn=RPNSpec(
                channels=96, anchor_sizes=(24, 48, 96, 160), pre_nms_top_n=1000, post_nms_top_n_train=64
            ),
            roi_head=RoIHeadSpec(channels=32, hidden_dim=256),
        ),
        train=TrainSpec(
            epochs=3.0,
            batch_size=8,
            learning_rate=0.03,
            reference_batch_size=8,
            warmup_steps=50,
            warmup_start_factor=2 / 15,
            milestones=(2.4,),
            clip_grad_norm=10.0,
        ),
        predict=PredictSpec(levels=levels),
    )


def run_demo(
    folder: Path,
    *,
    device: torch.device,
    watch: Callable[[StepReport], None],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Draw the data set, train on it, detect and score on its test images, and draw pictures.

    Args:
        folder: of the run; the data set and the pictures are written there, too.
        device: where to compute.
        watch: called after every training step.
        log: called with a line of text at each stage.

    Returns:
        The scores, the minutes taken, and the folders.

    Raises:
        RunError: if the folder already has a demo or another run.
    """
    started = time.monotonic()
    data = folder / "data"
    if data.exists():
        raise RunError(f"{folder}: already has a demo; remove it, or name another folder with --run")
    spec = demo_experiment(data)
    run = Run.create(folder, config=dump_experiment(spec))
    log(f"drawing {_NUM_TRAIN} training and {_NUM_TEST} test images in {data}")
    draw_shapes(data, spec=_shapes_spec(_NUM_TRAIN), seed=1, name="train")
    draw_shapes(data, spec=_shapes_spec(_NUM_TEST), seed=2, name="test")
    train_set = load_dataset(data / "train.json")
    test_set = load_dataset(data / "test.json")

    pictures = folder / "pictures"
    pictures.mkdir()
    order = order_chips(
        train_set,
        spec.pyramid,
        batch_size=spec.train.batch_size,
        flip=spec.data.flip,
        seed=spec.seed,
        epoch=0,
    )
    draw_chips(ChipDataset(order), pictures / "chips.png")
    log(f"training on {len(order.table)} chips an epoch; the first are in {pictures / 'chips.png'}")
    run_stages(run, spec, train_set, device=device, callbacks=Callbacks(on_step=watch))

    log("detecting objects in the test images")
    results = _detect(Detector.load(run, device, spec=spec), test_set, pictures=pictures)
    save_detections(folder / "detections.json", results)
    scores = evaluate(results, test_set).as_dict()
    minutes = round((time.monotonic() - started) / 60, 2)
    return {"run": str(folder), "pictures": str(pictures), "minutes": minutes, **scores}


def _shapes_spec(num_images: int) -> ShapesSpec:
    """Return images with many objects: the more a chip shows, the sooner the detector learns."""
    return ShapesSpec(
        num_images=num_images, min_objects=30, max_objects=45, min_distractors=6, max_distractors=12
    )


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
                pictures / f"detections_{record.path.stem}.png",
                categories=detector.categories,
                ground_truth=record,
            )
    return results
