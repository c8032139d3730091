"""One update: a batch of chips to better weights, on one device, alone or as one of several."""

import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sniper.config.experiment import ExperimentSpec
from sniper.data.batches import Batch
from sniper.data.datasets import Dataset
from sniper.errors import CheckpointError, ConfigError, OutOfMemory, TrainingDiverged
from sniper.models.build import autocast, build_detector
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.processes import Processes
from sniper.runs.run import Progress, Run, optimizer_tensors
from sniper.training.optimizer import build_optimizer

_LEAST_LOSS_SCALE = 2.0**-6


class Learner:
    """A detector and all that changes while it learns.

    Args:
        spec: the experiment.
        num_classes: without background.
        device: where to compute.
        ranks: the processes that share each batch.
        has_weights: whether to load the backbone's pretrained weights; a checkpoint brings its own.

    Attributes:
        model: the detector, in training mode.
        device: where it is.
    """

    def __init__(
        self,
        spec: ExperimentSpec,
        *,
        num_classes: int,
        device: torch.device,
        ranks: Processes,
        has_weights: bool,
    ) -> None:
        _check(spec, device=device, ranks=ranks)
        self.spec, self.device, self.ranks = spec, device, ranks
        model = build_detector(spec.model, seed=spec.seed, num_classes=num_classes, has_weights=has_weights)
        self.model: TwoStageDetector = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if spec.train.rpn_only:
            self.model.roi_head.requires_grad_(False)
        self._average = None
        if spec.train.ema_decay is not None:
            self._average = ModelEmaV3(self.model, decay=spec.train.ema_decay, use_warmup=True)
        self._optimizer = build_optimizer(spec.train, self.model)
        self._scaler = torch.amp.GradScaler(device.type, enabled=spec.train.precision == "fp16")
        if spec.train.compile:
            self.model.backbone.trunk.compile()
        self._losses: nn.Module = _Losses(self.model, rpn_only=spec.train.rpn_only)
        if ranks.count > 1:
            self._losses = _in_parallel(self._losses)

    @property
    def _num_shares(self) -> int:
        """Into how many parts each batch is cut, by processes and by each of them."""
        return self.ranks.count * self.spec.train.accumulation_steps

    @property
    def best(self) -> TwoStageDetector:
        """The detector to be used: that of the averaged weights, if they are kept."""
        return self.model if self._average is None else self._average.module

    def learn(self, batch: Batch, *, rate: float, step: int, weight: float = 1.0) -> dict[str, float]:
        """Make one update.

        Args:
            batch: this process's share of the chips, on any device.
            rate: of learning.
            step: updates made before.
            weight: how many times the losses count; the larger one of two batches counts more.

        Returns:
            The losses by name, as they are, and the norm of the gradient by which they count, `gradient_norm`, over all
            processes. Asking for them is the one time in a step that the processor waits for the device.

        Raises:
            TrainingDiverged: if a loss or a gradient is not finite; the weights are as they were.
            OutOfMemory: if the chips do not fit.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        losses = self._try_gradients(batch, weight=weight)
        if losses is None:
            raise OutOfMemory(self._advise(batch, step=step))
        self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        shared = self.ranks.mean(torch.stack(list(losses.values())))
        values = dict(zip((*losses, "gradient_norm"), torch.cat([shared, norm[None]]).tolist(), strict=True))
        self._check_finite(values, batch, step=step)
        if self.spec.train.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.spec.train.clip_grad_norm, norm
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update(self.model, step=step + 1)
        return values

    @contextmanager
    def at_rest(self) -> Iterator[TwoStageDetector]:
        """Give the detector to be used as a checkpoint would hold it, ready to search; every process must call this."""
        own = {name: tensor.clone() for name, tensor in self.best.state_dict().items()}
        was_training = self.best.training
        trunk = self.best.backbone.trunk
        compiled, trunk._compiled_call_impl = (
            trunk._compiled_call_impl,
            None,
        )  # or it is compiled for each shape
        self.best.load_state_dict(self._shared_state(self.best))
        try:
            yield self.best.eval()
        finally:
            self.best.load_state_dict(own)
            self.best.train(was_training)
            trunk._compiled_call_impl = compiled

    def load(self, run: Run, annotations: Dataset) -> Progress:
        """Go back to the newest checkpoint of a run, if it has one; see `Run.load_checkpoint`."""
        progress, counters = run.load_checkpoint(
            model=self.model,
            average=None if self._average is None else self._average.module,
            optimizer=self._optimizer,
            annotations=annotations,
        )
        if counters.get("loss_scale"):
            self._scaler.load_state_dict(counters["loss_scale"])
        begun_with = counters.get("num_shares", self._num_shares)
        if self.spec.data.whole is not None and progress.step_in_epoch and begun_with != self._num_shares:
            raise ConfigError(
                f"{run.folder}: batches of whole images depend on processes times train.accumulation_steps, "
                f"which was {begun_with} and is {self._num_shares}; go on with {begun_with}, or from a checkpoint "
                "at the end of an epoch (--step)"
            )
        return progress

    def save(self, run: Run, annotations: Dataset, *, progress: Progress, keep: int) -> None:
        """Write a checkpoint; every process must call this, the first writes. See `Run.save_checkpoint`."""
        weights = self._shared_state(self.model)
        average = None if self._average is None else self._shared_state(self._average.module)
        problem = None
        if self.ranks.is_first:
            try:
                run.save_checkpoint(
                    weights=weights,
                    average=average,
                    optimizer=optimizer_tensors(self._optimizer, self.model),
                    counters={
                        "loss_scale": self._scaler.state_dict(),
                        "num_shares": self._num_shares,
                    },
                    progress=progress,
                    annotations=annotations,
                    keep=keep,
                )
            except CheckpointError as error:
                problem = str(error)
        problem = self.ranks.gather(problem)[0]  # none goes on to read what is not written
        if problem is not None:
            raise CheckpointError(problem)

    def peak_memory(self) -> int:
        """Give the most memory that was in use so far, bytes: the device's, or the process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _try_gradients(self, batch: Batch, *, weight: float) -> dict[str, torch.Tensor] | None:
        """Compute the losses of a batch and their gradients, part by part; None if they do not fit."""
        num_parts = self.spec.train.accumulation_steps
        size = len(batch) // num_parts
        self._optimizer.zero_grad(set_to_none=True)
        totals: dict[str, torch.Tensor] = {}
        try:
            for index in range(num_parts):
                with self._shared_if(index == num_parts - 1):
                    part = batch.part(index * size, (index + 1) * size).to(self.device)
                    losses = self._backward(self._losses, part, share=weight / num_parts)
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0) + loss.detach() / num_parts
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_short_of_memory(error):
                raise
            return None
        return totals

    def _backward(self, compute: nn.Module, part: Batch, *, share: float) -> dict[str, torch.Tensor]:
        with autocast(self.spec.train.precision, self.device):
            losses: dict[str, torch.Tensor] = compute(part)
        total = torch.stack(list(losses.values())).sum() * share
        self._scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return losses

    def _shared_if(self, is_last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients with the other processes once for a batch, after its last part."""
        if isinstance(self._losses, DistributedDataParallel) and not is_last:
            return self._losses.no_sync()
        return nullcontext()

    def _shared_state(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Give a module's tensors; statistics of batch norm, which each process keeps, as their mean."""
        state = module.state_dict()
        for name, tensor in state.items():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                state[name] = self.ranks.mean(tensor)
        return state

    def _check_finite(self, values: Mapping[str, float], batch: Batch, *, step: int) -> None:
        is_fine = all(math.isfinite(value) for name, value in values.items() if name != "gradient_norm")
        if (
            is_fine and self._scaler.is_enabled()
        ):  # it passes over a gradient that is not, and lowers its scale
            is_fine = self._scaler.get_scale() >= _LEAST_LOSS_SCALE
        elif is_fine:
            is_fine = math.isfinite(values["gradient_norm"])
        if is_fine:
            return
        told = ", ".join(f"{name} {value:g}" for name, value in values.items())
        guilty = [
            name
            for i, name in enumerate(batch.names)
            if not all(map(math.isfinite, self._losses_of(batch.part(i, i + 1))))
        ]
        guilty = [name for part in self.ranks.gather(guilty) for name in part]
        chips = "; ".join(guilty or batch.names)
        raise TrainingDiverged(
            f"step {step}: a loss or a gradient is not finite ({told}); "
            f"{'chips whose losses are not' if guilty else 'chips of the batch'}: {chips}. A new run with a lower "
            "train.learning_rate, a longer warm-up or train.clip_grad_norm may do better."
        )

    @torch.no_grad()
    def _losses_of(self, chip: Batch) -> list[float]:
        with autocast(self.spec.train.precision, self.device):
            compute = self.model.rpn_losses if self.spec.train.rpn_only else self.model.losses
            return torch.stack(list(compute(chip.to(self.device)).values())).tolist()

    def _advise(self, batch: Batch, *, step: int) -> str:
        """Try fewer chips until some fit, and say how to go on with so many."""
        spec = self.spec.train
        asked = len(batch) // spec.accumulation_steps
        height, width = batch.images.shape[2:]
        told = f"step {step}: {asked} chips of {width}×{height} at a time do not fit into the memory of {self.device}"
        if self.spec.data.whole is not None:
            return f"{told}; a smaller --data.whole.batch_megapixels, or smaller levels, may"
        if self.spec.model.backbone.batch_norm == "synced" and self.ranks.count > 1:
            return f"{told}; a larger --train.accumulation_steps or a smaller --train.batch_size may"
        fits, fails = 0, asked
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._fits(batch.part(0, middle)) else (fits, middle)
        if not fits:
            return f"{told}, nor does one"
        own = spec.batch_size // self.ranks.count
        parts = next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= fits)
        return (
            f"{told}; {fits} would. Keep the batch and say --train.accumulation_steps {parts}, or begin a new run with "
            f"--train.batch_size {fits * self.ranks.count * spec.accumulation_steps}."
        )

    def _fits(self, batch: Batch) -> bool:
        """Try whether so many chips can be learnt from; nothing is learnt."""
        self._optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        alone = _Losses(self.model, rpn_only=self.spec.train.rpn_only)
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            with autocast(self.spec.train.precision, self.device):
                losses = alone(batch.to(self.device))
            # Not by way of the parameters: in many processes, those expect to be exchanged.
            torch.autograd.grad(torch.stack(list(losses.values())).sum(), learning, allow_unused=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_short_of_memory(error):
                raise
            return False
        return True


def _in_parallel(module: nn.Module) -> DistributedDataParallel:
    """Exchange gradients with the other processes, but keep own statistics of batch norm."""
    known = signature(DistributedDataParallel).parameters
    name = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )  # before torch 2.14
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(module, **options)


class _Losses(nn.Module):
    """A detector whose call gives its losses, as torch's parallel training wants it."""

    def __init__(self, detector: TwoStageDetector, *, rpn_only: bool) -> None:
        super().__init__()
        self.detector = detector
        self._rpn_only = rpn_only

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return self.detector.rpn_losses(batch) if self._rpn_only else self.detector.losses(batch)


def _check(spec: ExperimentSpec, *, device: torch.device, ranks: Processes) -> None:
    """Refuse what cannot be shared by these processes on such devices."""
    parts = ranks.count * spec.train.accumulation_steps
    if spec.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size: {spec.train.batch_size} chips cannot be shared equally by {ranks.count} processes"
            + (f" in {spec.train.accumulation_steps} parts each" if spec.train.accumulation_steps > 1 else "")
        )
    if spec.model.backbone.batch_norm == "synced" and ranks.count > 1 and device.type != "cuda":
        raise ConfigError("model.backbone.batch_norm: torch can sync statistics on GPUs only, not on a CPU")


def _is_short_of_memory(error: RuntimeError) -> bool:
    words = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error) for one in words)
