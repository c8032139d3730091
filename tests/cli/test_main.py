"""The journey by command line, and what a user's mistakes are answered with."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sniper.cli.main import run
from sniper.config.loading import dump_experiment, load_experiment
from sniper.runs.run import Run
from tests.data.tiny import write_dataset, write_image
from tests.training.experiments import tiny_experiment

SNIPER = str(Path(sys.executable).parent / "sniper")
PATIENCE = 600  # seconds after which a process hangs; a busy machine is no fault


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    (tmp_path / "experiment.yaml").write_text(dump_experiment(tiny_experiment(tmp_path / "train.json")))
    return tmp_path


def ask(capsys: pytest.CaptureFixture[str], *tokens: object) -> dict[str, Any]:
    """Run a command with --json; its standard output must be one JSON object and nothing else."""
    code = run([*map(str, tokens), "--json"])
    answer = capsys.readouterr()
    assert code == 0, answer.err
    loaded = json.loads(answer.out)
    assert isinstance(loaded, dict)
    return loaded


def test_from_annotations_to_scores(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, folder = world / "train.json", world / "run"

    chips = ask(
        capsys, "chips", annotations, "-o", world / "chips.npz", "--config", world / "experiment.yaml"
    )
    assert chips["num_images"] == 4
    assert chips["num_boxes"] == 12
    assert sum(chips["chips_per_level"]) == chips["num_chips"] > 0
    assert (world / "chips.npz").is_file()

    trained = ask(capsys, "train", world / "experiment.yaml", "--run", folder, "--train.epochs", "0.5")
    assert trained["step"] > 0
    further = ask(capsys, "train", world / "experiment.yaml", "--run", folder, "--resume", "--train.epochs=1")
    assert further["step"] > trained["step"]

    found = ask(capsys, "predict", folder, "--draw", world / "drawn")  # the experiment names what to test on
    assert found["num_images"] == 4
    assert found["num_detections"] > 0
    assert len(list((world / "drawn").glob("*.png"))) == 4

    scores = ask(capsys, "evaluate", folder / "detections.json", annotations)
    assert 0 <= scores["ap"] <= 1
    assert scores["num_images"] == 4
    ask(capsys, "predict", folder, "--annotations", annotations, "--limit", "2", "-o", world / "two.json")
    assert ask(capsys, "evaluate", world / "two.json", annotations, "--limit", 2)["num_images"] == 2

    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "detections.json",
    }


PLAN_KEYS = {
    "num_images", "num_boxes", "chips_per_image", "chips_per_level", "megapixels_per_image", "pixel_ratio_800x1333",
    "uncovered_boxes", "moved_boxes", "seconds",
}  # fmt: skip


def test_a_plan_suggests_an_experiment_that_trains(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, config = world / "train.json", world / "experiment.yaml"
    told = ask(
        capsys,
        "plan",
        annotations,
        "--config",
        config,
        "-o",
        world / "plan",
        "--share",
        "0.9",
        "--levels",
        "2",
    )
    assert told.keys() >= PLAN_KEYS
    assert told["uncovered_boxes"] == 0
    assert (world / "plan" / "plan.html").is_file()
    suggested = load_experiment(world / "plan" / "suggested.yaml")
    assert len(suggested.pyramid.levels) == len(told["suggestions"][0]["levels"]) == 2
    assert suggested.train == load_experiment(config).train

    table = world / "chips.npz"
    chips = ask(capsys, "chips", annotations, "-o", table, "--config", world / "plan" / "suggested.yaml")
    assert chips.keys() >= PLAN_KEYS
    assert chips["chips_per_image"] == told["suggestions"][0]["chips_per_image"]
    trained = ask(
        capsys, "train", world / "plan" / "suggested.yaml", "--run", world / "run", "--data.chips", table,
        "--train.epochs", "0.5",
    )  # fmt: skip
    assert trained["step"] > 0
    assert "made with another pyramid" in refused(
        world, capsys, "train", config, "--run", world / "other", "--data.chips", table
    )


def test_negative_chips_are_mined_planned_and_trained_on(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, config, folder = world / "train.json", world / "experiment.yaml", world / "run"
    mined = ["--negatives.source", "mined", "--negatives.min_proposals", "[1]", "--mine.rpn_epochs", "1"]
    trained = ask(capsys, "train", config, "--run", folder, *mined, "--train.epochs", "0.5")
    assert trained["step"] > 0
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "rpn", "mined", "chips_000.npz"
    }  # fmt: skip
    further = ask(capsys, "train", config, "--run", folder, *mined, "--resume", "--train.epochs", "1")
    assert further["step"] > trained["step"]

    told = ask(capsys, "mine", folder / "rpn", "-o", world / "found")
    assert told["missing_shards"] == 0
    assert told["num_proposals"] > 0
    options = ["--config", folder / "config.yaml", "--proposals", world / "found"]
    chips = ask(capsys, "chips", annotations, "-o", world / "chips.npz", *options)
    assert chips["negative_chips_pool"] >= chips["negative_chips_per_epoch"] > 0
    plan = ask(capsys, "plan", annotations, *options, "-o", world / "plan", "--share", "0.5", "--levels", "2")
    assert plan["negative_chips_pool"] == chips["negative_chips_pool"]
    page = (world / "plan" / "plan.html").read_text()
    assert "Dashed: negative chips" in page
    assert "stroke-dasharray" in page
    ask(
        capsys, "train", config, "--run", world / "other", "--data.chips", world / "chips.npz",
        "--train.epochs", "0.5",
    )  # fmt: skip
    first = json.loads((world / "other" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["negative_chips"] == chips["negative_chips_per_epoch"]

    ask(capsys, "predict", folder, "--annotations", annotations, "-o", world / "detections.json")
    taken = ask(capsys, "mine", folder, "--from", world / "detections.json", "-o", world / "taken")
    assert taken["missing_shards"] == 0
    assert "has trained its proposals only" in refused(world, capsys, "predict", folder / "rpn")
    assert "something else than proposals" in refused(world, capsys, "mine", folder, "-o", world)
    assert "holds no proposals" in refused(
        world, capsys, "plan", annotations, "--proposals", world, "-o", world / "p"
    )


def test_a_plan_is_told_in_tables(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    assert run(["plan", "train.json", "--share", "0.9", "--levels", "2"]) == 0
    out = capsys.readouterr().out
    for words in (
        "12 boxes to cover",
        "×1.667",
        "one pass at 800×1333",
        "as planned",
        f"plans/{world.name}_train/plan.html",
    ):
        assert words in out
    assert (world / "plans" / f"{world.name}_train" / "suggested.yaml").is_file()


def test_image_files_are_searched_without_annotations(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(world / "other.png", width=320, height=16)
    ask(capsys, "train", world / "experiment.yaml", "--run", world / "run", "--train.epochs", "0.2")
    output = world / "found" / "here.json"
    found = ask(capsys, "predict", world / "run", world / "other.png", "-o", output)
    assert found["num_images"] == 1
    entries = json.loads(output.read_text())
    assert {(entry["image_id"], entry["file_name"]) for entry in entries} == {(1, str(world / "other.png"))}


def test_folders_patterns_and_lists_stand_for_their_images(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(capsys, "train", world / "experiment.yaml", "--run", world / "run", "--train.epochs", "0.2")
    (world / "shots" / "deep").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "deep/c.JPG"):
        write_image(world / "shots" / name, width=40, height=30)
    (world / "shots" / "notes.md").write_text("no image")
    (world / "list.txt").write_text("shots/b.png\n\nshots/a.jpg\n")

    def searched(*tokens: object) -> list[str]:
        ask(capsys, "predict", world / "run", *tokens, "-o", world / "found.json")
        found = json.loads((world / "found.json").read_text())
        return list(dict.fromkeys(Path(entry["file_name"]).name for entry in found))

    assert searched(world / "shots") == ["a.jpg", "b.png", "c.JPG"]
    assert searched(world / "list.txt") == ["b.png", "a.jpg"]
    assert searched(world / "shots" / "**" / "*.JPG", world / "shots" / "b.png") == ["c.JPG", "b.png"]
    assert searched(world / "shots" / "b.png", world / "shots") == ["b.png", "a.jpg", "c.JPG"]
    assert searched(world / "shots" / "**") == ["a.jpg", "b.png", "c.JPG"]
    (world / "list.txt").write_bytes(b"\xef\xbb\xbfshots/b.png")
    assert searched(world / "list.txt") == ["b.png"]
    shots = ("predict", world / "run", world / "shots")
    assert "goes with --annotations" in refused(world, capsys, *shots, "--image-root", world)
    assert "is a folder, wanted a file" in refused(world, capsys, *shots, "-o", world / "shots")
    assert "has no name" in refused(world, capsys, "predict", world / "run", "")
    assert "there is no image" in refused(world, capsys, "predict", world / "run", world / "*.webp")
    assert "there is no image" in refused(world, capsys, "predict", world / "run", world / "run")


def test_a_search_that_met_a_bad_image_goes_on_where_it_was(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(capsys, "train", world / "experiment.yaml", "--run", world / "run", "--train.epochs", "0.2")
    whole = ask(capsys, "predict", world / "run", world / "images")
    expected = (world / "run" / "detections.json").read_bytes()
    bad = world / "images" / "train_2.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:300])
    assert "train_2.png: cannot be read" in refused(world, capsys, "predict", world / "run", world / "images")
    bad.write_bytes(content)
    resumed = ask(capsys, "predict", world / "run", world / "images", "--resume")
    assert resumed["num_detections"] == whole["num_detections"]
    assert (world / "run" / "detections.json").read_bytes() == expected


def test_pictures_are_not_drawn_with_the_categories_of_others(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(capsys, "train", world / "experiment.yaml", "--run", world / "run", "--train.epochs", "0.2")
    content = json.loads((world / "train.json").read_text())
    content["categories"].append({"id": 99, "name": "other"})
    (world / "other.json").write_text(json.dumps(content))
    search = ("predict", world / "run", "--annotations", world / "other.json")
    assert "other.json has other categories" in refused(world, capsys, *search, "--draw", world / "drawn")
    ask(capsys, *search, "--limit", "1")


def test_images_that_are_to_be_skipped_are_listed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = world / "experiment.yaml"
    bad = world / "images" / "train_2.png"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.warns(UserWarning, match=r"train_2\.png: .*; skipped"):
        ask(
            capsys,
            "train",
            config,
            "--run",
            world / "run",
            "--data.on_bad_image",
            "skip",
            "--data.num_workers",
            "0",
        )
    metrics = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(entry.get("skipped_chips", 0) for entry in metrics) > 0
    with pytest.warns(UserWarning, match=r"train_2\.png: .*; skipped"):
        found = ask(capsys, "predict", world / "run", "--draw", world / "drawn")
    assert [Path(path).name for path in found["skipped_images"]] == ["train_2.png"]
    assert len(list((world / "drawn").iterdir())) == 3


def test_a_check_reads_every_pixel_and_names_all_that_is_wrong(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(capsys, "check", world / "train.json")["num_images"] == 4
    cut = world / "images" / "train_1.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    (world / "images" / "train_3.png").unlink()
    message = refused(world, capsys, "check", world / "train.json")
    assert "2 bad images" in message
    assert "train_1.png: cannot be read as an image" in message
    assert "train_3.png: cannot be read as an image" in message


def perfect_detections(world: Path) -> list[dict[str, Any]]:
    truth = json.loads((world / "train.json").read_text())
    return [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.9}
        for one in truth["annotations"]
    ]


def test_an_evaluation_tells_how_far_it_is_from_another(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = perfect_detections(world)
    (world / "all.json").write_text(json.dumps(found))
    (world / "half.json").write_text(json.dumps(found[::2]))
    told = ask(capsys, "evaluate", world / "half.json", world / "train.json", "--against", world / "all.json")
    assert told["ap_difference"] == pytest.approx(told["ap"] - 1.0)
    assert told["ap_difference_low"] <= told["ap_difference"] <= told["ap_difference_high"] < 0
    (world / "all.json").write_text(json.dumps([{**found[0], "image_id": 77}]))
    score = ("evaluate", world / "half.json", world / "train.json")
    message = refused(world, capsys, *score, "--against", world / "all.json")
    assert "all.json: " in message
    assert "no image has id 77" in message
    assert "takes two images" in refused(
        world, capsys, *score, "--against", world / "half.json", "--limit", "1"
    )


def test_an_evaluation_tells_where_its_numbers_come_from(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = perfect_detections(world)
    path = world / "found.json"
    path.write_text(json.dumps(found))
    told = ask(
        capsys,
        "evaluate",
        path,
        world / "train.json",
        "--details",
        "--sizes",
        0,
        20,
        40,
        "--curve",
        world / "c.png",
    )
    assert told["ap"] == pytest.approx(1.0)
    assert [(one["at_least"], one["below"]) for one in told["sizes"]] == [(0, 20), (20, 40), (40, None)]
    assert {one["name"] for one in told["classes"]} == {"dark", "bright"}
    assert told["false_positives_per_image"]["at_recall_0.9"] is not None
    assert (world / "c.png").stat().st_size > 5000
    assert run(["evaluate", str(path), str(world / "train.json"), "--details", "--max-detections", "10"]) == 0
    shown = capsys.readouterr()
    assert "by size of the object" in shown.out
    assert "warning" not in shown.err
    path.write_text(json.dumps(found * 12))
    assert run(["evaluate", str(path), str(world / "train.json"), "--max-detections", "10"]) == 0
    assert re.search(r"warning: \d+ times an image has more than 10 detections", capsys.readouterr().err)
    path.write_text(json.dumps(found))
    assert "and rising" in refused(
        world, capsys, "evaluate", path, world / "train.json", "--details", "--sizes", 9, 4
    )
    score = ("evaluate", path, world / "train.json")
    assert "and rising" in refused(world, capsys, *score, "--details", "--sizes", "nan")
    assert "there is no folder" in refused(world, capsys, *score, "--curve", world / "none" / "c.png")
    assert "wanted a name that ends in .png" in refused(world, capsys, *score, "--curve", world / "c.xyz")
    assert "Must be >= 10" in refused(world, capsys, *score, "--max-detections", "9")


def test_a_reader_that_has_seen_enough_is_no_error(world: Path) -> None:
    script = "import os, sys; from sniper.cli.main import run; sys.exit(run(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    command = [
        sys.executable,
        "-u",
        "-c",
        script,
        "chips",
        str(world / "train.json"),
        "-o",
        str(world / "c.npz"),
    ]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_answers_are_words_without_json(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chips", str(world / "train.json"), "-o", str(world / "chips.npz")]) == 0
    assert re.search(r"^num_boxes +12$", capsys.readouterr().out, re.MULTILINE)


def refused(world: Path, capsys: pytest.CaptureFixture[str], *tokens: object) -> str:
    """Run a command that must end with exit code 2, nothing on standard output, one paragraph on the other."""
    code = run(list(map(str, tokens)))
    answer = capsys.readouterr()
    assert code == 2, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    return " ".join(answer.err.split())


def test_mistakes_are_told_in_a_paragraph(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, annotations = world / "experiment.yaml", world / "train.json"
    (world / "broken.json").write_text('{"images": [1, 2,, 3]}')
    (world / "detections.json").write_text('[{"image_id": 99}]')
    ask(capsys, "train", config, "--run", world / "run", "--train.epochs", "0.2")

    def told(*tokens: object) -> str:
        return refused(world, capsys, *tokens)

    assert "none.json: cannot be read" in told("chips", world / "none.json", "-o", world / "c.npz")
    assert "there is no folder" in told("chips", annotations, "-o", world / "none" / "c.npz")
    assert "broken.json: is not JSON" in told("chips", world / "broken.json", "-o", world / "c.npz")
    assert "line 1, column 18" in told("evaluate", world / "detections.json", world / "broken.json")
    assert "category_id" in told("evaluate", world / "detections.json", annotations)
    assert "none.yaml: cannot be read" in told("train", world / "none.yaml")
    assert "did you mean train.epochs?" in told("train", config, "--train.epoch", "3")
    assert "a value is missing" in told("train", config, "--train.epochs")
    assert "wanted --section.field VALUE" in told("train", config, "epochs")
    assert "a run is already there" in told("train", config, "--run", world / "run")
    assert "there is no run" in told("train", config, "--run", world / "none", "--resume")
    assert "train.momentum was 0.9, not 0.5" in told(
        "train", config, "--run", world / "run", "--resume", "--train.momentum", "0.5"
    )
    assert "timm has no model 'resnet51'" in told(
        "train", config, "--run", world / "other", "--model.backbone.name", "resnet51"
    )
    assert "none.safetensors: cannot be loaded" in told(
        "train", config, "--run", world / "third", "--model.backbone.weights", world / "none.safetensors"
    )
    assert "data.train.annotations is missing" in told("train", config, "--data.train.annotations", "''")
    assert "not both" in told("predict", world / "run", "x.png", "--annotations", annotations)
    assert "Must be >= 1" in told("predict", world / "run", "x.png", "--limit", "-1")
    assert "seed: must be greater than or equal to 0, not -1" in told("train", config, "--seed", "-1")
    assert "Must be >= 0" in told("chips", annotations, "-o", world / "c.npz", "--seed", "-1")
    assert "a section with fields of its own" in told("train", config, "--train", "3")
    assert "Must be <= 1" in told("plan", annotations, "--share", "1.5")
    assert "exists" in told("plan", annotations, "-o", annotations)
    assert "there is no such folder" in told("plan", annotations, "--images", world / "none")
    assert "Is a directory" in told("chips", annotations, "-o", world)
    assert "the folder of the run cannot be created" in told("train", config, "--run", annotations)
    assert "exists" in told("predict", world / "run", world / "images" / "train_0.png", "--draw", annotations)
    assert "there is no run" in told("predict", world / "none", annotations)
    assert "cannot be read as an image" in told("predict", world / "run", annotations)
    assert "--device abacus: cannot be used" in told("predict", world / "run", "x.png", "--device", "abacus")
    assert 'Unknown command "trian"' in told("trian")
    assert "requires an argument" in told("train")


def test_a_checkpoint_of_another_model_is_told(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(capsys, "train", world / "experiment.yaml", "--run", world / "run", "--train.epochs", "0.2")
    config = world / "run" / "config.yaml"
    config.write_text(config.read_text().replace("hidden_dim: 32", "hidden_dim: 48"))
    message = refused(world, capsys, "predict", world / "run", world / "images" / "train_0.png")
    assert "belongs to another model: roi_head.first.weight is (32, 392), not (48, 392)" in message


def test_help_imports_no_torch() -> None:
    code = "import sys, sniper.cli.main; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    told = subprocess.run([SNIPER, "--help"], check=True, capture_output=True, text=True).stdout
    for command in ("chips", "demo", "evaluate", "predict", "train"):
        assert command in told


def test_a_first_start_that_failed_leaves_no_run_behind(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("train", world / "experiment.yaml", "--run", world / "run", "--train.epochs", "0.2")
    refused(world, capsys, *start, "--model.backbone.name", "resnet51")
    assert ask(capsys, *start)["step"] == 1


def test_what_was_overridden_at_first_need_not_be_said_again(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = world / "short.yaml"
    config.write_text("train: {epochs: 0.2}")
    text = (world / "experiment.yaml").read_text()
    (world / "whole.yaml").write_text(text.replace("epochs: 1.5", "epochs: 0.2"))
    ask(capsys, "train", world / "whole.yaml", "--run", world / "run")
    went_on = ask(capsys, "train", config, "--run", world / "run", "--resume", "--train.epochs", "1")
    assert went_on["step"] > 1


def test_a_run_that_learnt_from_other_boxes_is_not_gone_on_with(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("train", world / "experiment.yaml", "--run", world / "run")
    ask(capsys, *start, "--train.epochs", "0.2")
    content = json.loads((world / "train.json").read_text())
    content["annotations"].pop()
    (world / "train.json").write_text(json.dumps(content))
    assert "trained on other images, boxes or categories" in refused(world, capsys, *start, "--resume")


@pytest.mark.parametrize("num_processes", [0, 1])
def test_an_image_that_breaks_in_the_middle_is_named_plainly(
    world: Path, capsys: pytest.CaptureFixture[str], num_processes: int
) -> None:
    path = world / "images" / "train_2.png"
    path.write_bytes(path.read_bytes()[:2000])
    start = ("train", world / "experiment.yaml", "--run", world / "run")
    message = refused(world, capsys, *start, "--data.num_workers", num_processes)
    assert message.startswith("error: ")
    assert "train_2.png: cannot be read as an image" in message
    assert "Caught" not in message


def start_process(world: Path, run_folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [SNIPER, "train", str(world / "experiment.yaml"), "--run", str(run_folder), "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], is_there: Callable[[], object]) -> None:
    """Wait until something is there or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_checkpoint(process: subprocess.Popen[str], run_folder: Path) -> None:
    wait_for(process, lambda: Run(run_folder).checkpoints)


def weights_of(run_folder: Path) -> dict[str, torch.Tensor]:
    return Run(run_folder).load_weights()[0]


def test_a_killed_process_leaves_a_run_that_ends_with_the_same_weights(world: Path) -> None:
    length = ("--train.epochs", "3", "--data.num_workers", "1")
    unbroken = start_process(world, world / "unbroken", *length)
    killed = start_process(world, world / "killed", *length)
    wait_for_checkpoint(killed, world / "killed")
    killed.kill()
    killed.communicate()
    resumed = start_process(world, world / "killed", *length, "--resume")
    for process in (unbroken, resumed):
        _, words = process.communicate()
        assert process.returncode == 0, words
    one, other = weights_of(world / "unbroken"), weights_of(world / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_with_the_weights_of_one_that_never_was(world: Path) -> None:
    length = ("--train.epochs", "120", "--data.num_workers", "1", "--train.ema_decay", "0.99")
    unbroken = start_process(world, world / "unbroken", *length)
    _, words = unbroken.communicate()
    assert unbroken.returncode == 0, words
    generator = random.Random(0)
    num_killed = 0
    for _ in range(10):
        more = ("--resume",) if Run(world / "killed").checkpoints else ()
        process = start_process(world, world / "killed", *length, *more)
        wait_for_checkpoint(process, world / "killed")
        try:
            process.communicate(timeout=generator.uniform(0, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            num_killed += 1
    assert num_killed >= 8
    last = start_process(world, world / "killed", *length, "--resume")
    _, words = last.communicate()
    assert last.returncode == 0, words
    one, other = weights_of(world / "unbroken"), weights_of(world / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def start_together(world: Path, run_folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start a training in two processes, as torchrun does."""
    return start_two("train", str(world / "experiment.yaml"), "--run", str(run_folder), *more)


def start_two(*tokens: str) -> subprocess.Popen[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
    command = [*launcher, SNIPER, *tokens]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.processes
def test_two_processes_learn_what_one_learns(world: Path) -> None:
    options = (
        *("--train.epochs", "7", "--train.checkpoint_minutes", "99", "--train.evaluate_every", "7"),
        *(
            "--model.backbone.batch_norm",
            "frozen",
            "--train.accumulation_steps",
            "2",
            "--negatives.source",
            "mined",
        ),
    )
    alone = start_process(world, world / "alone", *options)
    together = start_together(world, world / "together", *options)
    told = []
    for process in (alone, together):
        answer, words = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, words
        told.append(json.loads(answer))
    assert told[0]["step"] == told[1]["step"] >= 20
    one, other = weights_of(world / "alone"), weights_of(world / "together")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)
    metrics = [Run(world / name).entries() for name in ("alone", "together")]
    assert [entry["stage"] for entry in metrics[0]] == [entry["stage"] for entry in metrics[1]]
    for ours, theirs in zip(*metrics, strict=True):
        for key in ours.keys() & {"loss", "chips", "learning_rate", "ap"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-3), (key, ours, theirs)


def test_two_processes_find_what_one_finds(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(capsys, "train", world / "experiment.yaml", "--run", world / "run", "--train.epochs", "0.2")
    alone = ask(capsys, "predict", world / "run", "-o", world / "alone.json", "--device", "cpu")
    together = start_two("predict", str(world / "run"), "-o", str(world / "together.json"))
    answer, words = together.communicate(timeout=PATIENCE)
    assert together.returncode == 0, words
    assert json.loads(answer)["num_detections"] == alone["num_detections"] > 0
    assert (world / "together.json").read_bytes() == (world / "alone.json").read_bytes()
    assert not list(world.glob(".*part*"))


@pytest.mark.processes
def test_two_processes_that_are_stopped_go_on_together(world: Path) -> None:
    options = ("--train.epochs", "400", "--train.checkpoint_minutes", "99")
    process = start_together(world, world / "run", *options)
    metrics = world / "run" / "metrics.jsonl"
    wait_for(process, metrics.exists)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, words = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0, words
    (checkpoint,) = Run(world / "run").checkpoints
    last = Run(world / "run").entries()[-1]
    assert int(checkpoint.name) == last["step"]
    length = ("--train.epochs", str(last["epoch"] + 1))
    resumed = start_together(world, world / "run", *length, "--resume")
    _, words = resumed.communicate(timeout=PATIENCE)
    assert resumed.returncode == 0, words
    steps = [entry["step"] for entry in Run(world / "run").entries()]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] > last["step"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_asked_to_stop_saves_first(world: Path, signal_number: int) -> None:
    text = (world / "experiment.yaml").read_text()
    (world / "experiment.yaml").write_text(
        text.replace("checkpoint_minutes: 1.0e-09", "checkpoint_minutes: 99")
    )
    process = start_process(world, world / "run", "--train.epochs", "500")
    metrics = world / "run" / "metrics.jsonl"
    wait_for(process, metrics.exists)
    process.send_signal(signal_number)
    answer, words = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, words
    assert answer == ""
    assert "stopped" in words
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert [path.name for path in Run(world / "run").checkpoints][-1] == f"{last['step']:08d}"


@pytest.mark.processes
def test_an_error_of_one_process_ends_all_of_them_and_is_told(world: Path) -> None:
    path = world / "images" / "train_2.png"
    path.write_bytes(path.read_bytes()[:-2000])  # its sides can still be read
    process = start_together(world, world / "run", "--data.num_workers", "1")
    _, words = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert re.search(r"error: \S*train_2\.png: cannot be read as an image", " ".join(words.split())), words
