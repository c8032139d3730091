"""A run that starts from a detector: what is loaded, classes matched by name, and detectors that do not fit."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import dump_experiment, load_experiment
from sniper.data.datasets import Category, load_dataset
from sniper.errors import CheckpointError, ConfigError, SniperError, WeightsError
from sniper.models.build import build_detector
from sniper.models.spec import BackboneSpec, DetectorSpec
from sniper.models.weights import load_tensors, save_tensors
from sniper.pipeline import train
from sniper.runs.checkpoints import EMA, WEIGHTS
from sniper.runs.initial import InitialWeights, WeightsReport
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks
from tests.training.experiments import TrainedRun, have_equal_weights, with_train

ROWS = ("roi_head.classes.weight", "roi_head.classes.bias")


def with_model(spec: ExperimentSpec, **fields: Any) -> ExperimentSpec:
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, **fields))


def named(*names: str) -> tuple[Category, ...]:
    return tuple(Category(category_id=number, name=name) for number, name in enumerate(names, start=1))


def start(
    trained: TrainedRun, categories: tuple[Category, ...], spec: DetectorSpec | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], WeightsReport]:
    """Return the tensors of a detector before and after it is filled, and the report."""
    model = build_detector(spec or trained.spec.model, num_classes=len(categories))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = InitialWeights.load(trained.run.folder).load_into(model, categories)
    return before, model.state_dict(), report


def test_all_tensors_are_loaded_where_the_classes_are_the_same(trained_once: TrainedRun) -> None:
    weights, categories, _ = trained_once.run.load_weights()
    before, after, report = start(trained_once, categories)
    assert all(torch.equal(after[name], weights[name]) for name in before)
    assert (report.transfer.renewed, report.transfer.unused) == ((), ())
    assert len(report.transfer.loaded) == len(before)
    assert "with the scores of 2 classes (dark, bright) matched by name, all of them" in str(report)
    assert "made anew: nothing; not used: nothing" in str(report)


def test_scores_of_classes_are_matched_by_name_and_the_background_is_kept(trained_once: TrainedRun) -> None:
    weights, _, _ = trained_once.run.load_weights()
    before, after, report = start(trained_once, named("Bright", "striped", "dark"))
    for name in ROWS:
        dark, bright, background = weights[name]
        assert torch.equal(after[name], torch.stack([bright, before[name][1], dark, background]))
    assert all(torch.equal(after[name], weights[name]) for name in before if name not in ROWS)
    assert (report.kept, report.added, report.dropped) == (("Bright", "dark"), ("striped",), ())
    assert "made anew: the scores of 1 class (striped)" in str(report)


def test_other_classes_keep_their_initial_scores(trained_once: TrainedRun) -> None:
    weights, _, _ = trained_once.run.load_weights()
    before, after, report = start(trained_once, named("round"))
    assert torch.equal(after[ROWS[0]], torch.stack([before[ROWS[0]][0], weights[ROWS[0]][2]]))
    assert report.dropped == ("dark", "bright")
    assert "not used: the scores of 2 classes (dark, bright)" in str(report)


def test_the_moving_average_is_started_from_where_it_is_kept(trained: TrainedRun) -> None:
    folder = trained.run.checkpoints[-1]
    tensors, head = load_tensors(folder / WEIGHTS, dict)
    save_tensors(folder / EMA, {name: tensor + 1 for name, tensor in tensors.items()}, head=head)
    _, after, report = start(trained, trained.dataset.categories)
    assert torch.equal(after["rpn.hidden.bias"], tensors["rpn.hidden.bias"] + 1)
    assert report.source == folder / EMA


def test_the_second_stage_of_an_rpn_alone_is_made_anew(trained: TrainedRun) -> None:
    trained.run.save_config(dump_experiment(with_train(trained.spec, rpn_only=True)))
    before, after, report = start(trained, trained.dataset.categories)
    assert {name.partition(".")[0] for name in report.transfer.renewed} == {"roi_head"}
    assert all(torch.equal(after[name], before[name]) for name in report.transfer.renewed)
    assert (report.kept, report.added, report.dropped) == ((), ("dark", "bright"), ())
    assert "made anew: 10 tensors (roi_head.pool.reduce.weight, " in str(report)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("backbone", {"name": "test_resnet2"}, "model.backbone.name is test_resnet there and test_resnet2"),
        ("backbone", {"num_feature_maps": 1}, "model.backbone.num_feature_maps is 2 there and 1 here"),
        ("rpn", {"channels": 8}, "model.rpn.channels is 16 there and 8 here"),
        ("rpn", {"anchor_sizes": (8.0, 16.0)}, "anchor_sizes is [16, 32, 64] there and [8, 16] here"),
        ("roi_head", {"hidden_dim": 16}, "model.roi_head.hidden_dim is 32 there and 16 here"),
    ],
)
def test_fields_of_another_architecture_are_named(
    trained_once: TrainedRun, section: str, fields: dict[str, Any], message: str
) -> None:
    weights = InitialWeights.load(trained_once.run.folder)
    model = trained_once.spec.model
    other = dataclasses.replace(model, **{section: dataclasses.replace(getattr(model, section), **fields)})
    with pytest.raises(ConfigError) as caught:
        weights.check(dataclasses.replace(trained_once.spec, model=other), trained_once.dataset.categories)
    assert message in str(caught.value)
    assert str(caught.value).count(" there and ") == 1


def test_other_anchor_sizes_of_the_same_number_are_reported(trained_once: TrainedRun) -> None:
    rpn = dataclasses.replace(trained_once.spec.model.rpn, anchor_sizes=(8.0, 16.0, 32.0))
    spec = dataclasses.replace(trained_once.spec.model, rpn=rpn)
    _, _, report = start(trained_once, trained_once.dataset.categories, spec)
    assert "model.rpn.anchor_sizes was [16, 32, 64] and is [8, 16, 32]" in str(report)


def test_a_file_is_checked_by_its_shapes(trained_once: TrainedRun) -> None:
    path = trained_once.run.weights_path
    weights = InitialWeights.load(path)
    report = weights.check(trained_once.spec, named("dark"))
    assert report.kept == ("dark",)
    rpn = dataclasses.replace(trained_once.spec.model.rpn, channels=8)
    with pytest.raises(CheckpointError, match=r"rpn\.hidden\.weight is \(16, .*not \(8, "):
        weights.check(with_model(trained_once.spec, rpn=rpn), named("dark"))


def test_a_file_with_more_or_fewer_tensors_is_reported_or_refused(
    trained_once: TrainedRun, tmp_path: Path
) -> None:
    tensors, head = load_tensors(trained_once.run.weights_path, dict)
    more, fewer = tmp_path / "more.safetensors", tmp_path / "fewer.safetensors"
    save_tensors(more, {**tensors, "mask_head.weight": torch.zeros(2)}, head=head)
    report = InitialWeights.load(more).check(trained_once.spec, trained_once.dataset.categories)
    assert report.transfer.unused == ("mask_head.weight",)
    assert "not used: 1 tensor (mask_head.weight)" in str(report)
    del tensors["rpn.hidden.bias"]
    save_tensors(fewer, tensors, head=head)
    with pytest.raises(CheckpointError, match=r"rpn\.hidden\.bias is missing"):
        InitialWeights.load(fewer).check(trained_once.spec, trained_once.dataset.categories)


def test_files_of_other_libraries_are_refused(tmp_path: Path) -> None:
    torchvision, pickled = tmp_path / "coco.safetensors", tmp_path / "coco.pt"
    save_file({"roi_heads.box_predictor.cls_score.weight": torch.zeros(91, 4)}, torchvision)
    torch.save({"weight": torch.zeros(2)}, pickled)
    for path in (torchvision, pickled):
        with pytest.raises(
            WeightsError, match=r"model\.weights_from: .*coco\..*Weights of torchvision's detectors"
        ):
            InitialWeights.load(path)
    with pytest.raises(ConfigError, match=r"model\.weights_from: .*none: no such folder or file"):
        InitialWeights.load(tmp_path / "none")
    with pytest.raises(SniperError, match="there is no run"):
        InitialWeights.load(tmp_path)


def test_a_run_that_starts_from_a_detector_has_lower_losses_from_the_first_step(
    trained_once: TrainedRun, tmp_path: Path
) -> None:
    longer = with_train(trained_once.spec, epochs=12.0, milestones=(10.0,), checkpoint_minutes=10.0)
    first = train(longer, run=tmp_path / "first", device="cpu")
    reports: list[WeightsReport] = []
    second = train(
        with_train(longer, epochs=0.5),
        run=tmp_path / "second",
        device="cpu",
        weights_from=first,
        callbacks=Callbacks(on_weights=reports.append),
    )
    entry, *steps = second.entries()
    assert entry["stage"] == "start"
    assert entry["kept_classes"] == ["dark", "bright"]
    assert entry["loaded_tensors"] == len(reports[0].transfer.loaded)
    assert steps[0]["loss"] < 0.7 * first.entries()[0]["loss"]
    assert load_experiment(second.config_path).model.weights_from == str(first.folder.absolute())


def test_weights_are_read_only_at_the_start_of_a_run(trained: TrainedRun, tmp_path: Path) -> None:
    spec = with_train(with_model(trained.spec, weights_from=str(trained.run.folder)), epochs=0.3)
    unbroken = train(with_train(spec, epochs=1.0), run=tmp_path / "unbroken", device="cpu")
    run = train(spec, run=tmp_path / "run", device="cpu")
    shutil.rmtree(trained.run.folder)
    longer = with_train(spec, epochs=1.0)
    resumed = train(longer, run=run.folder, resume=True, device="cpu")
    assert have_equal_weights(unbroken, resumed)
    with pytest.warns(UserWarning, match=r"model\.weights_from: /other is not read, since the run continues"):
        train(with_model(longer, weights_from="/other"), run=run.folder, resume=True, device="cpu")


def test_an_ema_starts_from_the_loaded_weights(trained_once: TrainedRun, tmp_path: Path) -> None:
    spec = with_train(trained_once.spec, ema_decay=0.5, epochs=0.1, learning_rate=1e-9, weight_decay=0.0)
    run = train(spec, run=tmp_path / "run", device="cpu", weights_from=trained_once.run.folder)
    before, after = trained_once.run.load_weights()[0], run.load_weights()[0]
    assert run.weights_path.name == EMA
    torch.testing.assert_close(after["rpn.hidden.weight"], before["rpn.hidden.weight"])


def test_the_rpn_of_a_mined_run_starts_from_the_detector_too(
    trained_once: TrainedRun, tmp_path: Path
) -> None:
    mined = dataclasses.replace(trained_once.spec.negatives, source="rpn", min_proposals=(1,))
    mine = dataclasses.replace(trained_once.spec.mine, rpn_epochs=0.3)
    spec = dataclasses.replace(with_train(trained_once.spec, epochs=0.3), negatives=mined, mine=mine)
    run = train(spec, run=tmp_path / "run", device="cpu", weights_from=trained_once.run.folder)
    for folder in (run.folder, run.folder / "rpn"):
        entries = [entry for entry in Run(folder).entries() if entry["stage"] == "start"]
        assert [entry["kept_classes"] for entry in entries] == [["dark", "bright"]]
    initial, loss = trained_once.reports[0].losses, Run(run.folder / "rpn").entries()[1]
    assert loss["rpn_objectness"] < initial["rpn_objectness"]


@pytest.mark.parametrize("fields", [{}, {"model.rpn.nms_iou": 0.6}])
def test_a_data_set_is_trained_with_the_model_of_the_run(
    trained: TrainedRun, tmp_path: Path, fields: dict[str, Any]
) -> None:
    content = json.loads(trained.dataset.path.read_text())
    content["categories"][0]["name"] = "black"
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    reports: list[WeightsReport] = []
    pretrained = BackboneSpec(name="test_resnet", pretrained=True, frozen_stages=0)  # not to be downloaded
    trained.run.save_config(dump_experiment(with_model(trained.spec, backbone=pretrained)))
    run = train(
        path,
        run=tmp_path / "run",
        device="cpu",
        epochs=0.2,
        weights_from=trained.run.folder,
        overrides={
            "data.train.images": str(trained.dataset.image_root),
            "data.num_workers": 0,
            "pyramid.chip_size": 128,
            "train.evaluate_every": None,
            **fields,
        },
        callbacks=Callbacks(on_weights=reports.append),
    )
    model = load_experiment(run.config_path).model
    assert model.rpn.anchor_sizes == trained.spec.model.rpn.anchor_sizes
    assert model.rpn.nms_iou == fields.get("model.rpn.nms_iou", trained.spec.model.rpn.nms_iou)
    assert (reports[0].kept, reports[0].added, reports[0].dropped) == (("bright",), ("black",), ("dark",))
    with pytest.raises(ConfigError, match=r"model\.backbone\.neck is concat there and fpn here"):
        train(
            path,
            run=tmp_path / "fpn",
            device="cpu",
            weights_from=trained.run.folder,
            overrides={"model.backbone.neck": "fpn", "data.train.images": str(trained.dataset.image_root)},
        )


def test_a_relative_path_starts_from_the_experiment_file(trained: TrainedRun) -> None:
    path = trained.run.folder.parent / "next.yaml"
    path.write_text(f"model: {{weights_from: {trained.run.folder.name}}}")
    assert load_experiment(path).model.weights_from == str(trained.run.folder)


def test_classes_of_one_name_are_made_anew_unless_all_are_equal(trained_once: TrainedRun) -> None:
    _, _, report = start(trained_once, named("dark", "dark", "bright"))
    assert (report.kept, report.added) == (("bright",), ("dark", "dark"))
    assert load_dataset(trained_once.dataset.path).categories == trained_once.dataset.categories
