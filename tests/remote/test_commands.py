"""Commands take URLs wherever they take paths."""

import json
from pathlib import Path

import pytest

from sniper.cli.images import find_image_files
from sniper.errors import ConfigError
from sniper.inference.detector import Detector
from tests.cli.commands import CommandLine
from tests.cli.conftest import trained_folder, trained_folder_once  # noqa: F401 - fixtures
from tests.data.tiny import write_dataset
from tests.remote.server import Server


def names(argument: str) -> list[str]:
    return [path.name for path in find_image_files([argument]).images]


def test_images_are_named_by_url_folder_pattern_and_list(server: Server, served: Path) -> None:
    write_dataset(served, sides=[(60, 60)] * 3)
    (served / "images" / "notes.md").write_text("no image")
    (served / "list.txt").write_text(f"{server.url}/images/train_2.png\nimages/train_0.png\n")
    every = ["train_0.png", "train_1.png", "train_2.png"]
    assert names(f"{server.url}/images") == every
    assert names(f"{server.url}/images/*_[12].png") == every[1:]
    assert names(f"{server.url}/**/*_0.png") == every[:1]
    assert names(f"{server.url}/images/train_1.png") == every[1:2]
    assert names(f"{server.url}/list.txt") == [every[2], every[0]]
    with pytest.raises(ConfigError, match=r"no image is there"):
        names(f"{server.url}/*.none")


def test_detections_of_remote_images_are_those_of_local_ones(
    trained_folder: Path,  # noqa: F811 - the fixture
    server: Server,
    served: Path,
    sniper: CommandLine,
) -> None:
    write_dataset(served)
    run, target = trained_folder / "run", trained_folder / "detections.json"
    found = []
    for place in (served, server.url):
        result = sniper.json(
            "predict", run, f"{place}/images", "-o", target, "--draw", trained_folder / "pictures"
        )
        assert result["num_images"] == 4
        found.append([{**row, "file_name": ""} for row in json.loads(target.read_text())])
    assert found[0] == found[1]
    assert len(list((trained_folder / "pictures").iterdir())) >= 4
    detector = Detector.load(run)
    ours = detector.predict(f"{server.url}/images/train_0.png")
    assert ours.boxes.tolist() == detector.predict(served / "images" / "train_0.png").boxes.tolist()
    scores = sniper.json("evaluate", run, f"{server.url}/train.json")
    assert scores["ap"] == sniper.json("evaluate", run, served / "train.json")["ap"]
