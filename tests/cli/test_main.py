"""Help, exit codes and what mistakes in the arguments are answered with."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sniper import __version__
from sniper.cli import run
from sniper.cli.progress import ProgressBars
from tests.cli.commands import SNIPER, CommandLine

COMMANDS = (
    "plan",
    "check",
    "browse",
    "chips",
    "train",
    "mine",
    "predict",
    "evaluate",
    "focus",
    "export",
    "merge",
    "report",
    "recipes",
    "demo",
)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands_in_the_order_of_their_use(
    sniper: CommandLine, arguments: tuple[str, ...]
) -> None:
    listed = re.findall(r"^│ (\w+) ", sniper.text(*arguments).out, re.MULTILINE)
    assert [command for command in listed if command in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_each_of_its_options(sniper: CommandLine, command: str) -> None:
    out = sniper.text(command, "--help").out
    assert f"Usage: sniper {command} [OPTIONS]" in out
    of_options = out[out.index("─ Options ─") :]
    options = re.findall(r"^│ [* ]*(--[a-z-]+.*?)(?:  |│)(.*)│$", of_options, re.MULTILINE)
    assert "--json" in [name for name, _ in options]
    assert all(text.strip() for _, text in options), out


def test_help_imports_no_slow_library() -> None:
    slow = ("torch", "numpy", "numba", "PIL", "cv2", "pydantic", "matplotlib")
    code = (
        "import sys; from sniper.cli import run; "
        f"[run([*command.split(), '--help']) for command in {['', *COMMANDS]}]; "
        f"sys.exit(' '.join(sys.modules.keys() & set({slow})) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_command_prints_its_version() -> None:
    done = subprocess.run([SNIPER, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", 'Unknown command "trian". Did you mean "train"?'),
        ("train", "requires an argument"),
        ("predict run --limt 3", "--limt: no such option; did you mean --limit?"),
        ("predict run --annotations a.json --image-root b", "--image-root was renamed to --images"),
        ("mine run --image-root=b", "--image-root was renamed to --images"),
        ("predict run x.png --limit -1", "Must be >= 1"),
        ("chips train.json -o c.npz --seed -1", "Must be >= 0"),
        ("plan train.json --share 1.5", "Must be <= 1"),
        ("evaluate d.json train.json --max-detections 9", "Must be >= 10"),
    ],
)
def test_mistakes_in_the_arguments_are_explained(sniper: CommandLine, arguments: str, message: str) -> None:
    assert message in sniper.error(*arguments.split())


def test_results_are_lines_of_text_without_json(folder: Path, sniper: CommandLine) -> None:
    out = sniper.text("chips", folder / "train.json", "-o", folder / "chips.npz").out
    assert re.search(r"^num_boxes +12$", out, re.MULTILINE)


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sniper.data.datasets.load_dataset", interrupt)
    assert run(["check", str(folder / "train.json")]) == 130


@pytest.mark.parametrize(
    ("command", "stage", "continuation"),
    [
        ("predict", "predicting", "--resume"),
        ("evaluate", "predicting", "the same command"),
        ("mine", "mining", "the same command"),
    ],
)
def test_a_stopped_search_names_how_it_is_continued(
    trained_folder: Path,
    sniper: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    stage: str,
    continuation: str,
) -> None:
    searched: list[int] = []

    def interrupt(_: object, num_done: int, num_images: int) -> None:
        searched.append(num_done)
        if num_done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    arguments = [command, str(trained_folder / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBars, stage, interrupt)
        assert run(arguments) == 130
    message = sniper.capsys.readouterr().err.splitlines()[-1]
    assert (
        message
        == f"stopped; the images searched so far are kept, and {continuation} continues with the others"
    )
    monkeypatch.setattr(ProgressBars, stage, lambda _, num_done, num_images: searched.append(num_images))
    sniper.json(*arguments, *(("--resume",) if continuation == "--resume" else ()))
    assert searched == [1, 2, 2, 2]


def test_a_reader_that_closes_the_pipe_is_no_error(folder: Path) -> None:
    script = "import sys; from sniper.cli import run; sys.exit(run(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ("chips", str(folder / "train.json"), "-o", str(folder / "chips.npz"))
    done = subprocess.run(
        [sys.executable, "-u", "-c", script, *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_from_annotations_to_scores(folder: Path, sniper: CommandLine) -> None:
    annotations, config, run_folder = folder / "train.json", folder / "experiment.yaml", folder / "run"
    chips = sniper.json("chips", annotations, "-o", folder / "chips.npz", "--config", config)
    assert (chips["num_images"], chips["num_boxes"]) == (4, 12)
    assert sum(chips["chips_per_level"]) == chips["num_chips"] > 0

    trained = sniper.json("train", config, "--run", run_folder, "--train.epochs", "0.5")
    assert trained["step"] > 0
    further = sniper.json("train", config, "--run", run_folder, "--resume", "--train.epochs=1")
    assert further["step"] > trained["step"]

    predicted = sniper.json("predict", run_folder)  # the experiment names the test images
    assert predicted["num_images"] == 4
    assert predicted["num_detections"] > 0
    scores = sniper.json("evaluate", run_folder / "detections.json", annotations)
    assert 0 <= scores["ap"] <= 1
    assert scores["num_images"] == 4
    assert {path.name for path in run_folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "detections.json", ".detections.json.source",
        "report.html", "report",
    }  # fmt: skip
    of_run = sniper.json("evaluate", run_folder)
    assert (of_run["detections"], of_run["ap"]) == (predicted["output"], scores["ap"])


def test_negative_chips_are_mined_planned_and_trained_on(folder: Path, sniper: CommandLine) -> None:
    annotations, config, run_folder = folder / "train.json", folder / "experiment.yaml", folder / "run"
    mined = ("--negatives.source", "rpn", "--negatives.min_proposals", "[1]", "--mine.rpn_epochs", "1")
    trained = sniper.json("train", config, "--run", run_folder, *mined, "--train.epochs", "0.5")
    further = sniper.json("train", config, "--run", run_folder, *mined, "--resume", "--train.epochs", "1")
    assert further["step"] > trained["step"] > 0

    proposals = sniper.json("mine", run_folder / "rpn", "-o", folder / "proposals")
    assert proposals["num_proposals"] > 0
    options = ("--config", run_folder / "config.yaml", "--proposals", folder / "proposals")
    chips = sniper.json("chips", annotations, "-o", folder / "chips.npz", *options)
    assert chips["negative_chips_pool"] >= chips["negative_chips_per_epoch"] > 0
    plan = sniper.json(
        "plan", annotations, *options, "-o", folder / "plan", "--share", "0.5", "--levels", "2"
    )
    assert plan["negative_chips_pool"] == chips["negative_chips_pool"]
    page = (folder / "plan" / "plan.html").read_text()
    assert "Dashed: negative chips" in page
    assert "stroke-dasharray" in page

    table = ("--data.chips", folder / "chips.npz")
    sniper.json("train", config, "--run", folder / "other", *table, "--train.epochs", "0.5")
    first = json.loads((folder / "other" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["negative_chips"] == chips["negative_chips_per_epoch"]
    assert "only (train.rpn_only)" in sniper.error("predict", run_folder / "rpn")
