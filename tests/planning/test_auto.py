"""The experiment derived from a data set: bounds of every value, and what depends on the fields that are set."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given as draw
from hypothesis import settings
from hypothesis import strategies as st

from sniper.config.experiment import ExperimentSpec, TrainSpec, widened
from sniper.config.loading import load_partial
from sniper.data.datasets import Dataset, load_dataset
from sniper.data.epoch import to_image_boxes
from sniper.errors import AnnotationError, ConfigError, OutOfMemory
from sniper.geometry.masks import MaskArrays
from sniper.models.spec import DetectorSpec, RPNSpec
from sniper.planning import auto
from sniper.planning.auto import DerivedExperiment, choose_validation, derive, parse_time
from sniper.planning.experiment import suggest_experiment
from sniper.planning.given import Given
from sniper.planning.measure import Measurement
from sniper.planning.suggest import suggest_pyramid
from tests.data.tiny import write_dataset
from tests.planning.test_experiment import DATA, cost_of

CPU = torch.device("cpu")


def give(dataset: Dataset, config: Path | None = None, **fields: Any) -> Given:
    """Set fields; two underscores in a name stand for the dot."""
    overrides = {name.replace("__", "."): yaml.safe_dump(value) for name, value in fields.items()}
    overrides["data.train.annotations"] = str(dataset.path)
    spec, names = load_partial(config, overrides=overrides)
    return Given(config=config, overrides=overrides, spec=spec, names=names)


def derived(dataset: Dataset, *, num_scored: int = 1, **fields: Any) -> ExperimentSpec:
    given = give(dataset, **fields)
    data, reason = choose_validation(given)
    return derive(dataset, given, data=data, validation=reason, device=CPU, num_scored=num_scored).experiment


@settings(deadline=None, max_examples=30)
@draw(
    num_images=st.integers(1, 300),
    epochs=st.none() | st.floats(0.01, 500),
    batch_size=st.none() | st.integers(1, 64),
)
def test_warm_up_and_milestones_lie_inside_the_run(
    num_images: int, epochs: float | None, batch_size: int | None
) -> None:
    cost = cost_of(num_images)
    train = suggest_experiment(cost, data=DATA, is_scored=True, epochs=epochs, batch_size=batch_size).train
    steps = train.epochs * cost.num_steps(train.batch_size)
    assert train.warmup_steps <= steps / 20 + 1e-9
    assert 0 < train.milestones[0] < train.milestones[1] < train.epochs
    assert train.evaluate_every is not None
    assert train.evaluate_every <= max(train.epochs, 1)


@pytest.mark.parametrize("epochs", [0.5, 3, 40])
def test_the_schedule_follows_the_epochs(dataset: Dataset, epochs: float) -> None:
    train = derived(dataset, train__epochs=epochs).train
    assert train.epochs == epochs
    assert train.milestones == pytest.approx((0.75 * epochs, 0.92 * epochs), abs=0.05)


def test_test_levels_follow_the_training_levels_unless_they_are_set(dataset: Dataset) -> None:
    levels = [{"factor": 2.0, "below": 50}, {"long_side": 128, "at_least": 40}]
    spec = derived(dataset, pyramid__levels=levels, pyramid__chip_size=128)
    assert [level.factor for level in spec.pyramid.levels] == [2.0, None]
    assert spec.predict.levels == widened(spec.pyramid.levels)
    spec = derived(dataset, predict__levels=[{"factor": 1.0}])
    assert [level.factor for level in spec.predict.levels] == [1.0]
    assert derived(dataset).predict.levels == widened(derived(dataset).pyramid.levels)


def test_the_rate_refers_to_the_usual_batch_whatever_batch_is_set(dataset: Dataset) -> None:
    train = derived(dataset, train__batch_size=2).train
    assert train.batch_size == 2
    assert train.reference_batch_size == derived(dataset).train.reference_batch_size > 2
    assert train.learning_rate == derived(dataset).train.learning_rate


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_optimizer_brings_its_rate_and_decay(dataset: Dataset, optimizer: str) -> None:
    train = derived(dataset, train__optimizer=optimizer).train
    names = ("learning_rate", "weight_decay", "warmup_start_factor")
    expected = [getattr(TrainSpec(), name) for name in names] if optimizer == "sgd" else [0.0005, 0.01, 0.1]
    assert [getattr(train, name) for name in names] == expected


@pytest.mark.parametrize("size", [256, 384])
def test_a_chip_size_that_is_set_is_planned_with(dataset: Dataset, size: int) -> None:
    pyramid = derived(dataset, pyramid__chip_size=size).pyramid
    assert pyramid.chip_size == pyramid.levels[-1].long_side == size


def test_a_feature_pyramid_has_five_anchor_sizes(dataset: Dataset) -> None:
    model = derived(dataset).model
    assert model.backbone.neck == "fpn"
    sizes = model.rpn.anchor_sizes
    assert len(sizes) == 5
    one_map = derived(dataset, model__backbone__neck="concat").model
    assert one_map.rpn.anchor_sizes[0] == sizes[0]
    assert len(one_map.rpn.anchor_sizes) < 5


@pytest.mark.parametrize(
    "fields", [{"model__rpn__anchor_sizes": [16, 32]}, {"model__roi_head__pooling": "deformable"}]
)
def test_fields_that_exclude_a_feature_pyramid_lead_to_one_map(
    dataset: Dataset, fields: dict[str, Any]
) -> None:
    assert derived(dataset, **fields).model.backbone.neck == "concat"
    with pytest.raises(ConfigError, match="feature pyramid"):
        derived(dataset, model__backbone__neck="fpn", **fields)


def test_a_detector_of_torchvision_has_the_backbone_and_the_anchors_of_the_data_set(dataset: Dataset) -> None:
    model = derived(dataset, model__kind="torchvision", model__name="retinanet").model
    assert (model.kind, model.name) == ("torchvision", "retinanet")
    assert (model.backbone.name, model.backbone.neck) == ("mobilenetv2_100", "fpn")
    assert model.torchvision.anchor_sizes == derived(dataset).model.rpn.anchor_sizes
    assert (model.torchvision.channels, model.torchvision.num_convs) == (64, 2)
    assert model.rpn == RPNSpec()
    wide = derived(dataset, model__kind="torchvision", model__name="fcos", model__torchvision__channels=128)
    assert (wide.model.torchvision.channels, wide.model.torchvision.anchor_sizes) == (128, None)


def test_a_detector_with_a_backbone_of_its_own_stays_as_it_is(dataset: Dataset) -> None:
    spec = derived(
        dataset, model__kind="torchvision", model__name="fcos_resnet50_fpn", model__weights="COCO_V1"
    )
    assert spec.model == DetectorSpec(kind="torchvision", name="fcos_resnet50_fpn", weights="COCO_V1")
    assert spec.pyramid == derived(dataset).pyramid


def derive_on_gpu(
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    *,
    most_chips: int,
    measures_batch: bool = True,
    **fields: Any,
) -> DerivedExperiment:
    """Derive for a GPU on which a batch of at most so many chips fits into the memory."""

    def measure(spec: ExperimentSpec, *_: object, **__: object) -> Measurement:
        if spec.train.batch_size > most_chips:
            raise OutOfMemory(f"{spec.train.batch_size} chips")
        return measured(seconds_per_step=0.1, num_steps=5)

    monkeypatch.setattr(auto, "measure", measure)
    monkeypatch.setattr(auto, "choose_precision", lambda *_: "bf16")
    given = give(dataset, **fields)
    data, reason = choose_validation(given)
    return derive(
        dataset,
        given,
        data=data,
        validation=reason,
        device=torch.device("cuda:0"),
        num_scored=1,
        measures_batch=measures_batch,
    )


def test_a_gpu_has_a_larger_network(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = derive_on_gpu(dataset, monkeypatch, most_chips=1000).experiment.model
    assert (model.backbone.name, model.rpn.channels, model.roi_head.hidden_dim) == ("resnet50", 512, 1024)
    model = derived(dataset).model
    assert (model.backbone.name, model.rpn.channels, model.roi_head.hidden_dim) == (
        "mobilenetv2_100",
        128,
        512,
    )


@pytest.mark.parametrize("most_chips", [1, 3, 6])
def test_a_batch_that_exceeds_the_memory_of_a_gpu_is_halved(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, most_chips: int
) -> None:
    usual = derive_on_gpu(dataset, monkeypatch, most_chips=1000).experiment.train
    result = derive_on_gpu(dataset, monkeypatch, most_chips=most_chips)
    train = result.experiment.train
    assert usual.batch_size == 8  # a small set
    assert train.batch_size == {1: 1, 3: 2, 6: 4}[most_chips]
    assert train.reference_batch_size == usual.reference_batch_size
    reasons = {setting.name: setting.reason for setting in result.settings}
    assert reasons["batch"] == "more do not fit into the memory of cuda:0"
    given = derive_on_gpu(dataset, monkeypatch, most_chips=most_chips, train__batch_size=16)
    assert given.experiment.train.batch_size == 16


def test_the_batch_of_several_processes_does_not_depend_on_the_memory_of_each(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = derive_on_gpu(dataset, monkeypatch, most_chips=1, measures_batch=False)
    assert result.experiment.train.batch_size == 8


def test_a_gpu_on_which_no_chip_fits_is_out_of_memory(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutOfMemory, match="1 chips"):
        derive_on_gpu(dataset, monkeypatch, most_chips=0)


@pytest.mark.parametrize(("num_boxes", "most"), [(3, 200), (134, 300), (400, 600)])
def test_no_image_has_more_objects_than_detections(tmp_path: Path, num_boxes: int, most: int) -> None:
    dataset = load_dataset(write_dataset(tmp_path, sides=((200, 200),) * 2, boxes_per_image=num_boxes))
    assert derived(dataset).predict.max_detections == most


def test_a_partial_file_and_overrides_win(dataset: Dataset, tmp_path: Path) -> None:
    config = tmp_path / "partial.yaml"
    config.write_text("{train: {epochs: 2, clip_grad_norm: 3}, model: {rpn: {channels: 16}}}")
    given = give(dataset, config, train__epochs=4)
    data, reason = choose_validation(given)
    result = derive(dataset, given, data=data, validation=reason, device=CPU, num_scored=1)
    train = result.experiment.train
    assert (train.epochs, train.clip_grad_norm, result.experiment.model.rpn.channels) == (4, 3, 16)
    assert train.milestones == (3.0, 3.68)
    assert {setting.name: setting.reason for setting in result.settings}["length"] == "given"


def test_a_cosine_that_is_set_is_described(dataset: Dataset) -> None:
    given = give(dataset, train__schedule="cosine")
    data, reason = choose_validation(given)
    settings_ = derive(dataset, given, data=data, validation=reason, device=CPU).settings
    (schedule,) = (setting for setting in settings_ if setting.name == "schedule")
    assert (schedule.value, schedule.reason, schedule.option) == (
        "half a cosine",
        "given",
        "--train.schedule",
    )


def test_early_stopping_keeps_the_derived_interval_of_evaluations(dataset: Dataset) -> None:
    train = derived(dataset, train__patience=3).train
    assert train.patience == 3
    assert train.evaluate_every == derived(dataset).train.evaluate_every > 1  # type: ignore[operator]
    with pytest.raises(ConfigError, match="patience needs evaluate_every, which is null"):
        derived(dataset, num_scored=0, train__patience=3)


@pytest.mark.parametrize(
    "fields", [{}, {"train__epochs": 0.1, "train__batch_size": 1, "train__warmup_steps": 1}]
)
def test_every_setting_has_a_value_a_reason_and_an_option_that_sets_it(
    dataset: Dataset, fields: dict[str, Any]
) -> None:
    given = give(dataset, **fields)
    data, reason = choose_validation(given)
    result = derive(dataset, given, data=data, validation=reason, device=CPU, num_scored=1)
    short = {"--val", "--epochs, --time"}
    for setting in result.settings:
        assert setting.value
        assert setting.reason
        assert not re.search(r"\b1 (steps|chips|images)\b", setting.value)
        if setting.option not in short:
            section, *names = setting.option.removeprefix("--").split(".")
            value: Any = getattr(result.experiment, section)
            for name in names:
                value = getattr(value, name)


def test_images_are_held_out_where_there_is_no_split(dataset: Dataset) -> None:
    data, _ = choose_validation(give(dataset))
    assert (data.holdout, data.test.split) == (0.1, None)
    data, reason = choose_validation(give(dataset, data__holdout=0.0))
    assert (data.holdout, reason) == (0.0, "given")
    data, reason = choose_validation(give(dataset, data__test__annotations="val.json"))
    assert (data.holdout, reason) == (0.0, "given")


@pytest.mark.parametrize("name", ["val", "test"])
def test_the_split_of_the_data_set_is_validated_on(tmp_path: Path, name: str) -> None:
    for split in ("train", name):
        write_dataset(tmp_path / split, name="_annotations.coco").rename(
            tmp_path / split / "_annotations.coco.json"
        )
    dataset = load_dataset(tmp_path)
    data, _ = choose_validation(replace(give(dataset), spec=give_folder(tmp_path)))
    assert (data.holdout, data.test.split) == (0.0, name)


def give_folder(folder: Path) -> ExperimentSpec:
    return load_partial(None, overrides={"data.train.annotations": str(folder)})[0]


@pytest.mark.parametrize("field", ["whole", "tiles"])
def test_training_without_chips_needs_an_experiment(dataset: Dataset, field: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{field}: needs an experiment file"):
        choose_validation(give(dataset, None, **{f"data__{field}": {}}))


@pytest.mark.parametrize("field", ["whole", "tiles"])
def test_derived_settings_have_no_negative_chips_without_chips(dataset: Dataset, field: str) -> None:
    """For benchmarks, which compare them with chips; `choose_validation` refuses them."""
    given = give(dataset, None, **{f"data__{field}": {}, "train__epochs": 20.0})
    assert derive_from(dataset, given).negatives.source == "none"
    assert derive_from(dataset, give(dataset, None, train__epochs=20.0)).negatives.source == "self"


def derive_from(dataset: Dataset, given: Given) -> ExperimentSpec:
    data = given.spec.data
    return derive(dataset, given, data=data, validation="", device=torch.device("cpu")).experiment


def test_a_data_set_without_boxes_is_refused(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path, boxes_per_image=0))
    with pytest.raises(AnnotationError, match="has no box to learn from"):
        derived(dataset)


@pytest.mark.parametrize("seconds", [60.0, 600.0, 6000.0])
@pytest.mark.parametrize("num_scored", [0, 1, 100])
def test_steps_and_evaluations_fit_into_the_time(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, seconds: float, num_scored: int
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(auto, "measure", lambda *_, **__: measured(seconds_per_step=2.0, num_steps=5))
    given = give(dataset)
    data, reason = choose_validation(given)
    train = derive(
        dataset, given, data=data, validation=reason, device=CPU, deadline=seconds, num_scored=num_scored
    ).experiment.train
    training = train.epochs * 5 * 2.0
    assert training <= 0.95 * seconds
    assert training >= 0.3 * seconds
    assert (train.evaluate_every is None) == (num_scored == 0)
    if train.evaluate_every is not None:
        assert train.epochs / train.evaluate_every <= 4


def test_an_evaluation_longer_than_half_the_time_is_left_out(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(auto, "measure", lambda *_, **__: measured(seconds_per_step=2.0, num_steps=5))

    def limited(*, num_scored: int, **fields: Any) -> DerivedExperiment:
        given = give(dataset, **fields)
        data, reason = choose_validation(given)
        return derive(
            dataset, given, data=data, validation=reason, device=CPU, deadline=60.0, num_scored=num_scored
        )

    short, long = limited(num_scored=1), limited(num_scored=10_000)
    assert short.experiment.train.evaluate_every is not None
    assert long.experiment.train.evaluate_every is None
    assert long.experiment.train.epochs * 5 * 2.0 > 0.9 * 60
    evaluation = next(setting for setting in long.settings if setting.name == "evaluation")
    assert evaluation.value == "none"
    assert "too much of the time; `sniper evaluate` scores the run" in evaluation.reason
    with pytest.raises(
        ConfigError,
        match=r"no step fits: .* the evaluation \(--train.evaluate_every null leaves it out\) about",
    ):
        limited(num_scored=10_000, train__evaluate_every=1)


@pytest.mark.parametrize(
    ("num_scored", "epochs", "subset"), [(10, 40, None), (2000, 8, None), (2000, 400, 50), (40, 1, None)]
)
def test_evaluations_on_many_images_use_a_subset(
    dataset: Dataset, num_scored: int, epochs: float, subset: int | None
) -> None:
    train = derived(dataset, num_scored=num_scored, train__epochs=epochs).train
    assert (train.evaluate_images is None) == (subset is None)
    if subset is not None and train.evaluate_images is not None:
        assert train.evaluate_images >= subset
        assert train.evaluate_images < num_scored
    elif num_scored == 2000:  # even 50 images at a time would take too long
        assert train.evaluate_every == epochs
    given_images = derived(dataset, num_scored=2000, train__epochs=40, train__evaluate_images=7)
    assert given_images.train.evaluate_images == 7


def test_a_time_that_mining_would_exceed_has_no_negative_chips(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(auto, "measure", lambda *_, **__: measured(seconds_per_step=2.0, num_steps=5))
    monkeypatch.setattr(
        auto, "levels_megapixels", lambda *_: 1000.0
    )  # a search takes far longer than the time

    def limited(**fields: Any) -> ExperimentSpec:
        given = give(dataset, **fields)
        data, reason = choose_validation(given)
        return derive(
            dataset, given, data=data, validation=reason, device=CPU, deadline=40.0, num_scored=0
        ).experiment

    short = limited()
    assert short.negatives.source == "none"
    assert 3 < short.train.epochs < 4
    with pytest.raises(ConfigError, match=r"mining negative chips \(--negatives.source none leaves it out\)"):
        limited(negatives__source="self", mine__share=1.0)


def measured(*, seconds_per_step: float, num_steps: int) -> Measurement:
    minutes = seconds_per_step * num_steps / 60
    return Measurement(
        device="cpu",
        seconds_per_step=seconds_per_step,
        peak_memory=1,
        minutes_per_epoch=minutes,
        minutes=minutes,
    )


def test_a_time_without_room_for_a_step_is_refused(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(auto, "measure", lambda *_, **__: measured(seconds_per_step=9.0, num_steps=5))
    given = give(dataset)
    data, reason = choose_validation(given)
    with pytest.raises(ConfigError, match=r"--time: no step fits: .* a step takes 9\.0 s"):
        derive(dataset, given, data=data, validation=reason, device=CPU, deadline=5.0)
    with pytest.raises(ConfigError, match="--time: is over after reading, planning and measuring a step"):
        derive(dataset, given, data=data, validation=reason, device=CPU, deadline=-5.0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), (" 2m5s ", 125)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0m", "ten minutes", "30m1h", "-5m"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a time such as 90s, 10m or 1h30m"):
        parse_time(text)


def test_the_same_experiment_is_derived_again(dataset: Dataset) -> None:
    first, second = derived(dataset), derived(dataset)
    assert first == second
    assert np.isfinite(first.train.epochs)


@pytest.mark.parametrize("neck", ["fpn", "concat"])
def test_the_pyramid_suits_the_neck(dataset: Dataset, neck: str) -> None:
    given = give(dataset, model__backbone__neck=neck)
    data, reason = choose_validation(given)
    result = derive(dataset, given, data=data, validation=reason, device=CPU, num_scored=1)
    low = {"fpn": 16, "concat": 32}[neck]
    assert f"{low} to 480 px" in {setting.name: setting.reason for setting in result.settings}["chips"]
    pyramid = suggest_pyramid(to_image_boxes(dataset), useful_sizes=(float(low), 480.0))
    assert pyramid is not None
    assert result.experiment.pyramid == pyramid.pyramid


def test_the_mask_head_follows_the_masks_of_the_data_set(dataset: Dataset) -> None:
    assert derived(dataset).model.mask_head is None
    rings = [[[[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]] for _ in range(len(dataset.boxes))]
    masked = replace(dataset, masks=MaskArrays.from_rings(rings))
    head = derived(masked).model.mask_head
    assert head is not None
    assert (head.channels, head.num_convs, head.class_agnostic) == (64, 2, False)
    assert derived(masked, model__mask_head=None).model.mask_head is None
    changed = derived(masked, model__mask_head__num_convs=3).model.mask_head
    assert changed == replace(head, num_convs=3)
    start = Given(**{**vars(give(dataset)), "model": replace(derived(masked).model, mask_head=head)})
    data, reason = choose_validation(start)
    again = derive(dataset, start, data=data, validation=reason, device=CPU).experiment
    assert again.model.mask_head is None
