"""`sniper convert`, and the way from a YOLO or VOC folder to scores by commands alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sniper.config.loading import dump_experiment
from sniper.data.datasets import load_dataset
from tests.cli.commands import CommandLine
from tests.data.geotiffs import write_geotiff
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment, with_train


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Return a folder with `train.json`, `val.json` and their images."""
    write_dataset(tmp_path / "source", name="train")
    write_dataset(tmp_path / "source", sides=((120, 90), (90, 120)), name="val")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("to", "path"),
    [
        ("yolo", "data.yaml"),
        pytest.param("voc", ".", marks=pytest.mark.slow),
        pytest.param("coco", ".", marks=pytest.mark.slow),
    ],
)
def test_commands_lead_from_a_folder_of_any_format_to_scores(
    splits: Path, tmp_path: Path, sniper: CommandLine, to: str, path: str
) -> None:
    out = tmp_path / to
    converted = sniper.json("convert", splits, out, "--to", to)
    assert (converted["splits"], converted["num_images"], converted["num_boxes"]) == (["train", "val"], 6, 18)
    data, run = out / path, tmp_path / "run"
    assert sniper.json("check", data)["num_images"] == 6
    assert sniper.json("plan", data, "--split", "val", "-o", tmp_path / "plan")["num_images"] == 2
    experiment = with_train(tiny_experiment(data), epochs=0.5, evaluate_every=1)
    (tmp_path / "experiment.yaml").write_text(dump_experiment(experiment))
    sniper.json("train", tmp_path / "experiment.yaml", "--run", run)
    assert sniper.json("predict", run, "--draw", tmp_path / "pictures")["num_images"] == 2
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert sniper.json("mine", run)["num_images"] == 4
    assert (
        sniper.json("predict", run, "--annotations", data, "--split", "all", "-o", tmp_path / "a.json")[
            "num_images"
        ]
        == 6
    )
    assert 0 <= sniper.json("evaluate", run / "detections.json", data)["ap"] <= 1
    assert 0 <= sniper.json("evaluate", tmp_path / "a.json", data, "--split", "all")["ap"] <= 1
    assert "detections" in sniper.error("evaluate", tmp_path / "a.json", data, "--split", "val")


def test_pixels_that_are_copied_need_no_intensity_range(
    splits: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    for path in (splits / "images").iterdir():
        with Image.open(path) as image:
            deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        Image.fromarray(deep).save(path)
    assert sniper.json("convert", splits, tmp_path / "yolo", "--to", "yolo")["num_images"] == 6
    converted = sniper.json(
        "convert", tmp_path / "yolo", tmp_path / "coco", "--to", "coco"
    )  # reads the sides
    assert (converted["num_images"], converted["num_boxes"]) == (6, 18)
    for name in ("train_0.png", "val_1.png"):
        (copy,) = (tmp_path / "coco" / "images").rglob(name)
        assert copy.read_bytes() == (splits / "images" / name).read_bytes()
    message = sniper.error("check", splits / "train.json")
    assert "intensity_range: [0, 65535]" in message
    assert message.endswith("a field of data.read is set in an experiment file (--config FILE)")


def test_images_of_many_bands_are_converted(tmp_path: Path, sniper: CommandLine) -> None:
    pytest.importorskip("rasterio")
    write_dataset(tmp_path / "source", sides=((64, 48),))
    content = json.loads((tmp_path / "source" / "train.json").read_text())
    content["images"][0]["file_name"] = "bands.tif"
    (tmp_path / "source" / "train.json").write_text(json.dumps(content))
    write_geotiff(
        tmp_path / "source" / "images" / "bands.tif", np.zeros((48, 64, 5), dtype=np.uint16), crs=None
    )
    assert sniper.json("convert", tmp_path / "source", tmp_path / "voc", "--to", "voc")["num_images"] == 1


def test_boxes_are_counted_as_they_are_written(splits: Path, tmp_path: Path, sniper: CommandLine) -> None:
    content = json.loads((splits / "train.json").read_text())
    for entry in content["annotations"][:2]:
        entry["iscrowd"] = 1
    (splits / "train.json").write_text(json.dumps(content))
    converted = sniper.json("convert", splits, tmp_path / "yolo", "--to", "yolo")
    lines = [
        line
        for path in (tmp_path / "yolo" / "labels").rglob("*.txt")
        for line in path.read_text().splitlines()
    ]
    assert converted["num_boxes"] == len(lines) == 16
    assert sniper.json("convert", splits, tmp_path / "voc", "--to", "voc")["num_boxes"] == 18


def test_perfect_detections_score_1_whatever_the_format_of_the_truth(
    splits: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    sniper.json("convert", splits, tmp_path / "yolo", "--to", "yolo", "--split", "val")
    truth = load_dataset(tmp_path / "yolo").to_coco()["annotations"]
    detections = [
        {**{key: entry[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9} for entry in truth
    ]
    (tmp_path / "found.json").write_text(json.dumps(detections))
    assert sniper.json("evaluate", tmp_path / "found.json", tmp_path / "yolo")["ap"] == pytest.approx(1.0)


def test_images_that_are_trained_and_scored_on_are_reported(
    splits: Path, tmp_path: Path, sniper: CommandLine
) -> None:
    experiment = with_train(tiny_experiment(splits / "train.json"), epochs=0.2, evaluate_every=1)
    (tmp_path / "experiment.yaml").write_text(dump_experiment(experiment))
    printed = sniper.text("train", tmp_path / "experiment.yaml", "--run", tmp_path / "run")
    assert "4 of 4 images of data.test are in data.train too" in " ".join(printed.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("source out --to png", "png"),
        ("source/images out --to yolo", "is no data set; looked for"),
        ("source source --to yolo", "source: is not empty, expected a new folder"),
        ("source out --to yolo --split night", "has no split night, expected one of train, val"),
        ("source/train.json out --to yolo --split val", "has no splits"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    splits: Path,
    tmp_path: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in sniper.error("convert", *arguments.split())
    assert not (tmp_path / "out").exists()
