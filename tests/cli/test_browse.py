"""`sniper browse`: the page of a data set or of a run, until it is stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sniper.browse.server import BrowseServer
from sniper.chips.negatives import NegativeSpec
from sniper.config.loading import dump_experiment
from tests.cli.commands import CommandLine
from tests.training.experiments import TrainedRun


def get(url: str, path: str = "") -> Any:
    parts = urlsplit(url)
    connection = HTTPConnection(str(parts.hostname), int(parts.port or 0), timeout=60)
    connection.request("GET", f"{parts.path}{path}")
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server would serve: the command ends at once, as if it were stopped."""
    described: list[dict[str, Any]] = []

    def stop_at_once(self: BrowseServer, poll_interval: float = 0.5) -> None:
        self.content.chips.wait()
        chips = self.content.chips.chips
        described.append(
            {
                "num_negative": 0 if chips is None else int(chips.table.is_negative.sum()),
                "dataset": self.content.describe(),
                "chips": self.content.describe_chips(),
                "ids": self.content.dataset.image_ids.tolist(),
            }
        )

    monkeypatch.setattr(BrowseServer, "serve_forever", stop_at_once)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    return described


def write_detections(path: Path, *, image_id: int = 1, category_id: int = 10) -> Path:
    entry = {"image_id": image_id, "category_id": category_id, "bbox": [1, 1, 20, 20], "score": 0.6}
    path.write_text(json.dumps([entry]))
    return path


def test_a_data_set_is_served_with_suggested_chips(
    folder: Path, sniper: CommandLine, served: list[dict[str, Any]]
) -> None:
    printed = sniper.text("browse", folder / "train.json")
    assert "4 images of" in printed.out
    assert "http://127.0.0.1:" in printed.out
    (content,) = served
    assert content["dataset"]["num_images"] == 4
    assert not content["dataset"]["has_detections"]
    assert content["chips"]["is_suggested"]


def test_an_experiment_gives_the_chips_and_detections_the_errors(
    folder: Path, sniper: CommandLine, served: list[dict[str, Any]]
) -> None:
    detections = write_detections(folder / "detections.json")
    options = ("--config", folder / "experiment.yaml", "--detections", detections)
    answer = sniper.json("browse", folder / "train.json", *options)
    assert answer.keys() == {"url", "port", "num_images"}
    assert answer["url"].startswith(f"http://127.0.0.1:{answer['port']}/")
    sniper.text("browse", folder / "train.json", *options, "--min-score", 0.75)
    first, second = served
    assert first["dataset"]["has_detections"]
    assert not first["chips"]["is_suggested"]
    assert second["dataset"]["min_score"] == 0.75


def test_a_run_is_served_with_its_validation_images_and_detections(
    trained: TrainedRun, sniper: CommandLine, served: list[dict[str, Any]]
) -> None:
    run = trained.run.folder
    sniper.text("browse", run, "--split", "train")
    assert sniper.json("browse", run)["num_images"] == len(served[1]["ids"]) > 0
    assert not served[1]["chips"]["is_suggested"]
    (run / "evaluation").mkdir()
    write_detections(run / "evaluation" / "detections.json", image_id=99)
    printed = sniper.text("browse", run)
    assert "no image has id 99" in printed.err
    assert "they are not shown" in printed.err
    write_detections(run / "detections.json", image_id=served[1]["ids"][0])
    sniper.text("browse", run)
    sniper.text("browse", run, "--split", "train")
    assert [content["dataset"]["has_detections"] for content in served] == [False, False, False, True, False]


def test_negative_chips_are_those_of_what_was_mined(
    trained: TrainedRun, sniper: CommandLine, served: list[dict[str, Any]], tmp_path: Path
) -> None:
    run, mined = trained.run.folder, tmp_path / "mined"
    sniper.text("mine", run, "--source", "rpn", "-o", mined)
    negatives = NegativeSpec(min_proposals=(1,), min_score=0.0)
    trained.run.save_config(dump_experiment(replace(trained.spec, negatives=negatives)))
    sniper.text("browse", run, "--split", "train")
    sniper.text("browse", run, "--split", "train", "--proposals", mined)
    assert [content["num_negative"] > 0 for content in served] == [False, True]
    assert "no proposals" in sniper.error("browse", run, "--split", "train", "--proposals", tmp_path)


def test_a_browser_is_opened_where_there_is_a_desktop(
    folder: Path, sniper: CommandLine, served: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    called = threading.Event()

    def record(url: str) -> None:
        opened.append(url)
        called.set()

    monkeypatch.setattr("webbrowser.open", record)
    arguments = ("browse", folder / "train.json", "--config", folder / "experiment.yaml")
    token = sniper.json(*arguments)["url"].split("/")[3]
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    sniper.text(*arguments, "--no-open")
    assert opened == []
    sniper.text(*arguments)
    assert called.wait(30)
    (url,) = opened
    assert "/launch/" in url
    assert token not in url  # other users can read command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.json", "none.json: "),
        (
            "train.json --min-score 0.5",
            "--min-score 0.5: there are no detections; name some with --detections",
        ),
        ("train.json --detections other.json", "no image has id 99 (1 detection)"),
        ("train.json --detections train.json", "train.json: expected a list of detections"),
        ("train.json --port 70000", "<= 65535"),
        ("train.json --split other", "split"),
        ("train.json --results a.json", "--results: no such option; use --detections"),
        ("empty.json", "empty.json: there is no image to show"),
    ],
)
def test_mistakes_are_explained(
    folder: Path, sniper: CommandLine, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    write_detections(folder / "other.json", image_id=99)
    (folder / "empty.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    assert message in sniper.error("browse", *arguments.split())


def test_options_of_data_sets_are_not_those_of_runs(trained: TrainedRun, sniper: CommandLine) -> None:
    run = trained.run.folder
    assert "--config: is not used with the folder of a run" in sniper.error(
        "browse", run, "--config", "coco_r101_paper"
    )
    assert "--split other: a run has the images" in sniper.error("browse", run, "--split", "other")


@contextmanager
def browsing(*arguments: object) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    """Start the command, and yield the process and what it printed."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from sniper.cli import main; main()",
            "browse",
            *map(str, arguments),
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DISPLAY": "", "WAYLAND_DISPLAY": ""},
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_it_and_a_second_command_on_its_port_is_refused(
    folder: Path, sniper: CommandLine
) -> None:
    with browsing(folder / "train.json") as (process, answer):
        assert get(answer["url"], "dataset")["num_images"] == 4
        error = sniper.error("browse", folder / "train.json", "--port", answer["port"])
        assert f"--port {answer['port']}: is in use by another program; name another one" in error
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        assert "stopped" in err
        assert "Traceback" not in err
