"""The experiments that come with the package: all of them are read, built and able to learn."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sniper.chips import LevelSpec, PyramidSpec, Standing
from sniper.config import load_experiment
from sniper.data.coco import Annotations, load_annotations
from sniper.data.images import load_image
from sniper.engine.build import build_detector
from sniper.engine.predict import Predictor, to_coco
from sniper.engine.run import Run
from sniper.engine.spec import ExperimentSpec, PredictSpec, TrainSpec
from sniper.engine.train import StepReport, train
from sniper.evaluation import evaluate
from tests.models.batches import build_batch, build_sample

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHARED = ROOT.parent / "shared"
WEIGHTS = SHARED / "weights/mobilenetv2_100.safetensors"
CPU = torch.device("cpu")
SIDE = 192


def of_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=of_name)
def test_an_experiment_of_ours_gives_finite_losses(path: Path) -> None:
    model = build_detector(load_experiment(path), num_classes=80, has_weights=False).train()
    chips = [build_sample([[20, 20, 100, 90]], [Standing.VALID]), build_sample([], [])]
    losses = model.losses(build_batch(*chips))
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", ["coco_r101_paper", "coco_mobilenetv2_paper"])
def test_the_papers_recipe_is_what_an_experiment_says_that_says_nothing(name: str) -> None:
    spec, defaults = load_experiment(ROOT / "configs" / f"{name}.yaml"), ExperimentSpec()
    assert spec.pyramid == defaults.pyramid
    assert spec.train == defaults.train
    assert spec.predict == defaults.predict
    assert spec.mine == defaults.mine
    assert spec.model.rpn == defaults.model.rpn


def eight_images() -> Annotations:
    """Choose eight real images of a few objects, each at least 12 px wide and high where the long side is `SIDE`."""
    annotations = load_annotations(SHARED / "data/coco_mini/train.json")
    chosen = []
    for index in range(len(annotations)):
        record = annotations[index]
        boxes = record.boxes * SIDE / max(record.width, record.height)
        is_large = ((boxes[:, 2:] - boxes[:, :2]) >= 12).all()
        if 1 <= len(boxes) <= 8 and is_large and not record.is_crowd.any():
            chosen.append(index)
    return annotations.select(np.array(chosen[:8]))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="wants real images")
@pytest.mark.parametrize("path", CONFIGS, ids=of_name)
def test_an_experiments_detector_learns_eight_images_by_heart(path: Path, tmp_path: Path) -> None:
    images = eight_images()
    assert len(images) == 8
    spec = load_experiment(path)
    has_weights = spec.model.backbone.name == "mobilenetv2_100" and WEIGHTS.exists()
    backbone = dataclasses.replace(
        spec.model.backbone,
        pretrained=False,
        weights=str(WEIGHTS) if has_weights else None,
        frozen_stride=spec.model.backbone.frozen_stride if has_weights else 0,
    )
    level = LevelSpec(long_side=SIDE)
    spec = ExperimentSpec(
        pyramid=PyramidSpec(chip_size=SIDE, levels=(level,)),
        data=dataclasses.replace(spec.data, flip=0.0, loader_processes=0),
        model=dataclasses.replace(spec.model, backbone=backbone),
        train=TrainSpec(
            epochs=120.0,
            batch_size=8,
            reference_batch=8,
            optimizer="adamw",
            learning_rate=4e-4,
            warm_up_steps=10,
            warm_up_rate=1e-5,
            decay_at=(100.0,),
            clip_gradient=10.0,
        ),
        predict=PredictSpec(levels=(level,)),
    )
    run = Run.create(tmp_path / "run", config="")

    def tell(report: StepReport) -> None:
        if report.progress.step % 20 == 0:
            print(path.stem, report.progress.step, report.losses)  # noqa: T201 - to be seen when it fails

    train(run, spec, images, device=CPU, watch=tell)
    predictor = Predictor.load(run, spec, device=CPU)
    results = []
    for record in images:
        found = predictor(load_image(record.path))
        results += to_coco(found, image_id=record.image_id, categories=images.categories)
    ap50 = evaluate(results, images.to_coco()).as_dict()["ap50"]
    print(path.stem, "AP50", ap50)  # noqa: T201
    assert ap50 > 0.9
