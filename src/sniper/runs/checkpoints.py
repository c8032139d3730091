"""Checkpoints: weights, optimizer state and progress of a run at one step.

A checkpoint is a folder of safetensors files named after its step. It is written under another name and renamed when
complete, so a folder with a number for a name is always complete.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sniper.data.datasets import Category, DatasetIdentity
from sniper.errors import CheckpointError
from sniper.files import atomic_folder, remove_folder
from sniper.models.weights import load_tensors, save_tensors

WEIGHTS, EMA, OPTIMIZER = "weights.safetensors", "ema.safetensors", "optimizer.safetensors"
_REPLACED = ".replaced"  # suffix of a checkpoint while a new one takes its place


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer updates made.
        epoch: epochs completed.
        step_in_epoch: updates made in the current epoch.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0

    def next_step(self) -> "Progress":
        """Return the progress after one more update of the current epoch."""
        return Progress(step=self.step + 1, epoch=self.epoch, step_in_epoch=self.step_in_epoch + 1)

    def next_epoch(self) -> "Progress":
        """Return the progress at the start of the next epoch."""
        return Progress(step=self.step, epoch=self.epoch + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything that is needed to continue a run from one step.

    Attributes:
        weights: parameters and buffers of the model, by name.
        ema: their exponential moving average, if one is kept: the weights to predict with.
        optimizer: state tensors of the optimizer, by name; see `optimizer_tensors`.
        counters: plain data that belongs to the optimizer, such as the loss scale.
        progress: how far the run has come.
        identity: of the data set that the run is trained on.
    """

    weights: Mapping[str, torch.Tensor]
    ema: Mapping[str, torch.Tensor] | None
    optimizer: Mapping[str, torch.Tensor]
    counters: Mapping[str, Any]
    progress: Progress
    identity: DatasetIdentity

    def save(self, checkpoints: Path) -> Path:
        """Write the checkpoint, complete or not at all.

        Args:
            checkpoints: folder of all checkpoints of the run.

        Returns:
            The folder of this checkpoint. An earlier one of the same step is replaced.

        Raises:
            OSError: if it cannot be written; earlier checkpoints are unchanged.
        """
        final = checkpoints / f"{self.progress.step:08d}"
        replaced = final.with_name(f"{final.name}{_REPLACED}")
        head = asdict(self.identity)
        checkpoints.mkdir(parents=True, exist_ok=True)
        with atomic_folder(final) as folder:
            save_tensors(folder / WEIGHTS, self.weights, head=head)
            if self.ema is not None:
                save_tensors(folder / EMA, self.ema, head=head)
            save_tensors(folder / OPTIMIZER, self.optimizer, head={**asdict(self.progress), **self.counters})
            if final.exists():
                final.replace(replaced)
        if replaced.exists():
            remove_folder(replaced)
        return final

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """Read a checkpoint.

        Raises:
            CheckpointError: if it cannot be read.
        """
        weights, identity = load_tensors(folder / WEIGHTS)
        ema = load_tensors(folder / EMA)[0] if (folder / EMA).exists() else None
        optimizer, counters = load_tensors(folder / OPTIMIZER)
        progress = _to_progress(counters, source=folder / OPTIMIZER)
        return cls(
            weights=weights,
            ema=ema,
            optimizer=optimizer,
            counters={name: value for name, value in counters.items() if name not in asdict(progress)},
            progress=progress,
            identity=to_identity(identity, source=folder / WEIGHTS),
        )


def read_progress(folder: Path) -> Progress:
    """Read how far the run had come when a checkpoint was written.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return _to_progress(load_tensors(folder / OPTIMIZER)[1], source=folder / OPTIMIZER)


def _to_progress(head: Mapping[str, Any], *, source: Path) -> Progress:
    try:
        return Progress(**{field.name: head[field.name] for field in fields(Progress)})
    except KeyError as error:
        raise CheckpointError(f"{source}: the progress of the run is missing ({error})") from error


def to_identity(head: Mapping[str, Any], *, source: Path) -> DatasetIdentity:
    """Return the identity of the data set that is stored beside weights.

    Args:
        head: plain data beside the tensors of a file.
        source: the file, for the error message.

    Raises:
        CheckpointError: if it is missing or incomplete.
    """
    try:
        categories = tuple(Category(**entry) for entry in head["categories"])
        return DatasetIdentity(categories=categories, digest=head["digest"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: the categories of the data set are missing ({error})") from error


def restore_replaced(checkpoints: Path) -> None:
    """Restore the checkpoint that a process was replacing when it was killed; called by the process that writes.

    Args:
        checkpoints: folder of all checkpoints of the run.
    """
    for replaced in checkpoints.glob(f"*{_REPLACED}"):
        final = replaced.with_suffix("")
        if final.exists():
            remove_folder(replaced)
        else:
            replaced.replace(final)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state tensors of an optimizer, named `<parameter>/<key>`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def fill_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: Path
) -> None:
    """Load state tensors into an optimizer, in the memory layout and on the device of their parameters.

    Args:
        optimizer: of that model.
        model: whose parameters the tensors are named after.
        tensors: see `optimizer_tensors`.
        source: the file that they came from, for the error message.

    Raises:
        CheckpointError: if the model lacks a parameter.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None:
            raise CheckpointError(f"{source}: belongs to another model: it has {name}")
        has_parameter_shape = tensor.shape == parameter.shape and tensor.dim() > 0
        # AdamW counts steps in tensors without dimensions, which stay on the CPU.
        value = torch.empty_like(parameter).copy_(tensor) if has_parameter_shape else tensor
        optimizer.state[parameter][key] = value.detach()
