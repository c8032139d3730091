"""`sniper train`: overrides, resuming, and mistakes that are found before or during training."""

import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Literal

import pytest

import sniper as package
from sniper.cli import run
from sniper.cli.progress import ProgressBars
from sniper.cli.unknown import parse_overrides
from sniper.config.experiment import widened
from sniper.config.loading import load_experiment
from sniper.errors import ConfigError
from sniper.pipeline import load_split
from sniper.runs.run import Run
from sniper.training.callbacks import StepReport
from tests.cli.commands import CommandLine
from tests.data.tiny import write_dataset

SMALL = """
seed: 1
data: {num_workers: 0}
model:
  backbone: {name: test_resnet, pretrained: false}
  rpn: {channels: 16, post_nms_top_n_train: 20, post_nms_top_n: 20}
  roi_head: {channels: 8, hidden_dim: 32}
train: {batch_size: 4, precision: fp32}
"""
"""A partial configuration with which a few steps take a second."""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the COCO JSON of a tiny data set; `small.yaml` is beside it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    return write_dataset(tmp_path)


def names_of(run: Path, split: Literal["train", "test"]) -> set[str]:
    return set(load_split(load_experiment(run / "config.yaml"), split).file_names.tolist())


def test_a_data_set_is_trained_predicted_and_scored_without_an_experiment(
    data: Path, sniper: CommandLine
) -> None:
    printed = sniper.text("train", "train.json", "--config", "small.yaml", "--epochs", 1)
    assert "1 image (10 %" in printed.err
    assert "--predict.levels" in printed.err
    assert "next: sniper predict runs/train --draw runs/train/pictures" in printed.out
    assert re.search(r"^AP50 +(–|0\.\d{3})$", printed.out, re.MULTILINE)
    assert "AR (100 per image)" in printed.out
    assert "has the best AP" in printed.out
    assert "\ntraining: 1 step, 1 epoch of 1\n" in printed.err
    assert "evaluation: once on 1 image\n" in printed.err
    assert re.search(r"^epoch 1/1  loss \d.*  AP (–|0\.\d{3})", printed.err, re.MULTILINE)
    assert "\x1b" not in printed.err
    spec = load_experiment(Path("runs/train/config.yaml"))
    assert (spec.train.epochs, spec.train.milestones, spec.data.holdout) == (1, (0.75, 0.92), 0.1)
    assert spec.predict.levels == widened(spec.pyramid.levels)
    assert sniper.json("predict", "runs/train", "--draw", "runs/train/pictures")["num_images"] == 1
    scores = sniper.json("evaluate", "runs/train/detections.json", "runs/train/validation.json")
    assert scores["num_images"] == 1


def test_the_split_of_a_yolo_data_set_is_validated_on(data: Path, sniper: CommandLine) -> None:
    for split in ("train", "val"):
        write_dataset(data.parent / "coco" / split, name=f"{split}_image").rename(
            data.parent / "coco" / split / "_annotations.coco.json"
        )
    sniper.json("convert", "coco", "yolo", "--to", "yolo")
    result = sniper.json("train", "yolo/data.yaml", "--config", "small.yaml", "--epochs", 1)
    assert result["run"] == "runs/data"
    assert {"ap", "ap50", "loss"} <= set(result)
    spec = load_experiment(Path("runs/data/config.yaml"))
    assert (spec.data.holdout, spec.data.test.split) == (0, "val")
    assert not names_of(Path("runs/data"), "train") & names_of(Path("runs/data"), "test")


def test_another_data_set_is_validated_on(data: Path, sniper: CommandLine) -> None:
    write_dataset(data.parent, name="val")
    sniper.json("train", "train.json", "--val", "val.json", "--config", "small.yaml", "--epochs", 0.5)
    assert names_of(Path("runs/train"), "train") == {f"train_{index}.png" for index in range(4)}
    assert names_of(Path("runs/train"), "test") == {f"val_{index}.png" for index in range(4)}


def test_a_stopped_training_names_the_command_that_continues_it(
    data: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object, report: StepReport) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    arguments = ("train", "train.json", "--config", "small.yaml", "--epochs", "3", "--run", "my run")
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBars, "step", interrupt)
        assert run([*arguments]) == 130
    stopped = sniper.capsys.readouterr().err.splitlines()[-1]
    message, _, command = stopped.partition("; to continue: ")
    assert message == "stopped after step 1, which is saved"
    assert "from step 1" in sniper.text(*shlex.split(command)[1:]).err


def test_held_out_images_stay_held_out_when_a_run_is_resumed(data: Path, sniper: CommandLine) -> None:
    run = Path("runs/train")
    sniper.json("train", "train.json", "--config", "small.yaml", "--epochs", 1)
    trained, held_out = names_of(run, "train"), names_of(run, "test")
    assert trained | held_out == {f"train_{index}.png" for index in range(4)}
    assert not trained & held_out
    config = (run / "config.yaml").read_text()
    resumed = sniper.json("train", "train.json", "--resume", "--epochs", 2)
    assert resumed["step"] > 1
    assert (run / "config.yaml").read_text() == config.replace("epochs: 1\n", "epochs: 2\n", 1)
    assert (names_of(run, "train"), names_of(run, "test")) == (trained, held_out)
    assert "data.holdout was 0.1, not 0.5" in sniper.error(
        "train", "train.json", "--resume", "--data.holdout", 0.5
    )
    assert "holdout must be 0" in sniper.error("train", "train.json", "--resume", "--val", "train.json")
    assert "length of a run is fixed" in sniper.error("train", "train.json", "--resume", "--time", "1m")


def test_a_time_becomes_a_number_of_epochs(data: Path, sniper: CommandLine) -> None:
    printed = sniper.text(
        "train", "train.json", "--config", "small.yaml", "--time", "20s", "--train.evaluate_every", "null"
    )
    assert "measuring: a few steps" in printed.err.partition("reason")[0]
    train = load_experiment(Path("runs/train/config.yaml")).train
    assert train.evaluate_every is None
    assert 0 < train.milestones[0] < train.milestones[1] < train.epochs
    spent = sum(entry.get("seconds", 0) for entry in Run(Path("runs/train")).entries())
    assert 1 < spent < 20


def test_the_same_run_is_started_in_python(data: Path, sniper: CommandLine) -> None:
    sniper.json("train", "train.json", "--config", "small.yaml", "--epochs", 0.5, "--run", "first")
    second = package.train("train.json", config="small.yaml", epochs=0.5, run="second")
    assert second.config_path.read_text() == Path("first/config.yaml").read_text()


def test_a_run_inside_its_warm_up_is_warned_of(folder: Path, sniper: CommandLine) -> None:
    start = ("train", folder / "experiment.yaml", "--run", folder / "run", "--train.warmup_steps", 1000)
    assert "lies inside the warm-up of 1000" in sniper.text(*start, "--epochs", "0.3").err


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
        ("none.yaml", "none.yaml: no such file; expected a data set"),
        ("experiment.yaml --train.epoch 3", "did you mean --train.epochs?"),
        ("experiment.yaml --train 3", "--train: is a section"),
        (
            "experiment.yaml --train.milestones 3",
            "error: --train.milestones: must be a list, not 3 (--train.milestones '[3]')",
        ),
        ("experiment.yaml --lr 3", "--lr: no such option; use --train.learning_rate"),
        ("train.json --batch 3", "--batch: no such option; use --train.batch_size"),
        ("train.json --imgsz 3", "--imgsz: no such option; use --pyramid.chip_size"),
        ("train.json --conf=3", "--conf: no such option; use --predict.score_threshold"),
        ("train.json --workers 3", "--workers: no such option; use --data.num_workers"),
        ("train.json --optimizer sgd", "--optimizer: no such option; use --train.optimizer"),
        ("train.json --num-workers 3", "--num-workers: no such option; use --data.num_workers"),
        ("train.json --device gpu", "device gpu: there is no such device; this machine has cpu"),
        ("train.json --time 10", "--time 10: expected a time such as 90s, 10m or 1h30m"),
        ("train.json --time 1m --epochs 2", "--time: and --epochs exclude each other"),
        ("train.json --epochs 2 --train.epochs 3", "--train.epochs: is set twice"),
        ("train.json --train.epoch 3", "error: --train.epoch is not known; did you mean --train.epochs?"),
        ("train.json --data.train.annotations a.json", "data.train.annotations: is the data set"),
        ("train.json --config none.yaml", "--config none.yaml: cannot be read"),
        ("train.json --resume --run none", "there is no run"),
        ("experiment.yaml --time 5m", "--time: needs a data set"),
        ("experiment.yaml --config other.yaml", "--config: needs a data set"),
        ("experiment.yaml --seed -1", "seed: must be greater than or equal to 0, not -1"),
        ("experiment.yaml --data.train.annotations ''", "data.train.annotations is missing"),
        ("experiment.yaml --run train.json", "the folder of the run cannot be created"),
        ("experiment.yaml --run none --resume", "there is no run"),
        ("experiment.yaml --run none --step 3", "step: needs resume"),
        ("experiment.yaml --device abacus", "device abacus: there is no such device"),
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
