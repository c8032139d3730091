"""The whole story on the made-up world: drawn, learnt, searched, scored and shown."""

import json
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
from sniper.data.images.files import open_image
from sniper.data.spec import DataSpec, SourceSpec
from sniper.demo.shapes import ShapesSpec, draw_shapes
from sniper.errors import RunError
from sniper.evaluation.coco import evaluate, save_detections
from sniper.inference.detector import Detector, to_coco
from sniper.models.spec import BackboneSpec, DetectorSpec, RoIHeadSpec, RPNSpec
from sniper.reports.pictures import draw_chips, draw_detections
from sniper.runs.run import Run
from sniper.training.loop import StepReport, train

_NUM_TRAIN, _NUM_TEST, _NUM_PICTURES = 80, 20, 4


def demo_experiment(world: Path) -> ExperimentSpec:
    """Give the demo's experiment: small enough to learn from nothing on two processor cores in a few minutes.

    Args:
        world: folder of the made-up data set.
    """
    levels = (
        LevelSpec(factor=3.0, below=40),
        LevelSpec(factor=1.0, at_least=32, below=120),
        LevelSpec(factor=0.4, at_least=96, below=360),
        LevelSpec(long_side=256, at_least=320),
    )
    return ExperimentSpec(
        data=DataSpec(
            train=SourceSpec(annotations=str((world / "train.json").absolute())),
            test=SourceSpec(annotations=str((world / "test.json").absolute())),
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
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Draw the world, train on it, find its objects, score them, and leave pictures in the run's folder.

    Args:
        folder: of the run.
        device: where to compute.
        watch: told after every training step.
        say: told what is being done.

    Returns:
        The scores, the minutes it took, and where to look.

    Raises:
        RunError: if a demo or another run is already there.
    """
    started = time.monotonic()
    world = folder / "world"
    if world.exists():
        raise RunError(f"{folder}: a demo is already there; remove it, or name another folder with --run")
    spec = demo_experiment(world)
    run = Run.create(folder, config=dump_experiment(spec))
    say(f"drawing a world of {_NUM_TRAIN} images to learn from and {_NUM_TEST} to be tested on: {world}")
    draw_shapes(world, spec=_crowded(_NUM_TRAIN), seed=1, name="train")
    draw_shapes(world, spec=_crowded(_NUM_TEST), seed=2, name="test")
    train_set = load_dataset(world / "train.json")
    test_set = load_dataset(world / "test.json")

    pictures = folder / "pictures"
    pictures.mkdir()
    plan = order_chips(
        train_set,
        spec.pyramid,
        batch_size=spec.train.batch_size,
        flip=spec.data.flip,
        seed=spec.seed,
        epoch=0,
    )
    draw_chips(ChipDataset(plan), pictures / "chips.png")
    say(f"training on {len(plan.table)} chips an epoch, such as those in {pictures / 'chips.png'}")
    train(run, spec, train_set, device=device, watch=watch)

    say("looking for objects in the test images")
    results = _detect(Detector.load(run, spec, device=device), test_set, pictures=pictures)
    save_detections(folder / "detections.json", results)
    scores = evaluate(results, json.loads((world / "test.json").read_text())).as_dict()
    minutes = round((time.monotonic() - started) / 60, 2)
    return {"run": str(folder), "pictures": str(pictures), "minutes": minutes, **scores}


def _crowded(num_images: int) -> ShapesSpec:
    """Ask for images with many objects: the more a chip shows, the sooner there is something to see."""
    return ShapesSpec(
        num_images=num_images, fewest_objects=30, most_objects=45, fewest_clutter=6, most_clutter=12
    )


def _detect(predictor: Detector, annotations: Dataset, *, pictures: Path) -> list[dict[str, Any]]:
    """Find the objects of every image as COCO results, and draw those of the first few."""
    results = []
    for i, found in enumerate(predictor.search(record.path for record in annotations)):
        record = annotations[i]
        assert found is not None
        results += to_coco(found, image_id=record.image_id, categories=predictor.categories)
        if i < _NUM_PICTURES:
            draw_detections(
                open_image(record.path),
                found,
                pictures / f"found_{record.path.stem}.png",
                categories=predictor.categories,
                ground_truth=record,
            )
    return results
