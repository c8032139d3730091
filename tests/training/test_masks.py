"""Masks in training: resumed to the same bits, refused without masks, and learnt by heart."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import sniper
from sniper.chips import LevelSpec, PyramidSpec
from sniper.config import dump_experiment
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.spec import DataSpec, SourceSpec
from sniper.errors import ConfigError
from sniper.inference.detector import Detector, to_coco
from sniper.models.spec import BackboneSpec, DetectorSpec, MaskHeadSpec, RoIHeadSpec, RPNSpec
from sniper.pipeline import run_stages, train
from sniper.reports.run_page import training_charts
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks
from tests.data.tiny import write_dataset
from tests.data_folder import find_data
from tests.training.experiments import CPU, check_resumed, tiny_experiment, train_run, with_train

HEAD = MaskHeadSpec(channels=8, num_convs=1, pool_size=4, batch_size_per_image=4)


def write_masks(folder: Path) -> Path:
    """Write the tiny data set with the lower left triangle of each box as its mask; every fifth box has none."""
    path = write_dataset(folder)
    content = json.loads(path.read_text())
    for index, entry in enumerate(content["annotations"]):
        x, y, width, height = entry["bbox"]
        if index % 5:
            entry["segmentation"] = [[x, y, x + width, y + height, x, y + height]]
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def masked(tmp_path: Path) -> Dataset:
    return load_dataset(write_masks(tmp_path / "masked"))


def mask_experiment(dataset: Dataset) -> ExperimentSpec:
    spec = with_train(tiny_experiment(dataset.path), epochs=1.5)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, mask_head=HEAD))


def test_a_mask_training_that_was_killed_and_resumed_ends_with_the_same_weights(
    masked: Dataset, tmp_path: Path
) -> None:
    spec = mask_experiment(masked)
    unbroken = check_resumed(spec, masked, tmp_path)
    assert all(entry["mask"] > 0 for entry in unbroken.entries() if "learning_rate" in entry)


def test_a_mask_head_is_refused_without_masks(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "boxes")
    spec = mask_experiment(load_dataset(path))
    with pytest.raises(
        ConfigError, match=r"model\.mask_head: .* has no masks to learn from; set model\.mask_head to null"
    ):
        train(spec, run=tmp_path / "run", device="cpu")
    ignoring = dataclasses.replace(
        spec,
        data=dataclasses.replace(
            spec.data, masks="ignore", train=SourceSpec(annotations=str(write_masks(tmp_path / "masked")))
        ),
    )
    with pytest.raises(ConfigError, match=r"is read without masks \(data\.masks\)"):
        train(ignoring, run=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_detector_can_start_from_one_without_a_mask_head(masked: Dataset, tmp_path: Path) -> None:
    """As the paper starts from a detector of OpenImages, which has no masks."""
    spec = mask_experiment(masked)
    plain = dataclasses.replace(spec, model=dataclasses.replace(spec.model, mask_head=None))
    boxes = Run.create(tmp_path / "boxes", config="")
    train_run(boxes, plain, masked)
    weights = boxes.checkpoints[-1] / "weights.safetensors"
    reports: list[Any] = []
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, weights_from=str(weights)))
    train(spec, run=tmp_path / "run", device="cpu", callbacks=Callbacks(on_weights=reports.append))
    (report,) = reports
    assert report.transfer.renewed
    assert all(name.startswith("mask_head.") for name in report.transfer.renewed)
    assert not report.transfer.unused


def test_masks_are_scored_while_training(masked: Dataset, tmp_path: Path) -> None:
    spec = with_train(mask_experiment(masked), epochs=1.0, evaluate_every=1)
    spec = dataclasses.replace(
        spec, data=dataclasses.replace(spec.data, test=SourceSpec(annotations=str(masked.path)))
    )
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    run_stages(run, spec, masked, test=masked, device=CPU)
    (entry,) = [each for each in run.entries() if each["stage"] == "evaluate"]
    found = sniper.Detector.load(run.folder, device="cpu").predict_many(masked)
    results = [
        each
        for record, detections in zip(masked, found, strict=True)
        if detections is not None
        for each in to_coco(detections, image_id=record.image_id, categories=masked.categories)
    ]
    scores = sniper.evaluate(results, masked)
    assert scores.masks is not None
    assert {name: entry[f"segm_{name}"] for name in scores.masks.numbers} == scores.masks.numbers
    charts = {chart.title: chart for chart in training_charts(run.entries())}
    drawn = {each.name for each in charts["Validation AP"].drawn}
    assert drawn == {"AP", "AP50", "mask AP", "mask AP50"}


def write_eight(folder: Path) -> Dataset:
    """Write eight images of `coco_masks` with few objects, none of them small."""
    content = json.loads(find_data("data/coco_masks/train.json").read_text())
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in content["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    chosen = [
        image
        for image in content["images"]
        if 1 <= len(by_image.get(image["id"], [])) <= 4
        and all(not entry["iscrowd"] and min(entry["bbox"][2:]) >= 64 for entry in by_image[image["id"]])
    ][:8]
    content["images"] = chosen
    content["annotations"] = [entry for image in chosen for entry in by_image[image["id"]]]
    folder.mkdir()
    path = folder / "eight.json"
    path.write_text(json.dumps(content))
    return load_dataset(path, image_root=find_data("data/coco_masks/images"))


def mask_ap50(path: Path, results: list[dict[str, Any]]) -> float:
    truth = COCO(str(path))
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, for how pycocotools makes arrays
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1])


@pytest.mark.slow
def test_eight_images_are_learnt_by_heart_with_their_masks(tmp_path: Path) -> None:
    images = write_eight(tmp_path / "eight")
    assert len(images) == 8
    assert images.masks is not None
    backbone = BackboneSpec(
        name="mobilenetv2_100",
        pretrained=False,
        weights=str(find_data("weights/mobilenetv2_100_tv.safetensors")),
        neck="fpn",
    )
    model = DetectorSpec(
        backbone=backbone,
        rpn=RPNSpec(
            channels=128, anchor_sizes=(16, 32, 64, 128, 160), pre_nms_top_n=500, post_nms_top_n_train=32
        ),
        roi_head=RoIHeadSpec(channels=64, hidden_dim=256),
        mask_head=MaskHeadSpec(channels=32, num_convs=2, batch_size_per_image=16),
    )
    level = LevelSpec(long_side=160)
    spec = ExperimentSpec(
        pyramid=PyramidSpec(chip_size=160, levels=(level,)),
        data=DataSpec(flip=0.0, num_workers=0),
        model=model,
        train=TrainSpec(
            epochs=120.0,
            batch_size=8,
            reference_batch_size=8,
            optimizer="adamw",
            learning_rate=1e-3,
            warmup_steps=10,
            milestones=(100.0,),
            clip_grad_norm=10.0,
            precision="fp32",
            report=False,
        ),
        predict=PredictSpec(levels=(level,), precision="fp32"),
    )
    trained = run_stages(Run.create(tmp_path / "run", config=""), spec, images, device=CPU)
    detector = Detector.from_model(trained.eval(), spec=spec, categories=images.categories, device=CPU)
    results = [
        entry
        for record, found in zip(images, detector.predict_many(images), strict=True)
        if found is not None
        for entry in to_coco(found, image_id=record.image_id, categories=images.categories)
    ]
    assert np.isfinite([entry["score"] for entry in results]).all()
    assert mask_ap50(images.path, results) > 0.9
