"""`sniper evaluate`: scores of detections and of runs, details, comparison, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sniper.config.experiment import MineSpec
from sniper.data.datasets import load_dataset
from sniper.evaluation.results import DetectionTable
from sniper.inference.calibration import Calibration, save_calibration
from sniper.inference.mining import proposals_from_detections
from sniper.runs.run import Run
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
    assert result["fp_per_image_at_90"] is result["fp_per_image_at_90_difference"] is None
    (folder / "found.json").write_text(json.dumps([{**perfect[0], "image_id": 77}]))
    message = sniper.error(*score, "--against", folder / "found.json")
    assert f"--against {folder / 'found.json'}: " in message
    assert "no image has id 77" in message
    assert "at least two images" in sniper.error(*score, "--against", folder / "half.json", "--limit", "1")


@pytest.mark.usefixtures("few_draws")
def test_false_positives_are_counted_on_clean_images_and_compared(
    folder: Path, sniper: CommandLine, perfect: list[dict[str, Any]]
) -> None:
    content = json.loads((folder / "train.json").read_text())
    clean = [{**content["images"][0], "id": 1000 + i, "file_name": f"clean_{i}.png"} for i in range(30)]
    content["images"] += clean
    num_images = len(content["images"])
    (folder / "clean.json").write_text(json.dumps(content))
    false = [{**perfect[0], "image_id": image["id"], "score": 0.95} for image in clean]
    (folder / "false.json").write_text(json.dumps(perfect + false + false[:15]))
    score = ("evaluate", folder / "false.json", folder / "clean.json")
    result = sniper.json(*score, "--against", folder / "found.json")
    assert result["num_clean_images"] == 30
    assert result["score_at_recall_90"] == 0.9
    assert result["fp_per_image_at_90"] == pytest.approx(45 / num_images)
    assert result["fp_per_clean_image_at_90"] == 1.5
    assert result["fp_per_clean_image_at_90_difference"] == 1.5
    assert 1.2 < result["fp_per_clean_image_at_90_difference_low"] < 1.5
    assert 1.5 < result["fp_per_clean_image_at_90_difference_high"] < 1.8
    out = sniper.text(*score, "--against", folder / "found.json").out
    assert "AP minus that of --against: -" in out
    assert f"{num_images} images" in out
    assert re.search(rf"90% +│ +0\.9 │ +{45 / num_images:.3f} │ +1\.500", out)
    assert re.search(r"90% +│ \+\d\.\d{3} \(.+\) +│ \+1\.500 \(\+1\.\d{3} to \+1\.\d{3}\)", out)


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


def test_precision_recall_and_confusions_are_at_one_score(folder: Path, sniper: CommandLine) -> None:
    truth = json.loads((folder / "train.json").read_text())
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    found = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 0.9}
        for entry in truth["annotations"]
    ]  # fmt: skip
    first = next(entry for entry in found if entry["category_id"] == ids["dark"])
    first["category_id"] = ids["bright"]
    far = [{**first, "bbox": [180.0, 180.0, 5.0, 5.0], "score": 0.2}]
    (folder / "found.json").write_text(json.dumps(found + far))
    score = ("evaluate", folder / "found.json", folder / "train.json")
    result = sniper.json(*score)
    point = result["operating_point"]
    assert (point["score"], point["chosen_on"], point["is_optimistic"]) == (0.55, "scored_images", True)
    assert point["recall"] == point["precision"] == pytest.approx(1 - 1 / len(found))
    assert {"object": "dark", "detected_as": "bright", "count": 1} in result["confusions"]
    assert all(row["object"] is not None for row in result["confusions"])
    lower = sniper.json(*score, "--min-score", 0.1)
    assert (lower["operating_point"]["chosen_on"], lower["ap"]) == ("min_score", result["ap"])
    assert {"object": None, "detected_as": "bright", "count": 1} in lower["confusions"]
    text = sniper.text(*score).out
    assert "AR, 100 detections" in text
    assert "score 0.55 on (at which F1 is best on these images)" in text
    assert "caution: the score was chosen on the images that are scored" in text
    assert "confusion matrix" in text
    assert "caution" not in sniper.text(*score, "--min-score", 0.1).out


def test_undefined_scores_are_null_and_dashes(folder: Path, sniper: CommandLine) -> None:
    content = json.loads((folder / "train.json").read_text())
    (folder / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    (folder / "found.json").write_text("[]")
    score = ("evaluate", folder / "found.json", folder / "empty.json")
    result = sniper.json(*score)
    assert result["ap"] is result["ap_small"] is result["ar_100"] is None
    assert result["operating_point"]["score"] is result["operating_point"]["recall"] is None
    assert result["classes"][0]["f1"] is None
    out = sniper.text(*score).out
    assert re.search(r"^AP small +–$", out, re.MULTILINE)
    assert result["fp_per_image_at_50"] is result["fp_per_clean_image_at_50"] is None
    assert re.search(r"50% +│ +– │ +– │ +–", out)
    assert "no detection matches an object" in out


def test_second_boxes_on_an_object_are_left_out_on_request(
    folder: Path, sniper: CommandLine, perfect: list[dict[str, Any]]
) -> None:
    (folder / "found.json").write_text(json.dumps(perfect + [{**entry, "score": 0.8} for entry in perfect]))
    score = ("evaluate", folder / "found.json", folder / "train.json", "--min-score", "0.5")
    assert sniper.json(*score)["operating_point"]["precision"] == pytest.approx(0.5)
    result = sniper.json(*score, "--drop-duplicates")
    assert result["operating_point"]["precision"] == 1.0
    assert result["ap"] == sniper.json(*score)["ap"]


def test_a_run_is_scored_on_its_validation_images(trained_folder: Path, sniper: CommandLine) -> None:
    run = trained_folder / "run"
    first = sniper.json("evaluate", run)
    assert first["num_images"] == 4
    assert first["num_detections"] > 0
    assert first["detections"] == str(run / "evaluation" / "detections.json")
    assert first["operating_point"]["drops_duplicates"]
    files = {path.name for path in (run / "evaluation").iterdir() if not path.name.startswith(".")}
    assert files == {"detections.json", "scores.json", "confusion.csv", "confusion.png"}
    assert json.loads((run / "evaluation" / "scores.json").read_text()) == first
    second = sniper.text("evaluate", run)
    assert "detections of the same weights and settings are in" in second.err
    hard = sniper.text("evaluate", run, "--predict.merge", "hard", "--limit", 2)
    assert "same weights" not in hard.err
    assert hard.out.splitlines()[12].startswith("2 images, ")
    of_file = sniper.json("evaluate", run / "evaluation" / "detections.json", trained_folder / "train.json")
    assert of_file["num_images"] == 4


def test_detections_of_predict_are_used_while_nothing_changes(
    trained_folder: Path, sniper: CommandLine
) -> None:
    run = trained_folder / "run"
    sniper.json("predict", run)
    result = sniper.json("evaluate", run)
    assert result["detections"] == str(run / "detections.json")
    entries = json.loads((run / "detections.json").read_text())
    (run / "detections.json").write_text(json.dumps(entries[:1]))
    assert sniper.json("evaluate", run)["detections"] == str(run / "evaluation" / "detections.json")
    assert len(json.loads((run / "detections.json").read_text())) == 1


def test_a_run_is_scored_at_the_score_of_its_validation_images(
    trained_folder: Path, sniper: CommandLine
) -> None:
    run = Run.open(trained_folder / "run")
    calibration = Calibration(
        step=int(run.checkpoints[-1].name),
        num_images=4,
        num_compared=0,
        merge="gaussian",
        soft_nms_sigma=0.55,
        merge_iou=0.5,
        min_score=0.125,
        f1=0.5,
        precision=0.5,
        recall=0.5,
    )
    save_calibration(run, calibration)
    other = ("--images", trained_folder / "images")
    of_other = sniper.json("evaluate", run.folder, trained_folder / "train.json", *other)["operating_point"]
    assert (of_other["score"], of_other["chosen_on"]) == (0.125, "validation_images")
    assert not of_other["is_optimistic"]
    assert sniper.json("evaluate", run.folder)["operating_point"]["is_optimistic"]
    out = sniper.text("evaluate", run.folder).out
    assert "score 0.125 on (at which F1 was best on the validation images of the run)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("found.json", "found.json: expected the folder of a run, or annotations after the result file"),
        ("none.json", "none.json: no such file or folder"),
        ("found.json train.json --images images", "--images requires the folder of a run"),
        ("found.json train.json --device cpu", "--device requires the folder of a run"),
        ("found.json train.json --predict.merge hard", "--predict.merge requires the folder of a run"),
        ("found.json train.json other.json", "other.json: expected one data set, after train.json"),
        ("found.json train.json --detials", "--detials: no such option"),
        ("found.json train.json --min-score 2", "--min-score"),
        ("images train.json", "images"),
    ],
)
@pytest.mark.usefixtures("perfect")
def test_detections_with_options_of_a_run_are_refused(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    assert message in sniper.error("evaluate", *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --split val", "--split requires annotations"),
        ("run --images images", "--images requires annotations"),
        ("run --data.test.annotations x.json", "--data.test.annotations: sniper evaluate has no such option"),
    ],
)
def test_options_of_another_data_set_need_one(
    trained_folder: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(trained_folder)
    assert message in sniper.error("evaluate", *arguments.split())


def test_a_run_without_validation_images_asks_for_a_data_set(
    trained_folder: Path, sniper: CommandLine
) -> None:
    config = trained_folder / "run" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["data"]["test"] = {}
    config.write_text(yaml.safe_dump(content))
    assert "sniper evaluate" in sniper.error("evaluate", trained_folder / "run")


@pytest.fixture
def store(folder: Path, perfect: list[dict[str, Any]]) -> Path:
    """Return a folder of proposals: a box on every object of the first image and of no other."""
    first = perfect[0]["image_id"]
    dataset = load_dataset(folder / "train.json", has_images=False)
    table = DetectionTable.from_entries([entry for entry in perfect if entry["image_id"] == first])
    (folder / "first.json").write_text("[]")
    proposals_from_detections(
        table, dataset, folder / "proposals", spec=MineSpec(nms_iou=0.99), source=folder / "first.json"
    )
    return folder / "proposals"


def test_proposals_of_a_folder_have_the_recall_of_the_same_results(
    folder: Path, sniper: CommandLine, perfect: list[dict[str, Any]], store: Path
) -> None:
    first = perfect[0]["image_id"]
    of_first = [{**entry, "category_id": 77} for entry in perfect if entry["image_id"] == first]
    (folder / "first.json").write_text(json.dumps(of_first))
    result = sniper.json("evaluate", "--proposals", store, folder / "train.json")
    assert result == sniper.json("evaluate", folder / "first.json", folder / "train.json", "--proposals")
    assert result["num_proposals"] == len(of_first)
    every = result["sizes"][0]
    assert every["num_objects"] == len(perfect)
    for limit in (100, 300, 1000):
        assert every[f"recall_50_{limit}"] == pytest.approx(len(of_first) / len(perfect))
    alone = sniper.json("evaluate", "--proposals", store, folder / "train.json", "--limit", 1)
    assert (alone["num_images"], alone["sizes"][0]["ar_100"]) == (1, pytest.approx(1.0))
    out = sniper.text("evaluate", "--proposals", store, folder / "train.json").out
    assert re.search(rf"all +│ +{len(perfect)} │ +0\.\d{{3}} │", out)
    assert re.search(r"large +│ +0 │ +– │", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("proposals", "proposals: expected a data set after it"),
        ("none train.json", "none: no such file or folder"),
        ("proposals other.json", "proposals of other images than those of"),
        ("images train.json", "contains no proposals"),
        (
            "unknown.json train.json",
            "unknown.json: the detections: do not match the annotations: no image has id 77",
        ),
        ("proposals train.json --min-score 0.5", "--min-score is not used with --proposals"),
        ("proposals train.json --max-detections 300", "--max-detections is not used with --proposals"),
        ("proposals train.json --predict.merge hard", "--predict.merge is not used with --proposals"),
    ],
)
def test_proposals_that_cannot_be_scored_are_refused(
    folder: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    perfect: list[dict[str, Any]],
    store: Path,
    arguments: str,
    message: str,
) -> None:
    content = json.loads((folder / "train.json").read_text())
    (folder / "other.json").write_text(json.dumps({**content, "annotations": content["annotations"][1:]}))
    (folder / "unknown.json").write_text(json.dumps([{**perfect[0], "image_id": 77}]))
    monkeypatch.chdir(store.parent)
    assert message in sniper.error("evaluate", "--proposals", *arguments.split())


def test_proposals_of_a_run_are_scored_on_its_training_images(
    trained_folder: Path, sniper: CommandLine
) -> None:
    run = trained_folder / "run"
    mined = sniper.json("mine", run, "--source", "rpn")
    result = sniper.json("evaluate", "--proposals", run / "proposals")
    assert result["num_proposals"] == mined["num_proposals"]
    assert result["num_images"] == mined["num_images"]
    message = sniper.error("evaluate", "--proposals", run, trained_folder / "train.json")
    assert f"is the folder of a run, expected one of proposals, such as {run / 'proposals'}" in message
    sniper.json("mine", run, "--source", "self")
    message = sniper.error("evaluate", "--proposals", run / "false_alarms")
    assert "false_alarms: has false alarms, which are on no object; expected proposals" in message
