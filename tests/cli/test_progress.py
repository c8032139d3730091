"""What a training shows: bars that fit into 80 columns, and lines without control characters elsewhere."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from sniper.cli.progress import (
    ProgressBars,
    describe_epoch,
    describe_start,
    format_time_left,
    show_progress,
)
from sniper.runs.checkpoints import Progress as RunProgress
from sniper.training.callbacks import EpochReport, StartReport, StepReport

START = StartReport(
    steps=12_000,
    steps_done=0,
    epochs=12.0,
    rpn_steps=0,
    num_mined=0,
    num_evaluations=0,
    num_scored=0,
    num_images=0,
    download=None,
    folder=Path("runs/cars"),
    config={},
    origin={},
)
EPOCH = EpochReport(stage="train", epoch=3, epochs=12.0, loss=0.5132, positive_accuracy=0.671)


def step(number: int, *, left: int, stage: str = "train") -> StepReport:
    return StepReport(
        stage=stage,
        progress=RunProgress(step=number),
        epoch=number / 100,
        epochs=12.0,
        steps_left=left,
        losses={"rpn_box": 123.4567},
        gradient_norm=1.0,
        learning_rate=0.1,
        seconds=1.0,
        chips_per_second=123.4,
        data_wait=0.0,
        megapixels=1.0,
        peak_memory=1_300_000_000,
    )


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({}, ["training: 12,000 steps, 12 epochs of 1,000"]),
        (
            {"steps": 1, "epochs": 1.0, "num_mined": 1, "rpn_steps": 1},
            ["RPN stage: 1 step", "mining: 1 image", "training: about 1 step, 1 epoch of about 1"],
        ),
        ({"steps_done": 300}, ["training: 12,000 steps, 12 epochs of 1,000, from step 300"]),
        (
            {"steps_done": 12_000, "num_evaluations": 1},
            ["training: complete after 12,000 steps; its length is 12 epochs"],
        ),
        (
            {"download": "timm/some, 14 MB", "rpn_steps": 400, "num_mined": 5000},
            [
                "download: timm/some, 14 MB",
                "RPN stage: 400 steps",
                "mining: 5,000 images",
                "training: about 12,000 steps, 12 epochs of about 1,000",
            ],
        ),
        (
            {"num_evaluations": 4, "num_scored": 50, "num_images": 210},
            [
                "training: 12,000 steps, 12 epochs of 1,000",
                "evaluation: 4 times on 50 of 210 images, at the end on all",
            ],
        ),
        (
            {"num_evaluations": 1, "num_scored": 210, "num_images": 210},
            ["training: 12,000 steps, 12 epochs of 1,000", "evaluation: once on 210 images"],
        ),
    ],
)
def test_what_is_to_be_done_is_described(fields: dict[str, object], lines: list[str]) -> None:
    assert list(describe_start(replace(START, **fields))) == lines  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "epoch 3/12  loss 0.513  class accuracy 67 %"),
        ({"stage": "rpn", "positive_accuracy": None}, "rpn epoch 3/12  loss 0.513"),
        (
            {"scores": {"ap": 0.412, "ap50": 0.7}, "num_scored": 50, "num_images": 210},
            "epoch 3/12  loss 0.513  class accuracy 67 %  AP 0.412  AP50 0.700 on 50 of 210 images",
        ),
        (
            {"scores": {"ap": -1.0, "ap50": -1.0}, "num_scored": 9, "num_images": 9, "is_best": True},
            "epoch 3/12  loss 0.513  class accuracy 67 %  AP –  AP50 – (best)",
        ),
        (
            {"scores": {"ap": 0.4, "ap50": 0.7, "segm_ap": 0.3}, "num_scored": 9, "num_images": 9},
            "epoch 3/12  loss 0.513  class accuracy 67 %  AP 0.400  AP50 0.700  mask AP 0.300",
        ),
    ],
)
def test_an_epoch_is_one_line(fields: dict[str, object], line: str) -> None:
    assert describe_epoch(replace(EPOCH, **fields)) == line  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s left"),
        (89, "89 s left"),
        (91, "2 min left"),
        (3_570, "1 h 0 min left"),
        (9_000, "2 h 30 min left"),
    ],
)
def test_the_time_left_is_short(seconds: float, text: str) -> None:
    assert format_time_left(seconds) == text


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_fits_into_the_terminal(width: int) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with show_progress(output=terminal) as bars:
        for number in (1, 11_999):
            bars.step(step(number, left=12_000 - number))
        bars.time_left(9_000.0)
        bars.evaluating(3, 50)
        bars.step(step(11_999, left=1))
        shown = terminal.render_lines(bars._progress.get_renderable())
    (line,) = ["".join(segment.text for segment in line) for line in shown]
    assert len(line.rstrip()) <= width
    assert "11,999/12,000  loss 123.  123 chips/s" in line
    assert "left" in line
    assert "…" not in line


def test_elsewhere_a_line_is_printed_from_time_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    bars = ProgressBars(Progress(disable=True), has_lines=True, clock=lambda: now)
    for number in range(1, 101):
        now += 1.0
        bars.step(step(number, left=1000 - number))
        if number >= 10:
            bars.time_left(1000.0 - number)
    bars.epoch(EPOCH)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("time: 16 min, until about ")
    assert first.endswith("memory: 1.3 GB")
    assert lines == [
        "train  step 31/1,000  loss 123.  123 chips/s  16 min left",
        "train  step 62/1,000  loss 123.  123 chips/s  16 min left",
        "train  step 93/1,000  loss 123.  123 chips/s  15 min left",
        "epoch 3/12  loss 0.513  class accuracy 67 %  15 min left",
    ]


def test_parts_of_images_are_shown_if_they_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    bars = ProgressBars(Progress(disable=True), has_lines=True, clock=lambda: now)
    for done, total in ((0.25, 3), (1, 3), (1234.5, 2000)):
        now += 31.0
        bars.predicting(done, total)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["predict  image 0.2/3", "predict  image 1/3", "predict  image 1,234/2,000"]


def test_the_time_left_runs_on_between_reports() -> None:
    now = 0.0
    bars = ProgressBars(Progress(disable=True), has_lines=True, clock=lambda: now)
    assert bars.seconds_left() is None
    bars.time_left(100.0)
    now = 30.0
    assert bars.seconds_left() == 70.0
    now = 300.0
    assert bars.seconds_left() == 0.0
