"""`sniper mine`: proposals from detections of any detector, and what it refuses."""

from pathlib import Path

import pytest

from tests.cli.commands import CommandLine


def test_detections_of_any_detector_become_proposals(trained_folder: Path, sniper: CommandLine) -> None:
    sniper.json("predict", trained_folder / "run")
    detections = ("--from", trained_folder / "run" / "detections.json")
    result = sniper.json("mine", trained_folder / "run", *detections, "-o", trained_folder / "proposals")
    assert result["num_proposals"] > 0
    with_images = (trained_folder / "train.json", "--images", trained_folder / "images")
    again = sniper.json(
        "mine", trained_folder / "run", *with_images, *detections, "-o", trained_folder / "again"
    )
    assert again["num_proposals"] == result["num_proposals"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none", "there is no run"),
        ("run --images images", "--images requires ANNOTATIONS"),
        ("run -o images", "something else than proposals"),
        ("run --from train.json", "expected a list of detections"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(trained_folder)
    assert message in sniper.error("mine", *arguments.split())
