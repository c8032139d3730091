"""Load the detector of a run or of a library with torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import load_experiment
from sniper.data.datasets import Category
from sniper.errors import ConfigError, WeightsError, count_and_list
from sniper.files import expand_path
from sniper.geometry import Detections, SelectDetections
from sniper.geometry.focus_cells import FocusCells
from sniper.inference.calibration import Calibration, load_calibration
from sniper.inference.detector import Detector, with_predict
from sniper.inference.focus import check_levels
from sniper.inference.focus_choice import load_focus
from sniper.models.build import autocast, build_detector, resolve
from sniper.models.protocol import DetectorModel
from sniper.models.spec import ON_BACKBONE, BackboneSpec, DetectorSpec, Precision
from sniper.models.weights import fill_module
from sniper.runs.initial import InitialWeights
from sniper.runs.run import CheckpointChoice, Run


def load_run(
    run: Run | str | os.PathLike[str],
    device: torch.device | str | None = None,
    *,
    spec: ExperimentSpec | None = None,
    predict: Mapping[str, Any] | None = None,
    checkpoint: CheckpointChoice = "best",
) -> Detector:
    """Load the detector of a run; see `Detector.load`."""
    device = _choose_device(device)
    loaded = load_model(run, device, spec=spec, predict=predict, checkpoint=checkpoint)
    detector = Detector.from_model(
        loaded.model, spec=loaded.spec, categories=loaded.categories, device=device
    )
    return detector if loaded.calibration is None else detector.calibrated(loaded.calibration)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """The model of a detector, and what it was loaded from.

    Attributes:
        model: in evaluation mode.
        spec: the experiment.
        categories: classes by label.
        weights: file of its weights.
        calibration: what was chosen on validation images, if anything.
    """

    model: DetectorModel
    spec: ExperimentSpec
    categories: tuple[Category, ...]
    weights: Path
    calibration: Calibration | None = None


def load_model(
    run: Run | str | os.PathLike[str],
    device: torch.device | str,
    *,
    spec: ExperimentSpec | None = None,
    predict: Mapping[str, Any] | None = None,
    checkpoint: CheckpointChoice = "best",
) -> LoadedModel:
    """Load the model of a run; see `Detector.load`."""
    opened = run if isinstance(run, Run) else Run.open(expand_path(run))
    if spec is None:
        spec = load_experiment(opened.config_path)
    spec = with_predict(spec, predict)
    check_levels(spec.predict)
    if spec.train.rpn_only:
        raise ConfigError(
            f"{opened.folder}: has trained the RPN only (train.rpn_only); use it with sniper mine"
        )
    tensors, categories, source = opened.load_weights(checkpoint)
    model = build_detector(spec.model, seed=spec.seed, num_classes=len(categories), has_weights=False)
    fill_module(model, tensors, source=source)
    folder = source.parent.name
    step = int(folder) if folder.isdigit() else None
    calibration = load_calibration(opened, step=step)
    if spec.predict.focus == "auto":
        choice = load_focus(opened)
        focus = None if choice is None else choice.resolve(spec.predict, step=step)
        if focus is not None:
            spec = replace(spec, predict=replace(spec.predict, focus=focus))
    return LoadedModel(
        model=model.to(device).eval(),
        spec=spec,
        categories=categories,
        weights=source,
        calibration=calibration,
    )


def load_library_detector(
    name: str, device: torch.device | str | None = None, *, spec: ExperimentSpec
) -> tuple[Detector, LoadedModel]:
    """Load a detector of torchvision or transformers with its own weights.

    Args:
        name: see `Detector.load`.
        device: see `Detector.load`.
        spec: how to search, and how images are read.

    Raises:
        ConfigError: if there is no such detector or file, or a focus is set for one level.
        WeightsError: if the weights cannot be downloaded, read, or belong to another detector.
    """
    check_levels(spec.predict)
    kind, _, rest = name.partition(":")
    model_spec = _transformers_spec(name, rest) if kind == "transformers" else _torchvision_spec(name, rest)
    initial = InitialWeights.of_library(model_spec)
    if not initial.categories:
        raise WeightsError(
            f"{initial.source}: has other classes than torchvision's weights for {model_spec.name}, so their names are "
            "unknown; it can be trained from (model.weights)"
        )
    if initial.lacking:
        raise WeightsError(
            f"{initial.source}: is not complete: {count_and_list(initial.lacking)} are missing"
        )
    device = _choose_device(device)
    model = build_detector(model_spec, num_classes=len(initial.categories), has_weights=False)
    initial.load_into(model, initial.categories)
    loaded = LoadedModel(
        model=model.to(device).eval(), spec=spec, categories=initial.categories, weights=initial.source
    )
    detector = Detector.from_model(loaded.model, spec=spec, categories=initial.categories, device=device)
    return detector, loaded


def _transformers_spec(name: str, rest: str) -> DetectorSpec:
    """Return the configuration of a detector of transformers, with its architecture."""
    if not rest:
        raise ConfigError(
            f"{name}: expected transformers:NAME, with a name on the Hugging Face hub or a folder, such as "
            "transformers:PekingU/rtdetr_v2_r18vd"
        )
    folder = expand_path(rest)
    return resolve(DetectorSpec(kind="transformers", name=str(folder) if folder.is_dir() else rest))


def _torchvision_spec(name: str, rest: str) -> DetectorSpec:
    """Return the configuration of a detector of torchvision."""
    builder, _, file = rest.partition("@")
    if not builder or builder in ON_BACKBONE:
        raise ConfigError(
            f"{name}: expected torchvision:NAME or torchvision:NAME@FILE, with the name of a builder, such as "
            "torchvision:fcos_resnet50_fpn"
        )
    return DetectorSpec(
        kind="torchvision",
        name=builder,
        weights=str(expand_path(file)) if file else "DEFAULT",
        backbone=BackboneSpec(pretrained=False, batch_norm="frozen"),
    )


def _choose_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def detect_with(
    model: DetectorModel, images: Sequence[torch.Tensor], *, precision: Precision, device: torch.device
) -> Sequence[Detections]:
    """Detect objects with a model in some precision; see `DetectorModel.detect`."""
    with torch.inference_mode(), autocast(precision, device):
        return model.detect(images)


def detect_masks_with(
    model: DetectorModel,
    images: Sequence[torch.Tensor],
    select: SelectDetections,
    *,
    precision: Precision,
    device: torch.device,
) -> Sequence[Detections]:
    """Detect objects, and predict the masks of some, in some precision; see `DetectorModel.detect_masks`."""
    with torch.inference_mode(), autocast(precision, device):
        return model.detect_masks(images, select)


def detect_focused_with(
    model: DetectorModel,
    images: Sequence[torch.Tensor],
    select: SelectDetections | None,
    *,
    precision: Precision,
    device: torch.device,
) -> tuple[Sequence[Detections], Sequence[FocusCells]]:
    """Detect objects, and predict the cells of a focus head, in some precision; see `DetectorModel.detect_focused`."""
    with torch.inference_mode(), autocast(precision, device):
        return model.detect_focused(images, select)
