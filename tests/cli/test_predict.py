"""`sniper predict`: which images it searches, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import CommandLine
from tests.data.tiny import write_image


def test_the_test_images_of_the_experiment_are_searched_and_drawn(
    trained_folder: Path, sniper: CommandLine
) -> None:
    result = sniper.json("predict", trained_folder / "run", "--draw", trained_folder / "drawn")
    assert result["num_images"] == 4
    assert result["num_detections"] > 0
    assert len(list((trained_folder / "drawn").glob("*.png"))) == 4


def test_the_first_images_of_annotations_are_searched(trained_folder: Path, sniper: CommandLine) -> None:
    annotations = ("--annotations", trained_folder / "train.json", "--images", trained_folder / "images")
    sniper.json(
        "predict", trained_folder / "run", *annotations, "--limit", "2", "-o", trained_folder / "two.json"
    )
    scores = sniper.json("evaluate", trained_folder / "two.json", trained_folder / "train.json", "--limit", 2)
    assert scores["num_images"] == 2


def test_image_files_are_searched_without_annotations(trained_folder: Path, sniper: CommandLine) -> None:
    images = [trained_folder / "other.png", trained_folder / "images" / "train_0.png"]
    write_image(images[0], width=320, height=16)
    output = trained_folder / "found" / "here.json"
    assert sniper.json("predict", trained_folder / "run", *images, "-o", output)["num_images"] == 2
    entries = {(entry["image_id"], entry["file_name"]) for entry in json.loads(output.read_text())}
    assert entries == {(1, str(images[0])), (2, str(images[1]))}


def test_a_search_stopped_by_a_bad_image_is_continued(trained_folder: Path, sniper: CommandLine) -> None:
    search = ("predict", trained_folder / "run", trained_folder / "images")
    whole = sniper.json(*search)
    expected = (trained_folder / "run" / "detections.json").read_bytes()
    bad = trained_folder / "images" / "train_2.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:300])
    assert "train_2.png: cannot be read" in sniper.error(*search)
    bad.write_bytes(content)
    assert sniper.json(*search, "--resume")["num_detections"] == whole["num_detections"]
    assert (trained_folder / "run" / "detections.json").read_bytes() == expected


def test_annotations_with_other_categories_are_searched_but_not_drawn(
    trained_folder: Path, sniper: CommandLine
) -> None:
    content = json.loads((trained_folder / "train.json").read_text())
    content["categories"].append({"id": 99, "name": "other"})
    (trained_folder / "other.json").write_text(json.dumps(content))
    search = ("predict", trained_folder / "run", "--annotations", trained_folder / "other.json")
    assert "--draw: the categories of" in sniper.error(*search, "--draw", trained_folder / "drawn")
    sniper.json(*search, "--limit", "1")


def test_images_with_more_detections_than_the_limit_are_warned_of(
    trained_folder: Path, sniper: CommandLine
) -> None:
    config = trained_folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("max_detections: ", "max_detections: 1 # "))
    printed = sniper.text("predict", trained_folder / "run", "--limit", "2")
    assert "warning: 2 images have more detections than predict.max_detections = 1" in printed.err


def test_a_checkpoint_of_another_model_is_refused(trained_folder: Path, sniper: CommandLine) -> None:
    config = trained_folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("hidden_dim: 32", "hidden_dim: 48"))
    message = sniper.error("predict", trained_folder / "run", trained_folder / "images" / "train_0.png")
    assert "belongs to another model: roi_head.first.weight is (32, 392), not (48, 392)" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none x.png", "there is no run"),
        ("run x.png --annotations train.json", "not both"),
        ("run images --images images", "--images requires --annotations"),
        ("run images -o images", "images: expected a file to write"),
        ("run images/train_0.png --draw train.json", "exists"),
        ("run train.json", "cannot be read as an image"),
        ("run x.png --device abacus", "device abacus: cannot be used"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(trained_folder)
    assert message in sniper.error("predict", *arguments.split())
