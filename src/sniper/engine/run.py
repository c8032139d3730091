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

from sniper.data.coco import Annotations, Category
from sniper.errors import CheckpointError, RunError
from sniper.files import replace_whole
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
        with replace_whole(self.config_path) as file:
            file.write(config.encode())

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
        with replace_whole(self.metrics_path) as file:
            file.write("".join(lines).encode())

    def save_checkpoint(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        annotations: Annotations,
        keep: int,
    ) -> Path:
        """Write a checkpoint, complete or not at all, and remove all but the newest few.

        Args:
            model: its weights and statistics.
            optimizer: of that model.
            progress: how far the run has come.
            annotations: what it learns from; their categories and digest are kept.
            keep: how many checkpoints to leave.
        """
        folder = self.folder / "checkpoints"
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        head = _identity(annotations)
        save_tensors(unfinished / "weights.safetensors", model.state_dict(), head=head)
        state = _optimizer_state(optimizer, model)
        save_tensors(unfinished / "optimizer.safetensors", state, head=asdict(progress))
        final = folder / f"{progress.step:08d}"
        os.replace(unfinished, final)
        for old in self.checkpoints[:-keep]:
            os.replace(old, unfinished)  # it bears a number no more before it stops being whole
            shutil.rmtree(unfinished)
        return final

    def load_checkpoint(
        self, *, model: nn.Module, optimizer: torch.optim.Optimizer, annotations: Annotations
    ) -> Progress:
        """Go back to the newest checkpoint; a run without one starts at its beginning.

        Args:
            model: filled with its weights and statistics.
            optimizer: of that model; filled with its state.
            annotations: what the run goes on learning from.

        Raises:
            CheckpointError: if it cannot be read, belongs to another model, or learnt from other annotations.
        """
        if not self.checkpoints:
            return Progress()
        self.check_learnt_from(annotations)
        source = self.checkpoints[-1] / "weights.safetensors"
        weights, _ = load_tensors(source)
        fill_module(model, weights, source=source)
        source = self.checkpoints[-1] / "optimizer.safetensors"
        state, head = load_tensors(source)
        _fill_optimizer(optimizer, model, state, source=source)
        return Progress(step=head["step"], epoch=head["epoch"], step_in_epoch=head["step_in_epoch"])

    def learnt_from(self, annotations: Annotations) -> bool:
        """Tell whether the newest checkpoint, if there is one, learnt from these annotations.

        Raises:
            CheckpointError: if it cannot be read.
        """
        if not self.checkpoints:
            return True
        _, head = load_tensors(self.checkpoints[-1] / "weights.safetensors")
        return head == _identity(annotations)

    def check_learnt_from(self, annotations: Annotations) -> None:
        """Refuse to go on with other annotations.

        Raises:
            CheckpointError: if the newest checkpoint learnt from others, or cannot be read.
        """
        if not self.learnt_from(annotations):
            raise CheckpointError(
                f"{self.checkpoints[-1]}: the run learnt from other images, boxes or categories than "
                f"{annotations.path} has now"
            )

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


def _identity(annotations: Annotations) -> dict[str, Any]:
    """Say what a run learns from, in plain data: a checkpoint fits no other."""
    categories = [asdict(category) for category in annotations.categories]
    return {"categories": categories, "digest": annotations.digest}


def _optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
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
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None:
            raise CheckpointError(f"{source}: belongs to another model: it has {name}")
        optimizer.state[parameter][key] = tensor.to(parameter.device)
