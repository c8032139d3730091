"""Detectors of transformers under our loop: resumed to the same bits, with negatives, averages, other weights."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sniper
from sniper.chips import LevelSpec, PyramidSpec
from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec, TrainSpec
from sniper.config.loading import dump_experiment, load_experiment
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.spec import DataSpec
from sniper.errors import CheckpointError, ConfigError
from sniper.evaluation.coco import evaluate
from sniper.inference.detector import Detector, to_coco
from sniper.models.build import resolve
from sniper.pipeline import run_stages, train
from sniper.runs.initial import InitialWeights
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks
from tests.models.transformers_detectors.specs import SOME, save, spec_of
from tests.training.experiments import CPU, check_resumed, train_run, weights_of, with_train

SILENT = Callbacks(on_warning=lambda _: None)


def with_detector(spec: ExperimentSpec, folder: Path, **fields: Any) -> ExperimentSpec:
    """Return an experiment of a few steps with a detector of transformers."""
    spec = with_train(spec, epochs=0.5, batch_size=2, optimizer="adamw", learning_rate=1e-3, milestones=())
    return dataclasses.replace(spec, model=resolve(spec_of(folder)), **fields)


@pytest.mark.parametrize("name", SOME)
def test_a_run_that_was_killed_and_resumed_ends_with_the_same_weights(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path, name: str
) -> None:
    spec = with_detector(spec, save(name, tmp_path / name))
    spec = with_train(spec, ema_decay=0.9, accumulation_steps=2)

    def forget() -> None:
        torch.manual_seed(5)
        shutil.rmtree(tmp_path / name)

    check_resumed(spec, dataset, tmp_path, before_resuming=forget)


def test_a_moving_average_of_shared_layers_is_updated_once(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_detector(spec, save("rt_detr_v2", tmp_path / "detector", names=("dark", "bright")))
    spec = with_train(spec, ema_decay=0.5, epochs=0.01, warmup_steps=0)  # one step, of which half is kept
    run = Run.create(tmp_path / "run", config="")
    initial = InitialWeights.of_library(spec.model).tensors
    train_run(run, spec, dataset)
    weights, average = weights_of(run), run.load_checkpoint(dataset.identity).ema  # type: ignore[union-attr]
    assert average is not None
    share = {}
    for name in ("net.model.decoder.class_embed.0.bias", "net.model.encoder_input_proj.0.0.weight"):
        change = weights[name] - initial[name]
        assert change.abs().max() > 0
        share[name] = float((average[name] - initial[name]).norm() / change.norm())
    assert len({round(value, 3) for value in share.values()}) == 1


def test_negative_chips_are_mined_with_a_detector_of_transformers(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    negatives = NegativeSpec(source="self", min_proposals=(1,), min_score=0.0, dose="auto")
    folder = save("d_fine", tmp_path / "detector")  # whose boxes are small at first
    spec = with_detector(spec, folder, negatives=negatives, mine=MineSpec(start=0.5))
    spec = with_train(spec, epochs=2.0, batch_size=4)
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    run_stages(run, spec, dataset, device=CPU)
    entries = run.entries()
    assert {"start", "train", "mine", "chips"} <= {entry["stage"] for entry in entries}
    assert sum(entry.get("negative_chips_in_batch", 0) for entry in entries) > 0
    assert all(entry["negative_loss"] > 0 for entry in entries if entry.get("negative_chips_in_batch"))


def test_a_run_needs_nothing_but_its_folder(dataset: Dataset, spec: ExperimentSpec, tmp_path: Path) -> None:
    folder = save("yolos", tmp_path / "detector", names=("bright", "other"))
    reports: list[str] = []
    # It is scored on the images that it is trained on, which is warned of.
    callbacks = Callbacks(on_warning=lambda _: None, on_weights=lambda report: reports.append(str(report)))
    unresolved = dataclasses.replace(with_detector(spec, folder), model=spec_of(folder))
    unresolved = with_train(unresolved, evaluate_every=1)
    run = train(unresolved, run=tmp_path / "run", callbacks=callbacks)
    assert "with the scores of 1 class (bright) matched by name" in reports[0]
    assert run.entries()[0]["new_classes"] == ["dark"]
    shutil.rmtree(folder)
    saved = load_experiment(run.config_path)
    assert saved.model.transformers.config is not None
    assert "id2label" not in saved.model.transformers.config
    assert saved.model == resolve(unresolved.model, earlier=saved.model)
    assert run.best_scores() is not None
    detections = Detector.load(run, "cpu", predict={"max_detections": 30}).predict(dataset[0].path)
    assert 0 < len(detections) <= 30
    assert detections.class_names == ("dark", "bright")
    step = run.progress.step
    resumed = train(with_train(unresolved, epochs=1.0), run=run.folder, resume=True, callbacks=SILENT)
    assert resumed.progress.step > step > 0
    started = dataclasses.replace(saved, model=dataclasses.replace(saved.model, weights_from=str(run.folder)))
    assert "with the scores of 2 classes (dark, bright)" in str(
        InitialWeights.load(run.folder).check(started, dataset.categories)
    )


def test_a_run_of_another_detector_is_no_start(
    dataset: Dataset, spec: ExperimentSpec, tmp_path: Path
) -> None:
    spec = with_detector(spec, save("yolos", tmp_path / "yolos"))
    run = Run.create(tmp_path / "run", config=dump_experiment(spec))
    train_run(run, with_train(spec, epochs=0.01), dataset)
    initial = InitialWeights.load(run.folder)
    other = dataclasses.replace(spec, model=resolve(spec_of(save("detr", tmp_path / "detr"))))
    with pytest.raises(
        ConfigError, match=r"model_type of model\.transformers\.config is yolos there and detr here"
    ):
        initial.check(other, dataset.categories)
    wider = resolve(spec_of(save("yolos", tmp_path / "wider", intermediate_size=96)))
    with pytest.raises(CheckpointError, match=r"intermediate.*\(64, 32\), not \(96, 32\)"):
        initial.check(dataclasses.replace(spec, model=wider), dataset.categories)


def test_an_rpn_is_refused(spec: ExperimentSpec, tmp_path: Path) -> None:
    folder = save("yolos", tmp_path / "yolos")
    with pytest.raises(
        ValueError, match=r"negatives\.source must not be rpn for model\.name .*yolos, which has no"
    ):
        with_detector(spec, folder, negatives=NegativeSpec(source="rpn"))


def test_a_detector_is_searched_without_training(tmp_path: Path) -> None:
    folder = save("detr", tmp_path / "detr", names=("cat", "dog"))
    detector = sniper.Detector.load(f"transformers:{folder}", "cpu", predict={"max_detections": 40})
    assert [category.name for category in detector.categories] == ["cat", "dog"]
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    detections = detector.predict(pixels)
    assert 0 < len(detections) <= 40
    with pytest.raises(
        ConfigError, match=r"^transformers:: expected transformers:NAME, with a name on the Hugging"
    ):
        sniper.Detector.load("transformers:")
    (folder / "model.safetensors").unlink()
    with pytest.raises(sniper.errors.SniperError, match=r"detr: has no weights \(model\.safetensors\)"):
        sniper.Detector.load(f"transformers:{folder}")


SIDE = 128


def write_eight_images(folder: Path) -> Path:
    """Write images with two squares each, dark or bright, that do not overlap."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True)
    for index in range(8):
        pixels = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
        pixels += rng.integers(0, 20, pixels.shape, dtype=np.uint8)
        for quarter in rng.permutation(4)[:2].tolist():
            side = int(rng.integers(20, 50))
            x, y = (int(value) for value in rng.integers(0, SIDE // 2 - side + 1, 2))
            x, y = x + SIDE // 2 * (quarter % 2), y + SIDE // 2 * (quarter // 2)
            label = int(rng.integers(0, 2))
            pixels[y : y + side, x : x + side] = 250 * label
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "width": SIDE, "height": SIDE})
    categories = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
    path = folder / "eight.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.mark.slow
def test_a_small_detr_overfits_eight_images(tmp_path: Path) -> None:
    images = load_dataset(write_eight_images(tmp_path / "eight"))
    folder = save("deformable_detr", tmp_path / "detector", names=("dark", "bright"), dropout=0.0)
    level = LevelSpec(long_side=SIDE)
    spec = ExperimentSpec(
        pyramid=PyramidSpec(chip_size=SIDE, levels=(level,)),
        data=DataSpec(flip=0.0, num_workers=0),
        model=resolve(spec_of(folder, pretrained=False)),
        train=TrainSpec(
            epochs=200.0,
            batch_size=8,
            reference_batch_size=8,
            optimizer="adamw",
            learning_rate=1e-3,
            warmup_steps=10,
            warmup_start_factor=0.01,
            milestones=(160.0,),
            clip_grad_norm=10.0,
            precision="fp32",
        ),
        predict=PredictSpec(levels=(level,), precision="fp32"),
    )
    run = Run.create(tmp_path / "run", config="")
    run_stages(run, spec, images, device=CPU)
    detector = Detector.load(run, CPU, spec=spec)
    results = []
    for record in images:
        detections = detector.predict(record.path)
        results += to_coco(detections, image_id=record.image_id, categories=images.categories)
    assert evaluate(results, images).as_dict()["ap50"] > 0.9  # measured: 0.96
