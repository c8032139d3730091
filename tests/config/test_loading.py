"""Experiments in YAML: written whole, read back, and refused with all their problems at once."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from yaml import safe_dump as dump_yaml

from sniper.chips import LevelSpec, PyramidSpec
from sniper.config.experiment import ExperimentSpec, PredictSpec, TrainSpec, widened
from sniper.config.loading import (
    RENAMED,
    RENAMED_VALUES,
    check_resumable,
    dump_changes,
    dump_experiment,
    is_experiment,
    load_experiment,
    merge_experiment,
    parse_experiment,
)
from sniper.data.spec import DataSpec, ReadSpec, SourceSpec
from sniper.errors import ConfigError

SOURCE = Path("folder/experiment.yaml")

# The configuration of version 0.1 with every key that has another name today.
OLD_KEYS = [
    ("data.color", "{hue: 0.1}", "data.color_jitter"),
    ("data.loader_processes", "2", "data.num_workers"),
    ("data.read.grey_range", "[0, 9]", "data.read.intensity_range"),
    ("data.read.orientation", "stored", "data.read.exif_orientation"),
    ("data.tiles.min_visible_share", "0.2", "data.tiles.min_visibility"),
    ("model.backbone.features", "1", "model.backbone.num_feature_maps"),
    ("model.backbone.frozen_stride", "4", "model.backbone.frozen_stages"),
    ("model.roi_head.pooled_side", "5", "model.roi_head.pool_size"),
    ("model.roi_head.score_floor", "0.1", "model.roi_head.score_threshold"),
    ("model.roi_head.width", "64", "model.roi_head.hidden_dim"),
    ("model.rpn.anchors_per_chip", "64", "model.rpn.batch_size_per_image"),
    ("model.rpn.num_candidates", "10", "model.rpn.pre_nms_top_n"),
    ("model.rpn.num_proposals", "10", "model.rpn.post_nms_top_n"),
    ("model.rpn.num_training_proposals", "10", "model.rpn.post_nms_top_n_train"),
    ("model.rpn.positive_share", "0.2", "model.rpn.positive_fraction"),
    ("negatives.at_least", "[3]", "negatives.min_proposals"),
    ("predict.score_floor", "0.1", "predict.score_threshold"),
    ("train.accumulate", "2", "train.accumulation_steps"),
    ("train.clip_gradient", "2", "train.clip_grad_norm"),
    ("train.decay", "0.2", "train.gamma"),
    ("train.decay_at", "[3]", "train.milestones"),
    ("train.reference_batch", "8", "train.reference_batch_size"),
    ("train.tensorboard", "1", "train.trackers"),
    ("train.warm_up_rate", "0.001", "train.warmup_start_factor"),
    ("train.warm_up_steps", "3", "train.warmup_steps"),
]
OLD_VALUES = [
    ("data.read.exif_orientation", "turned", "apply"),
    ("data.read.exif_orientation", "stored", "ignore"),
    ("model.backbone.neck", "joined", "concat"),
]


def as_yaml(name: str, value: str) -> str:
    """Write a value by its dotted name as nested YAML."""
    sections = name.split(".")
    return ": {".join(sections) + f": {value}" + "}" * (len(sections) - 1)


def test_an_experiment_is_read_back_as_it_was_written() -> None:
    spec = ExperimentSpec(
        seed=3,
        data=DataSpec(read=ReadSpec(intensity_range=(0.5, 99.0)), test=SourceSpec(annotations="/1e4")),
        train=TrainSpec(epochs=1.5, clip_grad_norm=math.inf, learning_rate=1e-7),
    )
    assert parse_experiment(dump_experiment(spec), source=SOURCE) == spec


def test_a_written_experiment_has_every_field() -> None:
    lines = dump_experiment(ExperimentSpec()).splitlines()
    keys = [line.strip().removeprefix("- ").partition(":")[0] for line in lines]
    for spec in (ExperimentSpec(), TrainSpec(), PredictSpec(), ReadSpec(), PredictSpec().levels[0]):
        assert {field.name for field in dataclasses.fields(spec)} <= set(keys)


def test_the_differences_from_the_defaults_are_enough_to_read_it_back() -> None:
    assert dump_changes(ExperimentSpec()) == "{}\n"
    levels = (LevelSpec(factor=2.0, below=50), LevelSpec(long_side=512, at_least=40))
    spec = ExperimentSpec(train=TrainSpec(epochs=1.5)).with_pyramid(
        PyramidSpec(levels=levels), train=SourceSpec(annotations="/a.json")
    )
    text = dump_changes(spec)
    assert parse_experiment(text, source=SOURCE) == spec
    assert "batch_size" not in text
    assert "{factor: 2, below: 50}" in text
    assert [level.below for level in spec.predict.levels] == [60, math.inf]
    assert [level.at_least for level in spec.predict.levels] == [0, 25]


def test_test_levels_of_levels_without_an_upper_end_have_none() -> None:
    levels = (LevelSpec(factor=1.0), LevelSpec(long_side=512, at_least=40))
    assert [level.below for level in widened(levels)] == [math.inf, math.inf]


def test_an_empty_file_is_the_papers_experiment() -> None:
    assert parse_experiment("", source=SOURCE) == ExperimentSpec()


def test_all_problems_are_reported_at_once() -> None:
    text = """
    sed: 1
    train: {batchsize: 4, epochs: many, momentum: -1}
    pyramid: {levels: [{factor: 2, below: 50}, {long_sid: 512}, {}]}
    model: {backbone: {batch_norm: shared}}
    """
    with pytest.raises(ConfigError) as caught:
        parse_experiment(text, source=SOURCE)
    assert str(caught.value) == "folder/experiment.yaml: " + "; ".join(
        [
            "pyramid.levels[1].long_sid is not known; did you mean pyramid.levels[1].long_side?",
            "pyramid.levels[2]: a level needs exactly one of factor, long_side, short_side; got none",
            "model.backbone.batch_norm: must be 'trained', 'synced' or 'frozen', not 'shared'",
            "train.epochs: must be a valid number, not 'many'",
            "train.momentum: must be greater than or equal to 0, not -1",
            "train.batchsize is not known; did you mean train.batch_size?",
            "sed is not known; did you mean seed?",
        ]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "folder/experiment.yaml: not YAML (while parsing a flow sequence"),
        ("- 1", "folder/experiment.yaml: expected sections such as data and train, got list"),
        ("2020-01-01: 1", "2020-01-01 is not known; known are seed, data, pyramid, negatives, mine"),
        (
            "data: &data {train: *data}",
            "not YAML (expected at most 20000 values in 30 levels, with aliases expanded",
        ),
        ("seed: -1", "seed: must be greater than or equal to 0, not -1"),
        ("train: {epochs: -1}", "train.epochs: must be greater than 0, not -1"),
        ("train: {epochs: .inf}", "train.epochs: must be a finite number, not inf"),
        ("train: {clip_grad_norm: .nan}", "train.clip_grad_norm: must be greater than 0, not nan"),
        ("train: {momentum: 5}", "train.momentum: must be less than 1, not 5"),
        (
            "train: {momentum: yes}",
            "train.momentum: must be a valid number, not true (YAML reads yes, no, on",
        ),
        ("train: {batch_size: 2.5}", "train.batch_size: must be a valid integer, not 2.5"),
        ("train: {batch_size: '2'}", "train.batch_size: must be a valid integer, not '2'"),
        ("train: {compile: 1}", "train.compile: must be a valid boolean, not 1"),
        ("train: {milestones: 3}", "train.milestones: must be a list, not 3"),
        ("train: {milestones: [1, -2]}", "train.milestones[1]: must be greater than or equal to 0, not -2"),
        ("train: {milestones: [on]}", "train.milestones[0]: must be a valid number, not true"),
        ("train: 3", "train: must be a mapping, not 3"),
        ("train:", "train: must be a mapping, not null"),
        ("train: {batch_size: 10, accumulation_steps: 4}", "train: accumulation_steps: a batch of 10 chips"),
        ("pyramid: {levels: []}", "pyramid.levels: must have at least 1 item, not 0"),
        (
            "pyramid: {levels: [{factor: 0}]}",
            "experiment.yaml: pyramid.levels[0].factor: must be greater than 0, not 0",
        ),
        (
            "predict: {levels: [{factor: 1, scale: 2}]}",
            "predict.levels[0].scale is not known; known are factor, long_side, short_side, max_long_side",
        ),
        ("predict: {window: 8}", "predict.window: must be greater than or equal to 256, not 8"),
        (
            "model: {backbone: {name: on}}",
            "model.backbone.name: must be a valid string, not true (YAML reads",
        ),
        ("model: {backbone: {frozen_stages: 3}}", "frozen_stages: must be less than or equal to 2, not 3"),
        (
            "model: {rpn: {positive_iou: 0.3}}",
            "model.rpn: negative_iou must be at most positive_iou (0.3), not 0.4",
        ),
        ("data: {read: {intensity_range: [1]}}", "data.read.intensity_range[1] is missing"),
        (
            "data: {read: {intensity_range: [1, 2, 3]}}",
            "data.read.intensity_range: must have at most 2 items, not 3",
        ),
        ("data: {read: {intensity_range: [2, 2]}}", "the value of black must be below that of white"),
        (
            "data: {whole: {batch_megapixels: 0}}",
            "data.whole.batch_megapixels: must be greater than 0, not 0",
        ),
        ("data: {whole: {level: []}}", "data.whole.level is not known; did you mean data.whole.levels?"),
        ("data: {tiles: {overlap: 1}}", "data.tiles.overlap: must be less than or equal to 0.9, not 1"),
        (
            "data: {whole: {}, tiles: {}}",
            "data: only one of chips, whole and tiles can be given, not whole and tiles",
        ),
        ("data: {chips: a.npz, tiles: {}}", "can be given, not chips and tiles"),
        (
            "{data: {whole: {}}, negatives: {source: rpn}}",
            "negatives.source must be none with data.whole, which trains on no chips",
        ),
        (
            "{data: {chips: a.npz}, negatives: {source: rpn}}",
            "negatives.source must be none with data.chips",
        ),
        ("{train: {trackers: [mlflow, mlflow]}}", "train: trackers: expected each once, not mlflow, mlflow"),
        (
            "{train: {trackers: [comet]}}",
            "train.trackers[0]: must be 'tensorboard', 'mlflow' or 'wandb', not 'comet'",
        ),
        (
            "{negatives: {min_proposals: [1, 2, 3, 4]}}",
            "negatives.min_proposals has 4 numbers for 3 levels",
        ),
    ],
)
def test_an_experiment_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(text, source=SOURCE)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E+2", 100.0), ("1.0e-4", 1e-4), ("3", 3.0), (".5", 0.5)]
)
def test_numbers_are_read_in_every_notation(text: str, value: float) -> None:
    assert parse_experiment(f"train: {{epochs: {text}}}", source=SOURCE).train.epochs == value


def test_every_renamed_key_and_value_is_in_the_tables() -> None:
    assert {name for name, _, _ in OLD_KEYS} == set(RENAMED)
    assert {(name, old) for name, old, _ in OLD_VALUES} == {
        (name, old) for name, values in RENAMED_VALUES.items() for old in values
    }


@pytest.mark.parametrize(("old", "value", "new"), OLD_KEYS)
def test_an_old_key_is_refused_with_its_new_name(old: str, value: str, new: str) -> None:
    cases: tuple[tuple[str, dict[str, str], str], ...] = (
        (as_yaml(old, value), {}, "folder/experiment.yaml: "),
        ("", {old: value}, ""),
        ("", {f"--{old}": value}, "--"),
    )
    for text, overrides, where in cases:
        with pytest.raises(ConfigError) as caught:
            parse_experiment(text, source=SOURCE, overrides=overrides)
        dashes = where if where == "--" else ""
        assert str(caught.value).startswith(f"{where}{old} was renamed to {dashes}{new}")


@pytest.mark.parametrize(("name", "old", "new"), OLD_VALUES)
def test_an_old_value_is_refused_with_the_new_one(name: str, old: str, new: str) -> None:
    for text, overrides in ((as_yaml(name, old), {}), ("", {name: old})):
        with pytest.raises(ConfigError) as caught:
            parse_experiment(text, source=SOURCE, overrides=overrides)
        assert f"{name}: must be " in str(caught.value)
        assert f"not '{old}' ({old} was renamed to {new})" in str(caught.value)


def test_an_old_key_within_a_list_is_refused_with_its_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "pyramid.levels.scale", "pyramid.levels.factor")
    with pytest.raises(
        ConfigError, match=r"pyramid\.levels\[0\]\.scale was renamed to pyramid\.levels\.factor"
    ):
        parse_experiment("pyramid: {levels: [{scale: 3}]}", source=SOURCE)


@pytest.mark.parametrize(("flag", "trackers"), [("true", ("tensorboard",)), ("false", ())])
def test_the_flag_of_tensorboard_is_a_tracker(flag: str, trackers: tuple[str, ...]) -> None:
    text = f"train: {{tensorboard: {flag}}}"
    assert parse_experiment(text, source=SOURCE).train.trackers == trackers
    base = parse_experiment("train: {trackers: [mlflow]}", source=SOURCE)
    options = {"--train.tensorboard": flag}
    assert parse_experiment("", source=SOURCE, overrides=options, base=base).train.trackers == trackers


def test_the_flag_of_tensorboard_beside_a_list_of_trackers_is_refused() -> None:
    both = "train: {tensorboard: true, trackers: [mlflow]}"
    options = {"--train.tensorboard": "true", "--train.trackers": "[mlflow]"}
    for text, overrides in ((both, {}), ("", options)):
        with pytest.raises(
            ConfigError, match=r"train\.tensorboard was renamed to .*train\.trackers, a list such"
        ):
            parse_experiment(text, source=SOURCE, overrides=overrides)


def test_paths_start_from_the_file_and_in_overrides_from_the_working_folder(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text("data: {train: {annotations: a.json}, test: {annotations: /b.json}}")
    spec = load_experiment(path, overrides={"data.test.images": "pictures", "train.epochs": "0.5"})
    assert spec.data.train.annotations == str(tmp_path / "a.json")
    assert spec.data.test.annotations == "/b.json"
    assert spec.data.test.images == str(Path("pictures").absolute())
    assert spec.train.epochs == 0.5


def test_overrides_reach_every_field() -> None:
    overrides = {
        "seed": "4",
        "train.clip_grad_norm": "null",
        "pyramid.levels": "[{factor: 2, below: 99}, {long_side: 512, at_least: 50}]",
    }
    spec = parse_experiment("seed: 1", source=SOURCE, overrides=overrides)
    assert spec.seed == 4
    assert spec.pyramid.levels == (LevelSpec(factor=2, below=99), LevelSpec(long_side=512, at_least=50))


def test_a_base_gives_the_fields_that_the_file_leaves_out() -> None:
    base = ExperimentSpec(seed=5, train=TrainSpec(epochs=1.5, momentum=0.5))
    spec = parse_experiment("train: {momentum: 0.2}", source=SOURCE, base=base)
    assert spec == dataclasses.replace(base, train=TrainSpec(epochs=1.5, momentum=0.2))


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch is not known; did you mean train\.epochs\?"):
        parse_experiment("", source=SOURCE, overrides={"train.epoch": "1"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_experiment(tmp_path / "none.yaml")


@pytest.mark.parametrize("value", [True, "3", 2.5, None])
def test_a_field_is_checked_in_python_too(value: Any) -> None:
    with pytest.raises(ValueError, match="batch_size\n  Input should be a valid integer"):
        TrainSpec(batch_size=value)
    with pytest.raises(ValueError, match="batch_size\n  Input should be a valid integer"):
        dataclasses.replace(TrainSpec(), batch_size=value)


def test_an_unknown_field_is_refused_in_python_too() -> None:
    with pytest.raises(ValueError, match="batchsize\n  Unexpected keyword argument"):
        TrainSpec(batchsize=3)  # type: ignore[call-arg]


def test_a_run_may_be_resumed_for_longer_but_not_with_other_settings() -> None:
    old = ExperimentSpec()
    check_resumable(old, dataclasses.replace(old, train=TrainSpec(epochs=9.0)), source=SOURCE)
    with pytest.raises(ConfigError, match=r"seed was 0, not 1; train\.momentum was 0\.9, not 0\.5"):
        check_resumable(old, dataclasses.replace(old, seed=1, train=TrainSpec(momentum=0.5)), source=SOURCE)


def test_the_length_of_a_cosine_is_fixed_when_a_run_is_resumed() -> None:
    old = ExperimentSpec(train=TrainSpec(schedule="cosine", epochs=4.0))
    longer = dataclasses.replace(old, train=dataclasses.replace(old.train, epochs=8.0))
    with pytest.raises(ConfigError, match=r"train\.epochs was 4\.0, not 8\.0"):
        check_resumable(old, longer, source=SOURCE)


@pytest.mark.parametrize("field", ["merge_iou", "soft_nms_sigma"])
def test_what_is_chosen_on_validation_images_cannot_be_set(field: str) -> None:
    base = ExperimentSpec(predict=PredictSpec(merge="auto"))
    overrides = {f"--predict.{field}": "0.7"}
    with pytest.raises(ConfigError, match=f"^--predict.{field}: merge: auto chooses {field} itself"):
        merge_experiment(base, None, overrides=overrides)
    spec = merge_experiment(base, None, overrides={**overrides, "--predict.merge": "hard"})
    assert getattr(spec.predict, field) == 0.7


BOMB = "\n".join(
    [
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
    ]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "expected at most 20000 values in 30 levels, with aliases expanded"),
        ("[" * 3000, r"not YAML \((nested too deeply|while parsing)"),
        ("seed: " + "[" * 50 + "]" * 50, "expected at most 20000 values in 30 levels"),
        ("seed: " + "{a: " * 50 + "1" + "}" * 50, "expected at most 20000 values in 30 levels"),
        ("seed: 1\nseed: 2", "the key 'seed' occurs twice"),
        ("train: {epochs: 1, epochs: 2}", "the key 'epochs' occurs twice"),
        ("seed: !!int x", "a value is not of the kind that it is marked as"),
        ("seed: !!int ''", "a value is not of the kind that it is marked as"),
        ("seed: !!bool x", "a value is not of the kind that it is marked as"),
        ("seed: 0b_", "a value is not of the kind that it is marked as"),
        ("seed: " + "9" * 5000, "a value is not of the kind that it is marked as"),
        ("seed: !!timestamp 1", "could not determine a constructor for the tag"),
        ("seed: !!binary x", "could not determine a constructor for the tag"),
        ("seed: !!set {a}", "could not determine a constructor for the tag"),
        ("seed: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("seed: !!map [a]", "expected a mapping node"),
        ("{? [a] : 1}", "found unhashable key"),
        ("seed: \x00", "special characters are not allowed"),
        ('data: {train: {annotations: "a\\0b"}}', "data.train.annotations: expected a path in UTF-8"),
        ('pyramid: {levels: [{"\\ud800": 1}]}', "expected a path in UTF-8"),
        ("seed: 2001-99-99", "seed: must be a valid integer, not '2001-99-99'"),
        (f"seed: {2**63}", "seed: must be less than or equal to 9223372036854775807"),
        (
            f"model: {{roi_head: {{hidden_dim: {10**9}}}}}",
            "model.roi_head.hidden_dim: must be less than or equal to 65536",
        ),
        (f"seed: '{'x' * 1000}'", r"not 'x{196}\.\.\."),
    ],
)
def test_yaml_of_any_content_is_refused_by_the_name_of_its_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_experiment(text, source=SOURCE)
    assert str(caught.value).startswith(str(SOURCE))
    assert len(str(caught.value)) < 2000


def test_aliases_and_merged_mappings_are_read() -> None:
    text = "train: &train {epochs: 3, momentum: 0.5}\nmine: {<<: {rpn_epochs: 2}, rpn_epochs: 1}\n"
    levels = "predict: {levels: [&level {long_side: 512}, *level]}"
    spec = parse_experiment(text + levels, source=SOURCE)
    assert (spec.train.epochs, spec.mine.rpn_epochs, len(spec.predict.levels)) == (3.0, 1.0, 2)
    inherited = "data: {train: &a {annotations: x.json, split: val}, test: {<<: *a, split: test}}"
    assert parse_experiment(inherited, source=SOURCE).data.test.split == "test"


def test_a_path_that_is_not_utf8_is_refused_by_its_name() -> None:
    text = dump_experiment(ExperimentSpec(data=DataSpec(train=SourceSpec(annotations="/data/\udcb2.json"))))
    with pytest.raises(ConfigError, match=r"data\.train\.annotations: expected a path in UTF-8"):
        parse_experiment(text, source=SOURCE)


def test_mistakes_in_options_are_told_apart_from_those_of_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(
            "train: {epochs: 0, milestones: 3}",
            source=SOURCE,
            overrides={"--train.batch_size": "-2", "--seed": "x"},
        )
    file, *options = str(caught.value).split("; --")
    assert file.startswith(
        "folder/experiment.yaml: train.epochs: must be greater than 0, not 0; train.milestones: "
    )
    assert file.endswith("must be a list, not 3 (such as [3])")
    assert sorted(options) == [
        "seed: must be a valid integer, not 'x'",
        "train.batch_size: must be greater than 0, not -2",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{pyramid: {levels: [{factor: 2, below: 50}, {long_side: 512, at_least: 40}]}}", (60, 25)),
        ("{train: {epochs: 3}}", (90, 75)),  # the default pyramid keeps the paper's test levels
        ("{pyramid: {chip_size: 512}}", (90, 75)),
    ],
)
def test_test_levels_follow_the_pyramid_of_a_file(text: str, expected: tuple[float, float]) -> None:
    levels = parse_experiment(text, source=SOURCE).predict.levels
    assert (levels[0].below, levels[-1].at_least) == expected


def test_test_levels_of_a_file_are_kept() -> None:
    text = "{pyramid: {levels: [{long_side: 512}]}, predict: {levels: [{factor: 1}]}}"
    (level,) = parse_experiment(text, source=SOURCE).predict.levels
    assert level.factor == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{train: {epochs: 3}}", True),
        ("{data: {}}", True),
        ("", True),
        ("{train: images, val: images, names: [a]}", False),
        ("{path: ., train: [a, b], nc: 1}", False),
        ("{val: images, names: {0: a}}", False),
    ],
)
def test_experiments_are_told_apart_from_data_sets(tmp_path: Path, text: str, expected: bool) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert is_experiment(path) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{names: [a], train: {epochs: 3}}",
            r"keys of YOLO's data.yaml \(names\) and sections of .* \(train\)",
        ),
        ("{epochs: 3}", r"neither YOLO's data.yaml .* nor an experiment .*; it has epochs"),
        ("[1, 2]", "neither YOLO's data.yaml .*; it has no keys"),
        ("{", "not YAML"),
    ],
)
def test_a_file_of_both_or_neither_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        is_experiment(path)


def test_folders_and_other_files_are_data_sets_and_recipes_are_experiments(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    assert not is_experiment(tmp_path)
    assert not is_experiment(tmp_path / "train.json")
    assert is_experiment(Path("coco_r50_fpn"))
    with pytest.raises(
        ConfigError, match=r"no such file; expected a data set .* an experiment .* or the name of a"
    ):
        is_experiment(tmp_path / "none.json")


@pytest.mark.parametrize("base", [None, ExperimentSpec()])
def test_a_detector_of_torchvision_on_a_backbone_has_a_feature_pyramid(base: ExperimentSpec | None) -> None:
    overrides = {"model.kind": "torchvision", "model.name": "fcos"}
    spec = parse_experiment("", source=Path("options"), overrides=overrides, base=base)
    assert spec.model.backbone.neck == "fpn"
    with pytest.raises(ConfigError, match=r"backbone\.neck: must be fpn for fcos"):
        parse_experiment(
            "", source=Path("x"), overrides=overrides | {"model.backbone.neck": "concat"}, base=base
        )


@pytest.mark.parametrize(
    ("text", "path"), [("COCO_V1", "COCO_V1"), ("DEFAULT", "DEFAULT"), ("w.pth", "/there/w.pth"), ("W", "W")]
)
def test_weights_are_a_name_or_a_path_from_the_folder_of_the_file(text: str, path: str) -> None:
    model = f"model: {{kind: torchvision, name: fcos_resnet50_fpn, weights: {text}}}"
    assert parse_experiment(model, source=Path("/there/mine.yaml")).model.weights == path


def _unions(kind: Any, *place: str | int) -> Iterator[tuple[str | int, ...]]:
    """Yield the places of fields that take several kinds, null among them; an item of a list has the index 0."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            yield from _unions(hint, *place, name)
    elif get_origin(kind) is tuple:
        yield from _unions(get_args(kind)[0], *place, 0)
    elif get_origin(kind) in (Union, UnionType):
        yield place
        for inner in get_args(kind):
            yield from _unions(inner, *place)


UNIONS = list(_unions(ExperimentSpec))


@pytest.mark.parametrize("value", [{"unknown_key": 1}, [[1]], True], ids=["mapping", "list", "flag"])
@pytest.mark.parametrize("place", UNIONS, ids=lambda place: ".".join(map(str, place)))
def test_a_field_of_several_kinds_is_reported_by_its_name(
    place: tuple[str | int, ...], value: object
) -> None:
    nested: Any = value
    for key in reversed(place):
        nested = [nested] if isinstance(key, int) else {key: nested}
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)[1:]
    section, text = str(place[0]), dump_yaml(nested)
    with pytest.raises(ConfigError) as of_file:
        parse_experiment(text, source=SOURCE)
    with pytest.raises(ConfigError) as of_option:
        parse_experiment("", source=SOURCE, overrides={f"--{section}": dump_yaml(nested[section])})
    for error, dashes in ((of_file, ""), (of_option, "--")):
        assert re.search(rf"(^|[ ]){re.escape(dashes + name)}[.:\[]", str(error.value))
        assert not re.search(r"Spec\b|literal\[|constrained|\.(str|int|float|tuple)\b", str(error.value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "{min_scores: 0.4, window: 256}",
            "predict.focus.min_scores is not known; did you mean predict.focus.min_score?",
        ),
        (
            "{min_score: 0.4, window: 100}",
            "predict.focus.window: must be a multiple of 64, not 100",
        ),
        ("all", "predict.focus: must be a mapping (min_score, window, cues) or 'auto' or null, not 'all'"),
        ("true", "predict.focus: must be a mapping (min_score, window, cues) or 'auto' or null, not true"),
    ],
)
def test_a_focus_that_cannot_be_used_is_explained(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{SOURCE}: (.*; )?{re.escape(message)}"):
        parse_experiment(f"predict: {{focus: {value}}}", source=SOURCE)
    with pytest.raises(ConfigError, match=rf"(^|; ){re.escape(message.replace('predict.', '--predict.'))}"):
        parse_experiment("", source=SOURCE, overrides={"--predict.focus": value})


def test_a_dose_that_cannot_be_used_is_explained() -> None:
    message = "negatives.dose: must be 'auto' or less than or equal to 10 or null, not 20"
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_experiment("negatives: {dose: 20}", source=SOURCE)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mask_head", "{}", "mask_head: is a section of kind two_stage, not of torchvision"),
        ("mask_head.channels", "64", "mask_head: is a section of kind two_stage, not of torchvision"),
        ("rpn.channels", "64", "rpn: is a section of kind two_stage, not of torchvision"),
        ("focus", "true", "focus: is of kind two_stage, not of torchvision"),
        ("backbone.weights", "x", "backbone.weights: fcos_resnet50_fpn does not have this field"),
    ],
)
def test_the_option_of_a_field_that_a_kind_does_not_have_is_named(
    option: str, value: str, message: str
) -> None:
    overrides = {"--model.kind": "torchvision", "--model.name": "fcos_resnet50_fpn"}
    with pytest.raises(ConfigError, match=rf"^--model\.{re.escape(option)}: {re.escape(message)}$"):
        parse_experiment("", source=SOURCE, overrides=overrides | {f"--model.{option}": value})


def test_a_misspelled_detector_is_named_before_fields_that_it_would_not_have() -> None:
    overrides = {
        "--model.kind": "torchvision",
        "--model.name": "maskrcnn_resnet50",
        "--model.backbone.weights": "x",
    }
    message = (
        r"^--model\.name: name: torchvision has no detector 'maskrcnn_resnet50'; did you mean maskrcnn_res"
    )
    with pytest.raises(ConfigError, match=message):
        parse_experiment("", source=SOURCE, overrides=overrides)


def test_weights_of_a_detector_of_this_package_lead_to_those_of_its_backbone() -> None:
    message = r"^--model\.weights: weights: .*; weights of a backbone belong to backbone\.weights$"
    with pytest.raises(ConfigError, match=message):
        parse_experiment("", source=SOURCE, overrides={"--model.weights": "resnet.safetensors"})
