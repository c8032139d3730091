"""The training loop: epochs of chips to checkpoints and metrics, resumable after any step."""

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch

from sniper.config.experiment import ExperimentSpec, TrainSpec
from sniper.config.loading import dump_experiment
from sniper.data.batches import Batch, ChipTransform
from sniper.data.datasets import DatasetIdentity
from sniper.data.epoch import EpochOrder
from sniper.data.loader import load_batches
from sniper.errors import (
    CheckpointError,
    ImageError,
    OutOfMemory,
    RunError,
    SniperError,
    counted,
    explain_os_error,
)
from sniper.models.protocol import DetectorModel
from sniper.models.weights import fill_module
from sniper.runs.checkpoints import Progress
from sniper.runs.initial import has_initial_weights, load_initial_weights
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, EpochReport, ScoresReport, StepReport
from sniper.training.learner import Learner, Update
from sniper.training.length import (
    Costs,
    TimeLimit,
    correction_epochs,
    count_evaluations,
    fit_length,
    seconds_of,
)
from sniper.training.optimizer import learning_rate_at
from sniper.training.pace import Pace, Part
from sniper.training.signals import SignalHandler
from sniper.training.workers import Workers

OrderOfEpoch = Callable[[int], EpochOrder]
"""Returns the chips of an epoch, 0 the first, in their order; equal epochs must give equal orders."""

_FEW_LAPS = 3  # steps to measure before the length is corrected
_LATE_SHARE = 0.05  # of a limited time: a training that takes more is warned of


@runtime_checkable
class Evaluator(Protocol):
    """Scores a detector on validation images: on a subset while it trains, on all at the end."""

    @property
    def num_images(self) -> int:
        """The number of validation images."""

    @property
    def num_scored(self) -> int:
        """The number of those that are searched while training."""

    def megapixels(self, *, on_all: bool) -> float:
        """Return the pixels that are searched, in millions."""

    def __call__(self, model: DetectorModel, *, step: int, on_all: bool) -> Mapping[str, float]:
        """Return the scores by name of a detector with the weights of a step."""


def train(
    run: Run,
    spec: ExperimentSpec,
    order_of_epoch: OrderOfEpoch,
    *,
    identity: DatasetIdentity,
    device: torch.device,
    callbacks: Callbacks = Callbacks(),
    evaluate: Evaluator | None = None,
    transform: ChipTransform | None = None,
    processes: Processes = SINGLE_PROCESS,
    pace: Pace | None = None,
    limit: TimeLimit | None = None,
) -> DetectorModel:
    """Train from the newest checkpoint of a run, if it has one, to the last epoch.

    All random draws depend on the seed and the position in the run only, so a run that is stopped and resumed ends with
    the same weights as an uninterrupted one. If a batch cannot be loaded, or a step cannot be logged or reported, the
    last whole step is saved before the error is raised.

    Args:
        run: its folder; metrics and checkpoints are written there.
        spec: the experiment.
        order_of_epoch: returns the chips of an epoch.
        identity: of the data set that the chips are cut from.
        device: where to compute.
        callbacks: called in the first process.
        evaluate: scores a detector; called every `train.evaluate_every` epochs, by all processes. The checkpoint with
            the best AP is kept, and `train.patience` evaluations without a better one end the training.
        transform: applied to each chip; see `ChipDataset`.
        processes: that train together; all call this, the first writes.
        pace: measures the training; of all stages together.
        limit: corrects `train.epochs`, the milestones and `train.evaluate_every` to end in time, in a single process.
            The `config.yaml` of the run has the corrected values: a new run with them has the same weights.

    Returns:
        The detector after the last step: the moving average of the weights if one is kept.

    Raises:
        AnnotationError: if there is no chip to train on.
        CacheError: if the folder of cached chips cannot be used.
        CheckpointError: if the newest checkpoint cannot be read or belongs to another model or data set, or if one
            cannot be written.
        ConfigError: if the batch cannot be divided among the processes.
        ImageError: if an image cannot be read and `data.on_bad_image` is `refuse`.
        LoaderError: if a process that reads chips was killed, or ran out of memory.
        Stopped: after SIGINT (Ctrl-C), SIGTERM or SIGHUP, once the step in progress is complete and saved; at a second
            signal at once. It is a KeyboardInterrupt.
        OutOfMemory: if the chips do not fit into the memory of the device.
        TrainingDiverged: if a loss or a gradient is not finite.
        RunError: if `model.weights_from` names a folder without a run or a checkpoint, or another process has failed.
        TransformError: if `transform` fails, or returns something else than a chip.
        WeightsError: if the pretrained weights of the backbone, or the file that `model.weights_from` names, cannot be
            loaded.
    """
    is_new = not run.checkpoints
    learner = Learner(
        spec,
        num_classes=len(identity.categories),
        device=device,
        processes=processes,
        has_weights=is_new and not has_initial_weights(spec.model),
    )
    progress = learner.load(run, identity, on_warning=callbacks.on_warning)
    if processes.is_first:
        run.truncate_metrics(step=progress.step)
    initial = load_initial_weights(spec.model) if is_new else None
    if initial is not None:
        report = learner.start_from(initial, identity.categories)
        if processes.is_first:
            run.log(report.to_entry())
    loop = _Loop(
        run,
        spec,
        learner,
        identity=identity,
        callbacks=callbacks,
        evaluate=evaluate,
        transform=transform,
        pace=pace or Pace(),
        limit=limit,
    )
    with loop.signals.installed():
        loop.train(order_of_epoch, progress)
    return learner.inference_model


@dataclass(frozen=True, kw_only=True)
class _Timing:
    """Duration of a step and of its wait for data, seconds."""

    step: float
    data_wait: float


class _EpochMeans:
    """Means over the steps of an epoch, from their lines in the metrics.

    Attributes:
        num_steps: steps that were added.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._loss = self._positives = self._correct = 0.0
        self._losses = {"negative": 0.0, "positive": 0.0}  # sums over chips, of batches with negative chips
        self._chips = {"negative": 0, "positive": 0}

    @property
    def loss(self) -> float:
        return round(self._loss / self.num_steps, 6) if self.num_steps else math.nan

    @property
    def positive_accuracy(self) -> float | None:
        return round(self._correct / self._positives, 4) if self._positives else None

    def add(self, entry: Mapping[str, Any]) -> None:
        self.num_steps += 1
        self._loss += entry["loss"]
        positives = entry.get("positives", 0)
        self._positives += positives
        self._correct += positives * entry.get("positive_accuracy", 0.0)
        for kind in self._chips:
            num_chips = entry.get(f"{kind}_chips_in_batch", 0)
            self._chips[kind] += num_chips
            self._losses[kind] += num_chips * entry.get(f"{kind}_loss", 0.0)

    def chip_losses(self) -> dict[str, float]:
        """Return the mean classification losses of negative and positive chips; empty without negative chips."""
        if not self._chips["negative"]:
            return {}
        return {
            f"{kind}_loss": round(self._losses[kind] / num_chips, 6)
            for kind, num_chips in self._chips.items()
            if num_chips
        }


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
        evaluate: Evaluator | None,
        transform: ChipTransform | None,
        pace: Pace,
        limit: TimeLimit | None,
    ) -> None:
        self.signals = SignalHandler.current()
        self._run = run
        self._spec = spec
        self._learner = learner
        self._identity = identity
        self._callbacks = callbacks
        self._evaluate = evaluate
        self._transform = transform
        self._processes = learner.processes
        self._pace = pace
        self._limit = limit
        self._workers = Workers(spec.data.num_workers, device=learner.device)
        self._last_checkpoint = time.monotonic()
        self._saved_step = 0
        self._corrected_at = -1.0
        self._is_late = False
        self._means = _EpochMeans()
        self._last_of_epoch = -1

    def train(self, order_of_epoch: OrderOfEpoch, progress: Progress) -> None:
        """Train all epochs that are left, and evaluate."""
        self._pace.start()
        self._saved_step = progress.step
        if progress.step_in_epoch == 0:  # in case the run was stopped between a checkpoint and its evaluation
            self._report_epoch(progress, self._evaluate_if_due(progress))
        while progress.epoch < math.ceil(self._spec.train.epochs) and not self._is_without_progress():
            order = order_of_epoch(progress.epoch)  # it may mine
            if progress.step == 0:
                self._warn_of_warmup(order)
            self._means = self._read_means(progress)
            epoch = progress.epoch
            with self.signals.deferred():
                while progress.epoch == epoch and progress.step_in_epoch < self._num_steps(order, epoch):
                    progress = self._train_steps(order, progress)
            self._report_epoch(progress, self._evaluate_if_due(progress))
            if progress.epoch == epoch:  # the last epoch may be a fraction
                break
        self._evaluate_best()

    def _warn_of_warmup(self, order: EpochOrder) -> None:
        """Warn if the learning rate never reaches its value, since the run is shorter than its warm-up."""
        spec = self._spec.train
        num_steps = max(round(order.num_steps * spec.epochs), 1)
        if self._processes.is_first and num_steps < spec.warmup_steps:
            self._callbacks.on_warning(
                f"the training of {counted(num_steps, 'step')} lies inside the warm-up of {spec.warmup_steps} "
                "(train.warmup_steps), so the "
                "learning rate does not reach its value; a twentieth of the steps is usual"
            )

    def _num_steps(self, order: EpochOrder, epoch: int) -> int:
        """Return the number of steps of an epoch; the last may be a fraction."""
        return max(round(order.num_steps * min(self._spec.train.epochs - epoch, 1.0)), 1)

    def _train_steps(self, order: EpochOrder, progress: Progress) -> Progress:
        """Make the remaining steps of an epoch, or those until its length or the number of loaders is changed."""
        num_steps = self._num_steps(order, progress.epoch)
        self._workers.restart()
        started = ready = time.monotonic()
        with closing(self._batches(order, steps=range(progress.step_in_epoch, num_steps))) as batches:
            while progress.step_in_epoch < num_steps:
                batch, num_skipped = self._next_batch(batches, progress)
                spec = self._spec.train
                data_wait = time.monotonic() - ready
                epoch = progress.epoch + progress.step_in_epoch / order.num_steps
                learning_rate = learning_rate_at(spec, step=progress.step, epoch=epoch)
                try:
                    update = self._learner.update(
                        batch,
                        learning_rate=learning_rate,
                        step=progress.step,
                        weight=order.weight(progress.step_in_epoch),
                    )
                except OutOfMemory as problem:
                    if self._processes.world_size > 1:  # the others are waiting inside the update
                        raise
                    self._fail(progress, problem)
                progress = progress.next_step()
                now = time.monotonic()
                error: Exception | None = None
                try:
                    self._report(
                        order,
                        batch,
                        progress=progress,
                        update=update,
                        learning_rate=learning_rate,
                        timing=_Timing(step=now - started, data_wait=data_wait),
                        num_skipped=num_skipped,
                    )
                    self._correct_length(order, progress)
                    if progress.step_in_epoch >= self._num_steps(order, progress.epoch):
                        self._log_epoch(order, progress)
                except Exception as problem:  # such as a full disk; the other processes must hear of it first
                    error = problem
                is_last = progress.step_in_epoch >= self._num_steps(order, progress.epoch)
                if progress.step_in_epoch == order.num_steps:
                    progress = progress.next_epoch()
                num_failed, num_stopping, num_late = self._sum(
                    error is not None,
                    self.signals.stop_requested,
                    now - self._last_checkpoint > spec.checkpoint_minutes * 60,
                )
                if num_failed:
                    self._fail(progress, error)
                if is_last or num_late:
                    self._save(progress)
                if num_stopping or ((is_last or num_late) and self._is_stopping()):
                    self._stop(progress)
                is_grown = self._workers.grow(seconds=now - started, data_wait=data_wait)
                if is_grown and self._processes.is_first:
                    self._callbacks.on_notice(self._workers.describe())
                started = now
                if is_last or is_grown or num_steps != self._num_steps(order, progress.epoch):
                    break  # other steps are to be loaded, or by more processes
                ready = time.monotonic()
        return progress

    def _next_batch(self, batches: Generator[Batch, None, None], progress: Progress) -> tuple[Batch, int]:
        """Load the next batch in all processes, and return the number of chips that were skipped in all of them."""
        batch, error, is_stopping = None, None, False
        try:
            with self.signals.interruptible():  # no step is in progress
                batch = next(batches)
        except KeyboardInterrupt:
            is_stopping = True
        except Exception as problem:
            error = problem
        num_failed, num_stopping, num_skipped = self._sum(
            error is not None, is_stopping, 0 if batch is None else sum(batch.skipped)
        )
        if num_failed:
            self._fail(progress, error)
        if num_stopping or batch is None:
            self._stop(progress)
        return batch, round(num_skipped)

    def _stop(self, progress: Progress) -> NoReturn:
        """Save the last whole step, in all processes, and raise `Stopped`."""
        if progress.step > self._saved_step:
            self._save(progress)
        self.signals.check()
        raise KeyboardInterrupt  # another process was asked to stop

    def _fail(self, progress: Progress, error: Exception | None) -> NoReturn:
        """Save the last whole step, and raise what has made this process fail, or name the failure of another."""
        saved = ""
        if progress.step > self._saved_step:
            try:
                self._save(progress)
            except CheckpointError as problem:
                saved = f"; {problem}"
        if not saved and progress.step:
            saved = f"; step {progress.step:,} is saved, and --resume continues from it"
        if isinstance(error, ImageError):
            saved = f"; to skip such images, set data.on_bad_image to skip{saved}"
        if error is None:
            raise RunError(f"another process of this training has failed, see its error{saved}")
        if isinstance(error, SniperError):
            raise type(error)(f"{error}{saved}") from error
        if isinstance(error, OSError):
            raise RunError(f"{explain_os_error(error)}{saved}") from error
        raise error

    def _evaluate_if_due(self, progress: Progress) -> Mapping[str, float] | None:
        """Evaluate the detector at the end of an epoch, if configured and not done before."""
        every = self._spec.train.evaluate_every
        if self._evaluate is None or every is None or progress.step == 0:
            return None
        epoch = self._epochs_trained(progress)
        is_due = epoch >= self._spec.train.epochs or epoch % every == 0
        if not is_due or self._is_evaluated(progress):
            return None
        with self._learner.evaluating() as model:
            scores = self._score(model, step=progress.step, on_all=False)
        if self._processes.is_first:
            self._run.log({"stage": "evaluate", "step": progress.step, "epoch": epoch, **scores})
            self._run.remove_checkpoints(keep=self._spec.train.keep_checkpoints)
            self._callbacks.on_scores(ScoresReport(step=progress.step, epoch=epoch, scores=scores))
        return scores

    def _evaluate_best(self) -> None:
        """Evaluate the best checkpoint on all images, if a subset was used while training."""
        evaluate, every = self._evaluate, self._spec.train.evaluate_every
        if evaluate is None or every is None or evaluate.num_scored == evaluate.num_images:
            return
        step = self._processes.all_gather(self._step_to_score() if self._processes.is_first else None)[0]
        if step is None:
            return
        weights, _, path = self._run.load_weights(step)
        with self._learner.evaluating() as model:
            fill_module(model, weights, source=path)
            scores = self._score(model, step=step, on_all=True)
        if self._processes.is_first:
            epoch = next(entry.epoch for entry in self._run.evaluations if entry.step == step)
            self._run.log({"stage": "final", "step": step, "epoch": epoch, **scores})
            self._callbacks.on_scores(ScoresReport(step=step, epoch=epoch, scores=scores, is_final=True))

    def _step_to_score(self) -> int | None:
        """Return the step of the best checkpoint if it was not evaluated on all images before."""
        best = self._run.best
        return None if best is None or self._run.final_scores(best.step) is not None else best.step

    def _score(self, model: DetectorModel, *, step: int, on_all: bool) -> dict[str, float]:
        """Score a detector, and measure the time."""
        assert self._evaluate is not None
        num_images = self._evaluate.num_images if on_all else self._evaluate.num_scored
        scores = {**self._evaluate(model, step=step, on_all=on_all), "num_images": num_images}
        megapixels = self._evaluate.megapixels(on_all=on_all)
        self._pace.lap("evaluate", megapixels)
        self._pace.left["evaluate"] = max(self._pace.left.get("evaluate", 0.0) - megapixels, 0.0)
        if self._processes.is_first:
            self._pace.report(self._callbacks.on_time_left)
        return scores

    def _is_evaluated(self, progress: Progress) -> bool:
        """Check whether the first process has scored this step before."""
        evaluations = self._run.evaluations if self._processes.is_first else []
        return self._sum(any(entry.step == progress.step for entry in evaluations))[0] > 0

    def _is_without_progress(self) -> bool:
        """Check whether the last `train.patience` evaluations had no better AP than one before them."""
        patience = self._spec.train.patience
        if patience is None or self._evaluate is None:
            return False
        scores = [entry.ap for entry in self._run.evaluations] if self._processes.is_first else []
        has_scores = bool(scores) and max(scores) >= 0  # the images have objects
        since_best = len(scores) - 1 - scores.index(max(scores)) if has_scores else 0
        if self._sum(since_best >= patience)[0] == 0:
            return False
        if self._processes.is_first:
            self._callbacks.on_notice(
                f"stopped early: {counted(since_best, 'evaluation')} without a better AP than {max(scores):.3f} "
                "(train.patience)"
            )
        return True

    def _epochs_trained(self, progress: Progress) -> float:
        """Return the epochs after the last step of one; `epochs` may be fractional, so only the last can stop early."""
        epochs = self._spec.train.epochs  # rounded to whole steps, these may be all steps of an epoch
        return min(progress.epoch, epochs) if progress.step_in_epoch == 0 else epochs

    def _read_means(self, progress: Progress) -> "_EpochMeans":
        """Return the means of the steps of an epoch that were made before a run was continued."""
        means = _EpochMeans()
        if progress.step_in_epoch and self._processes.is_first:
            for entry in self._run.entries():
                if "learning_rate" in entry and entry["step"] > progress.step - progress.step_in_epoch:
                    means.add(entry)
        return means

    def _log_epoch(self, order: EpochOrder, progress: Progress) -> None:
        """Write the means of an epoch to the metrics, before the checkpoint that they belong to."""
        if self._processes.is_first:
            epoch = progress.epoch + progress.step_in_epoch / order.num_steps
            self._run.log(
                {
                    "stage": "epoch",
                    "step": progress.step,
                    "epoch": round(epoch, 4),
                    "loss": self._means.loss,
                    "positive_accuracy": self._means.positive_accuracy,
                    **self._means.chip_losses(),
                }
            )
            self._last_of_epoch = progress.step

    def _report_epoch(self, progress: Progress, scores: Mapping[str, float] | None) -> None:
        """Report an epoch whose last step or evaluation was made now."""
        if not self._processes.is_first or (scores is None and self._last_of_epoch != progress.step):
            return
        means = self._run.epoch_means(progress.step)
        best, evaluate = self._run.best if scores else None, self._evaluate
        self._callbacks.on_epoch(
            EpochReport(
                stage=self._stage,
                epoch=self._epochs_trained(progress),
                epochs=self._spec.train.epochs,
                loss=means.get("loss"),
                positive_accuracy=means.get("positive_accuracy"),
                scores=scores,
                num_scored=evaluate.num_scored if evaluate and scores else 0,
                num_images=evaluate.num_images if evaluate and scores else 0,
                is_best=best is not None and best.step == progress.step,
            )
        )

    @property
    def _stage(self) -> Part:
        return "rpn" if self._spec.train.rpn_only else "train"

    def _costs(self, order: EpochOrder) -> Costs:
        """Return what the rest costs as far as it is measured."""
        step, megapixel = self._pace.seconds_per("train"), self._pace.seconds_per("evaluate") or 0.0
        assert step is not None
        evaluate = self._evaluate
        if evaluate is None or self._spec.train.evaluate_every is None:
            return Costs(epoch=step * order.num_steps)
        return Costs(
            epoch=step * order.num_steps,
            evaluation=megapixel * evaluate.megapixels(on_all=False),
            end=megapixel * self._final_megapixels(evaluate),
        )

    def _final_megapixels(self, evaluate: Evaluator) -> float:
        """Return the pixels that are searched after the last evaluation, in millions."""
        return 0.0 if evaluate.num_scored == evaluate.num_images else evaluate.megapixels(on_all=True)

    def _correct_length(self, order: EpochOrder, progress: Progress) -> None:
        """Change the length of a training with limited time, where that changes nothing of the steps so far."""
        limit, train = self._limit, self._spec.train
        if limit is None or self._pace.num_laps("train") < _FEW_LAPS:
            return
        epoch = progress.epoch + progress.step_in_epoch / order.num_steps
        if epoch >= train.epochs:
            return
        now, costs = self._pace.clock(), self._costs(order)
        points = list(correction_epochs(train))
        is_warm = progress.step == max(train.warmup_steps, _FEW_LAPS + 1)
        if is_warm or any(self._corrected_at < point <= epoch for point in points):
            self._corrected_at = epoch
            changed = fit_length(train, limit, now=now, step=progress.step, epoch=epoch, costs=costs)
            if changed != train:
                self._change_length(changed, progress=progress, epoch=epoch)
        seconds_over = now + seconds_of(self._spec.train, epoch=epoch, costs=costs) - limit.end
        is_fixed = all(point <= epoch or point >= train.epochs for point in points)
        if is_fixed and not self._is_late and seconds_over > _LATE_SHARE * limit.seconds:
            self._is_late = True
            self._callbacks.on_warning(
                f"the machine has become slower, so training takes about {_duration(seconds_over)} longer than --time; "
                "it is not cut off, since the last epochs with a low learning rate improve the scores most"
            )

    def _change_length(self, train: TrainSpec, *, progress: Progress, epoch: float) -> None:
        """Continue with another length; the configuration of the run is changed first."""
        old, self._spec = self._spec.train, replace(self._spec, train=train)
        self._run.save_config(dump_experiment(self._spec))
        fields = ("epochs", "milestones", "evaluate_every")
        self._run.log(
            {
                "stage": "length",
                "step": progress.step,
                "epoch": round(epoch, 4),
                **{name: getattr(train, name) for name in fields},
            }
        )
        self._callbacks.on_notice(
            f"length: {counted(train.epochs, 'epoch')} instead of {old.epochs:g} fit into --time, by the steps so far"
        )

    def _is_stopping(self) -> bool:
        """Check whether any process was asked to stop, such as while a checkpoint was written."""
        return self._sum(self.signals.stop_requested)[0] > 0

    def _sum(self, *counts: float) -> list[float]:
        """Return the sum of each number over all processes; of a flag, the number of processes that set it."""
        means = self._processes.mean(torch.tensor(counts, dtype=torch.float32))
        return [mean * self._processes.world_size for mean in means.tolist()]

    def _batches(self, order: EpochOrder, *, steps: range) -> Generator[Batch, None, None]:
        """Load this process's share of each batch."""
        return load_batches(
            order,
            replace(self._spec.data, num_workers=self._workers.count),
            steps=steps,
            share=(self._processes.rank, self._processes.world_size),
            device=self._learner.device,
            transform=self._transform,
        )

    def _save(self, progress: Progress) -> None:
        keep = self._spec.train.keep_checkpoints
        self._learner.save(self._run, self._identity, progress=progress, keep=keep)
        self._last_checkpoint, self._saved_step = time.monotonic(), progress.step

    def _report(
        self,
        order: EpochOrder,
        batch: Batch,
        *,
        progress: Progress,
        update: Update,
        learning_rate: float,
        timing: _Timing,
        num_skipped: int,
    ) -> None:
        """Log a step and call back, in the first process."""
        megapixels = batch.images[:, 0].numel() * self._processes.world_size / 1e6
        self._pace.lap(self._stage, megapixels=megapixels)
        if not self._processes.is_first:
            return
        spec = self._spec.train
        epoch = progress.epoch + progress.step_in_epoch / order.num_steps
        report = StepReport(
            stage=self._stage,
            progress=progress,
            epoch=epoch,
            epochs=spec.epochs,
            steps_left=max(round((spec.epochs - epoch) * order.num_steps), 0),
            losses=update.losses,
            gradient_norm=update.gradient_norm,
            learning_rate=learning_rate,
            seconds=timing.step,
            chips_per_second=len(order.positions(progress.step_in_epoch - 1)) / timing.step,
            data_wait=timing.data_wait / timing.step,
            megapixels=megapixels,
            peak_memory=self._learner.peak_memory(),
            skipped_chips=num_skipped,
            num_positives=update.num_positives,
            num_correct=update.num_correct,
            num_negative_chips=update.num_negative_chips,
            negative_loss=_mean(update.negative_loss, update.num_negative_chips),
            positive_loss=_mean(
                update.positive_loss,
                len(batch) * self._processes.world_size - update.num_negative_chips,
            ),
        )
        entry = _to_entry(report, order)
        self._means.add(entry)
        self._run.log(entry)
        self._callbacks.on_step(report)
        self._report_time_left(report)

    def _report_time_left(self, report: StepReport) -> None:
        self._pace.left[self._stage] = report.steps_left
        if self._evaluate is not None and self._spec.train.evaluate_every is not None:
            num_evaluations = count_evaluations(self._spec.train, after=report.epoch - 1e-9)
            self._pace.left["evaluate"] = num_evaluations * self._evaluate.megapixels(
                on_all=False
            ) + self._final_megapixels(self._evaluate)
        self._pace.report(self._callbacks.on_time_left)


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


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
    if report.stage == "train":
        entry["positives"] = report.num_positives
        if report.num_positives:
            entry["positive_accuracy"] = round(report.num_correct / report.num_positives, 4)
        if order.table.is_negative.any():
            num_chips = len(order.positions(report.progress.step_in_epoch - 1))
            counts = {
                "negative": report.num_negative_chips,
                "positive": num_chips - report.num_negative_chips,
            }
            losses = {"negative": report.negative_loss, "positive": report.positive_loss}
            for kind, loss in losses.items():
                entry[f"{kind}_chips_in_batch"] = counts[kind]
                if loss is not None:
                    entry[f"{kind}_loss"] = loss
    if report.skipped_chips:
        entry["skipped_chips"] = report.skipped_chips
    if report.progress.step_in_epoch == 1:
        entry |= {
            "chips": len(order.table),
            "negative_chips": int(order.table.is_negative.sum()),
            "padding_chips": order.num_padding,
        }
    return entry


def _duration(seconds: float) -> str:
    """Return a duration in words."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
