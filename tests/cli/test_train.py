"""`sniper train`: overrides, resuming, and mistakes that are found before or during training."""

import json
from pathlib import Path

import pytest

from sniper.cli.train import parse_overrides
from sniper.errors import ConfigError
from tests.cli.commands import CommandLine


def test_overrides_are_written_with_a_space_or_an_equals_sign() -> None:
    arguments = ["--train.epochs", "3", "--data.chips=a=b.npz", "--seed", "-1"]
    assert parse_overrides(arguments) == {"train.epochs": "3", "data.chips": "a=b.npz", "seed": "-1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.compile", "--train.epochs", "3"], "--train.compile: the value is missing"),
        (["--train.epochs"], "--train.epochs: the value is missing"),
        (["epochs"], "epochs: expected --section"),
    ],
)
def test_overrides_without_name_or_value_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.yaml", "none.yaml: cannot be read"),
        ("experiment.yaml --train.epoch 3", "did you mean train.epochs?"),
        ("experiment.yaml --train 3", "train: "),
        ("experiment.yaml --seed -1", "seed: must be greater than or equal to 0, not -1"),
        ("experiment.yaml --data.train.annotations ''", "data.train.annotations is missing"),
        ("experiment.yaml --run train.json", "the folder of the run cannot be created"),
        ("experiment.yaml --run none --resume", "there is no run"),
        ("experiment.yaml --run none --step 3", "step: needs resume"),
        ("experiment.yaml --device abacus", "device abacus: cannot be used"),
        ("experiment.yaml --model.backbone.name resnet51", "timm has no model 'resnet51'"),
        ("experiment.yaml --model.backbone.weights none.safetensors", "none.safetensors: cannot be loaded"),
    ],
)
def test_mistakes_are_refused_before_a_step_is_made(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    assert message in sniper.error("train", *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "a run is already there"),
        ("--resume --train.momentum 0.5", "train.momentum was 0.9, not 0.5"),
        ("--resume --step 7", "no checkpoint of step 7"),
    ],
)
def test_a_run_is_continued_only_as_it_was_started(
    trained_folder: Path, sniper: CommandLine, arguments: str, message: str
) -> None:
    start = ("train", trained_folder / "experiment.yaml", "--run", trained_folder / "run")
    assert message in sniper.error(*start, *arguments.split())


def test_a_run_is_not_continued_with_other_boxes(trained_folder: Path, sniper: CommandLine) -> None:
    content = json.loads((trained_folder / "train.json").read_text())
    content["annotations"].pop()
    (trained_folder / "train.json").write_text(json.dumps(content))
    start = ("train", trained_folder / "experiment.yaml", "--run", trained_folder / "run")
    assert "other images, boxes or categories" in sniper.error(*start, "--resume")


def test_a_failed_start_leaves_no_run_behind(folder: Path, sniper: CommandLine) -> None:
    start = ("train", folder / "experiment.yaml", "--run", folder / "run", "--train.epochs", "0.2")
    sniper.error(*start, "--model.backbone.name", "resnet51")
    assert sniper.json(*start)["step"] == 1


def test_a_resumed_run_keeps_the_overrides_of_its_start(trained_folder: Path, sniper: CommandLine) -> None:
    config = trained_folder / "short.yaml"
    config.write_text("train: {epochs: 0.2}")
    further = sniper.json("train", config, "--run", trained_folder / "run", "--resume", "--train.epochs", "1")
    assert further["step"] > 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_in_the_middle_is_named(
    folder: Path, sniper: CommandLine, num_workers: int
) -> None:
    path = folder / "images" / "train_2.png"
    path.write_bytes(path.read_bytes()[:2000])
    start = ("train", folder / "experiment.yaml", "--run", folder / "run")
    message = sniper.error(*start, "--data.num_workers", num_workers)
    assert "train_2.png: cannot be read as an image" in message
    assert "Caught" not in message


def test_images_to_be_skipped_are_listed(folder: Path, sniper: CommandLine) -> None:
    bad = folder / "images" / "train_2.png"
    bad.write_bytes(bad.read_bytes()[:300])
    skip = ("--data.on_bad_image", "skip")
    with pytest.warns(UserWarning, match=r"train_2\.png: .*; skipped"):
        sniper.json("train", folder / "experiment.yaml", "--run", folder / "run", *skip)
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(entry.get("skipped_chips", 0) for entry in metrics) > 0
    with pytest.warns(UserWarning, match=r"train_2\.png: .*; skipped"):
        predicted = sniper.json("predict", folder / "run", "--draw", folder / "drawn")
    assert [Path(path).name for path in predicted["skipped_images"]] == ["train_2.png"]
    assert len(list((folder / "drawn").iterdir())) == 3
