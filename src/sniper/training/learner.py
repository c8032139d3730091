"""One training step: forward, backward and optimizer update, in one process or in several."""

import math
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sniper.config.experiment import ExperimentSpec
from sniper.data.batches import Batch
from sniper.data.datasets import Category, DatasetIdentity
from sniper.errors import CheckpointError, ConfigError, OutOfMemory, TrainingDiverged, counted
from sniper.models.build import autocast, build_detector
from sniper.models.protocol import DetectorModel, ProposingModel
from sniper.models.weights import fill_module
from sniper.runs.checkpoints import (
    EMA,
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    Counters,
    Progress,
    fill_optimizer,
    optimizer_tensors,
)
from sniper.runs.environment import Environment
from sniper.runs.initial import InitialWeights, WeightsReport
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Run
from sniper.training.optimizer import build_optimizer

_MIN_LOSS_SCALE = 2.0**-6


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an optimizer update reports, over all processes.

    Attributes:
        losses: by name, without the weight of the batch.
        gradient_norm: norm of the weighted gradient, before clipping.
        num_positives: positive proposals of the second stage; 0 if only the RPN is trained.
        num_correct: those whose most probable class is that of their object.
        num_negative_chips: chips without a valid box.
        negative_loss: sum over these chips of the classification losses of both stages.
        positive_loss: the same over the other chips.
    """

    losses: dict[str, float]
    gradient_norm: float
    num_positives: int = 0
    num_correct: int = 0
    num_negative_chips: int = 0
    negative_loss: float = 0.0
    positive_loss: float = 0.0


class Learner:
    """A detector with its optimizer, loss scaler and, if configured, moving average of the weights (EMA).

    Args:
        spec: the experiment.
        num_classes: without background.
        device: where to compute.
        processes: that share each batch.
        has_weights: whether to load the backbone's pretrained weights; not needed if a checkpoint is loaded.

    Attributes:
        model: the detector, in training mode.
        device: of the model.

    Raises:
        ConfigError: if the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        spec: ExperimentSpec,
        *,
        num_classes: int,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
        has_weights: bool = True,
    ) -> None:
        check_divisible(spec, device=device, processes=processes)
        self.spec, self.device, self.processes = spec, device, processes
        model = build_detector(spec.model, seed=spec.seed, num_classes=num_classes, has_weights=has_weights)
        self.model: DetectorModel = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if spec.train.rpn_only:
            for part in self.model.second_stage:
                part.requires_grad_(False)
        self._ema = None
        if spec.train.ema_decay is not None:
            self._ema = ModelEmaV3(self.model, decay=spec.train.ema_decay, use_warmup=True)
        self._optimizer = build_optimizer(spec.train, self.model)
        self._scaler = torch.amp.GradScaler(device.type, enabled=spec.train.precision == "fp16")
        if spec.train.compile:
            self.model.trunk.compile()
        self._statistics = list(self.model.buffers())  # of batch norm, which the forward pass changes
        self._statistics_before = [buffer.clone() for buffer in self._statistics]
        self._losses: nn.Module = _Losses(self.model, rpn_only=spec.train.rpn_only)
        if processes.world_size > 1:
            self._losses = _distributed(self._losses)

    @property
    def inference_model(self) -> DetectorModel:
        """The detector to predict with: the moving average of the weights if one is kept, else `model`."""
        return self.model if self._ema is None else self._ema.module

    def update(self, batch: Batch, *, learning_rate: float, step: int, weight: float = 1.0) -> Update:
        """Make one optimizer update.

        Args:
            batch: this process's share of the chips, on any device.
            learning_rate: of this update.
            step: updates made before.
            weight: factor of the losses in the gradient, for batches of different sizes.

        Returns:
            Its losses, the norm of the gradient, and counts. Reading them is the only point in a step that synchronizes
            with the device.

        Raises:
            TrainingDiverged: if a loss or a gradient is not finite; the weights are unchanged.
            OutOfMemory: if the chips do not fit into memory; the state of the model is unchanged.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        _copy(self._statistics, to=self._statistics_before)
        try:
            losses, counts = self.compute_gradients(batch, weight=weight)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            _copy(self._statistics_before, to=self._statistics)
            raise OutOfMemory(f"step {step}: {self._describe_out_of_memory(batch)}") from error
        self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        means = self.processes.mean(torch.stack([*losses.values(), *counts.values()]))
        values = dict(
            zip((*losses, *counts, "gradient_norm"), torch.cat([means, norm[None]]).tolist(), strict=True)
        )
        sums = {name: values.pop(name) * self.processes.world_size for name in counts}
        if not self._is_finite(values):
            raise TrainingDiverged(f"step {step}: {self._describe_divergence(values, batch)}")
        if self.spec.train.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.spec.train.clip_grad_norm, norm
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._ema is not None:
            self._ema.update(self.model, step=step + 1)
        return Update(
            gradient_norm=values.pop("gradient_norm"),
            losses=values,
            num_positives=round(sums.get("positives", 0)),
            num_correct=round(sums.get("correct", 0)),
            num_negative_chips=round(sums.get("negative_chips", 0)),
            negative_loss=sums.get("negative_loss", 0.0),
            positive_loss=sums.get("positive_loss", 0.0),
        )

    def compute_gradients(
        self, batch: Batch, *, weight: float = 1.0
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Compute the losses of a batch and their gradients, in `accumulation_steps` parts; nothing synchronizes.

        Args:
            batch: this process's share of the chips, on any device.
            weight: factor of the losses in the gradient.

        Returns:
            The losses by name, without the weight, and the counts of `DetectorModel.losses_and_counts`; both of this
            process.
        """
        num_parts = self.spec.train.accumulation_steps
        size = len(batch) // num_parts
        self._optimizer.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        counts: dict[str, torch.Tensor] = {}
        for index in range(num_parts):
            with self._synchronizing(is_last=index == num_parts - 1):
                part = batch.part(index * size, (index + 1) * size).to(self.device)
                part_losses, part_counts = self._backward(part, weight=weight / num_parts)
            for name, loss in part_losses.items():
                losses[name] = losses.get(name, 0) + loss.detach() / num_parts
            for name, count in part_counts.items():
                counts[name] = counts.get(name, 0) + count
        return losses, counts

    @contextmanager
    def evaluating(self) -> Iterator[DetectorModel]:
        """Provide the inference model in evaluation mode, as a checkpoint would store it; all processes must call this.

        Training continues afterwards as if nothing had happened.
        """
        model = self.inference_model
        saved, was_training = (
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            model.training,
        )
        trunk = model.trunk
        # A compiled trunk would be compiled again for every image shape.
        compiled, trunk._compiled_call_impl = trunk._compiled_call_impl, None
        model.load_state_dict(self._shared_state(model))
        try:
            yield model.eval()
        finally:
            model.load_state_dict(saved)
            model.train(was_training)
            trunk._compiled_call_impl = compiled

    def start_from(self, weights: InitialWeights, categories: Sequence[Category]) -> WeightsReport:
        """Load the weights of another detector, before the first step.

        Args:
            weights: of the detector to start from.
            categories: the classes to train, by label.

        Raises:
            ConfigError: if fields of the architecture differ.
            CheckpointError: if tensors do not fit.
        """
        report = weights.load_into(self.model, categories)
        if self._ema is not None:
            self._ema.module.load_state_dict(self.model.state_dict())
        return report

    def load(
        self, run: Run, identity: DatasetIdentity, *, on_warning: Callable[[str], None] = warnings.warn
    ) -> Progress:
        """Load the newest checkpoint of a run, if it has one.

        Args:
            run: the run.
            identity: of the data set that the run continues on.
            on_warning: called in the first process with what differs from the environment that the checkpoint was
                written in, since the weights then differ in their last bits from those of an uninterrupted run.

        Returns:
            How far the run has come.

        Raises:
            CheckpointError: if it cannot be read, belongs to another model, or was trained on another data set.
            ConfigError: if the current epoch of whole images was started with another division of the batch.
        """
        checkpoint = run.load_checkpoint(identity)
        if checkpoint is None:
            return Progress()
        folder = run.checkpoints[-1]
        fill_module(self.model, checkpoint.weights, source=folder / WEIGHTS)
        if self._ema is not None:
            fill_module(self._ema.module, checkpoint.ema or {}, source=folder / EMA)
        fill_optimizer(self._optimizer, self.model, checkpoint.optimizer, source=folder / OPTIMIZER)
        counters = checkpoint.counters
        if counters.loss_scale and self._scaler.is_enabled():
            self._load_loss_scale(counters.loss_scale, source=folder / OPTIMIZER)
        num_shares = counters.num_shares or self._num_shares
        is_within_epoch = checkpoint.progress.step_in_epoch > 0
        if self.spec.data.whole is not None and is_within_epoch and num_shares != self._num_shares:
            raise ConfigError(
                f"{run.folder}: batches of whole images depend on the number of processes times "
                f"train.accumulation_steps, which was {num_shares} and is {self._num_shares}; continue with "
                f"{num_shares}, or from a checkpoint at the end of an epoch (--step)"
            )
        if counters.environment is not None and self.processes.is_first:
            differences = counters.environment.differences(self._environment)
            if differences:
                on_warning(
                    f"{folder}: the run continues, but its weights will not equal those of an uninterrupted run to the "
                    f"last bit: {'; '.join(differences)}"
                )
        return checkpoint.progress

    def save(self, run: Run, identity: DatasetIdentity, *, progress: Progress, keep: int) -> None:
        """Write a checkpoint; all processes must call this, the first writes.

        Args:
            run: the run.
            identity: of the data set that it is trained on.
            progress: how far the run has come.
            keep: number of checkpoints to keep.

        Raises:
            CheckpointError: in all processes, if it cannot be written.
        """
        weights = self._shared_state(self.model)
        ema = None if self._ema is None else self._shared_state(self._ema.module)
        problem = None
        if self.processes.is_first:
            checkpoint = Checkpoint(
                weights=weights,
                ema=ema,
                optimizer=optimizer_tensors(self._optimizer, self.model),
                counters=Counters(
                    loss_scale=self._scaler.state_dict(),
                    num_shares=self._num_shares,
                    environment=self._environment,
                ),
                progress=progress,
                identity=identity,
            )
            try:
                run.save_checkpoint(checkpoint, keep=keep)
            except CheckpointError as error:
                problem = str(error)
        problem = self.processes.all_gather(problem)[0]
        if problem is not None:
            raise CheckpointError(problem)

    def peak_memory(self) -> int:
        """Return the peak memory so far, bytes: allocated on the GPU, or resident in the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def _num_shares(self) -> int:
        """Number of parts that each batch is computed in, by all processes."""
        return self.processes.world_size * self.spec.train.accumulation_steps

    @property
    def _environment(self) -> Environment:
        train = self.spec.train
        return Environment.current(
            self.device,
            world_size=self.processes.world_size,
            accumulation_steps=train.accumulation_steps,
            precision=train.precision,
            compile=train.compile,
            libraries=["transformers"] if self.spec.model.kind == "transformers" else [],
        )

    def _load_loss_scale(self, state: Mapping[str, int | float], *, source: Path) -> None:
        """Load the state of the loss scaler; see `load`."""
        expected = self._scaler.state_dict()
        is_same_kind = {name: type(value) for name, value in state.items()} == {
            name: type(value) for name, value in expected.items()
        }
        if not is_same_kind or min(state.values()) < 0 or state["scale"] == 0:
            raise CheckpointError(
                f"{source}: loss_scale: expected values such as {expected}, got {dict(state)}"
            )
        self._scaler.load_state_dict(dict(state))

    def _backward(
        self, part: Batch, *, weight: float
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        losses: dict[str, torch.Tensor]
        with autocast(self.spec.train.precision, self.device):
            losses, counts = self._losses(part)
        total = torch.stack(list(losses.values())).sum() * weight
        self._scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return losses, counts

    def _synchronizing(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients with the other processes once per batch, after its last part."""
        if isinstance(self._losses, DistributedDataParallel) and not is_last:
            return self._losses.no_sync()
        return nullcontext()

    def _shared_state(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return the state of a module, with the mean over all processes of batch norm's running statistics."""
        state = module.state_dict()
        for name, tensor in state.items():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                state[name] = self.processes.mean(tensor)
        return state

    def _is_finite(self, values: Mapping[str, float]) -> bool:
        """Check losses and gradient; a loss scaler skips updates that overflow, until its scale is too small."""
        if all(map(math.isfinite, values.values())):
            return True
        has_finite_losses = all(
            math.isfinite(value) for name, value in values.items() if name != "gradient_norm"
        )
        # Reading the scale synchronizes with the device.
        return has_finite_losses and self._scaler.is_enabled() and self._scaler.get_scale() >= _MIN_LOSS_SCALE

    def _describe_divergence(self, values: Mapping[str, float], batch: Batch) -> str:
        names = [
            name
            for i, name in enumerate(batch.names)
            if not all(map(math.isfinite, self._losses_of(batch.part(i, i + 1))))
        ]
        names = [name for gathered in self.processes.all_gather(names) for name in gathered]
        numbers = ", ".join(f"{name} {value:g}" for name, value in values.items())
        chips = "; ".join(names or batch.names)
        return (
            f"a loss or a gradient is not finite ({numbers}); "
            f"{'chips with such a loss' if names else 'chips of the batch'}: {chips}. Start a new run with a lower "
            "train.learning_rate, a longer train.warmup_steps or train.clip_grad_norm."
        )

    @torch.no_grad()
    def _losses_of(self, chip: Batch) -> list[float]:
        with autocast(self.spec.train.precision, self.device):
            losses, _ = _compute_losses(self.model, chip.to(self.device), rpn_only=self.spec.train.rpn_only)
            return torch.stack(list(losses.values())).tolist()

    def _describe_out_of_memory(self, batch: Batch) -> str:
        num_chips = len(batch) // self.spec.train.accumulation_steps
        height, width = batch.images.shape[2:]
        batch_key = "train.batch_size" if self.spec.data.whole is None else "data.whole.batch_megapixels"
        return (
            f"{self.device} is out of memory at {counted(num_chips, 'chip')} of {width}×{height}; "
            f"reduce {batch_key} or raise train.accumulation_steps"
        )


class _Losses(nn.Module):
    """A module whose forward pass returns losses and counts, as DistributedDataParallel requires."""

    def __init__(self, detector: DetectorModel, *, rpn_only: bool) -> None:
        super().__init__()
        self.detector = detector
        self._rpn_only = rpn_only

    def forward(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return _compute_losses(self.detector, batch, rpn_only=self._rpn_only)


def _compute_losses(
    model: DetectorModel, batch: Batch, *, rpn_only: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compute the losses and counts of a batch; those of the RPN alone have no counts."""
    if not rpn_only:
        return model.losses_and_counts(batch)
    if not isinstance(model, ProposingModel):
        raise ValueError("a detector without a region proposal network cannot be trained with rpn_only")
    return model.rpn_losses(batch), {}


def _distributed(module: nn.Module) -> DistributedDataParallel:
    """Exchange gradients with the other processes, but not the buffers, which are batch norm's statistics."""
    parameters = signature(DistributedDataParallel).parameters
    is_renamed = "forward_sync_buffers" in parameters  # in torch 2.14
    options: dict[str, Any] = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    return DistributedDataParallel(module, **options)


def _copy(tensors: list[torch.Tensor], *, to: list[torch.Tensor]) -> None:
    """Copy many small tensors at once; a model without batch norm has none."""
    if tensors:
        torch._foreach_copy_(to, tensors)


def check_divisible(spec: ExperimentSpec, *, device: torch.device, processes: Processes) -> None:
    """Check that the processes can share a batch on such devices."""
    if spec.train.batch_size % (processes.world_size * spec.train.accumulation_steps):
        raise ConfigError(
            f"train.batch_size: {counted(spec.train.batch_size, 'chip')} cannot be divided equally among "
            f"{counted(processes.world_size, 'process', 'processes')}"
            + (f" in {spec.train.accumulation_steps} parts each" if spec.train.accumulation_steps > 1 else "")
        )
    is_synced = spec.model.backbone.batch_norm == "synced" and processes.world_size > 1
    if is_synced and device.type != "cuda":
        raise ConfigError(
            "model.backbone.batch_norm: torch synchronizes statistics on GPUs only, not on a CPU"
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    messages = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)
