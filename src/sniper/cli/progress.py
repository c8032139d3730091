"""Progress of the stages of a command: bars on a terminal, a line from time to time elsewhere."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sniper.cli.output import console, print_progress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from sniper.training.callbacks import StepReport

_SECONDS_BETWEEN_LINES = 30


@contextmanager
def show_progress(*, is_shown: bool = True) -> Iterator["ProgressBars"]:
    """Show the progress of stages while the context is open.

    Args:
        is_shown: False for all but the first of several processes.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
    )
    has_bars = is_shown and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not has_bars) as progress:
        yield ProgressBars(progress, has_lines=is_shown and not has_bars)


class ProgressBars:
    """One bar for each stage; its methods are the callbacks of training, mining and prediction."""

    def __init__(self, progress: "Progress", *, has_lines: bool) -> None:
        self._progress = progress
        self._has_lines = has_lines
        self._tasks: dict[str, TaskID] = {}
        self._last_line = time.monotonic()

    def step(self, report: "StepReport") -> None:
        """Show a training step."""
        epoch = f"{report.epoch:.2f}/{report.epochs:g}"
        text = f"epoch {epoch}  loss {report.loss:.3f}  {report.chips_per_second:.1f} chips/s"
        done = report.progress.step
        self._show(report.stage, text, done=done, total=done + report.steps_left, unit="step")

    def mining(self, num_done: int, num_images: int) -> None:
        """Show how many images are mined."""
        self._show_images("mine", num_done, num_images)

    def predicting(self, num_done: int, num_images: int) -> None:
        """Show how many images are searched."""
        self._show_images("predict", num_done, num_images)

    def scores(self, epoch: float, scores: Mapping[str, float]) -> None:
        """Print the scores on the test images."""
        text = "  ".join(f"{name} {scores[name]:.3f}" for name in ("ap", "ap50", "ap75", "ar_100"))
        print_progress(f"epoch {epoch:g}  {text}")

    def _show_images(self, stage: str, num_done: int, num_images: int) -> None:
        text = f"{num_done} of {num_images} images"
        self._show(stage, text, done=num_done, total=num_images, unit="image")

    def _show(self, stage: str, text: str, *, done: int, total: int, unit: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, text=text)
        self._progress.update(self._tasks[stage], completed=done, total=total, text=text)
        now = time.monotonic()
        if self._has_lines and (now - self._last_line > _SECONDS_BETWEEN_LINES or done == total):
            print_progress(f"{stage}  {unit} {done}  {text}")
            self._last_line = now
