"""`sniper focus`: a table, a choice that the other commands use, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sniper.cli import run
from sniper.config.experiment import FocusSpec
from sniper.config.loading import load_experiment
from sniper.inference.focus_choice import FocusChoice, hash_levels, save_focus
from sniper.runs.run import Run
from tests.cli.commands import CommandLine


def test_a_choice_is_written_and_used(sniper: CommandLine, trained_folder: Path) -> None:
    run = trained_folder / "run"
    answer = sniper.json("focus", run, "--loss", "0.99")
    whole, *others = answer["curve"]
    assert (whole["window"], whole["pixel_share"]) == (None, 1.0)
    assert all(point["pixel_share"] <= 1 for point in others)
    chosen = json.loads((run / "focus.json").read_text())
    assert chosen["focus"] == {name: answer["chosen"][name] for name in ("min_score", "window", "cues")}
    assert chosen["num_images"] == answer["num_images"] == 4
    assert f"focus: windows of {chosen['focus']['window']} pixels" in sniper.text("predict", run).err
    printed = sniper.text("evaluate", run).err
    assert "(detections), as chosen on 4 images: " in printed
    with_focus = sniper.json("predict", run)
    without = sniper.json("predict", run, "--predict.focus", "null")
    given = sniper.json("predict", run, "--predict.focus", json.dumps(chosen["focus"]))
    assert with_focus["num_detections"] == given["num_detections"] <= without["num_detections"]
    pictures = trained_folder / "pictures"
    text = sniper.text("focus", run, "--loss", "0.99", "--limit", "2", "--draw", pictures).out
    assert len([*pictures.glob("*.jpg")]) == 2
    assert (pictures / "curve.png").exists()
    page = (pictures / "focus.html").read_text()
    assert f"sniper predict {run} IMAGES" in page
    assert len(re.findall("<figure>", page)) == 2
    assert page.count('<tr class="chosen">') == 1
    assert page.count("<tr") == 1 + len(answer["curve"])
    assert f"page: {pictures / 'focus.html'}" in text
    assert "chosen on 2 images" in text
    assert re.search(r"^ *all +100%", text, re.MULTILINE)
    assert "chosen" in text


def test_a_run_with_a_focus_head_is_searched_by_it(sniper: CommandLine, folder: Path) -> None:
    run = folder / "run"
    sniper.json(
        *("train", folder / "experiment.yaml", "--run", run, "--train.epochs", "0.2", "--model.focus", "true")
    )
    answer = sniper.json("focus", run, "--loss", "0.99")
    assert {point["cues"] for point in answer["curve"][1:]} == {"detections", "head"}
    answer = sniper.json("focus", run, "--loss", "0.99", "--cues", "head")
    assert {point["cues"] for point in answer["curve"][1:]} == {"head"}
    assert json.loads((run / "focus.json").read_text())["focus"]["cues"] == "head"
    assert sniper.json("predict", run)["num_images"] == 4
    for command in (("export", run, folder / "model.onnx"), ("predict", run, "--engine", "onnx")):
        error = sniper.error(*command)
        assert "the focus head is no part of an exported graph" in error
        assert "--cues detections" in error


@pytest.mark.parametrize("options", [(), ("--speed-up", "2")])
@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (None, "images.json: has no objects to score"),
        ([], "images.json: has no objects to score"),
        ([{"bbox": [5, 5, 12, 12], "iscrowd": 1}], "images.json: has no objects to score"),
        (
            [{"bbox": [5, 5, 60, 60]}, {"bbox": [5, 5, 12, 12], "iscrowd": 1}],
            "of a level that a focus searches less of ([16, 40), [0, 24) pixels)",
        ),
    ],
)
def test_images_that_do_not_show_what_a_focus_loses_are_refused(
    sniper: CommandLine,
    trained_folder: Path,
    annotations: list[dict[str, Any]] | None,
    message: str,
    options: tuple[str, ...],
) -> None:
    truth = json.loads((trained_folder / "train.json").read_text())
    del truth["annotations"]
    if annotations is not None:
        truth["annotations"] = [
            {"id": number, "image_id": 1, "category_id": 10, "area": 9} | each
            for number, each in enumerate(annotations)
        ]
    path = trained_folder / "images.json"
    path.write_text(json.dumps(truth))
    pictures = trained_folder / "pictures"
    assert run(["focus", str(trained_folder / "run"), str(path), "--draw", str(pictures), *options]) == 2
    assert message in " ".join(sniper.capsys.readouterr().err.split())
    assert not (trained_folder / "run" / "focus.json").exists()
    assert not pictures.exists()


def test_a_detector_that_finds_no_more_than_may_be_lost_is_refused(
    sniper: CommandLine, trained_folder: Path
) -> None:
    folder = trained_folder / "run"
    error = sniper.error("focus", folder)
    assert "train.json: the AP of a whole search is 0.001, no more than what may be lost (0.005)" in error
    truth = json.loads((trained_folder / "train.json").read_text())
    small = {"id": 1, "image_id": 1, "category_id": 10, "area": 36, "bbox": [0, 110, 6, 6]}
    path = trained_folder / "one.json"
    path.write_text(json.dumps(truth | {"annotations": [small]}))
    error = sniper.error("focus", folder, path, "--speed-up", "2")
    assert "one.json: a whole search finds none of its objects (AP 0.000)" in error
    assert not (folder / "focus.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cues", "head"), "was trained without a focus head (model.focus)"),
        (("--loss", "0.1", "--speed-up", "2"), "either --loss or --speed-up"),
        (("--split", "val"), "--split requires a data set"),
        (("--speed-up", "1"), "must be > 1"),
        (("--draw", "images"), "pictures would be among the images in"),
    ],
)
def test_mistakes_are_refused(
    sniper: CommandLine,
    trained_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(trained_folder)
    assert message.lower() in sniper.error("focus", trained_folder / "run", *options).lower()


def test_a_focus_that_is_not_used_is_told(sniper: CommandLine, trained_folder: Path) -> None:
    folder = trained_folder / "run"
    assert "focus: " not in sniper.text("predict", folder).err
    choice = FocusChoice(
        step=1,
        levels=hash_levels(load_experiment(folder / "config.yaml").predict.levels),
        focus=FocusSpec(min_score=0.4, window=128),
        num_images=4,
        pixel_share=0.5,
        time_share=0.5,
        ap=0.4,
        ap_whole=0.4,
    )
    save_focus(Run(folder), choice)
    one_level = ("--predict.levels", "[{factor: 1}]")
    unused = (
        "focus: every level is searched as a whole: {} was chosen for {}; choose anew with sniper focus {}"
    )
    path = folder / "focus.json"
    for command in ("predict", "evaluate"):
        assert (
            "pixels where scores sum to 0.4 (detections), as chosen on 4" in sniper.text(command, folder).err
        )
        told = unused.format(path, "other levels (predict.levels)", folder)
        assert told in sniper.text(command, folder, *one_level).err
        assert "focus: " not in sniper.text(command, folder, "--predict.focus", "null").err
        given = ("--predict.focus", "{min_score: 0.1, window: 128}")
        assert (
            "focus: windows of 128 pixels where scores sum to 0.1" in sniper.text(command, folder, *given).err
        )
        assert "predict.focus: has no effect on one level" in sniper.error(
            command, folder, *one_level, *given
        )
    save_focus(Run(folder), replace(choice, step=7))
    assert unused.format(path, "the weights of step 7", folder) in sniper.text("predict", folder).err


def test_a_run_of_one_level_is_refused(sniper: CommandLine, trained_folder: Path) -> None:
    config = trained_folder / "run" / "config.yaml"
    text = config.read_text()
    start = text.index("  levels:", text.index("\npredict:"))
    end = text.index("  merge:", start)
    config.write_text(text[:start] + "  levels:\n  - {factor: 1.0}\n" + text[end:])
    assert "searches one level (predict.levels)" in sniper.error("focus", trained_folder / "run")
