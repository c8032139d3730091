"""Training: plans of chips to weights, without a step lost."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sniper.chips import ChipTable
from sniper.config.experiment import ExperimentSpec
from sniper.data.batches import Batch, ChipTransform
from sniper.data.datasets import Dataset
from sniper.data.epoch import EpochOrder, order_chips, order_tiles, order_whole_images
from sniper.data.loader import load_batches
from sniper.errors import SniperError
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.processes import SINGLE_PROCESS, Processes
from sniper.runs.run import Progress, Run
from sniper.training.learner import Learner
from sniper.training.optimizer import learning_rate
from sniper.training.signals import SignalHandler, leave_signals_to_the_trainer
from sniper.training.tensorboard import TensorBoardLogger, check_tensorboard


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
        gradient_norm: of the sum of all losses.
        learning_rate: of the step.
        seconds: that the step took, reading included.
        chips_per_second: of all devices, over the step, reading included.
        data_wait: share of the step's time that was spent waiting for chips.
        megapixels: of the step's chips, padding included, in millions.
        peak_memory: the most memory that was in use so far on the first device, bytes.
        skipped_chips: how many chips could not be read, and others took their places.
    """

    stage: str
    progress: Progress
    epoch: float
    epochs: float
    steps_left: int
    losses: dict[str, float]
    gradient_norm: float
    learning_rate: float
    seconds: float
    chips_per_second: float
    data_wait: float
    megapixels: float
    peak_memory: int
    skipped_chips: int = 0

    @property
    def loss(self) -> float:
        """The sum of all losses."""
        return sum(self.losses.values())


def train(
    run: Run,
    spec: ExperimentSpec,
    annotations: Dataset,
    *,
    device: torch.device,
    watch: Callable[[StepReport], None],
    table_of: Callable[[int], ChipTable | None] | None = None,
    score: Callable[[TwoStageDetector, float], Mapping[str, float]] | None = None,
    transform: ChipTransform | None = None,
    ranks: Processes = SINGLE_PROCESS,
) -> TwoStageDetector:
    """Train, from the newest checkpoint of the run if it has one, to the last epoch.

    Everything drawn is a function of the seed and the place in the run, so a run that was stopped and goes on ends with
    the same weights as one that never stopped.

    Args:
        run: its folder; metrics and checkpoints go there.
        spec: the experiment.
        annotations: what to train on.
        device: where to compute.
        watch: told after every step, in the first process.
        table_of: gives the chips of an epoch, or None for such as are chosen anew; by default the table that the
            experiment names, if it names one.
        score: gives the scores of a detector after so many epochs; called as `evaluate_every` says.
        transform: changes each chip that is learnt from; see `ChipDataset`.
        ranks: the processes that train together; all call this, the first writes.

    Returns:
        The trained detector.

    Raises:
        AnnotationError: if there is nothing to learn from.
        ChipTableError: if the chip table that the experiment names cannot be read, or belongs to something else.
        CheckpointError: if the newest checkpoint cannot be read or belongs to something else, or one cannot be written.
        ConfigError: if the batch cannot be shared by these processes.
        ImageError: if an image cannot be read and is not to be skipped.
        CacheError: if the folder of kept chips cannot be used.
        TransformError: if `transform` gives back something else than a chip.
        KeyboardInterrupt: after SIGINT (Ctrl-C) or SIGTERM, when the step under way is done and a checkpoint written.
        OutOfMemory: if the chips do not fit into the memory of the device.
        TrainingDiverged: if a loss or a gradient is not finite.
    """
    if spec.train.tensorboard:
        check_tensorboard()
    fixed = _fixed_table(run, spec, annotations, ranks)
    learner = Learner(
        spec,
        num_classes=len(annotations.categories),
        device=device,
        ranks=ranks,
        has_weights=not run.checkpoints,
    )
    progress = learner.load(run, annotations)
    if ranks.is_first:
        run.forget_after(progress.step)
    board = None
    if spec.train.tensorboard and ranks.is_first:
        board = TensorBoardLogger(run.folder / "tensorboard", step=progress.step)
    trainer = _Trainer(
        run,
        spec,
        annotations,
        table_of or (lambda _: fixed),
        watch=watch,
        score=score,
        transform=transform,
        learner=learner,
        board=board,
    )
    with board or nullcontext(), trainer.ears.open():
        if progress.step_in_epoch == 0:
            trainer.score_if_due(progress)  # a run that was stopped before it could
        for _ in range(progress.epoch, math.ceil(spec.train.epochs)):
            progress = trainer.train_epoch(progress)
    return learner.best


def order_epoch(
    spec: ExperimentSpec,
    annotations: Dataset,
    *,
    epoch: int,
    table: ChipTable | None = None,
    num_shares: int = 1,
) -> EpochOrder:
    """Plan one epoch of an experiment: chips, whole images or tiles, as it asks for.

    Args:
        spec: the experiment.
        annotations: what to train on.
        epoch: which pass, 0 the first.
        table: the chips, where they were chosen before.
        num_shares: into how many parts each batch is to be cut.

    Raises:
        AnnotationError: if there is nothing to learn from.
    """
    data, batch_size = spec.data, spec.train.batch_size
    drawn: dict[str, Any] = {"flip": data.flip, "seed": spec.seed, "epoch": epoch}
    if data.whole is not None:
        return order_whole_images(
            annotations,
            data.whole,
            batch_size=batch_size,
            chip_size=spec.pyramid.chip_size,
            num_shares=num_shares,
            **drawn,
        )
    if data.tiles is not None:
        return order_tiles(
            annotations, data.tiles, batch_size=batch_size, images_at_once=data.images_at_once, **drawn
        )
    return order_chips(
        annotations,
        spec.pyramid,
        batch_size=batch_size,
        table=table,
        negatives_per_image=0 if spec.train.rpn_only else spec.negatives.per_image,
        images_at_once=data.images_at_once,
        **drawn,
    )


def _fixed_table(run: Run, spec: ExperimentSpec, annotations: Dataset, ranks: Processes) -> ChipTable | None:
    """Read the chips of all epochs, if the experiment names a table.

    A run keeps a copy: it goes on with the same chips, whatever became of the file.
    """
    if spec.data.chips is None:
        return None
    is_going_on = bool(run.checkpoints) and run.chips_path.exists()
    path = run.chips_path if is_going_on else Path(spec.data.chips)
    table = ChipTable.load(path, pyramid=spec.pyramid, digest=annotations.digest)
    ranks.wait()
    if not is_going_on and ranks.is_first:
        table.save(run.chips_path, pyramid=spec.pyramid, digest=annotations.digest)
    return table


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
        annotations: Dataset,
        table_of: Callable[[int], ChipTable | None],
        *,
        watch: Callable[[StepReport], None],
        score: Callable[[TwoStageDetector, float], Mapping[str, float]] | None,
        transform: ChipTransform | None,
        learner: Learner,
        board: TensorBoardLogger | None,
    ) -> None:
        self.run = run
        self.spec = spec
        self.annotations = annotations
        self.table_of = table_of
        self.watch = watch
        self.score = score
        self.transform = transform
        self.learner = learner
        self.ranks = learner.ranks
        self.board = board
        self.last_checkpoint = time.monotonic()
        self.ears = SignalHandler()

    def train_epoch(self, progress: Progress) -> Progress:
        """Make the steps that are left of one pass; the last pass may be a fraction."""
        spec = self.spec.train
        with self.ears.closed():  # it may mine, and every step so far is saved
            plan = self._plan(progress.epoch)
        share = min(spec.epochs - progress.epoch, 1.0)
        num_steps = max(round(plan.num_steps * share), 1)
        started = ready = time.monotonic()
        batches = self._batches(plan, first_step=progress.step_in_epoch, num_steps=num_steps)
        for batch in _told_plainly(batches):
            arrived = time.monotonic()
            epoch = progress.epoch + progress.step_in_epoch / plan.num_steps
            place = progress.step_in_epoch
            rate = learning_rate(spec, step=progress.step, epoch=epoch)
            losses = self.learner.learn(batch, rate=rate, step=progress.step, weight=plan.weight(place))
            progress = Progress(
                step=progress.step + 1, epoch=progress.epoch, step_in_epoch=progress.step_in_epoch + 1
            )
            now = time.monotonic()
            epoch = progress.epoch + progress.step_in_epoch / plan.num_steps
            is_asked, is_late, skipped = self._added_up(
                self.ears.is_asked.is_set(),
                now - self.last_checkpoint > spec.checkpoint_minutes * 60,
                sum(batch.skipped),
            )
            report = StepReport(
                stage="rpn" if spec.rpn_only else "train",
                progress=progress,
                epoch=epoch,
                epochs=spec.epochs,
                steps_left=max(round((spec.epochs - epoch) * plan.num_steps), 0),
                gradient_norm=losses.pop("gradient_norm"),
                losses=losses,
                learning_rate=rate,
                seconds=now - started,
                chips_per_second=len(plan.positions(place)) / (now - started),
                data_wait=(arrived - ready) / (now - started),
                megapixels=batch.images[:, 0].numel() * self.ranks.count / 1e6,
                peak_memory=self.learner.peak_memory(),
                skipped_chips=round(skipped),
            )
            started = now
            self._tell(report, plan)
            is_last = progress.step_in_epoch == num_steps
            if progress.step_in_epoch == plan.num_steps:
                progress = Progress(step=progress.step, epoch=progress.epoch + 1, step_in_epoch=0)
            is_stopping = is_asked > 0
            if is_last or is_stopping or is_late > 0:
                self.learner.save(self.run, self.annotations, progress=progress, keep=spec.keep_checkpoints)
                self.last_checkpoint = time.monotonic()
                is_stopping = (
                    self._added_up(self.ears.is_asked.is_set())[0] > 0
                )  # perhaps while it was written
            if is_stopping:
                raise KeyboardInterrupt
            ready = time.monotonic()
        self.score_if_due(progress)
        return progress

    def score_if_due(self, progress: Progress) -> None:
        """Score the detector at the end of a pass, if that was asked for and has not been done."""
        every = self.spec.train.evaluate_every
        if self.score is None or every is None or progress.step == 0:
            return
        # A pass that ends between two epochs is the last.
        epoch = progress.epoch if progress.step_in_epoch == 0 else self.spec.train.epochs
        is_due = epoch >= self.spec.train.epochs or epoch % every == 0
        if not is_due or self._is_scored(progress):
            return
        with self.ears.closed(), self.learner.at_rest() as model:  # every step so far is saved
            scores = self.score(model, epoch)
        if self.ranks.is_first:
            self._log({"stage": "evaluate", "step": progress.step, "epoch": epoch, **scores})

    def _is_scored(self, progress: Progress) -> bool:
        """Tell whether the first process has scored this step before."""
        entries = self.run.entries() if self.ranks.is_first else []
        is_scored = any(entry["stage"] == "evaluate" and entry["step"] == progress.step for entry in entries)
        return self._added_up(is_scored)[0] > 0

    def _added_up(self, *counts: float) -> list[float]:
        """Add up each of these numbers over all processes; of a flag, how many have raised it."""
        own = torch.tensor(counts, dtype=torch.float32)
        return [count * self.ranks.count for count in self.ranks.mean(own).tolist()]

    def _plan(self, epoch: int) -> EpochOrder:
        num_shares = self.ranks.count * self.spec.train.accumulation_steps
        return order_epoch(
            self.spec, self.annotations, epoch=epoch, table=self.table_of(epoch), num_shares=num_shares
        )

    def _batches(self, plan: EpochOrder, *, first_step: int, num_steps: int) -> Iterable[Batch]:
        """Read this process's share of each batch."""
        return load_batches(
            plan,
            self.spec.data,
            steps=range(first_step, num_steps),
            share=(self.ranks.rank, self.ranks.count),
            pin_memory=self.learner.device.type == "cuda",
            transform=self.transform,
            worker_init_fn=leave_signals_to_the_trainer,
        )

    def _tell(self, report: StepReport, plan: EpochOrder) -> None:
        if not self.ranks.is_first:
            return
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
                "chips": len(plan.table),
                "negative_chips": int(plan.table.is_negative.sum()),
                "padding_chips": plan.num_padding,
            }
        self._log(entry)
        self.watch(report)

    def _log(self, entry: Mapping[str, Any]) -> None:
        self.run.log(entry)
        if self.board is not None:
            self.board.write(entry)
