"""Checkpoints: weights, optimizer state and progress of a run at one step.

A checkpoint is a folder of safetensors files named after its step. It is written under another name and renamed when
complete, so a folder with a number for a name is always complete.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from sniper.data.datasets import DatasetIdentity
from sniper.errors import CheckpointError, counted
from sniper.files import atomic_folder, remove_folder
from sniper.models.two_stage import CLASS_TENSORS
from sniper.models.weights import check_tensor, load_head, load_tensors, refuse, save_tensors
from sniper.runs.environment import Environment
from sniper.specs import spec_dataclass

WEIGHTS, EMA, OPTIMIZER = "weights.safetensors", "ema.safetensors", "optimizer.safetensors"
_REPLACED = ".replaced"  # suffix of a checkpoint while a new one takes its place

_STATE_KEYS = {torch.optim.SGD: ("momentum_buffer",), torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq")}
"""The tensors that an optimizer keeps for each parameter once it has updated it."""


@spec_dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer updates made.
        epoch: epochs completed.
        step_in_epoch: updates made in the current epoch.
    """

    step: NonNegativeInt = 0
    epoch: NonNegativeInt = 0
    step_in_epoch: NonNegativeInt = 0

    def next_step(self) -> "Progress":
        """Return the progress after one more update of the current epoch."""
        return Progress(step=self.step + 1, epoch=self.epoch, step_in_epoch=self.step_in_epoch + 1)

    def next_epoch(self) -> "Progress":
        """Return the progress at the start of the next epoch."""
        return Progress(step=self.step, epoch=self.epoch + 1)


@spec_dataclass
class Counters:
    """Plain data that belongs to the state of the optimizer.

    Attributes:
        loss_scale: state of torch's `GradScaler`; empty where it is not used.
        num_shares: number of parts that each batch was computed in; None if an earlier version wrote the checkpoint.
        environment: that the last step was made in; None if an earlier version wrote the checkpoint.
    """

    loss_scale: dict[str, int | float] = field(default_factory=dict)
    num_shares: PositiveInt | None = None
    environment: Environment | None = None


@spec_dataclass
class _OptimizerHead(Counters):
    """What is stored beside the state of the optimizer: counters, and the progress, of which nothing may be missing."""

    step: NonNegativeInt
    epoch: NonNegativeInt
    step_in_epoch: NonNegativeInt


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything that is needed to continue a run from one step.

    Attributes:
        weights: parameters and buffers of the model, by name.
        ema: their exponential moving average, if one is kept: the weights to predict with.
        optimizer: state tensors of the optimizer, by name; see `optimizer_tensors`.
        counters: plain data that belongs to the optimizer.
        progress: how far the run has come.
        identity: of the data set that the run is trained on.
    """

    weights: Mapping[str, torch.Tensor]
    ema: Mapping[str, torch.Tensor] | None
    optimizer: Mapping[str, torch.Tensor]
    counters: Counters
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
            save_tensors(
                folder / OPTIMIZER, self.optimizer, head={**asdict(self.progress), **asdict(self.counters)}
            )
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
        weights, identity = load_weights(folder / WEIGHTS)
        ema = load_weights(folder / EMA)[0] if (folder / EMA).exists() else None
        optimizer, head = load_tensors(folder / OPTIMIZER, _OptimizerHead)
        return cls(
            weights=weights,
            ema=ema,
            optimizer=optimizer,
            counters=Counters(**_fields_of(Counters, head)),
            progress=_to_progress(head, folder=folder),
            identity=identity,
        )


def read_progress(folder: Path) -> Progress:
    """Read how far the run had come when a checkpoint was written.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return _to_progress(load_head(folder / OPTIMIZER, _OptimizerHead), folder=folder)


def _to_progress(head: _OptimizerHead, *, folder: Path) -> Progress:
    progress = Progress(**_fields_of(Progress, head))
    is_step = progress.step == int(folder.name)
    # Every epoch has at least one step.
    if not is_step or progress.epoch + progress.step_in_epoch > progress.step:
        raise CheckpointError(
            f"{folder / OPTIMIZER}: expected the progress of step {int(folder.name)}, got step {progress.step}: epoch "
            f"{progress.epoch} and {progress.step_in_epoch} steps"
        )
    return progress


def _fields_of(kind: type[Any], head: _OptimizerHead) -> dict[str, Any]:
    """Return the values of the fields of one of the parts of a head."""
    return {each.name: getattr(head, each.name) for each in fields(kind)}


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], DatasetIdentity]:
    """Read the weights of a detector, and the identity of the data set that it was trained on.

    Args:
        path: a file of weights of a checkpoint.

    Raises:
        CheckpointError: if it cannot be read, or has scores of other classes than those of the data set.
    """
    tensors, identity = load_tensors(path, DatasetIdentity)
    num_classes = len(identity.categories)
    for name in CLASS_TENSORS:
        rows = tensors[name].shape[:1] if name in tensors else (num_classes + 1,)
        if rows != (num_classes + 1,):
            raise CheckpointError(
                f"{path}: {name} has {rows[0] if rows else 'no'} rows for "
                f"{counted(num_classes, 'class', 'classes')} and the background"
            )
    return tensors, identity


def read_identity(path: Path) -> DatasetIdentity:
    """Read the identity of the data set that weights were trained on.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return load_head(path, DatasetIdentity)


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
        CheckpointError: if they are not those of all parameters of the optimizer, or differ in shape; or if values are
            not finite. The optimizer is then not changed.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter in trained}
    keys = _STATE_KEYS[type(optimizer)] if tensors else ()  # none before the first update
    if optimizer.defaults.get("momentum") == 0:
        keys = ()
    expected = {
        # AdamW counts steps in tensors without dimensions, which stay on the CPU.
        f"{name}/{key}": torch.zeros(()) if key == "step" else parameter
        for name, parameter in parameters.items()
        for key in keys
    }
    missing = [f"{name} is missing" for name in expected if name not in tensors]
    unexpected = [f"{name} is not part of the optimizer" for name in tensors if name not in expected]
    differing = [
        check_tensor(name, tensors[name], value) for name, value in expected.items() if name in tensors
    ]
    refuse(missing + unexpected + differing, source=source)
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        value = tensor if key == "step" else torch.empty_like(parameter).copy_(tensor)
        optimizer.state[parameter][key] = value.detach()
