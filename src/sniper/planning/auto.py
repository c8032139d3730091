"""The experiment that is derived from a data set: every field that the user has not set, with the reason."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sniper.chips.negatives import NegativeSpec
from sniper.config.derived import DerivedSetting
from sniper.config.experiment import ExperimentSpec, MineSpec, TrainSpec, widened
from sniper.data.datasets import Dataset
from sniper.data.datasets.load import find_splits
from sniper.data.datasets.splits import choose_splits, scored_split
from sniper.data.epoch import choose_positive_chips, order_chips, to_image_boxes
from sniper.data.spec import DataSpec
from sniper.errors import ConfigError, OutOfMemory, counted
from sniper.models.build import choose_precision
from sniper.models.spec import DetectorSpec
from sniper.planning.cost import USEFUL_SIZES, CostPlan, compute_cost, levels_megapixels
from sniper.planning.experiment import suggest_experiment, with_mask_head
from sniper.planning.given import Given
from sniper.planning.limits import limit_search, most_objects, num_proposals
from sniper.planning.measure import Measurement, measure
from sniper.planning.suggest import suggest_unless_given
from sniper.reports.page import resize_rule, sizes_text
from sniper.training.length import EVALUATION_SHARE
from sniper.training.mining import expected_dose, num_rounds, rpn_epochs, searched_share
from sniper.training.pace import SEARCH_SHARE

HOLDOUT = 0.1
"""The share of the images that are held out of a data set without a split to validate on."""

_MEASURED_STEPS, _MEASURED_SHARE = 4, 0.03  # steps, and the share of the time after which they are enough
_TIME_SHARE = 0.95  # of the time that is planned with, until the training measures itself
_FEWEST_SCORED = 50  # images of an evaluation while training: the AP on fewer is too uncertain to choose by
_MAX_EVALUATIONS = 4  # in a limited time
_LONGEST_EVALUATION = (
    0.5  # of a limited time; a longer one is left out, since it would leave too little to train in
)


_BACKBONE_REASONS = {False: "small enough to train on a CPU", True: "the usual one, for a GPU"}
_BATCH_REASONS = {
    False: "as many pixels as 16 chips of 256 px, or fewer for a small set",
    True: "as on each GPU in the paper, or fewer for a small set",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class DerivedExperiment:
    """A complete experiment, and where its values come from.

    Attributes:
        experiment: with the fields that were set, and the others as derived.
        settings: the settings that decide the most, each with its reason.
    """

    experiment: ExperimentSpec
    settings: tuple[DerivedSetting, ...]


def choose_validation(given: Given) -> tuple[DataSpec, str]:
    """Choose the images to validate on: those that were set, the data set's own split, or a tenth held out.

    Returns:
        The data section with that choice, and the reason.

    Raises:
        AnnotationError: if there is no data set, or it has no training split.
        ConfigError: if the section trains on something other than chips that are chosen from the data.
    """
    data = given.spec.data
    for name in ("chips", "whole", "tiles"):
        if getattr(data, name) is not None:
            raise ConfigError(
                f"data.{name}: needs an experiment file; from a data set, chips are chosen and settings derived"
            )
    if given.has("data.test") or given.has("data.holdout"):
        return data, "given"
    available = find_splits(data.train.annotations)
    split = scored_split(available)
    if split is not None and split not in choose_splits(
        Path(data.train.annotations), available, data.train.split
    ):
        return replace(data, test=replace(data.test, split=split)), "the data set has this split"
    return replace(data, holdout=HOLDOUT), "there is no split to validate on; drawn by the seed"


def derive(
    dataset: Dataset,
    given: Given,
    *,
    data: DataSpec,
    validation: str,
    device: torch.device,
    deadline: float | None = None,
    num_scored: int = 0,
    measures_batch: bool = True,
) -> DerivedExperiment:
    """Derive every field of an experiment that was not set, from the data, the machine and the fields that were.

    Args:
        dataset: the images to train on, with image files if `deadline` is given.
        given: the fields that were set; what depends on them follows.
        data: the data section, see `choose_validation`.
        validation: the reason for the images to validate on.
        device: where to train.
        deadline: when training and evaluation must end, in seconds of `time.monotonic`; steps are measured to estimate
            how many epochs fit. None chooses the epochs by the size of the data set.
        num_scored: images to validate on.
        measures_batch: whether to measure if a batch fits into the memory of a GPU. Several processes must not, since
            they have to derive the same, and each computes its share of a batch only.

    Raises:
        AnnotationError: if the data set has no box to learn from.
        ConfigError: if the fields that were set cannot be combined, or no step fits into the time.
        SniperError: if steps are measured and cannot be trained; see `measure`.
    """
    cost = _choose_pyramid(dataset, given)
    complete = partial(
        _complete, dataset, given, cost, data=data, is_scored=num_scored > 0, on_gpu=device.type == "cuda"
    )
    experiment = complete()
    batch_reason = _BATCH_REASONS[device.type == "cuda"]
    if device.type == "cuda" and measures_batch and not given.has("train.batch_size"):
        batch_size = _fit_batch(complete, dataset, device=device)
        if batch_size < experiment.train.batch_size:
            batch_reason = f"more do not fit into the memory of {device}"
            complete = partial(complete, batch_size=batch_size)
            experiment = complete()
    megapixels = levels_megapixels(experiment.predict.levels, to_image_boxes(dataset)) / max(len(dataset), 1)
    measured = left_out = None
    if deadline is not None:
        max_seconds = _MEASURED_SHARE * (deadline - time.monotonic())
        measured = measure(
            experiment, dataset, device=device, num_steps=_MEASURED_STEPS, max_seconds=max_seconds
        )
        seconds = deadline - time.monotonic()
        evaluation = _per_megapixel(experiment, measured) * megapixels * num_scored
        if not given.has("train.evaluate_every") and 0 < seconds < evaluation / _LONGEST_EVALUATION:
            left_out = (
                f"one takes about {evaluation:.0f} s, too much of the time; `sniper evaluate` scores the run"
            )
            complete = partial(complete, is_scored=False)
        # Negative chips depend on the epochs, and cost some: begin with as many as fit without them.
        experiment = complete(epochs=max(seconds, 1.0) / (60 * measured.minutes_per_epoch))
        for _ in range(2):
            epochs = _fit_time(
                experiment,
                measured,
                seconds=seconds,
                scored=megapixels * num_scored,
                mined=megapixels * len(dataset),
            )
            experiment = complete(epochs=epochs)
        if not given.has("train.evaluate_every") and experiment.train.evaluate_every is not None:
            every = max(math.ceil(epochs / _MAX_EVALUATIONS), 1)
            experiment = replace(experiment, train=replace(experiment.train, evaluate_every=every))
    experiment = _limit_evaluations(
        experiment, given, cost, megapixels_per_image=megapixels, num_scored=num_scored
    )
    settings = _describe(
        dataset,
        given,
        cost,
        experiment,
        validation=validation,
        device=device,
        batch_reason=batch_reason,
        num_scored=num_scored,
        measured=measured,
        left_out=left_out,
    )
    return DerivedExperiment(experiment=experiment, settings=settings)


def parse_time(text: str) -> float:
    """Return the seconds of a time such as `90s`, `10m` or `1h30m`.

    Raises:
        ConfigError: if it is no such time, or zero.

    Example:
        >>> [parse_time(text) for text in ("90s", "10m", "1h30m")]
        [90.0, 600.0, 5400.0]
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise ConfigError(f"--time {text}: expected a time such as 90s, 10m or 1h30m")
    return total


def _choose_pyramid(dataset: Dataset, given: Given) -> CostPlan:
    """Return the cost of the pyramid that was set, or else of the one that suits the data set."""
    boxes, base, seed = to_image_boxes(dataset), given.spec.pyramid, given.spec.seed
    neck = given.neck
    if not given.has("pyramid.levels"):
        suggestion = suggest_unless_given(boxes, given.spec, given.names, neck=neck)
        if suggestion is not None:
            return suggestion.cost
    order_chips(dataset, base, batch_size=1, flip=0.0, seed=seed, epoch=0)  # raises if there is no box
    table = choose_positive_chips(dataset, base, generator=np.random.default_rng(seed))
    return compute_cost(table, boxes, pyramid=base, useful_sizes=USEFUL_SIZES[neck])


def _complete(
    dataset: Dataset,
    given: Given,
    cost: CostPlan,
    *,
    data: DataSpec,
    is_scored: bool,
    on_gpu: bool,
    epochs: float | None = None,
    batch_size: int | None = None,
) -> ExperimentSpec:
    """Return the experiment: what was set, over what is derived from it and from the cost of the pyramid."""
    train = given.spec.train
    derived = suggest_experiment(
        cost,
        data=data,
        is_scored=is_scored and not train.rpn_only,
        batch_size=train.batch_size if given.has("train.batch_size") else batch_size,
        epochs=train.epochs if given.has("train.epochs") else epochs,
        optimizer=train.optimizer if given.has("train.optimizer") else "adamw",
        neck=given.neck,
        model=given.spec.model,
        on_gpu=on_gpu,
        has_masks=dataset.masks is not None,
    )
    if train.rpn_only:
        derived = replace(derived, negatives=NegativeSpec(), mine=MineSpec())
    if given.model is not None:
        model = with_mask_head(given.model, has_masks=dataset.masks is not None, on_gpu=on_gpu)
        derived = replace(derived, model=model)
    experiment = given.over(derived)
    if not given.has("predict.levels"):
        levels = widened(experiment.pyramid.levels)
        experiment = replace(experiment, predict=replace(experiment.predict, levels=levels))
    return limit_search(experiment, to_image_boxes(dataset), is_given=given.has)


def _fit_batch(complete: Callable[..., ExperimentSpec], dataset: Dataset, *, device: torch.device) -> int:
    """Return a batch size whose training step fits into the memory of a device: the derived one, halved as needed.

    Raises:
        OutOfMemory: if not even one chip fits.
    """
    batch_size = complete().train.batch_size
    while True:
        try:
            measure(complete(batch_size=batch_size), dataset, device=device, num_steps=1)
        except OutOfMemory:
            if batch_size == 1:
                raise
            batch_size //= 2
        else:
            return batch_size


def _max_objects(dataset: Dataset) -> int:
    """Return the largest number of objects in an image."""
    return int(np.diff(dataset.offsets).max(initial=0))


def _fit_time(
    experiment: ExperimentSpec, measured: Measurement, *, seconds: float, scored: float, mined: float
) -> float:
    """Fit epochs into a time; evaluations while training take at most a fifth of it.

    The times of mining and evaluation are estimated from the pixels of the images at the test levels.

    Args:
        experiment: without the length.
        measured: a few steps of it.
        seconds: that are left.
        scored: pixels of the images to validate on, in millions.
        mined: pixels of the training images, in millions.

    Returns:
        The number of epochs, to thousandths.

    Raises:
        ConfigError: if not one step fits.
    """
    train = experiment.train
    if seconds <= 0:
        raise ConfigError("--time: is over after reading, planning and measuring a step; set a longer one")
    per_epoch = 60 * measured.minutes_per_epoch
    per_megapixel = _per_megapixel(experiment, measured)
    evaluation = per_megapixel * scored if train.evaluate_every is not None else 0.0
    mining = num_rounds(experiment) * per_megapixel * mined * searched_share(experiment)
    if experiment.negatives.source == "rpn":
        mining += per_epoch * rpn_epochs(
            experiment.mine, num_steps=round(per_epoch / measured.seconds_per_step)
        )
    usable = _TIME_SHARE * seconds - mining
    per_epoch *= 1 + expected_dose(experiment)
    evaluations = evaluation + min((_MAX_EVALUATIONS - 1) * evaluation, EVALUATION_SHARE * usable)
    epochs = (usable - evaluations) / per_epoch
    if epochs * per_epoch < measured.seconds_per_step:
        others = {
            f"the evaluation (--train.evaluate_every null leaves it out) about {evaluation:.0f} s": evaluation,
            f"mining negative chips (--negatives.source none leaves it out) about {mining:.0f} s": mining,
        }
        taken = "".join(f", {text}" for text, cost in others.items() if cost)
        raise ConfigError(
            f"--time: no step fits: {seconds:.0f} s are left after reading and planning, and a step takes "
            f"{measured.seconds_per_step:.1f} s{taken}"
        )
    return math.floor(1000 * epochs) / 1000 or epochs


def _limit_evaluations(
    experiment: ExperimentSpec,
    given: Given,
    cost: CostPlan,
    *,
    megapixels_per_image: float,
    num_scored: int,
) -> ExperimentSpec:
    """Evaluate on so few images while training, and so seldom, that it takes at most a fifth of the time.

    The best checkpoint is then evaluated on all images at the end.
    """
    train = experiment.train
    if train.evaluate_every is None or given.has("train.evaluate_images"):
        return experiment
    num_steps = train.epochs * cost.num_steps(train.batch_size)
    training = num_steps * _megapixels_per_step(experiment) / (1 - EVALUATION_SHARE)
    per_image = SEARCH_SHARE * megapixels_per_image
    num_evaluations = math.ceil(train.epochs / train.evaluate_every)
    fitting = int(EVALUATION_SHARE * training / (per_image * num_evaluations))
    if fitting >= num_scored or num_evaluations == 1:
        return experiment
    num_images = min(max(fitting, _FEWEST_SCORED), num_scored)
    every = train.evaluate_every
    if fitting < num_images and not given.has("train.evaluate_every"):
        num_evaluations = max(int(EVALUATION_SHARE * training / (per_image * num_images)), 1)
        every = math.ceil(train.epochs / num_evaluations)
    is_subset = num_images < num_scored and every < train.epochs
    return replace(
        experiment,
        train=replace(train, evaluate_every=every, evaluate_images=num_images if is_subset else None),
    )


def _per_megapixel(experiment: ExperimentSpec, measured: Measurement) -> float:
    """Return the estimated seconds to search a megapixel."""
    return SEARCH_SHARE * measured.seconds_per_step / _megapixels_per_step(experiment)


def _megapixels_per_step(experiment: ExperimentSpec) -> float:
    return experiment.train.batch_size * experiment.pyramid.chip_size**2 / 1e6


def _describe(
    dataset: Dataset,
    given: Given,
    cost: CostPlan,
    experiment: ExperimentSpec,
    *,
    validation: str,
    device: torch.device,
    batch_reason: str,
    num_scored: int,
    measured: Measurement | None,
    left_out: str | None,
) -> tuple[DerivedSetting, ...]:
    """Describe the settings that decide the most, in the order of the sections."""
    data, pyramid, train, predict = experiment.data, experiment.pyramid, experiment.train, experiment.predict
    steps = cost.num_steps(train.batch_size)
    num_steps = max(round(train.epochs * steps), 1)
    low, high = cost.useful_sizes
    most = most_objects(to_image_boxes(dataset), predict.levels, window=predict.window)
    rows: list[tuple[str, Any, str, str]] = [
        (
            "validation",
            _validation(data, num_scored),
            validation if num_scored else "the training is not evaluated",
            "data.test.annotations",
        ),
        (
            "chips",
            f"{pyramid.chip_size} px, {cost.mean_chips_per_image:.1f} per image",
            f"{100 * cost.share_useful:.0f} % of the objects have a size of {low:g} to {high:g} px in a chip, with the "
            "fewest pixels",
            "pyramid.chip_size",
        ),
        (
            "levels",
            _levels(pyramid.levels),
            "more would save under 5 % of the pixels"
            if len(pyramid.levels) == 1
            else "fewer would cost over 5 % more pixels",
            "pyramid.levels",
        ),
        ("test levels", _levels(predict.levels), "the levels, with wider ranges", "predict.levels"),
        (
            "detections",
            f"up to {predict.max_detections} per image",
            f"an image has up to {counted(_max_objects(dataset), 'object')}",
            "predict.max_detections",
        ),
        (
            "windows",
            f"up to {predict.window} px, {num_proposals(experiment.model)} proposals in each",
            f"as large as the images at the test levels; one shows up to {counted(most, 'object')}",
            "predict.window",
        ),
        *_describe_model(experiment.model, device=device),
        (
            "batch",
            counted(train.batch_size, "chip"),
            batch_reason,
            "train.batch_size",
        ),
        (
            "optimizer",
            f"{train.optimizer}, rate {train.learning_rate:g} for {counted(train.reference_batch_size, 'chip')}",
            "short trainings converge faster with it than with SGD",
            "train.optimizer",
        ),
        (
            "length",
            f"{counted(train.epochs, 'epoch')}, {counted(num_steps, 'step')}",
            f"a step takes {measured.seconds_per_step:.2f} s"
            if measured
            else "at least 1,500 steps, 12 to 50 epochs",
            "train.epochs",
        ),
        (
            "negative chips",
            _negatives(experiment),
            "short trainings do without"
            if experiment.negatives.source == "none"
            else "fewer false positives at equal or higher AP",
            "negatives.source",
        ),
        (
            "warm-up",
            counted(train.warmup_steps, "step"),
            "a twentieth of the steps, at most 500",
            "train.warmup_steps",
        ),
        (
            "schedule",
            "half a cosine"
            if train.schedule == "cosine"
            else f"×{train.gamma:g} after {_epochs(train.milestones)}",
            "at 75 and 92 % of the run",
            "train.schedule" if given.has("train.schedule") else "train.milestones",
        ),
        (
            "evaluation",
            _evaluations(train, num_scored),
            left_out or "four times or fewer, in at most a fifth of the time",
            "train.evaluate_every",
        ),
        (
            "precision",
            f"{choose_precision(train.precision, device)} on {device}",
            "bf16 where the device has it",
            "train.precision",
        ),
    ]
    return tuple(
        DerivedSetting(
            name=name,
            value=str(value),
            reason=_reason(given, field, reason),
            option=_OPTIONS.get(field, f"--{field}"),
        )
        for name, value, reason, field in rows
    )


def _describe_model(model: DetectorSpec, *, device: torch.device) -> list[tuple[str, str, str, str]]:
    """Return the name, the value, the reason and the field of each setting of the detector."""
    rows = []
    if model.kind != "two_stage":
        rows = [("detector", f"{model.name} of {model.kind}", "given", "model.name")]
        if model.has_own_backbone:
            return rows
    rows += [
        ("backbone", model.backbone.name, _BACKBONE_REASONS[device.type == "cuda"], "model.backbone.name"),
        (
            "neck",
            {"fpn": "feature pyramid (FPN)", "concat": "one feature map"}[model.backbone.neck],
            "more accurate at the same cost on small objects",
            "model.backbone.neck",
        ),
    ]
    if model.mask_head is not None:
        value = f"{counted(model.mask_head.num_convs, 'convolution')} of {model.mask_head.channels} channels"
        rows.append(("mask head", value, "the data set has masks", "model.mask_head"))
    field, sizes = "model.rpn.anchor_sizes", model.rpn.anchor_sizes
    if model.kind == "torchvision":
        if model.anchor_sizes is None:
            return rows
        field, sizes = "model.torchvision.anchor_sizes", model.anchor_sizes
    reason = (
        "powers of 2 around the objects in the chips"
        if model.backbone.neck == "concat"
        else "powers of 2 from the smallest objects in the chips on"
    )
    return [*rows, ("anchors", ", ".join(f"{size:g}" for size in sizes) + " px", reason, field)]


def _reason(given: Given, field: str, derived: str) -> str:
    if given.has(field):
        return "given"
    return "of the detector to start from" if given.model and field.startswith("model.") else derived


_OPTIONS = {"data.test.annotations": "--val", "train.epochs": "--epochs, --time"}
"""Short options of `sniper train`, by the field that they set."""


def _validation(data: DataSpec, num_scored: int) -> str:
    if not num_scored:
        return "none"
    images = counted(num_scored, "image")
    if data.holdout:
        return f"{images} ({100 * data.holdout:g} % held out)"
    return f"{images} of {data.test.annotations or f'split {data.test.split}'}"


def _evaluations(train: TrainSpec, num_scored: int) -> str:
    every = train.evaluate_every
    if every is None:
        return "none"
    if every >= train.epochs:
        return "at the end"
    interval = f"every {every} epochs" if every > 1 else "every epoch"
    if train.evaluate_images is None or train.evaluate_images >= num_scored:
        return f"{interval} and at the end"
    return f"{interval} on {counted(train.evaluate_images, 'image')}, at the end on all"


def _negatives(experiment: ExperimentSpec) -> str:
    negatives, mine = experiment.negatives, experiment.mine
    if negatives.source == "none":
        return "none"
    if negatives.source == "rpn":
        return "on dense proposals of an RPN"
    rounds = "once" if mine.every_epochs is None else f"every {mine.every_epochs} epochs"
    return (
        f"on false alarms, searched in {100 * mine.share:.0f} % of the images {rounds} "
        f"after {100 * mine.start:.0f} % of the epochs"
    )


def _levels(levels: Any) -> str:
    return "\n".join(f"{resize_rule(level)}: {sizes_text(level)}" for level in levels)


def _epochs(milestones: tuple[float, ...]) -> str:
    if len(milestones) == 1:
        return counted(milestones[0], "epoch")
    return (" and ".join(f"{milestone:g}" for milestone in milestones) or "no") + " epochs"
