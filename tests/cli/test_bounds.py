"""Huge numbers in options and data sets are refused by name or used, without a traceback and without their memory."""

import json
import resource
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import CommandLine

OPTIONS = [
    ("evaluate d.json train.json --max-detections 1000000000000", "Must be <= 1000000"),
    (f"evaluate d.json train.json --max-detections {10**30}", "Must be <= 1000000"),
    ("evaluate d.json train.json --details --sizes 0 1e300", "expected rising numbers from 0 to 100,000"),
    ("plan train.json --levels 1000000000", "Must be <= 8"),
    ("plan train.json --batch-size 1000000000", "Must be <= 65536"),
    (f"chips train.json -o c.npz --seed {10**30}", "Must be <= 9223372036854775807"),
    (
        "TRAIN --pyramid.chip_size 1000000000",
        "--pyramid.chip_size: must be less than or equal to 16384, not 10",
    ),
    (
        "TRAIN --pyramid.levels '[{factor: 1e9, below: 80}, {long_side: 64}]'",
        "factor: must be less than or equal",
    ),
    (
        "TRAIN --pyramid.levels '[{long_side: 1000000000}]'",
        "long_side: must be less than or equal to 16777216",
    ),
    (f"TRAIN --predict.levels '[{'{factor: 1}, ' * 40}]'", "must have at most 32 items"),
    (
        "TRAIN --train.batch_size 1000000000",
        "--train.batch_size: must be less than or equal to 65536, not 10",
    ),
    (
        "TRAIN --train.batch_size 60000 --pyramid.chip_size 512",
        "(pyramid.chip_size) has 15,729 million pixels",
    ),
    ("TRAIN --train.epochs 1e300", "--train.epochs: must be less than or equal to 1000000, not 1e+300"),
    (
        "TRAIN --data.num_workers 1000000",
        "--data.num_workers: must be less than or equal to 1024, not 1000000",
    ),
    (f"TRAIN --seed {10**30}", "--seed: must be less than or equal to 9223372036854775807"),
    (
        "TRAIN --predict.max_detections 1000000000000",
        "--predict.max_detections: must be less than or equal to 1",
    ),
    (
        "TRAIN --predict.batch_megapixels 1e300",
        "--predict.batch_megapixels: must be less than or equal to 1000",
    ),
    ("TRAIN --mine.batch_megapixels 1e9", "--mine.batch_megapixels: must be less than or equal to 1000"),
    ("TRAIN --model.rpn.channels 1000000000", "--model.rpn.channels: must be less than or equal to 65536"),
    (
        "TRAIN --model.rpn.pre_nms_top_n 1000000000",
        "--model.rpn.pre_nms_top_n: must be less than or equal to 1",
    ),
    ("TRAIN --model.roi_head.hidden_dim 1000000000", "hidden_dim: must be less than or equal to 65536"),
    ("TRAIN --model.roi_head.pool_size 1000000000", "pool_size: must be less than or equal to 64"),
    ("TRAIN --data.cache.gigabytes 1e300", "--data.cache.gigabytes: must be less than or equal to 70000"),
    ("TRAIN --data.tiles '{side: 1000000000}'", "side: must be less than or equal to 16384"),
]


@pytest.mark.parametrize(("command", "message"), OPTIONS)
def test_a_huge_number_is_refused_with_its_bound(
    trained_folder_once: Path,
    monkeypatch: pytest.MonkeyPatch,
    sniper: CommandLine,
    command: str,
    message: str,
) -> None:
    monkeypatch.chdir(trained_folder_once)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = sniper.error(*shlex.split(command.replace("TRAIN", "train experiment.yaml --run new")))
    assert message in answer
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


Change = Callable[[dict[str, Any]], None]


def set_image(key: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["images"][0][key] = value

    return change


def set_boxes(*boxes: list[float]) -> Change:
    def change(content: dict[str, Any]) -> None:
        for annotation, box in zip(content["annotations"], boxes, strict=False):
            annotation["bbox"] = box
            annotation.pop("area")

    return change


def set_ids(key: str, value: int) -> Change:
    """Replace the id of the first category or image everywhere."""

    def change(content: dict[str, Any]) -> None:
        entry = content["categories" if key == "category_id" else "images"][0]
        for annotation in content["annotations"]:
            if annotation[key] == entry["id"]:
                annotation[key] = value
        entry["id"] = value

    return change


def add_categories(count: int) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["categories"] += [{"id": 100 + number, "name": f"class {number}"} for number in range(count)]

    return change


def set_name(name: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["categories"][0]["name"] = name

    return change


REFUSED = [
    (
        set_image("width", 10**8),
        "image 1: width is 100000000, expected at most 1,000,000 pixels",
    ),
    (
        set_image("width", 10**30),
        "image 1: width is 1000000000000000000000000000000, expected at most 1,000,000 pixels",
    ),
    (set_image("height", 1e300), "image 1: height is 1e+300, expected "),
    (set_image("height", float("nan")), "image 1: height is nan, expected a whole number of pixels"),
    (set_image("height", float("inf")), "image 1: height is inf, expected a whole number of pixels"),
    (set_image("height", "1e8"), "image 1: height is '1e8', expected at most 1,000,000 pixels"),
    (set_image("width", [640]), "image 1: width is [640], expected a whole number of pixels"),
    (add_categories(50_000), "there are 50,002 categories, expected at most 20,000"),
    (set_name("a" * 1_000_000), "has 1,000,000 characters, expected at most 1,024"),
]
COMMANDS = (
    "check data.json",
    "plan data.json -o plan",
    "chips data.json -o c.npz",
    "convert data.json out --to voc",
    "train data.json --run new --epochs 0.01 --device cpu --model.backbone.pretrained false",
    "evaluate d.json data.json",
    "predict run --annotations data.json",
    "mine run data.json",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_data_that_is_too_large_is_refused(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine, command: str
) -> None:
    monkeypatch.chdir(trained_folder)
    Path("d.json").write_text("[]")
    for change, message in REFUSED:
        content = json.loads(Path("train.json").read_text())
        change(content)
        Path("data.json").write_text(json.dumps(content))
        assert message in sniper.error(*command.split())


USED = [
    set_image("width", 0),
    set_image("width", -5),
    set_image("width", 160.0),
    set_image("width", "160"),
    set_boxes([10, 10, 1e30, 1e30], [-1e30, 5, 2e30, 10], [1e308, 1e308, 1e308, 1e308], [1e30, 1, 5, 5]),
    set_ids("category_id", 2**63 - 1),
    set_ids("category_id", 2**64 + 1),
    set_ids("category_id", -(2**70)),
    set_ids("image_id", 2**64 + 1),
]


@pytest.mark.parametrize(
    "command",
    [
        "check data.json",
        "plan data.json -o plan",
        "chips data.json -o c.npz",
        "convert data.json OUT --to voc",
        "evaluate d.json data.json",
        "predict run --annotations data.json -o e.json",
        pytest.param(
            "train data.json --run OUT --epochs 0.01 --device cpu --model.backbone.pretrained false",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_odd_numbers_are_used(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine, command: str
) -> None:
    monkeypatch.chdir(trained_folder)
    Path("d.json").write_text("[]")
    for number, change in enumerate(USED):
        content = json.loads(Path("train.json").read_text())
        change(content)
        Path("data.json").write_text(json.dumps(content))
        printed = sniper.text(*command.replace("OUT", f"out{number}").split())
        assert "RuntimeWarning" not in printed.err
        assert "overflow" not in printed.err


@pytest.mark.parametrize("command", ["plan data.json -o plan", "chips data.json -o c.npz"])
def test_a_wide_image_with_boxes_far_apart_is_planned(
    trained_folder: Path, monkeypatch: pytest.MonkeyPatch, sniper: CommandLine, command: str
) -> None:
    monkeypatch.chdir(trained_folder)
    content = json.loads(Path("train.json").read_text())
    content["images"][0] |= {"width": 1_000_000, "height": 1_000_000}
    for number, annotation in enumerate(content["annotations"]):
        annotation |= {"image_id": 1, "bbox": [80_000 * number, 75_000 * number, 40, 40], "area": 1600}
    Path("data.json").write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sniper.json(*command.split())["uncovered_boxes"] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
