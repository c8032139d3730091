"""Progress of the stages of a command: a bar on a terminal, a line from time to time elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from sniper.cli.output import console, print_progress
from sniper.errors import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from sniper.training.callbacks import EpochReport, StartReport, StepReport

_SECONDS_BETWEEN_LINES = 30
_FEW = 100  # images, which may be large: parts of them are shown
_BAR_WIDTH = 14  # characters; a line with it fits into 80


@contextmanager
def show_progress(*, is_shown: bool = True, output: "Console" = console) -> Iterator["ProgressBars"]:
    """Show the progress of stages while the context is open.

    Args:
        is_shown: False for all but the first of several processes.
        output: to print to.
    """
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class TimeLeftColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = bars.seconds_left()
            if seconds is None:
                seconds = task.time_remaining
            return Text("" if seconds is None else format_time_left(seconds))

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(_BAR_WIDTH),
        TextColumn("{task.fields[text]}", markup=False),
        TimeLeftColumn(),
    )
    has_bars = is_shown and output.is_terminal
    with Progress(*columns, console=output, transient=True, disable=not has_bars) as progress:
        bars = ProgressBars(progress, has_lines=is_shown and not has_bars)
        yield bars


class ProgressBars:
    """A bar for the stage in progress; its methods are the callbacks of training, mining and prediction."""

    def __init__(
        self, progress: "Progress", *, has_lines: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress = progress
        self._has_lines = has_lines
        self._clock = clock
        self._tasks: dict[str, TaskID] = {}
        self._last_line = clock()
        self._end: float | None = None
        self._peak_memory = 0

    def start(self, report: "StartReport") -> None:
        """Print what a training is about to do."""
        for line in describe_start(report):
            print_progress(line)

    def step(self, report: "StepReport") -> None:
        """Show a training step."""
        done = report.progress.step
        self._peak_memory = report.peak_memory
        text = f"loss {report.loss:#.3g}  {report.chips_per_second:.3g} chips/s"
        self._show(report.stage, text, done=done, total=done + report.steps_left, unit="step")

    def mining(self, num_done: int, num_images: int) -> None:
        """Show how many images are mined."""
        self._show("mine", "", done=num_done, total=num_images, unit="image")

    def predicting(self, num_done: float, num_images: int) -> None:
        """Show how many images are searched; a fraction is of those that are searched in part."""
        self._show("predict", "", done=num_done, total=num_images, unit="image")

    def writing(self, num_done: int, num_chips: int) -> None:
        """Show how many chips are written."""
        self._show("write", "", done=num_done, total=num_chips, unit="chip")

    def merging(self, num_done: int, num_images: int) -> None:
        """Show of how many images detections are merged."""
        self._show("merge", "", done=num_done, total=num_images, unit="image")

    def evaluating(self, num_done: int, num_images: int) -> None:
        """Show how many validation images are searched."""
        self._show("evaluate", "", done=num_done, total=num_images, unit="image")

    def time_left(self, seconds: float) -> None:
        """Show how long all stages still take; the first time with the memory, in a line of its own."""
        is_first = self._end is None
        self._end = self._clock() + seconds
        if is_first:
            end = datetime.now() + timedelta(seconds=seconds)
            print_progress(
                f"time: {_duration(seconds)}, until about {end:%H:%M}; memory: {self._peak_memory / 1e9:.1f} GB"
            )

    def seconds_left(self) -> float | None:
        """Return how long all stages still take; None if it is not known."""
        return None if self._end is None else max(self._end - self._clock(), 0.0)

    def epoch(self, report: "EpochReport") -> None:
        """Print the means and the scores of an epoch in one line."""
        line = describe_epoch(report)
        seconds = self.seconds_left()
        if self._has_lines and seconds:
            line += f"  {format_time_left(seconds)}"
        print_progress(line)
        self._last_line = self._clock()

    def _show(self, stage: str, text: str, *, done: float, total: int, unit: str) -> None:
        number = f"{done:.1f}" if done % 1 and total < _FEW else f"{int(done):,}"
        text = f"{number}/{total:,}" + (f"  {text}" if text else "")
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, text=text)
        for name, task in self._tasks.items():
            if name == stage:
                self._progress.update(task, completed=done, total=total, text=text, visible=True)
            else:
                self._progress.update(task, visible=False)
        now = self._clock()
        if self._has_lines and now - self._last_line > _SECONDS_BETWEEN_LINES:
            seconds = self.seconds_left()
            print_progress(f"{stage}  {unit} {text}" + (f"  {format_time_left(seconds)}" if seconds else ""))
            self._last_line = now


def describe_start(report: "StartReport") -> Iterator[str]:
    """Return lines with what a training is about to do."""
    if report.download:
        yield f"download: {report.download}"
    if report.rpn_steps:
        yield f"RPN stage: {counted(report.rpn_steps, 'step')}"
    if report.num_mined:
        yield f"mining: {counted(report.num_mined, 'image')}"
    per_epoch = report.steps / report.epochs
    if report.steps_done >= report.steps:
        steps = counted(report.steps_done, "step")
        yield f"training: complete after {steps}; its length is {counted(report.epochs, 'epoch')}"
        return
    about = "about " if report.num_mined else ""
    steps, epochs = counted(report.steps, "step"), counted(report.epochs, "epoch")
    line = f"training: {about}{steps}, {epochs} of {about}{per_epoch:,.0f}"
    yield line + (f", from step {report.steps_done:,}" if report.steps_done else "")
    if report.num_evaluations:
        times = "once" if report.num_evaluations == 1 else f"{report.num_evaluations} times"
        images = counted(report.num_images, "image")
        if report.num_scored == report.num_images:
            yield f"evaluation: {times} on {images}"
        else:
            yield f"evaluation: {times} on {report.num_scored:,} of {images}, at the end on all"


def describe_epoch(report: "EpochReport") -> str:
    """Return a line with the means and the scores of an epoch."""
    from sniper.reports.scores import format_score

    name = "rpn epoch" if report.stage == "rpn" else "epoch"
    parts = [f"{name} {report.epoch:g}/{report.epochs:g}"]
    if report.loss is not None:
        parts.append(f"loss {report.loss:.3f}")
    if report.positive_accuracy is not None:
        parts.append(f"class accuracy {100 * report.positive_accuracy:.0f} %")
    if report.scores is not None:
        scores = f"AP {format_score(report.scores['ap'])}"
        if "ap50" in report.scores:
            scores += f"  AP50 {format_score(report.scores['ap50'])}"
        if "segm_ap" in report.scores:
            scores += f"  mask AP {format_score(report.scores['segm_ap'])}"
        if report.num_scored < report.num_images:
            scores += f" on {report.num_scored:,} of {report.num_images:,} images"
        parts.append(scores + (" (best)" if report.is_best else ""))
    return "  ".join(parts)


def format_time_left(seconds: float) -> str:
    """Return the time that is left, in few characters.

    Example:
        >>> [format_time_left(seconds) for seconds in (5000, 754, 30)]
        ['1 h 23 min left', '13 min left', '30 s left']
    """
    return f"{_duration(seconds)} left"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
