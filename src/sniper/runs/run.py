"""The folder of a run: its configuration, metrics and checkpoints."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import torch

from sniper.data.datasets import Category, DatasetIdentity
from sniper.errors import CheckpointError, RunError, SniperError, count_and_list, describe_os_error
from sniper.files import atomic_write, check_regular, naming_path, read_bytes, remove_folder
from sniper.remote import is_remote
from sniper.runs.checkpoints import (
    EMA,
    WEIGHTS,
    Checkpoint,
    Progress,
    load_weights,
    read_identity,
    read_progress,
    restore_replaced,
)

_T = TypeVar("_T")

_NUMBER = re.compile("[0-9]+")

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Quantity = Annotated[float, msgspec.Meta(ge=0)]

CheckpointChoice = Literal["best", "last"] | int
"""The checkpoint with the best validation AP, the newest one, or that of a step."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation on validation images while a run was trained.

    Attributes:
        step: of the evaluated weights.
        epoch: epochs trained, fractions included.
        ap: COCO AP; below 0 if the images have no objects.
        num_images: validation images that were searched: all, or the subset that is evaluated on while training.
    """

    step: int
    epoch: float
    ap: float
    num_images: int


@dataclass(frozen=True)
class Run:
    """The folder of a run.

    Attributes:
        folder: contains everything that belongs to the run.
    """

    folder: Path

    @property
    def config_path(self) -> Path:
        """The complete configuration, as used."""
        return self.folder / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def calibration_path(self) -> Path:
        """What was chosen on the validation images, see `sniper.inference.calibration`."""
        return self.folder / "calibration.json"

    @property
    def focus_path(self) -> Path:
        """Where fine levels are searched, as `sniper focus` has chosen, see `sniper.inference.focus_choice`."""
        return self.folder / "focus.json"

    @property
    def chips_path(self) -> Path:
        """The chips of every epoch, if the experiment names a chip table."""
        return self.folder / "chips.npz"

    @property
    def exported_folder(self) -> Path:
        """The detector for engines other than torch, see `sniper.inference.exporting`."""
        return self.folder / "exported"

    @property
    def report_path(self) -> Path:
        """The page of the run, see `sniper.reports.run_page`."""
        return self.folder / "report.html"

    @property
    def report_folder(self) -> Path:
        """What the page is made from beside configuration and metrics, see `sniper.reports.parts`."""
        return self.folder / "report"

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(
            path for path in (self.folder / "checkpoints").glob("*") if _NUMBER.fullmatch(path.name)
        )

    @property
    def progress(self) -> Progress:
        """How far the newest checkpoint has come; the start if there is none.

        Raises:
            CheckpointError: if it cannot be read.
        """
        if not self.checkpoints:
            return Progress()
        with self._naming_previous_checkpoint():
            return read_progress(self.checkpoints[-1])

    @classmethod
    def check_absent(cls, folder: Path) -> None:
        """Check that a folder has no run with a checkpoint.

        Raises:
            RunError: if it has.
        """
        if cls(folder).checkpoints:
            raise RunError(
                f"{folder}: a run is already there; continue it (--resume, resume=True) or choose another folder "
                "(--run, run=...)"
            )

    @classmethod
    def create(cls, folder: Path, *, config: str) -> "Run":
        """Create the folder of a new run; a run there without a checkpoint is started over.

        Raises:
            RunError: if a run with a checkpoint is already there, or the folder cannot be created.
        """
        cls.check_absent(folder)
        run = cls(folder)
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{folder}: the folder of the run cannot be created ({describe_os_error(error)})"
            ) from error
        for old in (
            run.metrics_path,
            run.calibration_path,
            run.focus_path,
            run.report_path,
            *folder.glob("chips_*.npz"),
        ):
            old.unlink(missing_ok=True)
        if run.report_folder.is_dir():
            remove_folder(run.report_folder)
        run.save_config(config)
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open the folder of a run.

        Raises:
            RunError: if there is no run.
        """
        if is_remote(folder):
            raise RunError(f"{folder}: a run is not read from a URL; download its folder first")
        if folder.is_file():
            kind = "an exported model" if folder.suffix in _EXPORTED_SUFFIXES else "a file"
            raise RunError(f"{folder}: there is no run; expected its folder, not {kind}")
        if not (folder / "config.yaml").is_file():
            raise RunError(
                f"{folder}: there is no run (config.yaml is missing)"
                f"{_list_runs(folder) or _list_runs(folder.parent)}"
            )
        return cls(folder)

    def save_config(self, config: str) -> None:
        """Write the configuration."""
        with atomic_write(self.config_path) as file:
            file.write(config.encode())

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the metrics; a number that is not finite becomes null, since JSON has none."""
        entry = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        if self.metrics_path.exists():
            check_regular(self.metrics_path)
        with naming_path(self.metrics_path), self.metrics_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Read the metrics; see `_read_lines`."""
        return [entry for _, entry in self._read_lines()]

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations whose scores can be compared, oldest first: on as many images as the newest one."""
        evaluations = [_to_evaluation(entry) for entry in self._entries_of("evaluate")]
        return [entry for entry in evaluations if entry.num_images == evaluations[-1].num_images]

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the best AP among those whose checkpoint is there, the later one if equal."""
        steps = {int(path.name) for path in self.checkpoints}
        scored = [entry for entry in self.evaluations if entry.step in steps and entry.ap >= 0]
        return max(scored, key=lambda entry: (entry.ap, entry.step), default=None)

    def final_scores(self, step: int) -> dict[str, Any] | None:
        """Return the scores of a step on all validation images; None if it was not evaluated on all."""
        entries = [entry for entry in self._entries_of("final") if entry["step"] == step]
        return entries[-1] if entries else None

    def best_scores(self) -> dict[str, Any] | None:
        """Return the scores of the best checkpoint: on all validation images if it was evaluated on all.

        None if no checkpoint has been evaluated.
        """
        best = self.best
        if best is None:
            return None
        final = self.final_scores(best.step)
        return final or [entry for entry in self._entries_of("evaluate") if entry["step"] == best.step][-1]

    def epoch_means(self, step: int) -> dict[str, Any]:
        """Return the line with the means of the epoch that ended with a step; empty if there is none."""
        entries = [entry for entry in self._entries_of("epoch") if entry["step"] == step]
        return entries[-1] if entries else {}

    def chip_losses(self, *, after_epoch: float, up_to_epoch: float) -> tuple[float, float] | None:
        """Return the mean classification losses of negative and positive chips in the last epoch that has both.

        Args:
            after_epoch: only epochs that end later count.
            up_to_epoch: and not later than this.
        """
        losses = [
            (entry["negative_loss"], entry["positive_loss"])
            for entry in self._entries_of("epoch")
            if after_epoch < entry.get("epoch", 0) <= up_to_epoch
            and {"negative_loss", "positive_loss"} <= entry.keys()
        ]
        return losses[-1] if losses else None

    def has_entry(self, stage: str, *, epoch: float) -> bool:
        """Check whether the metrics have a line of a stage for an epoch."""
        return any(entry.get("epoch") == epoch for entry in self._entries_of(stage))

    def _entries_of(self, stage: str) -> list[dict[str, Any]]:
        """Read the lines of a stage that has few of them."""
        # Parsing the lines of all steps would take longer than reading them.
        return [entry for _, entry in self._read_lines(containing=f'"stage": "{stage}"'.encode())]

    def _read_lines(self, *, containing: bytes = b"") -> list[tuple[bytes, dict[str, Any]]]:
        """Read the lines of the metrics that contain some text, and what they say.

        Lines that cannot be read are left out with a warning, such as the last one if the run was killed meanwhile.

        Raises:
            RunError: if the file cannot be read.
        """
        path = self.metrics_path
        if not path.exists():
            return []
        try:
            lines = read_bytes(path).split(b"\n")
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({describe_os_error(error)})") from error
        entries, problems = [], []
        for number, line in enumerate(lines, start=1):
            if not line or containing not in line:
                continue
            try:
                entries.append((line, _parse_line(line)))
            except (ValueError, RecursionError) as error:
                is_cut = number == len(lines)
                problems.append(f"line {number} ({'cut short' if is_cut else error})")
        if problems:
            warnings.warn(f"{path}: cannot be read and is left out: {count_and_list(problems)}", stacklevel=3)
        return entries

    def truncate_metrics(self, *, step: int) -> None:
        """Drop the metrics of steps after the checkpoint that the run continues from, and lines that cannot be read."""
        if not self.metrics_path.exists():
            return
        lines = [line + b"\n" for line, entry in self._read_lines() if entry["step"] <= step]
        with atomic_write(self.metrics_path) as file:
            file.write(b"".join(lines))

    def save_checkpoint(self, checkpoint: Checkpoint, *, keep: int) -> Path:
        """Write a checkpoint, complete or not at all, and delete all but the newest few and the best one.

        Args:
            checkpoint: the state of the run.
            keep: number of newest checkpoints to keep.

        Raises:
            CheckpointError: if it cannot be written; earlier checkpoints are unchanged.
        """
        try:
            folder = checkpoint.save(self.folder / "checkpoints")
        except OSError as error:
            complete = self.checkpoints
            state = f"the newest complete one is {complete[-1]}" if complete else "there is no earlier one"
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {checkpoint.progress.step} cannot be written "
                f"({describe_os_error(error)}); {state}. Then continue with --resume."
            ) from error
        self.remove_checkpoints(keep=keep)
        return folder

    def remove_checkpoints(self, *, keep: int) -> None:
        """Delete all checkpoints but the newest few and the one with the best validation AP."""
        best = self.best
        for old in self.checkpoints[:-keep]:
            if best is None or int(old.name) != best.step:
                remove_folder(old)

    def load_checkpoint(self, identity: DatasetIdentity) -> Checkpoint | None:
        """Read the newest checkpoint; None if the run has none.

        Args:
            identity: of the data set that the run continues on.

        Raises:
            CheckpointError: if it cannot be read, or was trained on another data set.
        """
        if not self.checkpoints:
            return None
        with self._naming_previous_checkpoint():
            checkpoint = Checkpoint.load(self.checkpoints[-1])
        if checkpoint.identity != identity:
            raise self._trained_on_other_data()
        return checkpoint

    def rewind_to(self, step: int) -> None:
        """Continue from the checkpoint of an earlier step.

        Later checkpoints, and chips and false alarms that were mined with their weights, are renamed to end in `.old`.

        Raises:
            RunError: if there is no checkpoint of that step.
            CheckpointError: if it cannot be read.
        """
        index = self.checkpoints.index(self._checkpoint_of(step))
        epoch = read_progress(self.checkpoints[index]).epoch
        numbers = {
            path: path.stem.partition("_")[2]
            for pattern in ("chips_*.npz", "alarms_*")
            for path in self.folder.glob(pattern)
        }
        mined = [
            path for path, number in numbers.items() if _NUMBER.fullmatch(number) and int(number) > epoch
        ]
        for path in (*self.checkpoints[index + 1 :], *mined):
            renamed = path.with_name(f"{path.name}.old")
            if renamed.is_dir():
                remove_folder(renamed)
            path.replace(renamed)

    def restore_replaced(self) -> None:
        """Restore the checkpoint that a process was replacing when it was killed; called by the process that writes."""
        restore_replaced(self.folder / "checkpoints")

    def is_trained_on(self, identity: DatasetIdentity) -> bool:
        """Check whether the newest checkpoint was trained on a data set; True if there is no checkpoint.

        Raises:
            CheckpointError: if it cannot be read.
        """
        if not self.checkpoints:
            return True
        path = self.checkpoints[-1] / WEIGHTS
        with self._naming_previous_checkpoint():
            return read_identity(path) == identity

    def check_trained_on(self, identity: DatasetIdentity) -> None:
        """Refuse to continue on another data set.

        Raises:
            CheckpointError: if the newest checkpoint was trained on another data set, or cannot be read.
        """
        if not self.is_trained_on(identity):
            raise self._trained_on_other_data()

    @property
    def weights_path(self) -> Path:
        """The weights to predict with: those of the best checkpoint, or the newest; see `find_weights`.

        Raises:
            RunError: if there is no checkpoint yet.
        """
        return self.find_weights("best")

    def find_weights(self, checkpoint: CheckpointChoice = "best") -> Path:
        """Return the weights file of a checkpoint: of the moving average of the weights if one is kept.

        Args:
            checkpoint: `best`, the one with the best validation AP, or the newest if none has been evaluated; `last`,
                the newest; or the number of its step.

        Raises:
            RunError: if there is no such checkpoint.
        """
        if not self.checkpoints:
            raise RunError(f"{self.folder}: the run has no checkpoint yet")
        folder, best = self.checkpoints[-1], self.best
        if checkpoint == "best" and best is not None:
            folder = folder.with_name(f"{best.step:08d}")
        elif isinstance(checkpoint, int):
            folder = self._checkpoint_of(checkpoint)
        ema = folder / EMA
        return ema if ema.exists() else ema.with_name(WEIGHTS)

    def load_weights(
        self, checkpoint: CheckpointChoice = "best"
    ) -> tuple[dict[str, torch.Tensor], tuple[Category, ...], Path]:
        """Read the weights of a checkpoint, the categories by label, and the path of the file.

        Args:
            checkpoint: see `find_weights`.

        Raises:
            RunError: if there is no such checkpoint.
            CheckpointError: if it cannot be read.
        """

        def load(path: Path) -> tuple[dict[str, torch.Tensor], tuple[Category, ...], Path]:
            with self._naming_other_checkpoints(path):
                tensors, identity = load_weights(path)
                return tensors, identity.categories, path

        return self.read_weights(checkpoint, load)

    def read_weights(self, checkpoint: CheckpointChoice, read: Callable[[Path], _T]) -> _T:
        """Read the weights file of a checkpoint; start over with the next one if a training removes it meanwhile.

        Args:
            checkpoint: see `find_weights`.
            read: reads the file.

        Returns:
            What `read` returns.

        Raises:
            RunError: if there is no such checkpoint.
        """
        while True:
            path = self.find_weights(checkpoint)
            try:
                return read(path)
            except (OSError, SniperError):
                if path.parent.exists() or isinstance(checkpoint, int):
                    raise

    def _checkpoint_of(self, step: int) -> Path:
        for path in self.checkpoints:
            if int(path.name) == step:
                return path
        known = ", ".join(str(int(path.name)) for path in self.checkpoints) or "none"
        raise RunError(f"{self.folder}: there is no checkpoint of step {step}; there are {known}")

    @contextmanager
    def _naming_other_checkpoints(self, path: Path) -> Iterator[None]:
        """Add to an error about weights which other checkpoints there are."""
        try:
            yield
        except CheckpointError as error:
            others = ", ".join(str(int(folder.name)) for folder in self.checkpoints if folder != path.parent)
            if not others:
                raise
            raise CheckpointError(
                f"{error}; other checkpoints are of step {others}: predict with one of them (sniper predict "
                "--checkpoint STEP), or continue from one (sniper train --resume --step STEP)"
            ) from error

    def _trained_on_other_data(self) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoints[-1]}: was trained on other images, boxes or categories than the data set has now; "
            "restore the annotations, or start a new run"
        )

    @contextmanager
    def _naming_previous_checkpoint(self) -> Iterator[None]:
        """Add to an error about the newest checkpoint which one to continue from."""
        try:
            yield
        except CheckpointError as error:
            *older, newest = self.checkpoints
            if not older:
                raise
            step = int(older[-1].name)
            raise CheckpointError(
                f"{error}; the previous checkpoint is of step {step}: continue from it with "
                f"sniper train --resume --step {step}, or by moving {newest} away"
            ) from error


_EXPORTED_SUFFIXES = (".onnx", ".xml", ".bin", ".pt2")


def _list_runs(folder: Path) -> str:
    """Return which runs a folder has, as the end of an error; empty if there are none."""
    try:
        names = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    except OSError:
        return ""
    return f"; runs in {folder}: {count_and_list(names, limit=8, separator=', ')}" if names else ""


class _Line(msgspec.Struct, gc=False):
    """What is read from a line of the metrics; it may have more."""

    step: _Count
    stage: str = ""
    epoch: _Quantity | None = None
    ap: Annotated[float, msgspec.Meta(ge=-1, le=1)] | None = None
    num_images: _Count = 0
    loss: float | None = None
    learning_rate: float | None = None
    positives: _Count = 0
    positive_accuracy: _Quantity | None = 0.0
    positive_loss: _Quantity = 0.0
    negative_loss: _Quantity = 0.0
    positive_chips_in_batch: _Count = 0
    negative_chips_in_batch: _Count = 0

    def __post_init__(self) -> None:
        if self.stage in ("evaluate", "final") and self.epoch is None:
            raise ValueError("Object missing required field `epoch`")
        is_step = self.learning_rate is not None
        if is_step and None in (self.loss, self.positive_accuracy):
            raise ValueError("Object missing required field `loss` or `positive_accuracy`")


def _parse_line(line: bytes) -> dict[str, Any]:
    """Return a line of the metrics.

    Raises:
        ValueError: if it is not JSON, or not a line of the metrics.
    """
    entry: dict[str, Any] = msgspec.json.decode(line)
    msgspec.convert(entry, _Line)
    return entry


def _to_evaluation(entry: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation as the metrics have it."""
    return Evaluation(
        step=entry["step"],
        epoch=entry["epoch"],
        ap=-1.0 if entry.get("ap") is None else entry["ap"],
        num_images=entry.get("num_images", 0),
    )
