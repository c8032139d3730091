"""The stages of an experiment: train the RPN, mine with it, train the detector and score it (SNIPER §3.2).

Each stage continues where it was stopped, and is not repeated while its inputs are the same.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from sniper.chips import ChipTable
from sniper.chips.negatives import NegativeSpec
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec
from sniper.config.loading import (
    check_resumable,
    dump_experiment,
    load_experiment,
    parse_experiment,
    to_plain,
)
from sniper.data.batches import ChipTransform
from sniper.data.datasets import Category, Dataset, DatasetIdentity, load_dataset
from sniper.data.datasets.categories import CategoryMatch, match_categories
from sniper.data.datasets.load import find_scored_split
from sniper.data.epoch import EpochOrder, choose_positive_chips
from sniper.data.spec import SourceSpec
from sniper.errors import ConfigError, count_and_list
from sniper.evaluation.coco import score
from sniper.evaluation.pair import EvaluationPair, GroundTruth
from sniper.files import expand_path
from sniper.inference.detector import Detector, to_coco
from sniper.inference.mining import mine
from sniper.inference.proposals import add_negatives
from sniper.inference.store import BoxStore
from sniper.models.two_stage import TwoStageDetector
from sniper.runs.processes import SINGLE_PROCESS, Processes, select_device
from sniper.runs.run import Run
from sniper.training import loop
from sniper.training.callbacks import Callbacks
from sniper.training.epochs import load_configured_chips, order_epoch
from sniper.training.learner import check_divisible
from sniper.training.tensorboard import check_tensorboard


def train(
    experiment: ExperimentSpec | str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    step: int | None = None,
    device: str | torch.device | None = None,
    epochs: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    transform: ChipTransform | None = None,
    callbacks: Callbacks = Callbacks(),
) -> Run:
    """Train a detector: all stages that an experiment configures.

    With `negatives.source: mined` these are a short training of the RPN, mining with it, and the training of the
    detector on positive and negative chips. With `train.evaluate_every` the detector is scored on `data.test` while it
    trains. Under torchrun each process takes its share of every batch.

    Args:
        experiment: a YAML file, the name of a recipe of the package, or a specification.
        run: folder of the run; by default `runs/NAME`, after the file or the recipe.
        resume: continue a run that was stopped; fields that neither the file nor `overrides` set keep their values. An
            `ExperimentSpec` sets all fields.
        step: with `resume`, continue from the checkpoint of this step; later ones are renamed to end in `.old`.
        device: where to compute, such as `cpu` or `cuda:0`; by default a GPU if there is one.
        epochs: number of epochs; short for `{"train.epochs": ...}`.
        overrides: values of other fields by dotted name, such as `{"train.batch_size": 16}`; text is read as YAML.
        transform: applied to each training chip; see `ChipDataset`.
        callbacks: called in the first process while the training runs.

    Returns:
        The run; `Detector.load` takes it.

    Raises:
        ConfigError: if the experiment cannot be used.
        RunError: if the folder already has a run, or has none to resume.
        AnnotationError: if a data set cannot be used.
        KeyboardInterrupt: after SIGINT (Ctrl-C) or SIGTERM, once the step in progress is complete and saved.
        SniperError: for everything else that a user can correct; see `sniper.training.loop.train`.

    Example:
        >>> run = sniper.train("mine.yaml", epochs=12, overrides={"train.batch_size": 16})  # doctest: +SKIP
        >>> detector = sniper.Detector.load(run)  # doctest: +SKIP
    """
    if step is not None and not resume:
        raise ConfigError("step: needs resume; it selects the checkpoint to continue from")
    folder = _default_folder(experiment) if run is None else expand_path(run)
    changes = dict(overrides or {}) | ({} if epochs is None else {"train.epochs": epochs})
    spec = _load_experiment(experiment, _to_yaml(changes), resumed=Run.open(folder) if resume else None)
    processes = Processes.from_environment()
    callbacks = callbacks if processes.is_first else Callbacks(on_warning=lambda _: None)
    dataset = load_split(spec, "train", callbacks=callbacks)
    test = _load_test(spec, dataset, callbacks=callbacks)
    chosen = select_device(device)
    _check_inputs(spec, dataset, folder=folder, resume=resume, device=chosen, processes=processes)
    with processes.process_group(chosen):
        if processes.is_first:
            _prepare_run(folder, spec, resume=resume, step=step)
        processes.barrier()
        opened = Run.open(folder)
        run_stages(
            opened,
            spec,
            dataset,
            test=test,
            device=chosen,
            callbacks=callbacks,
            transform=transform,
            processes=processes,
        )
    return opened


def run_stages(
    run: Run,
    spec: ExperimentSpec,
    dataset: Dataset,
    *,
    device: torch.device,
    test: Dataset | None = None,
    callbacks: Callbacks = Callbacks(),
    transform: ChipTransform | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> TwoStageDetector:
    """Run the stages of an experiment that are not complete, in the folder of a run.

    Args:
        run: its folder. The training of the RPN is a run of its own in `rpn`, the proposals are in `mined`.
        spec: the experiment.
        dataset: to train on.
        device: where to compute.
        test: to score on with `train.evaluate_every`; by default the experiment's.
        callbacks: called in the first process.
        transform: applied to each training chip; see `ChipDataset`.
        processes: that train together; all call this.

    Returns:
        The trained detector.

    Raises:
        AnnotationError: if the test images have none of the categories of the training images.
        ConfigError: if the experiment is to be scored and names no test images.
        SniperError: see `sniper.training.loop.train` and `mine`.
    """
    stages = _Stages(
        run=run,
        spec=spec,
        dataset=dataset,
        test=_load_test(spec, dataset, callbacks=callbacks) if test is None else test,
        device=device,
        callbacks=callbacks,
        transform=transform,
        processes=processes,
    )
    return stages.train_detector()


def load_split(
    spec: ExperimentSpec,
    split: Literal["train", "test"],
    *,
    has_images: bool = True,
    callbacks: Callbacks = Callbacks(),
) -> Dataset:
    """Load a data set of an experiment.

    Args:
        spec: the experiment.
        split: which one.
        has_images: whether the image files are needed.
        callbacks: `on_warning` is called with the warnings.

    Raises:
        ConfigError: if the experiment names none.
        AnnotationError: if it cannot be used.
    """
    source = _find_source(spec, split)
    if source is None:
        raise ConfigError(f"data.{split}.annotations is missing")
    dataset = load_dataset(
        source.annotations,
        image_root=source.images,
        split=source.split,
        has_images=has_images,
        data=spec.data,
    )
    for warning in dataset.warnings:
        callbacks.on_warning(warning)
    return dataset


def _find_source(spec: ExperimentSpec, split: Literal["train", "test"]) -> SourceSpec | None:
    """Return a data set of an experiment and its split; None if the experiment has none.

    The split of the test images is val or else test. They are those of the training data set if it has such a split
    and no other is named.
    """
    source: SourceSpec = getattr(spec.data, split)
    if split == "train":
        return source if source.annotations else None
    base = source if source.annotations else spec.data.train
    if not base.annotations:
        return None
    scored = source.split or find_scored_split(base.annotations)
    return replace(base, split=scored) if scored is not None or base is source else None


def _load_test(spec: ExperimentSpec, dataset: Dataset, *, callbacks: Callbacks) -> Dataset | None:
    """Load the test images if the detector is to be scored while it trains, else return None."""
    if spec.train.evaluate_every is None:
        return None
    if _find_source(spec, "test") is None:
        raise ConfigError("train.evaluate_every: data.test.annotations is missing")
    test = load_split(spec, "test", callbacks=callbacks)
    _warn_of_shared_images(dataset, test, callbacks)
    match = _match(dataset, test)
    for warning in match.warnings:
        callbacks.on_warning(warning)
    if match.added:
        callbacks.on_warning("detections of categories that the test images lack are not scored")
    return test


def _match(dataset: Dataset, test: Dataset) -> CategoryMatch:
    """Match the classes that a detector learns with the categories of the test images, by name."""
    return match_categories(
        dataset.categories, test.categories, classes_of=str(dataset.path), categories_of=str(test.path)
    )


def _warn_of_shared_images(dataset: Dataset, test: Dataset, callbacks: Callbacks) -> None:
    """Warn if images are both trained and scored on."""
    trained = {os.path.realpath(dataset.image_root / name) for name in dataset.file_names.tolist()}
    shared = [
        name for name in test.file_names.tolist() if os.path.realpath(test.image_root / name) in trained
    ]
    if shared:
        callbacks.on_warning(
            f"{len(shared)} of {len(test)} images of data.test are in data.train too, so the scores are too high "
            f"({count_and_list(shared)})"
        )


def _check_inputs(
    spec: ExperimentSpec,
    dataset: Dataset,
    *,
    folder: Path,
    resume: bool,
    device: torch.device,
    processes: Processes,
) -> None:
    """Check everything that can be checked before the folder of a run is created or changed."""
    if spec.train.tensorboard:
        check_tensorboard()
    check_divisible(spec, device=device, processes=processes)
    if resume:
        Run.open(folder).check_trained_on(dataset.identity)
    elif spec.data.chips is not None:
        ChipTable.load(Path(spec.data.chips), pyramid=spec.pyramid, digest=dataset.digest)


def rpn_experiment(spec: ExperimentSpec) -> ExperimentSpec:
    """Return the experiment that trains only the RPN, on positive chips, to mine with."""
    return replace(
        spec,
        train=replace(spec.train, epochs=spec.mine.rpn_epochs, rpn_only=True, evaluate_every=None),
        negatives=NegativeSpec(),
    )


def _default_folder(experiment: ExperimentSpec | str | os.PathLike[str]) -> Path:
    if isinstance(experiment, ExperimentSpec):
        raise ConfigError("run: name the folder of the run; an ExperimentSpec has no file to name it after")
    return Path("runs") / expand_path(experiment).stem


def _to_yaml(changes: Mapping[str, Any]) -> dict[str, str]:
    """Write values of fields as YAML; text is YAML already.

    Raises:
        ConfigError: if a value cannot be written as YAML.
    """
    texts = {}
    for name, value in changes.items():
        if isinstance(value, str | os.PathLike):
            texts[name] = os.fspath(value)
            continue
        try:
            texts[name] = yaml.safe_dump(to_plain(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: {value!r} is no number, text, list or mapping") from error
    return texts


def _load_experiment(
    experiment: ExperimentSpec | str | os.PathLike[str], overrides: Mapping[str, str], *, resumed: Run | None
) -> ExperimentSpec:
    """Load an experiment, with unset fields as in the run to resume, and check that this run can continue with it."""
    old = None if resumed is None else load_experiment(resumed.config_path)
    if isinstance(experiment, ExperimentSpec):
        spec = parse_experiment(dump_experiment(experiment), source=Path("experiment"), overrides=overrides)
    else:
        spec = load_experiment(Path(experiment), overrides=overrides, base=old)
    if resumed is not None and old is not None:
        check_resumable(old, spec, source=resumed.config_path)
    return spec


def _prepare_run(folder: Path, spec: ExperimentSpec, *, resume: bool, step: int | None) -> None:
    """Create the folder of a run, or make an existing one continue with this experiment."""
    config = dump_experiment(spec)
    if not resume:
        Run.create(folder, config=config)
        return
    run = Run.open(folder)
    if step is not None:
        run.rewind_to(step)
    run.save_config(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stages:
    """The stages of one experiment."""

    run: Run
    spec: ExperimentSpec
    dataset: Dataset
    test: Dataset | None
    device: torch.device
    callbacks: Callbacks
    transform: ChipTransform | None
    processes: Processes

    def train_detector(self) -> TwoStageDetector:
        """Train the detector, after RPN stage and mining if negative chips are mined."""
        evaluator = self._build_evaluator()
        if self.spec.negatives.source == "mined":
            self.run.check_trained_on(self.dataset.identity)
            if not self.run.checkpoints:
                self._mined_chips(0)  # before the detector occupies memory
            return self._train(self.run, self.spec, self._mined_chips, evaluator=evaluator)
        table = load_configured_chips(self.run, self.spec, self.dataset, processes=self.processes)
        return self._train(self.run, self.spec, lambda _: table, evaluator=evaluator)

    def _train(
        self,
        run: Run,
        spec: ExperimentSpec,
        chips_of_epoch: Callable[[int], ChipTable | None],
        *,
        evaluator: "_Evaluator | None" = None,
    ) -> TwoStageDetector:
        def order_of_epoch(epoch: int) -> EpochOrder:
            return order_epoch(
                spec,
                self.dataset,
                epoch=epoch,
                table=chips_of_epoch(epoch),
                num_shares=self.processes.world_size * spec.train.accumulation_steps,
            )

        return loop.train(
            run,
            spec,
            order_of_epoch,
            identity=self.dataset.identity,
            device=self.device,
            callbacks=self.callbacks,
            evaluate=evaluator,
            transform=self.transform,
            processes=self.processes,
        )

    def _mined_chips(self, epoch: int) -> ChipTable:
        """Return the positive and negative chips of an epoch; mine at the start of every round."""
        every = self.spec.mine.every_epochs
        first_epoch = epoch // every * every if every else 0
        path = self.run.folder / f"chips_{first_epoch:03d}.npz"
        if not path.exists():
            miner = self._train_rpn() if first_epoch == 0 else self.run
            self._mine(miner, path, first_epoch=first_epoch)
        return ChipTable.load(path, pyramid=self.spec.pyramid, digest=self.dataset.digest)

    def _train_rpn(self) -> Run:
        """Train the RPN in a run of its own, or complete that run."""
        folder, spec = self.run.folder / "rpn", rpn_experiment(self.spec)
        if self.processes.is_first:
            _open_stage(folder, spec, self.dataset.identity)
        self.processes.barrier()
        run = Run(folder)
        self._train(run, spec, lambda _: None)
        return run

    def _mine(self, miner: Run, path: Path, *, first_epoch: int) -> None:
        """Mine with the newest weights of a run, and write the chips of a round."""
        started = time.monotonic()
        store = mine(
            miner,
            self.spec,
            self.dataset,
            self.run.folder / "mined",
            device=self.device,
            on_progress=self.callbacks.on_mining,
            processes=self.processes,
        )
        if self.processes.is_first:
            self._write_chips(path, store, first_epoch=first_epoch, started=started)
        self.processes.barrier()

    def _write_chips(self, path: Path, store: BoxStore, *, first_epoch: int, started: float) -> None:
        generator = np.random.default_rng([self.spec.seed, first_epoch, 1])
        positives = choose_positive_chips(self.dataset, self.spec.pyramid, generator=generator)
        table = add_negatives(
            positives, store, self.spec.negatives, pyramid=self.spec.pyramid, generator=generator
        )
        table.save(path, pyramid=self.spec.pyramid, digest=self.dataset.digest)
        self.run.log(
            {
                "stage": "mine",
                "step": int(self.run.checkpoints[-1].name) if self.run.checkpoints else 0,
                "images": len(self.dataset),
                "positive_chips": len(positives),
                "negative_chips_pool": len(table) - len(positives),
                "seconds": round(time.monotonic() - started, 3),
            }
        )

    def _build_evaluator(self) -> "_Evaluator | None":
        if self.test is None:
            return None
        return _Evaluator(
            spec=self.spec,
            test=self.test,
            classes=self.dataset.categories,
            match=_match(self.dataset, self.test),
            device=self.device,
            processes=self.processes,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Evaluator:
    """Scores a detector on the test images; each process searches its share.

    Attributes:
        spec: the experiment.
        test: the test images.
        classes: of the detector, by label.
        match: of the classes with the categories of the test images.
        device: of the detector.
        processes: that search together.
    """

    spec: ExperimentSpec
    test: Dataset
    classes: tuple[Category, ...]
    match: CategoryMatch
    device: torch.device
    processes: Processes

    @cached_property
    def _truth(self) -> GroundTruth:
        return GroundTruth.of(self.test)

    def __call__(self, model: TwoStageDetector) -> Mapping[str, float]:
        detector = Detector.from_model(model, spec=self.spec, categories=self.classes, device=self.device)
        records = [
            self.test[index]
            for index in range(self.processes.rank, len(self.test), self.processes.world_size)
        ]
        results: list[dict[str, Any]] = []
        searched = detector.predict_many(records)
        for record, detections in zip(records, searched, strict=True):
            if detections is not None:
                matched = self.match.relabel(detections)
                scored = matched[matched.labels < len(self.test.categories)]
                results += to_coco(scored, image_id=record.image_id, categories=self.test.categories)
        gathered = self.processes.all_gather(results)
        pair = EvaluationPair.of([entry for results in gathered for entry in results], self._truth)
        return score(pair).as_dict()


def _open_stage(folder: Path, spec: ExperimentSpec, identity: DatasetIdentity) -> Run:
    """Open the run of a stage if it was started with the same inputs; otherwise start it over."""
    discarded = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(discarded, ignore_errors=True)
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        if _has_inputs(run, spec) and run.is_trained_on(identity):
            return run
        os.replace(folder, discarded)  # first, so that an interrupted deletion leaves no incomplete run
        shutil.rmtree(discarded)
    return Run.create(folder, config=dump_experiment(spec))


def _has_inputs(run: Run, spec: ExperimentSpec) -> bool:
    """Check whether a run was started with the inputs of an experiment."""
    try:
        return _inputs(load_experiment(run.config_path)) == _inputs(spec)
    except ConfigError:
        return False


def _inputs(spec: ExperimentSpec) -> ExperimentSpec:
    """Reset the fields that the weights of the RPN do not depend on; data sets are compared by content instead."""
    cache = replace(spec.data.cache, folder=None if spec.data.cache.folder is None else "", gigabytes=1.0)
    return replace(
        spec,
        data=replace(
            spec.data,
            train=SourceSpec(),
            test=SourceSpec(),
            num_workers=0,
            on_bad_image="refuse",
            follow_links=False,
            cache=cache,
        ),
        train=replace(
            spec.train, checkpoint_minutes=1.0, keep_checkpoints=1, tensorboard=False, compile=False
        ),
        mine=MineSpec(),
        predict=PredictSpec(),
    )
