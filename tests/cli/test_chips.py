"""`sniper chips` and `sniper merge`: tables, chips for other trainers, their detections, and what is refused."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sniper.config.loading import load_experiment
from sniper.data.datasets import load_dataset
from sniper.data.epoch import order_chips
from sniper.geometry.boxes import to_xywh
from tests.cli.commands import SNIPER, CommandLine, start_changed
from tests.data.test_export import contents


@pytest.mark.parametrize(
    ("annotations", "output", "message"),
    [
        ("none.json", "c.npz", "none.json: cannot be read"),
        ("broken.json", "c.npz", "broken.json: is not JSON"),
        ("train.json", "none/c.npz", "there is no folder"),
        ("train.json", ".", "Is a directory"),
    ],
)
def test_paths_that_cannot_be_used_are_refused(
    folder: Path, sniper: CommandLine, annotations: str, output: str, message: str
) -> None:
    (folder / "broken.json").write_text('{"images": [1, 2,, 3]}')
    assert message in sniper.error("chips", folder / annotations, "-o", folder / output)


def test_equal_seeds_write_equal_chips(folder: Path, sniper: CommandLine) -> None:
    config = ("--config", folder / "experiment.yaml", "--images", folder / "images")
    for name in ("a.npz", "b.npz"):
        sniper.json("chips", folder / "train.json", "-o", folder / name, "--seed", 7, *config)
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()


PYRAMID = (
    "pyramid: {chip_size: 64, stride: 16, levels: [{factor: 1.5, below: 40}, {long_side: 64, at_least: 20}]}"
)


def test_fields_of_the_experiment_are_set_for_a_table(folder: Path, sniper: CommandLine) -> None:
    common = ("chips", folder / "train.json", "-o", folder / "c.npz", "--config", folder / "experiment.yaml")
    as_configured = sniper.json(*common)
    levels = "[{long_side: 64}]"
    one_level = sniper.json(*common, "--pyramid.chip_size", 64, "--pyramid.levels", levels)
    assert len(one_level["chips_per_level"]) == 1 < len(as_configured["chips_per_level"])


def entries_of(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    lines = (folder / "chips.jsonl").read_text().splitlines()[1:]
    return [entry for entry in map(json.loads, lines) if split in (None, entry["split"])]


def place_of(entry: dict[str, Any]) -> tuple[int, ...]:
    return tuple(entry[name] for name in ("image_id", "level", "x", "y"))


@pytest.fixture
def config(folder: Path) -> Path:
    path = folder / "e.yaml"
    path.write_text(PYRAMID)
    return path


@pytest.mark.parametrize("to", ["yolo", "coco"])
def test_chips_are_written_for_other_trainers(
    folder: Path, sniper: CommandLine, config: Path, to: str
) -> None:
    out = folder / "out"
    command = ("chips", folder / "train.json", "--to", to, out, "--config", config, "--dose", 0)
    result = sniper.json(*command)
    assert result["chip_size"] == 64
    assert result["levels"] == ["×1.5: up to 40 px", "long side 64: 20 px and more"]
    assert result["chips_per_split"].keys() == {"train", "val"}  # a tenth is held out
    assert result["objects_in_no_chip"] == result["num_negative_chips"] == 0
    dataset = load_dataset(out)
    assert len(dataset) == result["chips_per_split"]["train"]
    assert [category.name for category in dataset.categories] == ["dark", "bright"]
    assert {record.sides for record in dataset} == {(64, 64)}
    assert len(load_dataset(out, split="val")) == result["chips_per_split"]["val"]
    lines = (out / "chips.jsonl").read_text().splitlines()
    assert len(lines) == 1 + result["num_chips"]
    assert all((out / json.loads(line)["file_name"]).is_file() for line in lines[1:])
    again = sniper.json(*command)  # complete
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert "has chips of other images or settings" in sniper.error(*command, "--seed", 5)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_chips_are_those_of_the_epochs_of_a_training(folder: Path, sniper: CommandLine, config: Path) -> None:
    result = sniper.json(
        *("chips", folder / "train.json", "--to", "coco", folder / "out", "--config", config),
        *("--epochs", 2, "--val-as", "none", "--dose", 0, "--seed", 3),
    )
    dataset, spec = load_dataset(folder / "train.json"), load_experiment(config)
    entries = entries_of(folder / "out")
    for epoch in range(2):
        table = order_chips(dataset, spec.pyramid, batch_size=1, flip=0, seed=3, epoch=epoch).table
        written = [entry for entry in entries if entry["epoch"] == epoch]
        assert [(entry["level"], entry["x"], entry["y"]) for entry in written] == list(
            zip(table.level.tolist(), table.x.tolist(), table.y.tolist(), strict=True)
        )
    assert result["num_chips"] == len(entries)


def test_negative_chips_show_no_object_or_the_false_alarms(
    folder: Path, sniper: CommandLine, config: Path
) -> None:
    common = ("chips", folder / "train.json", "--to", "coco", "--config", config, "--val-as", "none")
    at_random = sniper.json(*common, folder / "random", "--dose", 0.5)
    assert at_random["num_negative_chips"] > 0
    entries = entries_of(folder / "random")
    assert all(entry["num_boxes"] == 0 for entry in entries if entry["is_negative"])
    alarm = {"image_id": 3, "category_id": 10, "bbox": [1, 1, 20, 20], "score": 0.9}
    (folder / "found.json").write_text(json.dumps([alarm]))
    mined = sniper.json(*common, folder / "mined", "--from", folder / "found.json", "--dose", 1)
    assert mined["num_negative_chips"] <= 1


def test_tiles_and_validation_images_are_written_as_asked(
    folder: Path, sniper: CommandLine, config: Path
) -> None:
    common = ("chips", folder / "train.json", "--to", "yolo")
    tiles = sniper.json(*common, folder / "tiles", "--data.tiles.side", 64, "--val", folder / "train.json")
    assert (tiles["chip_size"], tiles["levels"]) == (64, ["×1: all sizes"])
    for written_as in ("windows", "whole"):
        out = folder / written_as
        sniper.json(*common, out, "--config", config, "--val", folder / "train.json", "--val-as", written_as)
        val = load_dataset(out, split="val")
        assert {record.sides for record in val} == (
            {(64, 64)}
            if written_as == "windows"
            else {record.sides for record in load_dataset(folder / "train.json")}
        )
        assert len(val.boxes) > 0
    assert "of chips, not of tiles" in sniper.error(
        *common, folder / "no", "--data.tiles.side", 64, "--dose", 1
    )


def test_a_perfect_detector_on_windows_scores_one_on_whole_images(
    folder: Path, sniper: CommandLine, config: Path
) -> None:
    """The journey of another detector: chips to train on, windows to search, merging, scores."""
    chips, search, found = folder / "chips", folder / "search", folder / "found.json"
    sniper.json("chips", folder / "train.json", "--to", "yolo", chips, "--config", config)
    experiment = chips / "experiment.yaml"
    assert load_experiment(experiment).pyramid == load_experiment(config).pyramid
    result = sniper.json(
        *("chips", folder / "train.json", "--to", "coco", search, "--search", "--config", experiment)
    )
    assert result["num_labels"] == 0
    windows = sniper.json(
        *("chips", folder / "train.json", "--to", "coco", folder / "truth", "--config", config),
        *("--val", folder / "train.json", "--val-as", "windows", "--min-visibility", 0),
    )
    truth = load_dataset(folder / "truth", split="val")
    ids = {place_of(entry): entry["chip_id"] for entry in entries_of(search)}
    chip_of = {
        Path(entry["file_name"]).name: place_of(entry) for entry in entries_of(folder / "truth", "val")
    }
    assert len(ids) == result["num_chips"] == windows["chips_per_split"]["val"]
    detections = [
        {
            "image_id": ids[chip_of[record.path.name]],
            "category_id": 10 + label,
            "bbox": box,
            "score": 0.9,
        }
        for record in truth
        for box, label in zip(to_xywh(record.boxes).tolist(), record.labels.tolist(), strict=True)
    ]
    (folder / "on_windows.json").write_text(json.dumps(detections))
    merge = ("merge", folder / "on_windows.json", "--manifest", search, "-o", found)
    merged = sniper.json(*merge)
    assert merged["num_detections_on_chips"] == len(detections)
    assert merged["num_images"] == 4
    num_with = len({each["image_id"] for each in detections})
    assert merged["num_chips_without_detections"] == result["num_chips"] - num_with
    scores = sniper.json("evaluate", found, folder / "train.json")
    assert scores["ap50"] > 0.95
    assert sniper.json(*merge, "--predict.max_detections", 1)["num_detections"] == 4
    onto = ("merge", folder / "on_windows.json", "--manifest", search, "-o")
    assert "train.json: is no result file, and" in sniper.error(*onto, folder / "train.json")
    assert "is the file of the detections on chips" in sniper.error(*onto, folder / "on_windows.json")
    assert "score_threshold" in sniper.error(*merge, "--predict.score_threshold", 2)
    assert "no such option" in sniper.error(*merge, "--ranges_", "keep")
    assert "one argument too many" in sniper.error(*merge, "more.json")


def test_detections_that_seem_to_be_of_other_chips_or_classes_are_warned_of(
    folder: Path, sniper: CommandLine, config: Path
) -> None:
    search = (
        "chips",
        folder / "train.json",
        "--to",
        "coco",
        folder / "search",
        "--search",
        "--config",
        config,
    )
    printed = sniper.text(*search).out
    num_chips = len(entries_of(folder / "search"))
    assert [line.split()[0] for line in printed.splitlines()] == [
        *("chip_size", "levels", "num_images", "num_chips", "chips_skipped", "unreadable_images"),
        *("seconds", "output"),
    ]
    found = folder / "on_windows.json"
    merge = ("merge", found, "--manifest", folder / "search", "-o", folder / "found.json")
    for category_id, is_warned in ((0, False), (1, True)):
        entry = {"image_id": 1, "category_id": category_id, "bbox": [0, 0, 9, 9], "score": 0.9}
        found.write_text(json.dumps([entry]))
        err = " ".join(sniper.text(*merge, "--category-ids", "from-0").err.split())
        assert f"{num_chips - 1} of {num_chips} chips have no detection" in err
        assert ("no detection has the category_id 0, that of 'dark'" in err) is is_warned
    found.write_text(json.dumps([{**entry, "category_id": 2}]))
    assert "expected 0 (dark), 1 (bright)" in sniper.error(*merge, "--category-ids", "from-0")


def test_image_files_are_searched_with_the_classes_of_the_chips(
    folder: Path, sniper: CommandLine, config: Path
) -> None:
    chips, search = folder / "chips", folder / "search"
    sniper.json("chips", folder / "train.json", "--to", "yolo", chips, "--config", config)
    sniper.json(
        *("chips", folder / "images", "--to", "yolo", search, "--search"),
        *("--config", chips / "experiment.yaml"),
    )
    first = entries_of(search)[0]
    (folder / "labels").mkdir()
    (folder / "labels" / f"{Path(first['file_name']).stem}.txt").write_text("1 0.5 0.5 0.2 0.2 0.8\n")
    sniper.json("merge", folder / "labels", "--manifest", search, "-o", folder / "found.json")
    (found,) = json.loads((folder / "found.json").read_text())
    assert (found["image_id"], found["file_name"]) == (1, str(folder / "images" / "train_0.png"))
    assert (found["category_id"], found["category_name"]) == (11, "bright")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train.json", "expected -o FILE.npz, the chip table to write, or --to yolo|coco|voc OUT"),
        ("train.json out", "a folder of chips requires --to"),
        ("train.json -o e.yaml", "e.yaml: is no chip table, and would be replaced"),
        ("train.json -o c.npz --quality 50", "--quality requires --to"),
        ("train.json -o c.npz --pyramid.chip_size x", "--pyramid.chip_size"),
        ("train.json --to yolo", "expected the folder to write, as OUT or -o OUT"),
        ("train.json --to yolo a -o b", "expected one folder to write"),
        ("train.json --to yolo a b", "b: is one argument too many"),
        ("train.json --to yolo out --encoding png --quality 50", "--quality: is of jpeg"),
        ("train.json --to yolo out --ignored crowd", "YOLO has no regions to ignore"),
        ("train.json --to yolo images", "images: is not empty, expected a new folder"),
        ("train.json --to yolo out --search", "--search: needs the scales that the detector is trained at"),
        ("train.json --to yolo out --search --dose 1", "--dose: is of chips to train on"),
        ("train.json --to yolo out --val train.json --val-as none", "is not written with --val-as none"),
        ("train.json --to yolo out --conf 1", "--conf: sniper chips has no such option"),
        ("train.json --to yolo out --pyramid.chip_sise 64", "chip_size"),
        ("train.json --to yolo out --from none.json", "none.json: cannot be read"),
        ("none.json --to yolo out", "none.json: cannot be read"),
        ("none --to yolo out --search --config e.yaml", "none"),
        ("train.json --to yolo out --config none", "none: neither a file nor a recipe"),
    ],
)
def test_what_cannot_be_written_is_refused_in_words(
    folder: Path,
    sniper: CommandLine,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert message in sniper.error("chips", *arguments.split())
    assert not (folder / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(folder: Path, sniper: CommandLine, config: Path) -> None:
    (folder / "file").write_text("")
    out = folder / "file" / "out"
    message = sniper.error("chips", folder / "train.json", "--to", "yolo", out, "--config", config)
    assert str(folder / "file") in message


@pytest.mark.parametrize("to", ["merge", "chips"])
def test_files_that_are_not_there_are_named(folder: Path, sniper: CommandLine, to: str) -> None:
    if to == "merge":
        options = ("--manifest", folder / "none", "-o", folder / "found.json")
        assert "chips.jsonl that sniper chips --to writes" in sniper.error(
            "merge", folder / "train.json", *options
        )
    else:
        assert "none is not a folder" in sniper.error(
            "chips", folder / "train.json", "--to", "yolo", folder / "out", "--images", folder / "none"
        )


@pytest.mark.processes
def test_processes_write_equal_bytes_and_a_killed_one_is_continued(
    folder: Path, config: Path, sniper: CommandLine
) -> None:
    common = (folder / "train.json", "--to", "coco", "--config", config, "--epochs", 3)
    sniper.json("chips", *common, folder / "alone")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
    command = [*launcher, SNIPER, "chips", *common, folder / "shared", "--json"]
    together = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert together.returncode == 0, together.stderr
    slowly = (
        "import sniper.data.export as e, time; f = e._encode; e._encode = lambda *a: time.sleep(0.1) or f(*a)"
    )
    killed = start_changed(slowly, "chips", *common, folder / "killed")
    images = folder / ".killed.parts" / "images" / "train"
    while killed.poll() is None and len(list(images.glob("*.jpg"))) < 4:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert not (folder / "killed").exists()
    sniper.json("chips", *common, folder / "killed")
    expected = contents(folder / "alone")
    assert contents(folder / "shared") == contents(folder / "killed") == expected
