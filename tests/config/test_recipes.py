"""The recipes of the package: found by name, built, and able to overfit a few images."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sniper.chips import BoxStatus, LevelSpec, PyramidSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec
from sniper.config.loading import list_fields, load_experiment, load_partial
from sniper.config.recipes import list_recipes
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.images.files import load_image
from sniper.errors import ConfigError
from sniper.evaluation.coco import evaluate
from sniper.geometry.boxes import to_xywh
from sniper.geometry.masks import MaskArrays
from sniper.inference.detector import Detector, to_coco
from sniper.models.build import build_detector
from sniper.models.spec import MaskHeadSpec
from sniper.pipeline import run_stages
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport
from tests.data_folder import find_data
from tests.models.batches import build_batch, build_sample

CPU = torch.device("cpu")
SIDE = 128
NAMES = [recipe.name for recipe in list_recipes()]


def test_the_recipes_are_listed_with_the_first_line_of_their_files() -> None:
    assert NAMES == [
        "coco_mobilenetv2_paper",
        "coco_person_mobilenetv2",
        "coco_r101_mask_paper",
        "coco_r101_paper",
        "coco_r50_fpn",
        "hit_uav_mobilenetv2",
    ]
    for recipe in list_recipes():
        first_line = recipe.path.read_text().splitlines()[0]
        assert first_line == f"# {recipe.summary}"
        assert recipe.summary.endswith(".")


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_experiment("coco_r50_fpn").model.backbone.neck == "fpn"
    Path("coco_r50_fpn").write_text("seed: 3")
    assert load_experiment("coco_r50_fpn") == ExperimentSpec(seed=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coco_r101", "coco_r101: neither a file nor a recipe; did you mean coco_r101_paper"),
        ("xyz", "xyz: neither a file nor a recipe; the recipes are coco_mobilenetv2_paper, coco_person"),
        ("bords", "bords: neither a file nor a recipe; did you mean boards?"),
        ("coco_r101_paper.yaml", r"coco_r101_paper\.yaml: cannot be read"),
        ("folder/coco_r101_paper", "folder/coco_r101_paper: cannot be read"),
    ],
)
def test_an_unknown_recipe_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boards").mkdir()
    with pytest.raises(ConfigError, match=message):
        load_experiment(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_finite_losses(name: str) -> None:
    model = build_detector(load_experiment(name).model, num_classes=80, has_weights=False).train()
    chips = [build_sample([[20, 20, 100, 90]], [BoxStatus.VALID]), build_sample([], [])]
    if model.spec.mask_head is not None:
        rings = ([[[20, 20], [100, 20], [20, 90]]],), ()
        masks = [MaskArrays.from_rings(each) for each in rings]
        chips = [
            dataclasses.replace(chip, target=dataclasses.replace(chip.target, masks=each))
            for chip, each in zip(chips, masks, strict=True)
        ]
    losses = model.losses(build_batch(*chips))
    assert ("mask" in losses) == (name == "coco_r101_mask_paper")
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", ["coco_r101_paper", "coco_mobilenetv2_paper"])
def test_the_defaults_are_those_of_the_papers_recipes(name: str) -> None:
    spec, defaults = load_experiment(name), ExperimentSpec()
    assert spec.pyramid == defaults.pyramid
    assert spec.predict == defaults.predict
    assert spec.mine == dataclasses.replace(defaults.mine, rpn_epochs=4.0)
    assert spec.negatives == dataclasses.replace(
        defaults.negatives, source="rpn", dose=None, per_image=2, min_score=0.0, place_positives=False
    )
    assert spec.model.rpn == dataclasses.replace(defaults.model.rpn, anchor_sizes=spec.model.rpn.anchor_sizes)
    assert spec.model.roi_head.box_loss_weight == 1.6
    # An epoch of the paper has every chip and its mirrored copy.
    assert spec.train.epochs == 2 * 6
    assert spec.train.milestones == pytest.approx([2 * 5.33], abs=0.01)
    assert spec.mine.rpn_epochs == 2 * 2
    # More than 25 proposals at the finest level, more than 10 at the others.
    assert spec.negatives.min_proposals == (26, 11)


def test_resnet_101_has_the_papers_anchors_and_optimizer() -> None:
    spec = load_experiment("coco_r101_paper")
    assert spec.train == ExperimentSpec().train
    assert len(spec.model.rpn.anchor_sizes) * len(spec.model.rpn.aspect_ratios) == 21


def test_the_recipe_with_masks_differs_by_the_mask_head_alone() -> None:
    spec, plain = load_experiment("coco_r101_mask_paper"), load_experiment("coco_r101_paper")
    assert spec.model.mask_head == MaskHeadSpec()
    assert dataclasses.replace(spec, model=dataclasses.replace(spec.model, mask_head=None)) == plain


def test_mobilenetv2_has_its_own_rate_and_warmup() -> None:
    train = load_experiment("coco_mobilenetv2_paper").train
    assert train.learning_rate == pytest.approx(8 * 0.025)
    assert train.batch_size == train.reference_batch_size == 8 * 42
    assert train.warmup_steps == 9000
    assert train.learning_rate is not None
    assert train.learning_rate * train.warmup_start_factor == pytest.approx(8 * 0.0005)


# Fields that a recipe may leave out, with the reason.
LEFT_OUT = {
    "data.train": "a path",
    "data.test": "a path",
    "data.chips": "a path",
    "data.cache": "a path and its size; the pixels are the same",
    "data.remote": "how a server behaves",
    "model.weights_from": "a path",
    "model.kind": "two_stage, the only kind with these fields",
    "model.name": "not used by two_stage",
    "model.weights": "not used by two_stage",
    "model.labels": "not used by two_stage",
    "model.focus": "false: no focus head",
    "model.focus_loss_weight": "not used without focus",
    "model.torchvision": "not used by two_stage",
    "model.transformers": "not used by two_stage",
    "model.backbone.weights": "a path",
    "data.read": "what the image files are like",
    "data.on_bad_image": "what the image files are like",
    "data.follow_links": "where the image files are",
    "data.on_bad_box": "what the annotations are like",
    "data.crowds": "what the annotations are like",
    "data.masks": "what the annotations are like",
    "data.boxes_from_masks": "what the annotations are like",
    "data.whole": "absent: trains on chips",
    "data.tiles": "absent: trains on chips",
    "train.evaluate_images": "not used without evaluate_every",
    "train.patience": "not used without evaluate_every",
    "train.compile": "speed",
    "train.trackers": "reports",
    "train.report": "reports",
    "data.class_property": "not used by COCO JSON",
    "train.checkpoint_minutes": "what is kept on disk",
    "train.keep_checkpoints": "what is kept on disk",
    "mine.batch_megapixels": "speed and memory",
    "predict.batch_megapixels": "speed and memory",
}


def lies_in(name: str, sections: Iterable[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_states_every_number(name: str) -> None:
    (path,) = [recipe.path for recipe in list_recipes() if recipe.name == name]
    _, stated = load_partial(path)
    every = list_fields()
    is_stated = {
        field: lies_in(field, stated) or any(lies_in(each, [field]) for each in stated) for field in every
    }
    assert [field for field in every if not is_stated[field] and not lies_in(field, LEFT_OUT)] == []
    assert [field for field in LEFT_OUT if not any(lies_in(each, [field]) for each in every)] == []
    assert [field for field in stated if lies_in(field, LEFT_OUT)] == []


@pytest.mark.parametrize(
    ("name", "ap"),
    [
        ("coco_r101_paper", "46.1"),
        ("coco_r101_mask_paper", "47.6"),
        ("coco_mobilenetv2_paper", "34.1 to 34.3"),
    ],
)
def test_a_recipe_of_the_paper_names_its_score_and_that_it_was_not_run(name: str, ap: str) -> None:
    (recipe,) = [recipe for recipe in list_recipes() if recipe.name == name]
    assert f"the paper, which reports {ap} AP on test-dev; not run here." in recipe.summary


def test_small_recipes_have_the_optimizer_of_the_experiments() -> None:
    for name in ("hit_uav_mobilenetv2", "coco_person_mobilenetv2"):
        train = load_experiment(name).train
        assert (train.optimizer, train.learning_rate, train.reference_batch_size) == ("adamw", 0.0005, 16)
        assert (train.weight_decay, train.warmup_start_factor) == (0.01, 0.1)
        shares = [milestone / train.epochs for milestone in train.milestones]
        assert shares == pytest.approx([0.75, 0.94], abs=0.01)


def write_eight_images(folder: Path) -> Dataset:
    """Write eight real images of few objects with sides of at least 8 px, padded to squares of `SIDE` as chips are."""
    source = load_dataset(find_data("data/coco_mini/train.json"))
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
    categories = [{"id": category.category_id, "name": category.name} for category in source.categories]
    path = folder / "eight.json"
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return load_dataset(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "coco_r101_mask_paper"])  # the same boxes
def test_a_recipe_overfits_eight_images(name: str, tmp_path: Path) -> None:
    images = write_eight_images(tmp_path / "eight")
    assert len(images) == 8
    spec = load_experiment(name)
    has_weights = spec.model.backbone.name == "mobilenetv2_100"
    weights = str(find_data("weights/mobilenetv2_100.safetensors")) if has_weights else None
    backbone = dataclasses.replace(
        spec.model.backbone,
        pretrained=False,
        weights=weights,
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

    def show(report: StepReport) -> None:
        if report.progress.step % 20 == 0:
            print(name, report.progress.step, report.losses)  # noqa: T201 - shown if the test fails

    run_stages(run, spec, images, device=CPU, callbacks=Callbacks(on_step=show))
    detector = Detector.load(run, CPU, spec=spec)
    results = []
    for record in images:
        detections = detector.predict(load_image(record.path))
        results += to_coco(detections, image_id=record.image_id, categories=images.categories)
    ap50 = evaluate(results, images).as_dict()["ap50"]
    print(name, "AP50", ap50)  # noqa: T201
    assert ap50 > 0.9
