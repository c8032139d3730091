"""The training loop: epochs of chips to checkpoints and metrics, resumable after any step."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sniper.config.experiment import ExperimentSpec
from sniper.data.batches import Batch, ChipTransform
from sniper.data.datasets import DatasetIdentity
from sniper.data.epoch import EpochOrder
from sniper.data.loader import load_batches
from sniper.errors import SniperError
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.checkpoints import Progress
from sniper.runs.initial import InitialWeights
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, StepReport
from sniper.training.learner import Learner
from sniper.training.optimizer import learning_rate_at
from sniper.training.signals import SignalHandler, set_worker_signals
from sniper.training.tensorboard import TensorBoardLogger, check_tensorboard

OrderOfEpoch = Callable[[int], EpochOrder]
"""Returns the chips of an epoch, 0 the first, in their order; equal epochs must give equal orders."""

Evaluate = Callable[[TwoStageDetector, int], Mapping[str, float]]
"""Returns the scores by name of a detector with the weights of a step."""


def train(
    run: Run,
    spec: ExperimentSpec,
    order_of_epoch: OrderOfEpoch,
    *,
    identity: DatasetIdentity,
    device: torch.device,
    callbacks: Callbacks = Callbacks(),
    evaluate: Evaluate | None = None,
    transform: ChipTransform | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> TwoStageDetector:
    """Train from the newest checkpoint of a run, if it has one, to the last epoch.

    All random draws depend on the seed and the position in the run only, so a run that is stopped and resumed ends with
    the same weights as an uninterrupted one.

    Args:
        run: its folder; metrics and checkpoints are written there.
        spec: the experiment.
        order_of_epoch: returns the chips of an epoch.
        identity: of the data set that the chips are cut from.
        device: where to compute.
        callbacks: called in the first process.
        evaluate: scores a detector; called every `train.evaluate_every` epochs, by all processes.
        transform: applied to each chip; see `ChipDataset`.
        processes: that train together; all call this, the first writes.

    Returns:
        The trained detector: the moving average of the weights if one is kept.

    Raises:
        AnnotationError: if there is no chip to train on.
        CacheError: if the folder of cached chips cannot be used.
        CheckpointError: if the newest checkpoint cannot be read or belongs to another model or data set, or if one
            cannot be written.
        ConfigError: if the batch cannot be divided among the processes, or TensorBoard is not installed.
        ImageError: if an image cannot be read and `data.on_bad_image` is `refuse`.
        KeyboardInterrupt: after SIGINT (Ctrl-C) or SIGTERM, once the step in progress is complete and saved.
        OutOfMemory: if the chips do not fit into the memory of the device.
        TrainingDiverged: if a loss or a gradient is not finite.
        RunError: if `model.weights_from` names a folder without a run or a checkpoint.
        TransformError: if `transform` returns something else than a chip.
        WeightsError: if the pretrained weights of the backbone, or the file that `model.weights_from` names, cannot be
            loaded.
    """
    if spec.train.tensorboard:
        check_tensorboard()
    is_new, weights_from = not run.checkpoints, spec.model.weights_from
    learner = Learner(
        spec,
        num_classes=len(identity.categories),
        device=device,
        processes=processes,
        has_weights=is_new and weights_from is None,
    )
    progress = learner.load(run, identity)
    if processes.is_first:
        run.truncate_metrics(step=progress.step)
    if is_new and weights_from is not None:
        report = learner.start_from(InitialWeights.load(weights_from), identity.categories)
        if processes.is_first:
            run.log(report.to_entry())
    logger = None
    if spec.train.tensorboard and processes.is_first:
        logger = TensorBoardLogger(run.folder / "tensorboard", step=progress.step)
    loop = _Loop(
        run,
        spec,
        learner,
        identity=identity,
        callbacks=callbacks,
        evaluate=evaluate,
        transform=transform,
        logger=logger,
    )
    with logger or nullcontext(), loop.signals.installed():
        if progress.step_in_epoch == 0:
            loop.evaluate_if_due(
                progress
            )  # in case the run was stopped between a checkpoint and its evaluation
        for epoch in range(progress.epoch, math.ceil(spec.train.epochs)):
            with loop.signals.suspended():  # it may mine, and every step is saved
                order = order_of_epoch(epoch)
            if progress.step == 0:
                loop.warn_of_warmup(order)
            progress = loop.train_epoch(order, progress)
            loop.evaluate_if_due(progress)
    return learner.inference_model


@dataclass(frozen=True, kw_only=True)
class _Timing:
    """Duration of a step and of its wait for data, seconds."""

    step: float
    data_wait: float


class _Loop:
    """The parts of a training that stay the same from epoch to epoch."""

    def __init__(
        self,
        run: Run,
        spec: ExperimentSpec,
        learner: Learner,
        *,
        identity: DatasetIdentity,
        callbacks: Callbacks,
        evaluate: Evaluate | None,
        transform: ChipTransform | None,
        logger: TensorBoardLogger | None,
    ) -> None:
        self.signals = SignalHandler()
        self._run = run
        self._spec = spec
        self._learner = learner
        self._identity = identity
        self._callbacks = callbacks
        self._evaluate = evaluate
        self._transform = transform
        self._logger = logger
        self._processes = learner.processes
        self._last_checkpoint = time.monotonic()

    def warn_of_warmup(self, order: EpochOrder) -> None:
        """Warn if the learning rate never reaches its value, since the run is shorter than its warm-up."""
        spec = self._spec.train
        num_steps = max(round(order.num_steps * spec.epochs), 1)
        if self._processes.is_first and num_steps < spec.warmup_steps:
            self._callbacks.on_warning(
                f"all {num_steps} steps lie inside the warm-up of {spec.warmup_steps} (train.warmup_steps), so the "
                "learning rate does not reach its value; a twentieth of the steps is usual"
            )

    def train_epoch(self, order: EpochOrder, progress: Progress) -> Progress:
        """Make the remaining steps of an epoch; the last epoch may be a fraction."""
        spec = self._spec.train
        num_steps = max(round(order.num_steps * min(spec.epochs - progress.epoch, 1.0)), 1)
        started = ready = time.monotonic()
        for batch in self._batches(order, steps=range(progress.step_in_epoch, num_steps)):
            data_wait = time.monotonic() - ready
            epoch = progress.epoch + progress.step_in_epoch / order.num_steps
            learning_rate = learning_rate_at(spec, step=progress.step, epoch=epoch)
            values = self._learner.update(
                batch,
                learning_rate=learning_rate,
                step=progress.step,
                weight=order.weight(progress.step_in_epoch),
            )
            progress = progress.next_step()
            now = time.monotonic()
            num_stopping, num_late, num_skipped = self._sum(
                self.signals.stop_requested,
                now - self._last_checkpoint > spec.checkpoint_minutes * 60,
                sum(batch.skipped),
            )
            self._report(
                order,
                batch,
                progress=progress,
                values=values,
                learning_rate=learning_rate,
                timing=_Timing(step=now - started, data_wait=data_wait),
                num_skipped=round(num_skipped),
            )
            started = now
            is_last = progress.step_in_epoch == num_steps
            if progress.step_in_epoch == order.num_steps:
                progress = progress.next_epoch()
            if is_last or num_stopping or num_late:
                self._save(progress)
            if num_stopping or ((is_last or num_late) and self._is_stopping()):
                raise KeyboardInterrupt
            ready = time.monotonic()
        return progress

    def evaluate_if_due(self, progress: Progress) -> None:
        """Evaluate the detector at the end of an epoch, if configured and not done before."""
        every = self._spec.train.evaluate_every
        if self._evaluate is None or every is None or progress.step == 0:
            return
        # `epochs` may be fractional, so only the last epoch can stop early.
        epoch = progress.epoch if progress.step_in_epoch == 0 else self._spec.train.epochs
        is_due = epoch >= self._spec.train.epochs or epoch % every == 0
        if not is_due or self._is_evaluated(progress):
            return
        with self.signals.suspended(), self._learner.evaluating() as model:  # every step is saved
            scores = self._evaluate(model, progress.step)
        if self._processes.is_first:
            self._log({"stage": "evaluate", "step": progress.step, "epoch": epoch, **scores})
            self._callbacks.on_scores(epoch, scores)

    def _is_evaluated(self, progress: Progress) -> bool:
        """Check whether the first process has scored this step before."""
        entries = self._run.entries() if self._processes.is_first else []
        is_evaluated = any(
            entry["stage"] == "evaluate" and entry["step"] == progress.step for entry in entries
        )
        return self._sum(is_evaluated)[0] > 0

    def _is_stopping(self) -> bool:
        """Check whether any process was asked to stop, such as while a checkpoint was written."""
        return self._sum(self.signals.stop_requested)[0] > 0

    def _sum(self, *counts: float) -> list[float]:
        """Return the sum of each number over all processes; of a flag, the number of processes that set it."""
        means = self._processes.mean(torch.tensor(counts, dtype=torch.float32))
        return [mean * self._processes.world_size for mean in means.tolist()]

    def _batches(self, order: EpochOrder, *, steps: range) -> Iterable[Batch]:
        """Load this process's share of each batch."""
        batches = load_batches(
            order,
            self._spec.data,
            steps=steps,
            share=(self._processes.rank, self._processes.world_size),
            pin_memory=self._learner.device.type == "cuda",
            transform=self._transform,
            worker_init_fn=set_worker_signals,
        )
        return _without_worker_traceback(batches)

    def _save(self, progress: Progress) -> None:
        keep = self._spec.train.keep_checkpoints
        self._learner.save(self._run, self._identity, progress=progress, keep=keep)
        self._last_checkpoint = time.monotonic()

    def _report(
        self,
        order: EpochOrder,
        batch: Batch,
        *,
        progress: Progress,
        values: Mapping[str, float],
        learning_rate: float,
        timing: _Timing,
        num_skipped: int,
    ) -> None:
        """Log a step and call back, in the first process."""
        if not self._processes.is_first:
            return
        spec = self._spec.train
        epoch = progress.epoch + progress.step_in_epoch / order.num_steps
        report = StepReport(
            stage="rpn" if spec.rpn_only else "train",
            progress=progress,
            epoch=epoch,
            epochs=spec.epochs,
            steps_left=max(round((spec.epochs - epoch) * order.num_steps), 0),
            losses={name: value for name, value in values.items() if name != "gradient_norm"},
            gradient_norm=values["gradient_norm"],
            learning_rate=learning_rate,
            seconds=timing.step,
            chips_per_second=len(order.positions(progress.step_in_epoch - 1)) / timing.step,
            data_wait=timing.data_wait / timing.step,
            megapixels=batch.images[:, 0].numel() * self._processes.world_size / 1e6,
            peak_memory=self._learner.peak_memory(),
            skipped_chips=num_skipped,
        )
        self._log(_to_entry(report, order))
        self._callbacks.on_step(report)

    def _log(self, entry: Mapping[str, Any]) -> None:
        self._run.log(entry)
        if self._logger is not None:
            self._logger.write(entry)


def _to_entry(report: StepReport, order: EpochOrder) -> dict[str, Any]:
    """Return the line of a step in the metrics; the first of an epoch has its numbers of chips."""
    entry = {
        "stage": report.stage,
        "step": report.progress.step,
        "epoch": round(report.epoch, 4),
        "loss": report.loss,
        **report.losses,
        "gradient_norm": report.gradient_norm,
        "learning_rate": report.learning_rate,
        "seconds": round(report.seconds, 4),
        "chips_per_second": round(report.chips_per_second, 2),
        "megapixels": round(report.megapixels, 4),
        "data_wait": round(report.data_wait, 4),
        "peak_memory_gb": round(report.peak_memory / 1e9, 3),
    }
    if report.skipped_chips:
        entry["skipped_chips"] = report.skipped_chips
    if report.progress.step_in_epoch == 1:
        entry |= {
            "chips": len(order.table),
            "negative_chips": int(order.table.is_negative.sum()),
            "padding_chips": order.num_padding,
        }
    return entry


def _without_worker_traceback(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Pass batches on; raise a user's error without the traceback of the loader process that torch adds to it."""
    try:
        yield from batches
    except SniperError as error:
        kind = type(error)
        message = str(error).rstrip().rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]
        raise kind(message) from error
