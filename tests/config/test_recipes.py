"""The experiments that come with the package: all of them are read, built and able to learn."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sniper.chips import BoxStatus, LevelSpec, PyramidSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec
from sniper.config.loading import load_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.images.files import load_image
from sniper.evaluation.coco import evaluate
from sniper.geometry.boxes import to_xywh
from sniper.inference.detector import Detector, to_coco
from sniper.models.build import build_detector
from sniper.pipeline import run_stages
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport
from tests.models.batches import build_batch, build_sample

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHARED = ROOT.parent / "shared"
WEIGHTS = SHARED / "weights/mobilenetv2_100.safetensors"
CPU = torch.device("cpu")
SIDE = 128


def of_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=of_name)
def test_an_experiment_of_ours_gives_finite_losses(path: Path) -> None:
    model = build_detector(load_experiment(path).model, num_classes=80, has_weights=False).train()
    chips = [build_sample([[20, 20, 100, 90]], [BoxStatus.VALID]), build_sample([], [])]
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


def write_eight_images(folder: Path) -> Dataset:
    """Write eight real images of a few objects, of at least 8 px a side, as squares of `SIDE`.

    They are filled up with black, as chips are: what is learnt by heart is learnt with its surroundings.
    """
    source = load_dataset(SHARED / "data/coco_mini/train.json")
    images: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True)
    for record in source:
        scale = SIDE / max(record.width, record.height)
        sides = (record.boxes[:, 2:] - record.boxes[:, :2]) * scale
        if not 1 <= len(sides) <= 8 or (sides < 8).any() or record.is_crowd.any() or len(images) == 8:
            continue
        square = Image.new("RGB", (SIDE, SIDE))
        square.paste(
            Image.fromarray(load_image(record.path)).resize(
                (round(record.width * scale), round(record.height * scale))
            )
        )
        name = f"{record.image_id}.png"
        square.save(folder / "images" / name)
        images.append({"id": record.image_id, "file_name": name, "width": SIDE, "height": SIDE})
        for box, label in zip(to_xywh(record.boxes * scale).tolist(), record.labels.tolist(), strict=True):
            entries.append(
                {
                    "id": len(entries) + 1,
                    "image_id": record.image_id,
                    "category_id": source.categories[label].category_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": one.category_id, "name": one.name} for one in source.categories]
    path = folder / "eight.json"
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return load_dataset(path)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="wants real images")
@pytest.mark.parametrize("path", CONFIGS, ids=of_name)
def test_an_experiments_detector_learns_eight_images_by_heart(path: Path, tmp_path: Path) -> None:
    images = write_eight_images(tmp_path / "eight")
    assert len(images) == 8
    spec = load_experiment(path)
    has_weights = spec.model.backbone.name == "mobilenetv2_100" and WEIGHTS.exists()
    backbone = dataclasses.replace(
        spec.model.backbone,
        pretrained=False,
        weights=str(WEIGHTS) if has_weights else None,
        frozen_stages=spec.model.backbone.frozen_stages if has_weights else 0,
    )
    level = LevelSpec(long_side=SIDE)
    spec = ExperimentSpec(
        pyramid=PyramidSpec(chip_size=SIDE, levels=(level,)),
        data=dataclasses.replace(spec.data, flip=0.0, num_workers=0),
        model=dataclasses.replace(
            spec.model,
            backbone=backbone,
            rpn=dataclasses.replace(spec.model.rpn, post_nms_top_n_train=64),  # there are few objects
        ),
        train=TrainSpec(
            epochs=150.0,
            batch_size=8,
            reference_batch_size=8,
            optimizer="adamw",
            learning_rate=1e-3,
            warmup_steps=10,
            warmup_start_factor=1e-5 / 0.001,
            milestones=(130.0,),
            clip_grad_norm=10.0,
        ),
        predict=PredictSpec(levels=(level,)),
    )
    run = Run.create(tmp_path / "run", config="")

    def tell(report: StepReport) -> None:
        if report.progress.step % 20 == 0:
            print(path.stem, report.progress.step, report.losses)  # noqa: T201 - to be seen when it fails

    run_stages(run, spec, images, device=CPU, callbacks=Callbacks(on_step=tell))
    predictor = Detector.load(run, spec, device=CPU)
    results = []
    for record in images:
        found = predictor(load_image(record.path))
        results += to_coco(found, image_id=record.image_id, categories=images.categories)
    ap50 = evaluate(results, images.to_coco()).as_dict()["ap50"]
    print(path.stem, "AP50", ap50)  # noqa: T201
    assert ap50 > 0.9
