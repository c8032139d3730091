"""The stages of an experiment: train the RPN, mine with it, train the detector and score it (SNIPER §3.3).

Each stage continues where it was stopped, and is not repeated while its inputs are the same.
"""

import json
import math
import os
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sniper.chips import ChipTable
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.negatives import NegativeSpec, auto_dose
from sniper.config.derived import DerivedSetting
from sniper.config.experiment import ExperimentSpec, MineSpec, PredictSpec
from sniper.config.loading import (
    check_resumable,
    dump_experiment,
    is_experiment,
    load_experiment,
    load_partial,
    merge_experiment,
    parse_experiment,
    to_plain,
    to_yaml,
)
from sniper.data.batches import ChipTransform
from sniper.data.datasets import Category, Dataset, DatasetIdentity, load_dataset
from sniper.data.datasets.categories import CategoryMatch, match_categories
from sniper.data.datasets.load import find_scored_split
from sniper.data.epoch import EpochOrder, choose_positive_chips, to_image_boxes
from sniper.data.holdout import draw_images, draw_indices, hold_out
from sniper.data.spec import SourceSpec
from sniper.errors import ConfigError, SniperError, count_and_list
from sniper.evaluation.coco import score
from sniper.evaluation.pair import GroundTruth
from sniper.files import atomic_write, expand_path, remove_folder
from sniper.inference.calibration import load_calibration, save_calibration
from sniper.inference.detector import Detector
from sniper.inference.mining import mine, mine_alarms
from sniper.inference.proposals import add_negatives, open_proposals, read_alarms
from sniper.inference.store import BoxStore
from sniper.inference.validation import validate
from sniper.models.build import check_available, find_download, resolve
from sniper.models.protocol import DetectorModel
from sniper.planning.auto import choose_validation, derive, parse_time
from sniper.planning.cost import levels_megapixels
from sniper.planning.experiment import CPU_BACKBONE, GPU_BACKBONE
from sniper.planning.given import Given
from sniper.remote import is_remote
from sniper.remote.client import cache as remote_cache
from sniper.reports.reporter import RunReporter
from sniper.reports.scored import Subject
from sniper.runs.default import default_run
from sniper.runs.environment import Environment
from sniper.runs.initial import InitialWeights, load_initial_weights
from sniper.runs.lock import lock_folder
from sniper.runs.origin import describe_origin
from sniper.runs.processes import SINGLE_PROCESS, Processes, select_device
from sniper.runs.run import Run
from sniper.training import loop
from sniper.training.callbacks import Callbacks, EndReport, StartReport, Tracker, call_each
from sniper.training.epochs import load_configured_chips, order_epoch
from sniper.training.learner import check_divisible
from sniper.training.length import TimeLimit, count_evaluations
from sniper.training.mining import expected_dose, first_epoch, num_rounds, rpn_epochs, searched_share
from sniper.training.pace import Pace
from sniper.training.trackers import build_trackers, check_trackers

_SILENT = Callbacks(on_warning=lambda _: None)
_ALARMS = "alarms_"  # start of the names of the folders of false alarms


def train(
    experiment: ExperimentSpec | str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    step: int | None = None,
    device: str | torch.device | None = None,
    val: str | os.PathLike[str] | None = None,
    epochs: float | None = None,
    time: float | str | None = None,
    config: str | os.PathLike[str] | None = None,
    weights_from: Run | str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    transform: ChipTransform | None = None,
    callbacks: Tracker | Iterable[Tracker] = Callbacks(),
) -> Run:
    """Train a detector on a data set, or run all stages that an experiment configures.

    From a data set, every field that is not set is derived from the data and the machine, and written to the
    `config.yaml` of the run. An experiment states its fields; nothing in it is derived.

    With `negatives.source: self` the training images are searched while the detector is trained, and its false alarms
    become negative chips. With `negatives.source: rpn` the stages are a short training of the RPN, mining with it, and
    the training of the detector on positive and negative chips. With `train.evaluate_every` the detector is scored on
    `data.test` while it trains. Under torchrun each process takes its share of every batch.

    Args:
        experiment: a data set that `load_dataset` reads; or an experiment: a YAML file, the name of a recipe of the
            package, or a specification.
        run: folder of the run; by default `runs/NAME`, after the file, the folder or the recipe.
        resume: continue a run that was stopped; fields that neither the file nor `overrides` set keep their values, and
            nothing is derived anew. An `ExperimentSpec` sets all fields.
        step: with `resume`, continue from the checkpoint of this step; later ones are renamed to end in `.old`.
        device: where to compute, such as `cpu` or `cuda:0`; by default a GPU if there is one.
        val: data set to validate on; short for `{"data.test.annotations": ...}`.
        epochs: number of epochs; short for `{"train.epochs": ...}`.
        time: seconds, or text such as `10m`, that training on a data set may take, evaluation included. A few steps are
            measured first, to find how many epochs fit; the number is corrected while the training runs.
        config: with a data set, a YAML file of some fields of an experiment, which are not derived.
        weights_from: detector to start from: a run, its folder, or a safetensors file of its weights; short for
            `{"model.weights_from": ...}`. Classes are matched by name. With a data set, the model is that of the run.
        overrides: values of other fields by dotted name, such as `{"train.batch_size": 16}`; text is read as YAML.
        transform: applied to each training chip; see `ChipDataset`.
        callbacks: called in the first process while the training runs: functions, an object with the methods of
            `Tracker`, or several of these. An exception in one ends the training after its last whole step is saved.

    Returns:
        The run; `Detector.load` takes it.

    Raises:
        ConfigError: if the experiment cannot be used.
        RunError: if the folder already has a run, or has none to resume.
        InUseError: if another process works on the run.
        AnnotationError: if a data set cannot be used.
        KeyboardInterrupt: after SIGINT (Ctrl-C), SIGTERM or SIGHUP, once the step in progress is complete and saved.
        SniperError: for everything else that a user can correct; see `sniper.training.loop.train`.
        TypeError: if `callbacks` is no tracker.

    Example:
        >>> run = sniper.train("data.yaml", time="30m")  # doctest: +SKIP
        >>> run = sniper.train("mine.yaml", epochs=12, overrides={"train.batch_size": 16})  # doctest: +SKIP
        >>> detector = sniper.Detector.load(run)  # doctest: +SKIP
    """
    if step is not None and not resume:
        raise ConfigError("step: needs resume; it selects the checkpoint to continue from")
    started = clock.monotonic()
    callbacks = Callbacks.of(callbacks)
    folder = default_folder(experiment) if run is None else expand_path(run)
    if time is not None and epochs is not None:
        raise ConfigError("--time: and --epochs exclude each other")
    shortcuts = {
        "train.epochs": epochs,
        "data.test.annotations": val,
        "model.weights_from": weights_from.folder if isinstance(weights_from, Run) else weights_from,
    }
    changes = _with_shortcuts(overrides or {}, shortcuts)
    texts = to_yaml(changes)
    limit, settings = None, list[DerivedSetting]()
    processes = Processes.from_environment()
    callbacks = callbacks if processes.is_first else _SILENT
    callbacks = replace(callbacks, on_derived=call_each([settings.extend, callbacks.on_derived]))
    chosen = select_device(device)
    with lock_folder(folder, option="--run, run=..."):
        if resume and processes.is_first:
            Run(folder).restore_replaced()
        if isinstance(experiment, ExperimentSpec) or is_experiment(expand_path(experiment)):
            for name, value in (("time", time), ("config", config)):
                if value is not None:
                    raise ConfigError(f"--{name}: needs a data set; an experiment states its fields itself")
            spec = _load_experiment(experiment, texts, resumed=Run.open(folder) if resume else None)
            dataset = load_split(spec, "train", callbacks=callbacks)
            test = _load_test(spec, dataset, callbacks=callbacks)
        elif resume:
            if time is not None:
                raise ConfigError(
                    "--time: the length of a run is fixed at its start; set --epochs to change it"
                )
            spec = _load_resumed(experiment, texts, config=config, run=Run.open(folder))
            dataset = load_split(spec, "train", callbacks=callbacks)
            test = _load_test(spec, dataset, callbacks=callbacks)
        else:
            Run.check_absent(folder)
            seconds = parse_time(time) if isinstance(time, str) else time
            if seconds is not None:
                limit = TimeLimit(seconds=seconds, end=started + seconds)
            spec, dataset, test, limit = _derive(
                experiment,
                texts,
                config=config,
                limit=limit,
                device=chosen,
                callbacks=callbacks,
                processes=processes,
            )
        _check_inputs(spec, dataset, folder=folder, resume=resume, device=chosen, processes=processes)
        _check_weights(spec, dataset, resumed=Run.open(folder) if resume else None, callbacks=callbacks)
        with processes.process_group(chosen):
            if processes.is_first:
                _prepare_run(folder, spec, resume=resume, step=step)
                if spec.data.holdout:
                    _save_validation(folder, spec, test=test)
                _reporter(Run(folder), spec, callbacks).save_settings(settings)
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
                limit=limit,
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
    limit: TimeLimit | None = None,
) -> DetectorModel:
    """Run the stages of an experiment that are not complete, in the folder of a run.

    Args:
        run: its folder. The training of the RPN is a run of its own in `rpn`, the proposals are in `mined`; false
            alarms are in `alarms_EPOCH`.
        spec: the experiment.
        dataset: to train on.
        device: where to compute.
        test: to score on with `train.evaluate_every`; by default the experiment's.
        callbacks: called in the first process.
        transform: applied to each training chip; see `ChipDataset`.
        processes: that train together; all call this.
        limit: when the training is to end; see `sniper.training.loop.train`.

    Returns:
        The detector after the last step.

    Raises:
        AnnotationError: if the test images have none of the categories of the training images.
        ConfigError: if the experiment is to be scored and names no test images.
        SniperError: see `sniper.training.loop.train` and `mine`.
    """
    with _tracking(run, spec, callbacks, processes=processes) as tracked:
        stages = _Stages(
            run=run,
            spec=spec,
            dataset=dataset,
            test=_load_test(spec, dataset, callbacks=callbacks) if test is None else test,
            device=device,
            callbacks=tracked,
            transform=transform,
            processes=processes,
            limit=limit,
        )
        return stages.train_detector()


@contextmanager
def _tracking(
    run: Run, spec: ExperimentSpec, callbacks: Callbacks, *, processes: Processes
) -> Iterator[Callbacks]:
    """Add the trackers of an experiment to the callbacks, in the first process, and report the end of the block."""
    if processes.is_first and spec.train.trackers:
        # First, so that an exception in a callback of a user leaves them complete.
        callbacks = Callbacks.of([*build_trackers(spec.train.trackers, callbacks), callbacks])
    try:
        yield callbacks
    except BaseException as error:
        callbacks.on_end(_describe_end(run, error))
        raise
    callbacks.on_end(_describe_end(run, None))


def _describe_end(run: Run, error: BaseException | None) -> EndReport:
    """Return what a training has come to."""
    weights = scores = None
    try:
        weights = run.find_weights() if run.checkpoints else None
        scores = run.best_scores()
    except (OSError, SniperError):
        if error is None:
            raise
    status: Literal["completed", "stopped", "failed"] = "completed" if error is None else "failed"
    return EndReport(
        status="stopped" if isinstance(error, KeyboardInterrupt) else status,
        folder=run.folder,
        step=int(run.checkpoints[-1].name) if run.checkpoints else 0,
        weights=weights,
        scores=scores,
        error=error,
    )


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
    if spec.data.holdout:
        trained, held_out = hold_out(dataset, share=spec.data.holdout, seed=spec.seed)
        dataset = trained if split == "train" else held_out
    if split == "train" and is_remote(dataset.image_root):
        cache = remote_cache()
        bound = "half of what its disk has free" if spec.data.cache.gigabytes is None else "as given"
        callbacks.on_notice(
            f"remote images: kept in {cache.folder}, up to {cache.limit / 1e9:.3g} GB, {bound} "
            "(data.cache.gigabytes, data.cache.folder)"
        )
    for warning in dataset.warnings:
        callbacks.on_warning(warning)
    return dataset


def has_test_images(spec: ExperimentSpec) -> bool:
    """Check whether an experiment has images to evaluate on."""
    return _find_source(spec, "test") is not None


def _find_source(spec: ExperimentSpec, split: Literal["train", "test"]) -> SourceSpec | None:
    """Return a data set of an experiment and its split; None if the experiment has none.

    The split of the test images is val or else test. They are those of the training data set if it has such a split
    and no other is named, or a part of it that is held out.
    """
    if spec.data.holdout:
        split = "train"
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
    return _load_scored(spec, dataset, callbacks=callbacks)


def _load_scored(spec: ExperimentSpec, dataset: Dataset, *, callbacks: Callbacks) -> Dataset | None:
    """Load the test images, if there are any, and warn where they do not fit the training set."""
    if _find_source(spec, "test") is None:
        return None
    # Held-out images have the warnings of the training images, of which they are a part.
    test = load_split(spec, "test", callbacks=_SILENT if spec.data.holdout else callbacks)
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
    check_trackers(spec.train.trackers)
    check_divisible(spec, device=device, processes=processes)
    _check_masks(spec, dataset)
    if resume:
        run = Run.open(folder)
        run.check_trained_on(dataset.identity)
        if spec.train.evaluate_every is not None:
            load_calibration(run)  # refuses a damaged file now, not after an epoch
        return
    Run.check_absent(folder)
    if spec.data.chips is not None:
        path, images = Path(spec.data.chips), to_image_boxes(dataset)
        ChipTable.load(path, pyramid=spec.pyramid, images=images, digest=dataset.digest)


def _check_masks(spec: ExperimentSpec, dataset: Dataset) -> None:
    """Check that a data set has masks if the detector learns them."""
    if spec.model.mask_side is None or dataset.masks is not None:
        return
    reason = "has no masks" if spec.data.masks == "read" else "is read without masks (data.masks)"
    if spec.model.kind == "two_stage":
        raise ConfigError(
            f"model.mask_head: {dataset.path} {reason} to learn from; set model.mask_head to null to train on boxes "
            "alone"
        )
    raise ConfigError(
        f"model.name: {dataset.path} {reason} for {spec.model.name} to learn from; choose a detector of boxes, such as "
        "fasterrcnn_resnet50_fpn"
    )


def _check_weights(
    spec: ExperimentSpec, dataset: Dataset, *, resumed: Run | None, callbacks: Callbacks
) -> None:
    """Check that the detector that a run starts from fits, and report what is loaded from it."""
    path = spec.model.weights_from
    if resumed is not None and resumed.checkpoints:
        old = load_experiment(resumed.config_path).model.weights_from
        if path != old:
            callbacks.on_warning(
                f"model.weights_from: {path} is not read, since the run continues from its own weights"
                + ("" if old is None else f"; it started from {old}")
            )
        return
    initial = load_initial_weights(spec.model)
    if initial is not None:
        callbacks.on_weights(initial.check(spec, dataset.categories))


def rpn_experiment(spec: ExperimentSpec, *, num_steps: int) -> ExperimentSpec:
    """Return the experiment that trains only the RPN, on positive chips, to mine with.

    Its warm-up is at most a twentieth of it.

    Args:
        spec: the experiment.
        num_steps: of an epoch on positive chips.
    """
    epochs = rpn_epochs(spec.mine, num_steps=num_steps)
    return replace(
        spec,
        train=replace(
            spec.train,
            epochs=epochs,
            warmup_steps=min(spec.train.warmup_steps, round(0.05 * epochs * num_steps)),
            rpn_only=True,
            evaluate_every=None,
            evaluate_images=None,
            patience=None,
        ),
        negatives=NegativeSpec(),
    )


def default_folder(experiment: ExperimentSpec | str | os.PathLike[str]) -> Path:
    """Return the folder of a run that none is given for; see `sniper.runs.default`.

    Raises:
        ConfigError: if a specification is given, which has no name.
    """
    if isinstance(experiment, ExperimentSpec):
        raise ConfigError("run: name the folder of the run; an ExperimentSpec has no file to name it after")
    return default_run(experiment)


def _with_shortcuts(overrides: Mapping[str, Any], shortcuts: Mapping[str, Any]) -> dict[str, Any]:
    """Add the values of options with a short name to those of the fields that they set.

    Raises:
        ConfigError: if a field is set twice.
    """
    given = {
        name: json.dumps(os.fspath(value)) if isinstance(value, str | os.PathLike) else value
        for name, value in shortcuts.items()
        if value is not None
    }
    twice = [label for label in overrides if label.removeprefix("--") in given]
    if twice:
        raise ConfigError(f"{twice[0]}: is set twice, once by its short option")
    return {**overrides, **given}


def _derive(
    source: str | os.PathLike[str],
    overrides: Mapping[str, str],
    *,
    config: str | os.PathLike[str] | None,
    limit: TimeLimit | None,
    device: torch.device,
    callbacks: Callbacks,
    processes: Processes,
) -> tuple[ExperimentSpec, Dataset, Dataset | None, TimeLimit | None]:
    """Derive the experiment for a data set; return it with the images to train and to validate on, and its limit.

    Raises:
        ConfigError: if a time is given to several processes, which would measure different lengths.
    """
    if limit is not None and processes.world_size > 1:
        raise ConfigError("--time: needs a single process; set --epochs")
    path = None if config is None else expand_path(config)
    _, names = load_partial(path, overrides=overrides)
    if "data.train.annotations" in names:
        labels = [label for label in overrides if label.removeprefix("--") == "data.train.annotations"]
        label = labels[0] if labels else f"{config}: data.train.annotations"
        raise ConfigError(f"{label}: is the data set that is trained on, which was named already")
    texts = {**overrides, "data.train.annotations": _absolute(source)}
    spec, names = load_partial(path, overrides=texts)
    spec = replace(spec, model=resolve(spec.model))
    if limit is not None:
        if "train.epochs" in names:
            raise ConfigError("--time: and train.epochs exclude each other")
        given_fields = {name.removeprefix("train.") for name in names if name.startswith("train.")}
        limit = replace(limit, given=frozenset(given_fields))
    start = None if spec.model.weights_from is None else InitialWeights.load(spec.model.weights_from)
    given = Given(
        config=path, overrides=texts, spec=spec, names=names, model=None if start is None else start.model
    )
    if start is not None:
        start.check_fits(spec.model, names=names)
    data, reason = choose_validation(given)
    spec = replace(spec, data=data)
    if not given.has("model.backbone.name") and not spec.model.has_own_backbone:
        name = GPU_BACKBONE if device.type == "cuda" else CPU_BACKBONE
        backbone = replace(spec.model.backbone, name=name)
        spec = replace(spec, model=replace(spec.model, backbone=backbone))
    if start is None:
        check_available(spec.model)
    dataset = load_split(spec, "train", callbacks=callbacks)
    _check_masks(spec, dataset)
    test = None
    if spec.train.evaluate_every is not None or not given.has("train.evaluate_every"):
        test = _load_scored(spec, dataset, callbacks=callbacks)
    if limit is not None:
        callbacks.on_notice("measuring: a few steps, to estimate how many epochs fit into --time")
    derived = derive(
        dataset,
        given,
        data=data,
        validation=reason,
        device=device,
        deadline=None if limit is None else limit.end,
        num_scored=0 if test is None else len(test),
        measures_batch=processes.world_size == 1,
    )
    callbacks.on_derived(derived.settings)
    return derived.experiment, dataset, test, limit


def _load_resumed(
    source: str | os.PathLike[str],
    overrides: Mapping[str, str],
    *,
    config: str | os.PathLike[str] | None,
    run: Run,
) -> ExperimentSpec:
    """Load the experiment of a run that was derived from a data set, with other values of some fields."""
    old = load_experiment(run.config_path)
    texts = {**overrides, "data.train.annotations": _absolute(source)}
    spec = merge_experiment(old, None if config is None else expand_path(config), overrides=texts)
    check_resumable(old, spec, source=run.config_path)
    return spec


def _absolute(path: str | os.PathLike[str]) -> str:
    """Return an absolute path as YAML."""
    return json.dumps(str(expand_path(path).absolute()))


def _save_validation(folder: Path, spec: ExperimentSpec, *, test: Dataset | None) -> None:
    """Write the held-out images as COCO JSON, to evaluate the detections of the run with."""
    held_out = load_split(spec, "test", callbacks=_SILENT) if test is None else test
    with atomic_write(folder / "validation.json") as file:
        file.write(json.dumps(held_out.to_coco()).encode())


def _load_experiment(
    experiment: ExperimentSpec | str | os.PathLike[str], overrides: Mapping[str, str], *, resumed: Run | None
) -> ExperimentSpec:
    """Load an experiment, with unset fields as in the run to resume, and check that this run can continue with it."""
    old = None if resumed is None else load_experiment(resumed.config_path)
    if isinstance(experiment, ExperimentSpec):
        spec = parse_experiment(dump_experiment(experiment), source=Path("experiment"), overrides=overrides)
    else:
        spec = load_experiment(Path(experiment), overrides=overrides, base=old)
    spec = replace(spec, model=resolve(spec.model, earlier=None if old is None else old.model))
    if resumed is not None and old is not None:
        check_resumable(old, spec, source=resumed.config_path)
    return spec


def _reporter(run: Run, spec: ExperimentSpec, callbacks: Callbacks) -> RunReporter:
    return RunReporter(run=run, on_warning=callbacks.on_warning, is_enabled=spec.train.report)


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
    limit: TimeLimit | None
    pace: Pace = field(default_factory=Pace)
    # Made for the start report.
    orders: dict[tuple[bool, bool, bool, int], EpochOrder] = field(default_factory=dict)

    def train_detector(self) -> DetectorModel:
        """Train the detector, after RPN stage and mining if an RPN mines negative chips."""
        evaluator = self._build_evaluator()
        reporter = self._reporter
        source = self.spec.negatives.source
        table = None
        if source == "none":
            table = load_configured_chips(self.run, self.spec, self.dataset, processes=self.processes)
        else:
            self.run.check_trained_on(self.dataset.identity)
        self.callbacks.on_start(self._start(table, evaluator))
        if source == "rpn" and not self.run.checkpoints:
            self._mined_chips(0)  # before the detector occupies memory

        def choose_order(epoch: int) -> EpochOrder:
            if source == "self":
                return self._order_on_alarms(epoch)
            chips = self._mined_chips(epoch) if source == "rpn" else table
            return self._order(self.spec, epoch, chips, dose=self._dose(epoch))

        def order_of_epoch(epoch: int) -> EpochOrder:
            order = choose_order(epoch)
            if reporter is not None:
                reporter.save_chips(order, self.spec.data, epoch=epoch)
            return order

        model = self._train(self.run, self.spec, order_of_epoch, evaluator=evaluator)
        if reporter is not None:
            reporter.write()
        return model

    @property
    def _reporter(self) -> RunReporter | None:
        """Writes the page of the run in the first process."""
        return _reporter(self.run, self.spec, self.callbacks) if self.processes.is_first else None

    def _start(self, table: ChipTable | None, evaluator: "_Evaluator | None") -> StartReport:
        """Return what is to be done, and set what is left of each part of it."""
        spec, train, progress = self.spec, self.spec.train, self.run.progress
        source = spec.negatives.source
        rpn_steps = num_mined = 0
        if source == "none" or (source == "rpn" and self._chips_path(progress.epoch).exists()):
            table = self._mined_chips(progress.epoch) if source == "rpn" else table
            order = self._order(spec, progress.epoch, table, dose=self._dose(progress.epoch))
            steps_per_epoch = float(order.num_steps)
        else:
            positives = self._positive_order
            steps_per_epoch = positives.num_steps * (1 + expected_dose(spec))
            num_mined = self._num_mined if self._megapixels_to_mine() else 0
            if source == "rpn" and not self.run.checkpoints:
                rpn = rpn_experiment(spec, num_steps=positives.num_steps)
                rpn_steps = max(round(rpn.train.epochs * positives.num_steps), 1)
                rpn_steps = max(rpn_steps - Run(self.run.folder / "rpn").progress.step, 0)
        has_weights = bool(self.run.checkpoints) or spec.model.weights_from is not None
        steps = max(round(train.epochs * steps_per_epoch), 1)
        num_evaluations = count_evaluations(train, after=progress.epoch) if evaluator else 0
        self.pace.left["rpn"] = rpn_steps
        self.pace.left["train"] = max(steps - progress.step, 0)
        if source != "none":
            self.pace.left["mine"] = self._megapixels_to_mine()
        if evaluator is not None:
            self.pace.left["evaluate"] = num_evaluations * evaluator.megapixels(on_all=False)
        return StartReport(
            steps=steps,
            steps_done=progress.step,
            epochs=train.epochs,
            rpn_steps=rpn_steps,
            num_mined=num_mined,
            num_evaluations=num_evaluations,
            num_scored=evaluator.num_scored if evaluator else 0,
            num_images=evaluator.num_images if evaluator else 0,
            download=None if has_weights else find_download(spec.model),
            folder=self.run.folder,
            config=to_plain(spec),
            origin=self._origin() if self.processes.is_first else {},
        )

    def _origin(self) -> dict[str, str]:
        train = self.spec.train
        environment = Environment.current(
            self.device,
            world_size=self.processes.world_size,
            accumulation_steps=train.accumulation_steps,
            precision=train.precision,
            compile=train.compile,
        )
        return describe_origin(environment)

    def _megapixels_to_mine(self) -> float:
        """Return the pixels that all rounds of mining search, in millions."""
        done = self._alarm_rounds if self.spec.negatives.source == "self" else self._chip_rounds
        return max(num_rounds(self.spec) - len(done), 0) * self._megapixels_per_round

    @property
    def _chip_rounds(self) -> list[Path]:
        return list(self.run.folder.glob("chips_*.npz"))

    @property
    def _alarm_rounds(self) -> dict[int, Path]:
        """The folders of false alarms by the epoch at whose start they were mined, oldest first."""
        paths = {path.name.removeprefix(_ALARMS): path for path in self.run.folder.glob(f"{_ALARMS}*")}
        return {
            int(name): paths[name]
            for name in sorted(paths, key=lambda name: (len(name), name))
            if name.isdigit()
        }

    @property
    def _num_mined(self) -> int:
        """The number of images that a round of mining searches."""
        return math.ceil(searched_share(self.spec) * len(self.dataset))

    @cached_property
    def _megapixels_per_round(self) -> float:
        """The pixels that a round of mining searches, in millions."""
        share = self._num_mined / max(len(self.dataset), 1)
        return share * levels_megapixels(self.spec.predict.levels, to_image_boxes(self.dataset))

    @cached_property
    def _positive_order(self) -> EpochOrder:
        """The positive chips of the first epoch, in the order in which an RPN is trained on them, if there is one."""
        train = replace(
            self.spec.train,
            rpn_only=self.spec.model.has_rpn,
            evaluate_every=None,
            evaluate_images=None,
            patience=None,
        )
        return self._order(replace(self.spec, train=train, negatives=NegativeSpec()), 0, None)

    def _order_on_alarms(self, epoch: int) -> EpochOrder:
        """Order the chips of an epoch that are chosen on false alarms; mine at the start of every round."""
        number = self._alarm_round(epoch)
        if number is None:
            return self._order(self.spec, epoch, None)
        store = open_proposals(self._alarm_rounds[number], self.dataset)
        alarms = read_alarms(store, to_image_boxes(self.dataset), min_score=self.spec.negatives.min_score)
        dose = self._dose(epoch, mined_at=number)
        order = self._order(self.spec, epoch, None, alarms=alarms, dose=dose)
        if self.processes.is_first and not self.run.has_entry("chips", epoch=epoch):
            self.run.log(
                {
                    "stage": "chips",
                    "step": self.run.progress.step,
                    "epoch": epoch,
                    "positive_chips": int((~order.table.is_negative).sum()),
                    "negative_chips": int(order.table.is_negative.sum()),
                    "dose": dose,
                    "false_alarms": len(alarms.scores),
                }
            )
        return order

    def _alarm_round(self, epoch: int) -> int | None:
        """Return the epoch at whose start the false alarms of an epoch were mined, or mine; None before the first."""
        progress = self.run.progress
        rounds = [number for number in self._alarm_rounds if number <= epoch]
        is_start = progress.epoch == epoch and progress.step_in_epoch == 0
        # Within an epoch its order is fixed; without a checkpoint there is nothing to mine with.
        if is_start and self.run.checkpoints:
            # The length of the training may have been corrected since it began.
            spec = load_experiment(self.run.config_path)
            every = spec.mine.every_epochs
            is_due = (
                epoch - rounds[-1] >= every if rounds and every else not rounds and epoch >= first_epoch(spec)
            )
            if is_due or (rounds and rounds[-1] == epoch):
                self._mine_alarms(epoch)
                return epoch
        return rounds[-1] if rounds else None

    def _dose(self, epoch: int, *, mined_at: int = 0) -> float | None:
        """Return the dose of an epoch by the losses of the last one before with negative chips of the same round.

        The line of a fraction of the epoch itself, after which the run may have been continued, does not count.
        """
        dose = self.spec.negatives.first_dose
        if self.spec.negatives.dose != "auto":
            return dose
        losses = None
        if self.processes.is_first:
            losses = self.run.chip_losses(after_epoch=mined_at, up_to_epoch=epoch)
        dose = auto_dose(*losses) if losses else dose
        return self.processes.all_gather(dose)[0]

    def _order(
        self,
        spec: ExperimentSpec,
        epoch: int,
        table: ChipTable | None,
        *,
        alarms: ScoredBoxes | None = None,
        dose: float | None = None,
    ) -> EpochOrder:
        """Order the chips of an epoch; the order that the start report was made with is made once."""
        key = (spec.train.rpn_only, table is not None, alarms is not None, epoch)
        order = self.orders.get(key)
        if order is None:
            self.orders.clear()
            order = self.orders[key] = order_epoch(
                spec,
                self.dataset,
                epoch=epoch,
                table=table,
                alarms=alarms,
                dose=dose,
                num_shares=self.processes.world_size * spec.train.accumulation_steps,
            )
        return order

    def _train(
        self,
        run: Run,
        spec: ExperimentSpec,
        order_of_epoch: Callable[[int], EpochOrder],
        *,
        evaluator: "_Evaluator | None" = None,
    ) -> DetectorModel:
        reporter, callbacks = self._reporter, self.callbacks
        if reporter is not None and run == self.run:
            callbacks = replace(
                callbacks, on_epoch=call_each([lambda _: reporter.write(), callbacks.on_epoch])
            )
        return loop.train(
            run,
            spec,
            order_of_epoch,
            identity=self.dataset.identity,
            device=self.device,
            callbacks=callbacks,
            evaluate=evaluator,
            transform=self.transform,
            processes=self.processes,
            pace=self.pace,
            limit=None if spec.train.rpn_only else self.limit,
        )

    def _first_epoch(self, epoch: int) -> int:
        """Return the epoch at whose start the chips of an epoch are mined."""
        every = self.spec.mine.every_epochs
        return epoch // every * every if every else 0

    def _chips_path(self, epoch: int) -> Path:
        """Return the file with the mined chips of an epoch."""
        return self.run.folder / f"chips_{self._first_epoch(epoch):03d}.npz"

    def _mined_chips(self, epoch: int) -> ChipTable:
        """Return the positive and negative chips of an epoch; mine at the start of every round."""
        first_epoch, path = self._first_epoch(epoch), self._chips_path(epoch)
        if not path.exists():
            miner = self._train_rpn() if first_epoch == 0 else self.run
            self._mine(miner, path, first_epoch=first_epoch)
        return ChipTable.load(
            path,
            pyramid=self.spec.pyramid,
            images=to_image_boxes(self.dataset),
            digest=self.dataset.digest,
        )

    def _train_rpn(self) -> Run:
        """Train the RPN in a run of its own, or complete that run."""
        folder = self.run.folder / "rpn"
        spec = rpn_experiment(self.spec, num_steps=self._positive_order.num_steps)
        if self.processes.is_first:
            _open_stage(folder, spec, self.dataset.identity)
        self.processes.barrier()
        run = Run(folder)
        self._train(run, spec, lambda epoch: self._order(spec, epoch, None))
        return run

    def _mine(self, miner: Run, path: Path, *, first_epoch: int) -> None:
        """Mine with the newest weights of the RPN, and write the chips of a round."""
        started = clock.monotonic()
        store = self._search(mine, miner, self.run.folder / "mined")
        if self.processes.is_first:
            self._write_chips(path, store, first_epoch=first_epoch, started=started)
        self.processes.barrier()

    def _mine_alarms(self, epoch: int) -> None:
        """Search the training images for false alarms with the newest weights, at the start of an epoch."""
        started = clock.monotonic()
        images = draw_indices(self.dataset, num_images=self._num_mined, seed=self.spec.seed + epoch + 1)
        search = partial(mine_alarms, images=images)
        store = self._search(search, self.run, self.run.folder / f"{_ALARMS}{epoch:03d}")
        if self.processes.is_first and not self.run.has_entry("mine", epoch=epoch):
            is_clean = np.zeros(len(self.dataset), dtype=np.bool_)
            is_clean[images] = ~to_image_boxes(self.dataset).has_required[images]
            self.run.log(
                {
                    "stage": "mine",
                    "step": self.run.progress.step,
                    "epoch": epoch,
                    "images": len(images),
                    "images_without_objects": int(is_clean.sum()),
                    "false_alarms": int(store.counts.sum()),
                    "false_alarms_without_objects": int(store.counts[is_clean].sum()),
                    "seconds": round(clock.monotonic() - started, 3),
                }
            )
        self.processes.barrier()

    def _search(self, search: Callable[..., BoxStore], miner: Run, folder: Path) -> BoxStore:
        """Search all training images with the newest weights of a run, and measure the time."""
        left = self.pace.left.get("mine", 0.0)
        num_before = 0

        def report(num_done: int, num_images: int) -> None:
            nonlocal num_before
            megapixels = self._megapixels_per_round * (num_done - num_before) / max(num_images, 1)
            num_before = num_done
            self.pace.lap("mine", megapixels)
            self.pace.left["mine"] = max(left - self._megapixels_per_round * num_done / num_images, 0.0)
            self.callbacks.on_mining(num_done, num_images)
            self.pace.report(self.callbacks.on_time_left)

        return search(
            miner,
            self.spec,
            self.dataset,
            folder,
            device=self.device,
            on_progress=report,
            processes=self.processes,
        )

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
                "seconds": round(clock.monotonic() - started, 3),
            }
        )

    def _build_evaluator(self) -> "_Evaluator | None":
        if self.test is None:
            return None
        return _Evaluator(
            run=self.run,
            spec=self.spec,
            test=self.test,
            classes=self.dataset.categories,
            match=_match(self.dataset, self.test),
            device=self.device,
            processes=self.processes,
            on_image=self._report_evaluation,
            reporter=self._reporter,
        )

    def _report_evaluation(self, num_done: int, num_images: int) -> None:
        self.callbacks.on_evaluation(num_done, num_images)
        self.pace.report(self.callbacks.on_time_left)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Evaluator:
    """Scores a detector on the test images, or on a subset of them; each process searches its share.

    How detections are merged, and from which score they are shown, is chosen with the same search and written to the
    run.

    Attributes:
        run: that the detector belongs to.
        spec: the experiment.
        test: the test images.
        classes: of the detector, by label.
        match: of the classes with the categories of the test images.
        device: of the detector.
        processes: that search together.
        on_image: called after each image with the number of images that this process has searched, and of all that it
            is to search.
        reporter: keeps scores and errors for the page of the run; None in all but the first process.
    """

    run: Run
    spec: ExperimentSpec
    test: Dataset
    classes: tuple[Category, ...]
    match: CategoryMatch
    device: torch.device
    processes: Processes
    on_image: Callable[[int, int], None]
    reporter: RunReporter | None

    @property
    def num_images(self) -> int:
        return len(self.test)

    @property
    def num_scored(self) -> int:
        return len(self._subset)

    def megapixels(self, *, on_all: bool) -> float:
        return self._megapixels * (1.0 if on_all else self.num_scored / max(self.num_images, 1))

    @cached_property
    def _megapixels(self) -> float:
        return levels_megapixels(self.spec.predict.levels, to_image_boxes(self.test))

    @cached_property
    def _subset(self) -> Dataset:
        num_images = self.spec.train.evaluate_images
        if num_images is None or num_images >= len(self.test):
            return self.test
        return draw_images(self.test, num_images=num_images, seed=self.spec.seed)

    @cached_property
    def _truth(self) -> GroundTruth:
        return GroundTruth.of(self._subset)

    def __call__(self, model: DetectorModel, *, step: int, on_all: bool) -> Mapping[str, float]:
        test = self.test if on_all else self._subset
        detector = Detector.from_model(model, spec=self.spec, categories=self.classes, device=self.device)
        validation = validate(
            detector,
            test,
            truth=GroundTruth.of(test) if on_all else self._truth,
            match=self.match,
            step=step,
            processes=self.processes,
            on_image=self.on_image,
        )
        if self.processes.is_first:
            save_calibration(self.run, validation.calibration)
        scores = score(validation.pair)
        if self.reporter is not None:
            all_or_some = f"the {len(test):,}" if len(test) == len(self.test) else f"{len(test):,} of the"
            subject = Subject(
                pair=validation.pair,
                dataset=test,
                levels=self.spec.predict.levels,
                read=self.spec.data.read,
                min_score=validation.calibration.min_score,
                title=f"{all_or_some} validation images",
                step=step,
            )
            earlier = [entry.ap for entry in self.run.evaluations if entry.num_images == len(test)]
            is_best = scores.ap >= max(earlier, default=-1.0)
            self.reporter.save_scored(subject, scores=scores, is_training=True, is_best=is_best)
        of_masks = {} if scores.masks is None else scores.masks.numbers
        return scores.as_dict() | {f"segm_{name}": value for name, value in of_masks.items()}


def _open_stage(folder: Path, spec: ExperimentSpec, identity: DatasetIdentity) -> Run:
    """Open the run of a stage if it was started with the same inputs; otherwise start it over."""
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        run.restore_replaced()
        if _has_inputs(run, spec) and run.is_trained_on(identity):
            return run
        remove_folder(folder)
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
            spec.train,
            checkpoint_minutes=1.0,
            keep_checkpoints=1,
            trackers=(),
            report=True,
            compile=False,
        ),
        mine=MineSpec(),
        predict=PredictSpec(),
    )
