"""Experiments in YAML: complete, and refused with every fault at once."""

import dataclasses
import math
from pathlib import Path

import pytest

from sniper.chips import LevelSpec, PyramidSpec
from sniper.config.experiment import ExperimentSpec, TrainSpec
from sniper.config.loading import (
    check_resumable,
    dump_changes,
    dump_experiment,
    load_experiment,
    parse_experiment,
)
from sniper.data.spec import SourceSpec
from sniper.errors import ConfigError

HERE = Path("folder/experiment.yaml")


def test_an_experiment_comes_back_as_it_was_written() -> None:
    spec = ExperimentSpec(seed=3, train=TrainSpec(epochs=1.5, clip_grad_norm=10.0))
    assert parse_experiment(dump_experiment(spec), source=HERE) == spec


def test_what_differs_from_the_defaults_is_enough_to_come_back() -> None:
    assert dump_changes(ExperimentSpec()) == "{}\n"
    levels = (LevelSpec(factor=2.0, below=50), LevelSpec(long_side=512, at_least=40))
    spec = ExperimentSpec(train=TrainSpec(epochs=1.5)).with_pyramid(
        PyramidSpec(levels=levels), train=SourceSpec(annotations="/a.json")
    )
    text = dump_changes(spec)
    assert parse_experiment(text, source=HERE) == spec
    assert "batch_size" not in text
    assert [level.below for level in spec.predict.levels] == [60, math.inf]
    assert [level.at_least for level in spec.predict.levels] == [0, 25]


def test_an_empty_file_is_the_papers_experiment() -> None:
    assert parse_experiment("", source=HERE) == ExperimentSpec()


def test_every_fault_is_told_at_once_with_the_nearest_name() -> None:
    text = """
    sed: 1
    train: {batchsize: 4, epochs: many, momentum: -1}
    pyramid: {levels: [{factor: 2, below: 50}, {long_sid: 512}]}
    model: {backbone: {batch_norm: shared}}
    """
    with pytest.raises(ConfigError) as caught:
        parse_experiment(text, source=HERE)
    for part in (
        "folder/experiment.yaml: ",
        "sed is not known; did you mean seed?",
        "train.batchsize is not known; did you mean train.batch_size?",
        "train.epochs: input should be a valid number, unable to parse string as a number, not 'many'",
        "pyramid.levels[1].long_sid is not known; did you mean pyramid.levels[1].long_side?",
        "pyramid.levels[1]: a level needs exactly one of factor, long_side, short_side; got none",
        "model.backbone.batch_norm: input should be 'trained', 'synced' or 'frozen', not 'shared'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("- 1", "wanted sections such as data and train, got list"),
        ("train: {momentum: 5}", r"train: momentum must be in \[0, 1\), not 5"),
        ("train: 3", "train: "),
        ("pyramid: {levels: []}", "at least one level"),
        (
            "data: {whole: {batch_megapixels: 0}}",
            "data.whole: batch_megapixels must be positive or null, not 0",
        ),
        ("data: {whole: {level: []}}", "data.whole.level is not known; did you mean data.whole.levels?"),
        ("data: {tiles: {overlap: 1}}", "data.tiles: overlap is a share from 0 to 0.9, not 1"),
        ("data: {whole: {}, tiles: {}}", "one way to feed a detector at a time, not both whole and tiles"),
        ("data: {chips: a.npz, tiles: {}}", "one way to feed a detector at a time, not both chips and tiles"),
        (
            "{data: {whole: {}}, negatives: {source: mined}}",
            "negative chips go with chips, not with data.whole",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_experiment(text, source=HERE)


def test_paths_start_from_the_file_and_those_of_overrides_from_the_working_folder(tmp_path: Path) -> None:
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
    spec = parse_experiment("seed: 1", source=HERE, overrides=overrides)
    assert spec.seed == 4
    assert spec.pyramid.levels == (LevelSpec(factor=2, below=99), LevelSpec(long_side=512, at_least=50))


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch is not known; did you mean train\.epochs\?"):
        parse_experiment("", source=HERE, overrides={"train.epoch": "1"})


def test_a_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_experiment(tmp_path / "none.yaml")


def test_a_run_may_go_on_for_longer_but_not_otherwise() -> None:
    old = ExperimentSpec()
    check_resumable(old, dataclasses.replace(old, train=TrainSpec(epochs=9.0)), source=HERE)
    with pytest.raises(ConfigError, match=r"seed was 0, not 1; train\.momentum was 0\.9, not 0\.5"):
        check_resumable(old, dataclasses.replace(old, seed=1, train=TrainSpec(momentum=0.5)), source=HERE)
