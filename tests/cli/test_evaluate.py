"""`sniper evaluate`: scores, details, comparison, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import CommandLine
from tests.data.tiny import write_dataset


@pytest.fixture
def perfect(folder: Path) -> list[dict[str, Any]]:
    """Return detections equal to the annotations, also written to `found.json`."""
    truth = json.loads((folder / "train.json").read_text())
    detections = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 0.9}
        for entry in truth["annotations"]
    ]  # fmt: skip
    (folder / "found.json").write_text(json.dumps(detections))
    return detections


def test_detections_are_compared_with_others(
    folder: Path, sniper: CommandLine, perfect: list[dict[str, Any]]
) -> None:
    (folder / "half.json").write_text(json.dumps(perfect[::2]))
    score = ("evaluate", folder / "half.json", folder / "train.json")
    result = sniper.json(*score, "--against", folder / "found.json")
    assert result["ap_difference"] == pytest.approx(result["ap"] - 1.0)
    assert result["ap_difference_low"] <= result["ap_difference"] <= result["ap_difference_high"] < 0
    (folder / "found.json").write_text(json.dumps([{**perfect[0], "image_id": 77}]))
    message = sniper.error(*score, "--against", folder / "found.json")
    assert f"--against {folder / 'found.json'}: " in message
    assert "no image has id 77" in message
    assert "at least two images" in sniper.error(*score, "--against", folder / "half.json", "--limit", "1")


@pytest.mark.usefixtures("perfect")
def test_crowds_are_scored_as_objects_on_request(folder: Path, sniper: CommandLine) -> None:
    content = json.loads((folder / "train.json").read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    (folder / "crowds.json").write_text(json.dumps(content))
    score = ("evaluate", folder / "found.json", folder / "crowds.json")
    assert sniper.json(*score)["ap"] is None
    assert sniper.json(*score, "--crowds", "objects")["ap"] == pytest.approx(1.0)
    convert = ("convert", folder / "crowds.json", "--to", "yolo", "--images", "none")
    assert "crowds" in sniper.text(*convert, folder / "without").err
    assert sniper.text(*convert, folder / "with", "--crowds", "objects").err == ""


@pytest.mark.usefixtures("perfect")
def test_details_are_one_json_object(folder: Path, sniper: CommandLine) -> None:
    score = ("evaluate", folder / "found.json", folder / "train.json")
    result = sniper.json(*score, "--details", "--sizes", 0, 20, 40, "--curve", folder / "curve.png")
    assert result["ap"] == pytest.approx(1.0)
    assert [(bin_["at_least"], bin_["below"]) for bin_ in result["sizes"]] == [(0, 20), (20, 40), (40, None)]
    assert {scores["name"] for scores in result["classes"]} == {"dark", "bright"}
    assert result["false_positives_per_image"]["at_recall_0.9"] is not None
    assert (folder / "curve.png").stat().st_size > 5000


def test_details_are_tables_and_cut_detections_a_warning(
    folder: Path, sniper: CommandLine, perfect: list[dict[str, Any]]
) -> None:
    score = ("evaluate", folder / "found.json", folder / "train.json", "--max-detections", "10")
    printed = sniper.text(*score, "--details")
    assert "by size of the object" in printed.out
    assert "warning" not in printed.err
    (folder / "found.json").write_text(json.dumps(perfect * 12))
    warning = r"warning: \d+ times an image has more than 10 detections"
    assert re.search(warning, sniper.text(*score).err)


@pytest.mark.usefixtures("perfect")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("found.json broken.json", "line 1, column 18"),
        ("incomplete.json train.json", "category_id"),
        ("found.json train.json --details --sizes 9 4", "expected rising numbers"),
        ("found.json train.json --details --sizes nan", "expected rising numbers"),
        ("found.json train.json --sizes 0 9", "together with --details"),
        ("found.json train.json --curve none/c.png", "there is no folder"),
        ("found.json train.json --curve c.xyz", "expected a name that ends in .png"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    (folder / "broken.json").write_text('{"images": [1, 2,, 3]}')
    (folder / "incomplete.json").write_text('[{"image_id": 99}]')
    monkeypatch.chdir(folder)
    assert message in sniper.error("evaluate", *arguments.split())


def test_other_ids_of_the_same_classes_are_noticed(folder: Path, sniper: CommandLine) -> None:
    write_dataset(folder, sides=((200, 200),) * 12, boxes_per_image=8)
    truth = json.loads((folder / "train.json").read_text())
    detections = [
        {**entry, "category_id": 21 - entry["category_id"], "score": 0.9} for entry in truth["annotations"]
    ]
    (folder / "found.json").write_text(json.dumps(detections))
    err = sniper.text("evaluate", folder / "found.json", folder / "train.json").err
    assert "categories of the detections look exchanged" in err


@pytest.mark.usefixtures("perfect")
def test_class_names_are_printed_as_text(folder: Path, sniper: CommandLine) -> None:
    text = (folder / "train.json").read_text()
    names = ("[red]x[/red]:car:[/]", "\x1b[31m图\udcb2")
    for old, new in zip(("dark", "bright"), names, strict=True):
        text = text.replace(json.dumps(old), json.dumps(new))
    (folder / "train.json").write_text(text)
    score = ("evaluate", folder / "found.json", folder / "train.json", "--details")
    out = sniper.text(*score).out
    assert "[red]x[/red]:car:[/]" in out
    assert r"\x1b[31m图\xb2" in out
    assert {row["name"] for row in sniper.json(*score)["classes"]} == set(names)
