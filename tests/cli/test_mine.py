"""`sniper mine`: false alarms, proposals and detections of any detector, as stores and as images for others."""

import json
from pathlib import Path

import pytest

from sniper.data.datasets import load_dataset
from tests.cli.commands import CommandLine
from tests.data.tiny import write_dataset


@pytest.fixture
def detected(tmp_path: Path) -> Path:
    """Return a folder with `train.json`, whose last image has no object, and `found.json`.

    The detections are each object, and four false alarms in each image.
    """
    path = write_dataset(tmp_path, sides=((160, 120), (200, 200), (90, 70)), boxes_per_image=2)
    content = json.loads(path.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 3]
    path.write_text(json.dumps(content))
    boxes = [(entry["image_id"], entry["bbox"]) for entry in content["annotations"]]
    boxes += [(image, [x, y, 9, 9]) for image in (1, 2, 3) for x in (0, 60) for y in (0, 55)]
    detections = [
        {"image_id": image, "category_id": 10, "bbox": box, "score": 0.9 - 0.01 * number}
        for number, (image, box) in enumerate(boxes)
    ]
    detections += [{**detections[-1], "bbox": [30, 30, 8, 8], "score": 0.01}]
    (tmp_path / "found.json").write_text(json.dumps(detections))
    return tmp_path


def test_a_run_mines_its_own_false_alarms_or_proposals(trained_folder: Path, sniper: CommandLine) -> None:
    run = trained_folder / "run"
    alarms = sniper.json("mine", run)
    assert alarms["output"] == str(run / "false_alarms")
    assert alarms["num_false_alarms"] >= alarms["num_false_alarms_without_objects"] == 0
    assert (run / "false_alarms" / "head.json").exists()
    proposals = sniper.json("mine", run, "--source", "rpn")
    assert proposals["output"] == str(run / "proposals")
    assert proposals["num_proposals"] > 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("source: none", "source: rpn"))
    assert sniper.json("mine", run)["num_proposals"] == proposals["num_proposals"]


def test_detections_of_any_detector_become_proposals(trained_folder: Path, sniper: CommandLine) -> None:
    sniper.json("predict", trained_folder / "run")
    detections = ("--source", "rpn", "--from", trained_folder / "run" / "detections.json")
    result = sniper.json("mine", trained_folder / "run", *detections, "-o", trained_folder / "proposals")
    assert result["num_proposals"] > 0
    with_images = (trained_folder / "train.json", "--images", trained_folder / "images")
    again = sniper.json(
        "mine", trained_folder / "run", *with_images, *detections, "-o", trained_folder / "again"
    )
    assert again["num_proposals"] == result["num_proposals"]


def test_false_alarms_of_any_detector_are_collected_without_a_run(
    detected: Path, sniper: CommandLine
) -> None:
    mined = ("mine", detected / "train.json", "--from", detected / "found.json")
    result = sniper.json(*mined, "-o", detected / "alarms")
    assert result["num_images_without_objects"] == 1
    assert result["false_alarms_per_image_without_objects"] == 4
    assert 4 < result["num_false_alarms"] <= 12
    everything = sniper.json(*mined, "--source", "rpn", "-o", detected / "all")["num_proposals"]
    assert everything >= result["num_false_alarms"] + 4
    (detected / "e.yaml").write_text("pyramid: {chip_size: 64, stride: 16, levels: [{long_side: 64}]}")
    options = ("--config", detected / "e.yaml", "--proposals", detected / "alarms")
    chips = sniper.json("chips", detected / "train.json", "-o", detected / "chips.npz", *options)
    assert chips["negative_chips_pool"] == 1  # of the image without objects


@pytest.mark.parametrize("to", ["coco", "yolo"])
def test_negative_chips_are_written_for_other_trainers(detected: Path, sniper: CommandLine, to: str) -> None:
    (detected / "e.yaml").write_text("pyramid: {chip_size: 64, stride: 16, levels: [{long_side: 64}]}")
    mined = ("mine", detected / "train.json", "--from", detected / "found.json", "--to", to, "--dose", "9")
    result = sniper.json(*mined, "-o", detected / "out", "--config", detected / "e.yaml")
    assert (result["chip_size"], result["num_negative_chips"]) == (64, 1)
    written = load_dataset(detected / "out")
    assert [record.path.name for record in written] == ["train_2_level0_0_0_90_70.png"]
    assert written[0].sides == (64, 50)  # without padding
    assert len(written.boxes) == 0
    assert not [path for path in detected.iterdir() if path.name.startswith(".")]
    assert "out: is not empty, expected a new folder" in sniper.error(*mined, "-o", detected / "out")


def test_the_suggested_pyramid_is_printed(detected: Path, sniper: CommandLine) -> None:
    mined = (
        "mine",
        detected / "train.json",
        "--from",
        detected / "found.json",
        "--to",
        "yolo",
        "--dose",
        "9",
    )
    printed = sniper.text(*mined, "-o", detected / "out")
    assert "pyramid: Chips of " in printed.err
    assert "num_windows_with_objects" in printed.out
    plan = sniper.json("plan", detected / "train.json", "-o", detected / "plan")
    assert f"chip_size {plan['suggestions'][0]['chip_size']} levels" in " ".join(printed.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none", "there is no run"),
        ("run --images images", "--images requires ANNOTATIONS"),
        ("run -o images", "something else than proposals"),
        ("run --from train.json", "expected a list of detections"),
        (
            "train.json",
            "train.json: there is no run; expected its folder, not a file; a data set may take its place",
        ),
        (
            "train.json --from found.json",
            "train.json is no run to write into; name a folder to write with -o FOLDER",
        ),
        (
            "train.json train.json --from found.json -o out",
            "train.json is no run (config.yaml is missing), and a sec",
        ),
        ("run --config experiment.yaml", "run is a run, which has its own settings in config.yaml"),
        ("run --dose 0.5", "--dose requires --to"),
        ("run --to yolo --dose 0 -o out", "--dose"),
        ("run --to yolo", "--to yolo requires -o FOLDER"),
        ("run --to yolo -o images", "images: is not empty, expected a new folder"),
        (
            "run --to yolo -o out --source rpn",
            "windows with false alarms, not with proposals; add --source self",
        ),
        ("run --to png -o out", "png"),
        ("run --from none.json --to yolo -o out", "none.json: cannot be read"),
        (
            "run --from found.json --to yolo -o out",
            "there is no negative chip to write: 0 windows have false alarms",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    trained_folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(trained_folder)
    (trained_folder / "found.json").write_text("[]")
    before = sorted(trained_folder.iterdir())
    assert message in sniper.error("mine", *arguments.split())
    assert sorted(trained_folder.iterdir()) == before


def test_an_rpn_has_no_false_alarms_of_its_own(trained_folder: Path, sniper: CommandLine) -> None:
    config = trained_folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("rpn_only: false", "rpn_only: true"))
    message = sniper.error("mine", trained_folder / "run", "--source", "self")
    assert "has trained the RPN only (train.rpn_only)" in message
