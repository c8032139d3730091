"""The folder in which a run lives: its configuration, its metrics, its checkpoints.

A checkpoint is a folder `checkpoints/<step>`, filled under another name and renamed when complete, so that whatever
bears a number is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sniper.data.coco import Category
from sniper.errors import CheckpointError, RunError
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
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(path for path in (self.folder / "checkpoints").glob("*") if path.name.isdigit())

    @classmethod
    def create(cls, folder: Path, *, config: str) -> "Run":
        """Make a new run's folder.

        Raises:
            RunError: if a run is already there.
        """
        if (folder / "config.yaml").exists():
            raise RunError(
                f"{folder}: a run is already there; go on with --resume, or name another with --run"
            )
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        write_atomically(run.config_path, config)
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

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that were made after the checkpoint from which the run goes on."""
        if not self.metrics_path.exists():
            return
        lines = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed run, cut short
                continue
            if entry["step"] <= step:
                lines.append(line + "\n")
        write_atomically(self.metrics_path, "".join(lines))

    def save_checkpoint(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        categories: tuple[Category, ...],
        keep: int,
    ) -> Path:
        """Write a checkpoint, complete or not at all, and remove all but the newest few."""
        folder = self.folder / "checkpoints"
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        head = {"categories": [asdict(category) for category in categories]}
        save_tensors(unfinished / "weights.safetensors", model.state_dict(), head=head)
        tensors, plain = _flatten_optimizer(optimizer, model)
        save_tensors(unfinished / "optimizer.safetensors", tensors, head={**plain, **asdict(progress)})
        final = folder / f"{progress.step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in self.checkpoints[:-keep]:
            shutil.rmtree(old)
        return final

    def load_checkpoint(self, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Go back to the newest checkpoint; a run without one starts at its beginning.

        Raises:
            CheckpointError: if it cannot be read, or belongs to another model.
        """
        if not self.checkpoints:
            return Progress()
        newest = self.checkpoints[-1]
        weights, _ = load_tensors(newest / "weights.safetensors")
        fill_module(model, weights, source=newest / "weights.safetensors")
        tensors, head = load_tensors(newest / "optimizer.safetensors")
        _fill_optimizer(optimizer, model, tensors)
        return Progress(step=head["step"], epoch=head["epoch"], step_in_epoch=head["step_in_epoch"])

    def load_weights(self) -> tuple[dict[str, torch.Tensor], tuple[Category, ...], Path]:
        """Read the newest weights: tensors, categories by label, and the file they came from.

        Raises:
            RunError: if there is no checkpoint yet.
            CheckpointError: if it cannot be read.
        """
        if not self.checkpoints:
            raise RunError(f"{self.folder}: the run has no checkpoint yet")
        path = self.checkpoints[-1] / "weights.safetensors"
        tensors, head = load_tensors(path)
        try:
            categories = tuple(Category(**entry) for entry in head["categories"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: names no categories ({error})") from error
        return tensors, categories, path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _flatten_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Name the optimizer's tensors after the parameters they belong to."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[parameter]}/{key}"] = value
    return tensors, {"optimizer": type(optimizer).__name__}


def _fill_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = tensor.to(parameter.device)
