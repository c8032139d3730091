"""Detectors of transformers on the command line: trained by two processes, resumed, and searched without a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sniper.config.loading import dump_experiment
from sniper.runs.run import Run
from tests.cli.commands import CommandLine, start_two
from tests.cli.test_processes import finish, training, weights_of
from tests.models.transformers_detectors.specs import save, spec_of
from tests.training.experiments import tiny_experiment, with_train


def write_detector(folder: Path, name: str) -> Path:
    """Write a small detector, and an experiment that trains it from random weights; return the detector's folder."""
    detector = save(name, folder / "detector", names=("dark", "bright"))
    spec = replace(tiny_experiment(folder / "train.json"), model=spec_of(detector))
    (folder / "experiment.yaml").write_text(dump_experiment(with_train(spec, learning_rate=1e-3)))
    return detector


@pytest.mark.processes
def test_two_processes_learn_what_one_learns_with_a_detector_of_transformers(
    folder: Path, sniper: CommandLine
) -> None:
    write_detector(folder, "rt_detr_v2")
    # One chip each: losses are divided by the number of objects of a part, and parts of more chips are others.
    options = ("--train.epochs", "0.5", "--train.batch_size", "2")
    together = start_two(*training(folder, "together", *options))
    alone = training(folder, "alone", *options, "--train.accumulation_steps", "2", "--device", "cpu")
    assert sniper.json(*alone)["step"] == json.loads(finish(together))["step"]
    assert Run(folder / "alone").checkpoints
    weights, others = weights_of(folder / "alone"), weights_of(folder / "together")
    for key, tensor in weights.items():
        if not key.rpartition(".")[2].startswith(
            ("running_", "num_batches")
        ):  # batch norm sees the parts one after another, or both at once
            torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_detector_of_transformers_is_trained_and_searched(folder: Path, sniper: CommandLine) -> None:
    detector = write_detector(folder, "yolos")
    run, image = folder / "run", next((folder / "images").iterdir())
    printed = sniper.text(*training(folder, "run", "--train.epochs", "0.2"))
    assert f"starting from {detector / 'model.safetensors'}: loaded " in printed.err
    assert "with the scores of 2 classes (dark, bright) matched by name, all of them" in printed.err
    detector.rename(folder / "moved")
    sniper.text(*training(folder, "run", "--train.epochs", "0.4", "--resume"))
    assert sniper.json("predict", run, image)["num_detections"] > 0
    name = f"transformers:{folder / 'moved'}"
    target = folder / "found.json"
    result = sniper.json("predict", "--detector", name, image, "-o", target)
    assert result["detector"] == name
    assert result["num_detections"] == len(json.loads(target.read_text())) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.name none", "has no model.kind|model.name"),
        (
            "--model.kind transformers",
            "kind transformers needs the name of a detector on the Hugging Face hub",
        ),
        (
            "--model.kind transformers --model.name a/b/c",
            "model.name: a/b/c: no such folder; expected a folder, or",
        ),
        (
            "--model.kind transformers --model.name {detector} --model.rpn.channels 8",
            "rpn: a detector of transformers does not have this section",
        ),
        (
            "--model.kind transformers --model.name {detector} --negatives.source rpn",
            "which has no region proposal network",
        ),
    ],
)
def test_mistakes_are_named(folder: Path, sniper: CommandLine, arguments: str, message: str) -> None:
    detector = write_detector(folder, "yolos")
    options = arguments.format(detector=detector).split()
    error = sniper.error("train", folder / "train.json", "--run", folder / "run", *options)
    assert any(part in error for part in message.split("|")), error
