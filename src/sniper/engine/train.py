"""Training: plans of chips to weights, without a step lost."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Subset

from sniper.data.coco import Annotations
from sniper.data.dataset import Batch, ChipDataset, collate
from sniper.data.plan import EpochPlan, plan_epoch
from sniper.engine.run import Progress, Run
from sniper.engine.schedule import learning_rate
from sniper.engine.spec import ExperimentSpec, Precision, TrainSpec
from sniper.errors import AnnotationError, TrainingDiverged
from sniper.models.detector import Detector


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known after a step, for whoever watches.

    Attributes:
        progress: how far the run has come.
        epoch: passes made, fractions included.
        epochs: passes to make.
        steps_left: to the end of the run, as far as the plan of this epoch tells.
        losses: by name.
        learning_rate: of the step.
        chips_per_second: over the step, reading included.
    """

    progress: Progress
    epoch: float
    epochs: float
    steps_left: int
    losses: dict[str, float]
    learning_rate: float
    chips_per_second: float

    @property
    def loss(self) -> float:
        """The sum of all losses."""
        return sum(self.losses.values())


def build_detector(spec: ExperimentSpec, *, num_classes: int, has_weights: bool = True) -> Detector:
    """Make the detector of an experiment; its fresh layers are drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return Detector(spec.model, num_classes=num_classes, has_weights=has_weights)


def train(
    run: Run,
    spec: ExperimentSpec,
    annotations: Annotations,
    *,
    device: torch.device,
    watch: Callable[[StepReport], None],
) -> Detector:
    """Train, from the newest checkpoint of the run if it has one, to the last epoch.

    Everything drawn is a function of the seed and the place in the run, so a run that was stopped and goes on ends with
    the same weights as one that never stopped.

    Args:
        run: its folder; metrics and checkpoints go there.
        spec: the experiment.
        annotations: what to train on.
        device: where to compute.
        watch: told after every step.

    Returns:
        The trained detector.

    Raises:
        AnnotationError: if there is nothing to learn from.
        TrainingDiverged: if a loss is not finite.
    """
    if not annotations.categories or annotations.is_crowd.all():
        raise AnnotationError(f"{annotations.path}: no box to learn from")
    has_checkpoint = bool(run.checkpoints)
    model = build_detector(spec, num_classes=len(annotations.categories), has_weights=not has_checkpoint)
    model.to(device).train()
    optimizer = build_optimizer(spec.train, model)
    progress = run.load_checkpoint(model=model, optimizer=optimizer)
    run.forget_after(progress.step)
    trainer = _Trainer(run, spec, annotations, device=device, watch=watch, model=model, optimizer=optimizer)
    for _ in range(progress.epoch, math.ceil(spec.train.epochs)):
        progress = trainer.train_epoch(progress)
    return model


def build_optimizer(spec: TrainSpec, model: Detector) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters that learn."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        parameters, lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
    )


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Compute in bf16 where that was asked for, or where the device does it natively and `auto` leaves the choice."""
    if precision == "auto":
        is_native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    else:
        is_native = precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_native)


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _Trainer:
    """What stays the same from epoch to epoch."""

    def __init__(
        self,
        run: Run,
        spec: ExperimentSpec,
        annotations: Annotations,
        *,
        device: torch.device,
        watch: Callable[[StepReport], None],
        model: Detector,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.run = run
        self.spec = spec
        self.annotations = annotations
        self.device = device
        self.watch = watch
        self.model = model
        self.optimizer = optimizer
        self.last_checkpoint = time.monotonic()

    def train_epoch(self, progress: Progress) -> Progress:
        """Make the steps that are left of one pass; the last pass may be a fraction."""
        spec = self.spec.train
        plan = self._plan(progress.epoch)
        share = min(spec.epochs - progress.epoch, 1.0)
        num_steps = max(round(plan.num_steps * share), 1)
        started = time.monotonic()
        for batch in self._batches(plan, first_step=progress.step_in_epoch, num_steps=num_steps):
            epoch = progress.epoch + progress.step_in_epoch / plan.num_steps
            rate = learning_rate(spec, step=progress.step, epoch=epoch)
            losses = self._step(batch.to(self.device), rate=rate, step=progress.step)
            progress = Progress(
                step=progress.step + 1, epoch=progress.epoch, step_in_epoch=progress.step_in_epoch + 1
            )
            now = time.monotonic()
            report = StepReport(
                progress=progress,
                epoch=progress.epoch + progress.step_in_epoch / plan.num_steps,
                epochs=spec.epochs,
                steps_left=round((spec.epochs - progress.epoch) * plan.num_steps) - progress.step_in_epoch,
                losses=losses,
                learning_rate=rate,
                chips_per_second=spec.batch_size / (now - started),
            )
            started = now
            self._tell(report, plan)
            is_last = progress.step_in_epoch == num_steps
            if progress.step_in_epoch == plan.num_steps:
                progress = Progress(step=progress.step, epoch=progress.epoch + 1, step_in_epoch=0)
            if is_last or now - self.last_checkpoint > spec.checkpoint_minutes * 60:
                self._save(progress)
        return progress

    def _plan(self, epoch: int) -> EpochPlan:
        return plan_epoch(
            self.annotations,
            self.spec.pyramid,
            batch_size=self.spec.train.batch_size,
            flip=self.spec.data.flip,
            seed=self.spec.seed,
            epoch=epoch,
        )

    def _batches(self, plan: EpochPlan, *, first_step: int, num_steps: int) -> Iterable[Batch]:
        batch_size = self.spec.train.batch_size
        chips = ChipDataset(self.annotations, plan, min_visible_side=self.spec.data.min_visible_side)
        num_processes = self.spec.data.loader_processes
        return DataLoader(
            Subset(chips, range(first_step * batch_size, num_steps * batch_size)),
            batch_size=batch_size,
            num_workers=num_processes,
            prefetch_factor=2 if num_processes else None,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )

    def _step(self, batch: Batch, *, rate: float, step: int) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator(device=self.device).manual_seed(self.spec.seed * 1_000_003 + step)
        with autocast(self.spec.train.precision, self.device):
            losses = self.model.losses(batch, generator=generator)
        total = torch.stack(list(losses.values())).sum()
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not torch.isfinite(total):
            told = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise TrainingDiverged(
                f"step {step}: a loss is not finite ({told}); images {', '.join(sorted(set(batch.file_names)))}. "
                "A lower train.learning_rate, a longer warm-up or train.clip_gradient may help."
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if self.spec.train.clip_gradient is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.train.clip_gradient)
        self.optimizer.step()
        return values

    def _tell(self, report: StepReport, plan: EpochPlan) -> None:
        entry = {
            "step": report.progress.step,
            "epoch": round(report.epoch, 4),
            "loss": report.loss,
            **report.losses,
            "learning_rate": report.learning_rate,
            "chips_per_second": round(report.chips_per_second, 2),
        }
        if report.progress.step_in_epoch == 1:
            entry |= {"chips": len(plan.table), "padding_chips": plan.num_padding}
        self.run.log(entry)
        self.watch(report)

    def _save(self, progress: Progress) -> None:
        self.run.save_checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            progress=progress,
            categories=self.annotations.categories,
            keep=self.spec.train.keep_checkpoints,
        )
        self.last_checkpoint = time.monotonic()
