"""Send the metrics of a run to a service: without gaps if the run is resumed, and without ending it if that fails."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from sniper.errors import RunError
from sniper.files import atomic_write, read_json
from sniper.training.callbacks import EndReport, ScoresReport, StartReport, StepReport

SECONDS_BETWEEN = 5.0  # in which steps are collected, so that a slow service does not slow the training
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 960.0  # seconds without an attempt after a failure; doubled each time

_PASSWORD = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # in the address of a server

Entry = Mapping[str, Any]


@runtime_checkable
class Service(Protocol):
    """Records a run somewhere else. Any exception is a failure, after which the service is opened again.

    Attributes:
        name: in messages and of the file with its state.
        num_unsure: the most lines, of those written last, that are lost if the training is killed before `close`.
    """

    name: str
    num_unsure: int

    def open(self, start: StartReport, state: Mapping[str, str]) -> tuple[dict[str, str], str]:
        """Start a run of the service, or continue one.

        Args:
            start: what the training is about to do.
            state: what this method returned before for the same run folder; empty at first.

        Returns:
            What is needed to continue the run of the service, and where it can be seen.
        """

    def write(self, part: str, entries: Sequence[Entry], *, after: int) -> None:
        """Record lines of the metrics; return once all but the last `num_unsure` are there to stay.

        Args:
            part: `train`, or `rpn` for the stage of this name, which counts its own steps.
            entries: lines of the metrics.
            after: the last step that was recorded before; later ones are of a training that was killed.
        """

    def close(self, end: EndReport) -> None:
        """Record what the training has come to, and close the run of the service."""


class Tracking:
    """Tracker that sends the lines of `metrics.jsonl` to a service.

    How many lines the service has for sure is kept in `trackers/NAME.json` of the run, together with what identifies
    the run of the service. A resumed training sends the others, and the same run continues. After a failure the
    training goes on; a single warning names the service, and it is tried again after pauses of 1 to 16 minutes and at
    the end.

    Args:
        service: to send to.
        on_notice: called with where the run is recorded, and when the service works again.
        on_warning: called with the first failure.
        clock: returns seconds.
    """

    def __init__(
        self,
        service: Service,
        *,
        on_notice: Callable[[str], Any],
        on_warning: Callable[[str], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._on_notice = on_notice
        self._on_warning = on_warning
        self._clock = clock
        self._start: StartReport | None = None
        self._parts: dict[str, _Lines] = {}
        self._state: dict[str, str] = {}
        self._is_loaded = self._is_open = self._has_warned = False
        self._sent_at = -SECONDS_BETWEEN
        self._retry_at = 0.0
        self._pause = _FIRST_PAUSE

    def on_start(self, report: StartReport) -> None:
        """Open the run of the service."""
        self._start = report
        self._retry_at = self._clock()
        folder = report.folder
        self._parts = {
            "train": _Lines(folder / "metrics.jsonl"),
            "rpn": _Lines(folder / "rpn" / "metrics.jsonl"),
        }
        with self._surviving():
            self._open(report)

    def on_step(self, report: StepReport) -> None:
        """Send the lines that are new, from time to time."""
        self._parts[report.stage].begin(num_new=1)
        if self._clock() - self._sent_at >= SECONDS_BETWEEN:
            self._send()

    def on_scores(self, report: ScoresReport) -> None:
        """Send the lines that are new."""
        self._parts["train"].begin(num_new=1)
        self._send()

    def on_end(self, report: EndReport) -> None:
        """Send the rest, and close the run of the service."""
        if self._start is None:  # the training failed before it was about to start
            return
        self._parts["train"].begin(num_new=0)
        self._retry_at = self._clock()
        self._send()
        with self._surviving():
            if self._is_open:
                self._service.close(report)
                self._save(num_unsure=0)

    def _send(self) -> None:
        assert self._start is not None
        if self._clock() < self._retry_at:
            return
        self._sent_at = self._clock()
        if self._parts["train"].has_begun:
            self._parts["rpn"].begin(num_new=0)  # a stage that is over, or there is none
        with self._surviving():
            self._open(self._start)
            for name, lines in self._parts.items():
                with lines.reading() as entries:
                    if entries:
                        self._service.write(name, entries, after=lines.last_step)
            self._save(num_unsure=self._service.num_unsure)
            if self._has_warned and self._pause > _FIRST_PAUSE:
                self._on_notice(f"{self._service.name}: works again, and has what it had missed")
            self._pause = _FIRST_PAUSE

    def _open(self, start: StartReport) -> None:
        if self._is_open:
            return
        is_first = not self._has_warned
        if not self._is_loaded:
            self._load()
            self._is_loaded = True
        self._state, where = self._service.open(start, self._state)
        self._is_open = True
        self._save(num_unsure=self._service.num_unsure)
        if is_first:
            self._on_notice(f"{self._service.name}: {where}")

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Turn an exception into a warning, the first time, and pause."""
        try:
            yield
        except Exception as error:
            self._is_open = False
            self._retry_at = self._clock() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            if not self._has_warned:
                self._has_warned = True
                reason = _PASSWORD.sub("...", " ".join(str(error).split())) or type(error).__name__
                self._on_warning(
                    f"{self._service.name}: the run cannot be recorded there ({reason}); training goes on, it is tried "
                    "again from time to time, and all numbers are in metrics.jsonl"
                )

    @property
    def _path(self) -> Path:
        assert self._start is not None
        return self._start.folder / "trackers" / f"{self._service.name}.json"

    def _load(self) -> None:
        if not self._path.exists():
            return
        content = read_json(self._path, error=RunError)
        try:
            saved = msgspec.convert(content, _Saved)
        except ValueError as error:
            raise RunError(f"{self._path}: {error}; remove it to record the run anew") from error
        self._state = saved.state
        for name, lines in self._parts.items():
            lines.num_sent = lines.num_kept = saved.lines.get(name, 0)

    def _save(self, *, num_unsure: int) -> None:
        self._path.parent.mkdir(exist_ok=True)
        train, rpn = self._parts["train"], self._parts["rpn"]  # whose lines are the older ones
        sure = {
            "train": train.num_sure(num_unsure),
            "rpn": rpn.num_sure(max(num_unsure - train.num_sent, 0)),
        }
        saved = _Saved(self._state, sure)
        with atomic_write(self._path) as file:
            file.write(json.dumps(msgspec.to_builtins(saved)).encode())


class _Saved(msgspec.Struct):
    """What is kept of a service in the folder of a run."""

    state: dict[str, str]
    lines: dict[str, int]


class _Lines:
    """The lines of a file of metrics that a service does not have yet.

    Attributes:
        num_sent: lines that it was sent.
        num_kept: lines that it has from earlier trainings.
        last_step: the last step among these.
        has_begun: whether the training writes to the file.
    """

    def __init__(self, path: Path) -> None:
        self.num_sent = self.num_kept = self.last_step = 0
        self._path = path
        self._num_before: int | None = None
        self._offset: int | None = None

    @property
    def has_begun(self) -> bool:
        return self._num_before is not None

    def num_sure(self, num_unsure: int) -> int:
        """Return the number of lines that the service has, even if it loses the last ones of this training."""
        return max(self.num_kept, self.num_sent - num_unsure)

    def begin(self, *, num_new: int) -> None:
        """Count the lines that are older than this training, when it has written its first to the file.

        A resumed training cuts the file to its checkpoint first, so that it may have fewer lines than the service.

        Args:
            num_new: number of lines at the end of the file that are new.
        """
        if self._num_before is None and self._path.exists():
            self._num_before = len(self._path.read_bytes().splitlines()) - num_new

    @contextmanager
    def reading(self) -> Iterator[list[dict[str, Any]]]:
        """Read the new lines; they are sent if the block ends without an exception."""
        if self._num_before is None:
            yield []
            return
        if self._offset is None:
            # The service replaces the lines that this training has cut, and may lose what replaces them.
            self.num_sent = self.num_kept = min(self.num_sent, self._num_before)
            sent = self._path.read_bytes().splitlines(keepends=True)[: self.num_sent]
            self._offset = sum(map(len, sent))
            self.last_step = max((_parse(line)["step"] for line in sent), default=0)
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        entries = [_parse(line) for line in content.splitlines()]
        yield entries
        self._offset += len(content)
        self.num_sent += len(entries)
        self.last_step = max([self.last_step, *(entry["step"] for entry in entries)])


def _parse(line: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = msgspec.json.decode(line)
    return entry


def numbers_of(entry: Entry, part: str) -> dict[str, float]:
    """Return the numbers of a line of the metrics, named after its stage, such as `train/loss`."""
    stage = entry["stage"]
    prefix = f"rpn_{stage}" if part == "rpn" and stage != "rpn" else stage
    return {
        f"{prefix}/{name}": value
        for name, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }
