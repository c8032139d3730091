"""The folder in which a run lives: its configuration, its metrics, its checkpoints.

A checkpoint is a folder `checkpoints/<step>`, filled under another name and renamed when complete, so that whatever
bears a number is whole.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sniper.data.datasets import Category, Dataset
from sniper.errors import CheckpointError, RunError
from sniper.files import atomic_write
from sniper.models.weights import fill_module, load_tensors, save_tensors


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer updates made.
        epoch: passes completed.
        step_in_epoch: updates made in the pass under way.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        folder: where everything of the run is.
    """

    folder: Path

    @property
    def config_path(self) -> Path:
        """The complete configuration, as used."""
        return self.folder / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def chips_path(self) -> Path:
        """The chips of every epoch, where the experiment names a chip table."""
        return self.folder / "chips.npz"

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(path for path in (self.folder / "checkpoints").glob("*") if path.name.isdigit())

    @classmethod
    def create(cls, folder: Path, *, config: str) -> "Run":
        """Make a new run's folder.

        A folder in which a run was begun, but never came to a checkpoint, is begun anew.

        Raises:
            RunError: if a run with a checkpoint is already there, or the folder cannot be made.
        """
        run = cls(folder)
        if run.checkpoints:
            raise RunError(
                f"{folder}: a run is already there; go on with --resume, or name another with --run"
            )
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder}: cannot be made a run's folder ({error.strerror})") from error
        for old in (run.metrics_path, *folder.glob("chips_*.npz")):
            old.unlink(missing_ok=True)
        run.save_config(config)
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Find a run's folder.

        Raises:
            RunError: if there is none.
        """
        if not (folder / "config.yaml").is_file():
            raise RunError(f"{folder}: no run is there (config.yaml is absent)")
        return cls(folder)

    def save_config(self, config: str) -> None:
        """Write the configuration."""
        with atomic_write(self.config_path) as file:
            file.write(config.encode())

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the metrics; what is not finite becomes null, for JSON has no word for it."""
        entry = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Read the metrics; a last line that was cut short when the run was killed is left out."""
        if not self.metrics_path.exists():
            return []
        entries = []
        for line in self.metrics_path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        return entries

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that were made after the checkpoint from which the run goes on."""
        if not self.metrics_path.exists():
            return
        lines = [json.dumps(entry) + "\n" for entry in self.entries() if entry["step"] <= step]
        with atomic_write(self.metrics_path) as file:
            file.write("".join(lines).encode())

    def save_checkpoint(
        self,
        *,
        weights: Mapping[str, torch.Tensor],
        average: Mapping[str, torch.Tensor] | None,
        optimizer: Mapping[str, torch.Tensor],
        counters: Mapping[str, Any],
        progress: Progress,
        annotations: Dataset,
        keep: int,
    ) -> Path:
        """Write a checkpoint, complete or not at all, and remove all but the newest few.

        Args:
            weights: the model's, and its statistics.
            average: of the weights, if one is kept: what the trained detector is to use.
            optimizer: its tensors, see `optimizer_tensors`.
            counters: plain data that goes with the optimizer.
            progress: how far the run has come.
            annotations: what it learns from; their categories and digest are kept.
            keep: how many checkpoints to leave.

        Raises:
            CheckpointError: if it cannot be written; those written before are as they were.
        """
        folder = self.folder / "checkpoints"
        unfinished = folder / "unfinished"
        final = folder / f"{progress.step:08d}"
        head = _identity(annotations)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_tensors(unfinished / "weights.safetensors", weights, head=head)
            if average is not None:
                save_tensors(unfinished / "average.safetensors", average, head=head)
            place = {**asdict(progress), **counters}
            save_tensors(unfinished / "optimizer.safetensors", optimizer, head=place)
            shutil.rmtree(final, ignore_errors=True)  # of the same step, written before
            os.replace(unfinished, final)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            left = self.checkpoints
            state = f"the last one that is whole is {left[-1]}" if left else "there is none before it"
            raise CheckpointError(
                f"{final}: the checkpoint of step {progress.step} cannot be written "
                f"({error.strerror or error}); {state}. Once that is mended, go on with --resume."
            ) from error
        for old in self.checkpoints[:-keep]:
            os.replace(old, unfinished)  # it bears a number no more before it stops being whole
            shutil.rmtree(unfinished)
        return final

    def load_checkpoint(
        self,
        *,
        model: nn.Module,
        average: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        annotations: Dataset,
    ) -> tuple[Progress, dict[str, Any]]:
        """Go back to the newest checkpoint; a run without one starts at its beginning.

        Args:
            model: filled with its weights and statistics.
            average: filled with the average of the weights, if one is kept.
            optimizer: of that model; filled with its state.
            annotations: what the run goes on learning from.

        Returns:
            How far the run has come, and the counters that were saved.

        Raises:
            CheckpointError: if it cannot be read, belongs to another model, or learnt from other annotations.
        """
        if not self.checkpoints:
            return Progress(), {}
        self.check_learnt_from(annotations)
        folder = self.checkpoints[-1]
        for module, name in ((model, "weights"), (average, "average")):
            if module is not None:
                source = folder / f"{name}.safetensors"
                fill_module(module, self._read(source)[0], source=source)
        source = folder / "optimizer.safetensors"
        state, head = self._read(source)
        _fill_optimizer(optimizer, model, state, source=source)
        names = [field.name for field in fields(Progress)]
        try:
            progress = Progress(**{name: head.pop(name) for name in names})
        except KeyError as error:
            raise CheckpointError(f"{source}: does not say how far the run has come ({error})") from error
        return progress, head

    def go_back_to(self, step: int) -> None:
        """Put what came after the checkpoint of a step aside, under names that end in `.aside`.

        That is later checkpoints, and chips that were mined with their weights.

        Raises:
            RunError: if there is no checkpoint of that step.
            CheckpointError: if that cannot be read either.
        """
        steps = [int(path.name) for path in self.checkpoints]
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise RunError(f"{self.folder}: has no checkpoint of step {step}; there are {known}")
        kept = self.checkpoints[steps.index(step)]
        _, head = load_tensors(kept / "optimizer.safetensors")
        tables = [
            path for path in self.folder.glob("chips_*.npz") if int(path.stem.split("_")[1]) > head["epoch"]
        ]
        for path in (*self.checkpoints[steps.index(step) + 1 :], *tables):
            aside = path.with_name(f"{path.name}.aside")
            if aside.is_dir():
                shutil.rmtree(aside)
            os.replace(path, aside)

    def _read(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read a part of the newest checkpoint; if that fails, say which one is before it."""
        try:
            return load_tensors(path)
        except CheckpointError as error:
            *older, newest = self.checkpoints
            if not older:
                raise
            step = int(older[-1].name)
            raise CheckpointError(
                f"{error}; the one before is of step {step}: go back to it with sniper train --resume --step {step}, "
                f"or by moving {newest} away"
            ) from error

    def learnt_from(self, annotations: Dataset) -> bool:
        """Tell whether the newest checkpoint, if there is one, learnt from these annotations.

        Raises:
            CheckpointError: if it cannot be read.
        """
        if not self.checkpoints:
            return True
        _, head = self._read(self.checkpoints[-1] / "weights.safetensors")
        return head == _identity(annotations)

    def check_learnt_from(self, annotations: Dataset) -> None:
        """Refuse to go on with other annotations.

        Raises:
            CheckpointError: if the newest checkpoint learnt from others, or cannot be read.
        """
        if not self.learnt_from(annotations):
            raise CheckpointError(
                f"{self.checkpoints[-1]}: the run learnt from other images, boxes or categories than "
                f"{annotations.path} has now"
            )

    @property
    def weights_path(self) -> Path:
        """The newest weights, their average if one is kept.

        Raises:
            RunError: if there is no checkpoint yet.
        """
        if not self.checkpoints:
            raise RunError(f"{self.folder}: the run has no checkpoint yet")
        average = self.checkpoints[-1] / "average.safetensors"
        return average if average.exists() else average.with_name("weights.safetensors")

    def load_weights(self) -> tuple[dict[str, torch.Tensor], tuple[Category, ...], Path]:
        """Read the newest weights, their average if one is kept: tensors, categories by label, and the file.

        Raises:
            RunError: if there is no checkpoint yet.
            CheckpointError: if it cannot be read.
        """
        path = self.weights_path
        tensors, head = self._read(path)
        try:
            categories = tuple(Category(**entry) for entry in head["categories"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: names no categories ({error})") from error
        return tensors, categories, path


def _identity(annotations: Dataset) -> dict[str, Any]:
    """Say what a run learns from, in plain data: a checkpoint fits no other."""
    categories = [asdict(category) for category in annotations.categories]
    return {"categories": categories, "digest": annotations.digest}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Name the optimizer's tensors after the parameters they belong to."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _fill_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, torch.Tensor], *, source: Path
) -> None:
    """Put tensors back in their places: what has a parameter's shape in its memory layout and on its device."""
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None:
            raise CheckpointError(f"{source}: belongs to another model: it has {name}")
        is_alike = tensor.shape == parameter.shape and tensor.dim() > 0
        # AdamW counts steps in tensors without dimensions, which stay on the processor.
        own = torch.empty_like(parameter).copy_(tensor) if is_alike else tensor
        optimizer.state[parameter][key] = own.detach()
