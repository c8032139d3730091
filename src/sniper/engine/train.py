"""Training: plans of chips to weights, without a step lost."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from sniper.chips import ChipTable
from sniper.data.coco import Annotations
from sniper.data.dataset import Batch, ChipDataset, collate
from sniper.data.plan import EpochPlan, plan_epoch
from sniper.engine.run import Progress, Run
from sniper.engine.schedule import learning_rate
from sniper.engine.spec import ExperimentSpec, Precision, TrainSpec
from sniper.errors import SniperError, TrainingDiverged
from sniper.models.detector import Detector

_PLAIN: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
_SIGNALS = tuple(_PLAIN)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known after a step, for whoever watches.

    Attributes:
        stage: `rpn` or `train`.
        progress: how far the run has come.
        epoch: passes made, fractions included.
        epochs: passes to make.
        steps_left: to the end of the run, as far as the plan of this epoch tells.
        losses: by name.
        learning_rate: of the step.
        chips_per_second: over the step, reading included.
    """

    stage: str
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
    table_of: Callable[[int], ChipTable | None] | None = None,
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
        table_of: gives the chips of an epoch, or None for such as are chosen anew; by default the table that the
            experiment names, if it names one.

    Returns:
        The trained detector.

    Raises:
        AnnotationError: if there is nothing to learn from.
        ChipTableError: if the chip table that the experiment names cannot be read, or belongs to something else.
        CheckpointError: if the newest checkpoint cannot be read, or belongs to something else.
        ImageError: if an image cannot be read.
        KeyboardInterrupt: after SIGINT (Ctrl-C) or SIGTERM, when the step under way is done and a checkpoint written.
        TrainingDiverged: if a loss or a gradient is not finite.
    """
    fixed = _fixed_table(run, spec, annotations)
    has_checkpoint = bool(run.checkpoints)
    model = build_detector(spec, num_classes=len(annotations.categories), has_weights=not has_checkpoint)
    model.to(device).train()
    optimizer = build_optimizer(spec.train, model)
    progress = run.load_checkpoint(model=model, optimizer=optimizer, annotations=annotations)
    run.forget_after(progress.step)
    trainer = _Trainer(
        run,
        spec,
        annotations,
        table_of or (lambda _: fixed),
        device=device,
        watch=watch,
        model=model,
        optimizer=optimizer,
    )
    with trainer.ears.open():
        for _ in range(progress.epoch, math.ceil(spec.train.epochs)):
            progress = trainer.train_epoch(progress)
    return model


def _fixed_table(run: Run, spec: ExperimentSpec, annotations: Annotations) -> ChipTable | None:
    """Read the chips of all epochs, if the experiment names a table.

    A run keeps a copy: it goes on with the same chips, whatever became of the file.
    """
    if spec.data.chips is None:
        return None
    is_going_on = bool(run.checkpoints) and run.chips_path.exists()
    path = run.chips_path if is_going_on else Path(spec.data.chips)
    table = ChipTable.load(path, pyramid=spec.pyramid, digest=annotations.digest)
    if not is_going_on:
        table.save(run.chips_path)
    return table


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


class _Ears:
    """Notes SIGINT and SIGTERM instead of dying of them, so that the step under way can be finished."""

    def __init__(self) -> None:
        self.is_asked = Event()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Listen."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
            yield
            return
        before = {one: signal.signal(one, lambda *_: self.is_asked.set()) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let signals do what they do, for work that may end anywhere, such as mining."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        listening = {one: signal.signal(one, _PLAIN[one]) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in listening.items():
                signal.signal(one, handler)


def _leave_signals_to_the_trainer(_: int) -> None:
    """Keep a loader process alive when Ctrl-C reaches it too: the step under way may still need its chips."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torch ends its loader processes this way


def _told_plainly(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Pass batches on; what a user can mend is told without the traceback of the loader process it came from."""
    try:
        yield from batches
    except SniperError as error:
        kind = type(error)
        message = str(error).rstrip().rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]
        raise kind(message) from error


class _Trainer:
    """What stays the same from epoch to epoch."""

    def __init__(
        self,
        run: Run,
        spec: ExperimentSpec,
        annotations: Annotations,
        table_of: Callable[[int], ChipTable | None],
        *,
        device: torch.device,
        watch: Callable[[StepReport], None],
        model: Detector,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.run = run
        self.spec = spec
        self.annotations = annotations
        self.table_of = table_of
        self.device = device
        self.watch = watch
        self.model = model
        self.optimizer = optimizer
        self.last_checkpoint = time.monotonic()
        self.ears = _Ears()

    def train_epoch(self, progress: Progress) -> Progress:
        """Make the steps that are left of one pass; the last pass may be a fraction."""
        spec = self.spec.train
        with self.ears.closed():  # it may mine, and every step so far is saved
            plan = self._plan(progress.epoch)
        share = min(spec.epochs - progress.epoch, 1.0)
        num_steps = max(round(plan.num_steps * share), 1)
        started = time.monotonic()
        batches = self._batches(plan, first_step=progress.step_in_epoch, num_steps=num_steps)
        for batch in _told_plainly(batches):
            epoch = progress.epoch + progress.step_in_epoch / plan.num_steps
            rate = learning_rate(spec, step=progress.step, epoch=epoch)
            losses = self._step(batch.to(self.device), rate=rate, step=progress.step)
            progress = Progress(
                step=progress.step + 1, epoch=progress.epoch, step_in_epoch=progress.step_in_epoch + 1
            )
            now = time.monotonic()
            epoch = progress.epoch + progress.step_in_epoch / plan.num_steps
            report = StepReport(
                stage="rpn" if spec.rpn_only else "train",
                progress=progress,
                epoch=epoch,
                epochs=spec.epochs,
                steps_left=max(round((spec.epochs - epoch) * plan.num_steps), 0),
                losses=losses,
                learning_rate=rate,
                chips_per_second=spec.batch_size / (now - started),
            )
            started = now
            self._tell(report, plan)
            is_last = progress.step_in_epoch == num_steps
            if progress.step_in_epoch == plan.num_steps:
                progress = Progress(step=progress.step, epoch=progress.epoch + 1, step_in_epoch=0)
            is_stopping = self.ears.is_asked.is_set()
            if is_last or is_stopping or now - self.last_checkpoint > spec.checkpoint_minutes * 60:
                self._save(progress)
            if is_stopping:
                raise KeyboardInterrupt
        return progress

    def _plan(self, epoch: int) -> EpochPlan:
        return plan_epoch(
            self.annotations,
            self.spec.pyramid,
            batch_size=self.spec.train.batch_size,
            flip=self.spec.data.flip,
            seed=self.spec.seed,
            epoch=epoch,
            table=self.table_of(epoch),
            negatives_per_image=0 if self.spec.train.rpn_only else self.spec.negatives.per_image,
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
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=self.device.type == "cuda",
        )

    def _step(self, batch: Batch, *, rate: float, step: int) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.spec.train.precision, self.device):
            compute = self.model.rpn_losses if self.spec.train.rpn_only else self.model.losses
            losses = compute(batch)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not all(map(math.isfinite, (*values.values(), float(norm)))):
            told = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise TrainingDiverged(
                f"step {step}: a loss or a gradient is not finite ({told}, norm of the gradient {float(norm):g}); "
                f"images {'; '.join(batch.names)}. A new run with a lower train.learning_rate, a "
                "longer warm-up or train.clip_gradient may do better."
            )
        if self.spec.train.clip_gradient is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.spec.train.clip_gradient, norm)
        self.optimizer.step()
        return values

    def _tell(self, report: StepReport, plan: EpochPlan) -> None:
        entry = {
            "stage": report.stage,
            "step": report.progress.step,
            "epoch": round(report.epoch, 4),
            "loss": report.loss,
            **report.losses,
            "learning_rate": report.learning_rate,
            "chips_per_second": round(report.chips_per_second, 2),
        }
        if report.progress.step_in_epoch == 1:
            entry |= {
                "chips": len(plan.table),
                "negative_chips": int(plan.table.is_negative.sum()),
                "padding_chips": plan.num_padding,
            }
        self.run.log(entry)
        self.watch(report)

    def _save(self, progress: Progress) -> None:
        self.run.save_checkpoint(
            model=self.model,
            optimizer=self.optimizer,
            progress=progress,
            annotations=self.annotations,
            keep=self.spec.train.keep_checkpoints,
        )
        self.last_checkpoint = time.monotonic()
