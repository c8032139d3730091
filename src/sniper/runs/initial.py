"""The detector that a run starts from: of another run, or of a library, matched with the new classes by name."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import load_experiment
from sniper.data.datasets import Category
from sniper.data.datasets.categories import match_names
from sniper.errors import CheckpointError, ConfigError, RunError, WeightsError, count_and_list, counted
from sniper.models.build import build_detector, load_library_weights
from sniper.models.protocol import DetectorModel
from sniper.models.spec import DetectorSpec
from sniper.models.weights import Transfer, transfer_weights
from sniper.runs.checkpoints import load_weights
from sniper.runs.run import Run

_FIELD = "model.weights_from"
_MAX_LISTED = 5
_SECOND_STAGES = ("roi_head.", "mask_head.", "focus_head.", "net.roi_heads.")  # starts of names of tensors


def has_initial_weights(spec: DetectorSpec) -> bool:
    """Check whether a detector starts from the weights of another one."""
    return spec.weights_from is not None or spec.starts_from_library


def load_initial_weights(spec: DetectorSpec) -> "InitialWeights | None":
    """Load the weights of the detector that another one starts from; None if there is none. See `InitialWeights`."""
    if spec.weights_from is not None:
        return InitialWeights.load(spec.weights_from)
    return InitialWeights.of_library(spec) if spec.starts_from_library else None


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What a detector has from the one that it starts from.

    Attributes:
        source: file of the weights.
        transfer: names of tensors.
        kept: names of the classes whose scores are loaded.
        added: names of the classes whose scores are made anew.
        dropped: names of the classes whose scores are not used.
        has_scores: whether there are scores of classes to load.
        changes: fields that do not decide the shapes, and whose values differ.
    """

    source: Path
    transfer: Transfer
    kept: tuple[str, ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    has_scores: bool = True
    changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one paragraph."""
        transfer = self.transfer
        loaded = counted(len(transfer.loaded), "tensor")
        if self.kept and self.has_scores:
            same = "" if self.added or self.dropped else ", all of them"
            loaded += (
                f", with the scores of {_count_names(self.kept, 'class', 'classes')} matched by name{same}"
            )
        renewed = [_count_names(transfer.renewed, "tensor")] if transfer.renewed else []
        if self.added and self.has_scores:
            renewed.append(f"the scores of {_count_names(self.added, 'class', 'classes')}")
        unused = [_count_names(transfer.unused, "tensor")] if transfer.unused else []
        if self.dropped and self.has_scores:
            unused.append(f"the scores of {_count_names(self.dropped, 'class', 'classes')}")
        parts = [
            f"starting from {self.source}: loaded {loaded}",
            f"made anew: {' and '.join(renewed) or 'nothing'}",
            f"not used: {' and '.join(unused) or 'nothing'}",
            *self.changes,
        ]
        return "; ".join(parts)

    def to_entry(self) -> dict[str, Any]:
        """Return the line in the metrics of the run."""
        return {
            "stage": "start",
            "step": 0,
            "weights_from": str(self.source),
            "loaded_tensors": len(self.transfer.loaded),
            "new_tensors": list(self.transfer.renewed),
            "unused_tensors": list(self.transfer.unused),
            "kept_classes": list(self.kept),
            "new_classes": list(self.added),
            "unused_classes": list(self.dropped),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialWeights:
    """The weights of a detector to start from.

    Attributes:
        source: their file.
        tensors: by name.
        categories: classes of the detector by label.
        experiment: that they were trained with; None for a file, which has none.
        lacking: starts of the names of tensors that are left out.
    """

    source: Path
    tensors: Mapping[str, torch.Tensor]
    categories: tuple[Category, ...]
    experiment: ExperimentSpec | None
    lacking: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> "InitialWeights":
        """Read the best weights of a run (see `Run.load_weights`), or a file of weights.

        The second stage of a run that has trained the RPN alone is left out.

        Raises:
            RunError: if the folder has no run, or the run no checkpoint.
            ConfigError: if there is no such file, or the experiment of the run cannot be read.
            WeightsError: if a file is not the weights of a detector that a run has written.
        """
        path = Path(path)
        if path.is_dir():
            try:
                run = Run.open(path)
                tensors, categories, source = run.load_weights()
            except RunError as error:
                raise RunError(f"{_FIELD}: {error}") from error
            experiment = load_experiment(run.config_path)
            lacking: tuple[str, ...] = ()
            if experiment.train.rpn_only:
                lacking = _SECOND_STAGES
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(lacking)}
            return cls(
                source=source,
                tensors=tensors,
                categories=categories,
                experiment=experiment,
                lacking=lacking,
            )
        if not path.exists():
            raise ConfigError(f"{_FIELD}: {path}: no such folder or file; expected that of a run")
        try:
            tensors, identity = load_weights(path)
        except CheckpointError as error:
            raise WeightsError(
                f"{_FIELD}: {error}; expected the folder of a run, or a safetensors file of weights in its checkpoints."
                " Weights of torchvision's detectors belong to model.weights, and weights of a backbone to "
                "model.backbone.weights"
            ) from error
        return cls(source=path, tensors=tensors, categories=identity.categories, experiment=None)

    @classmethod
    def of_library(cls, spec: DetectorSpec) -> "InitialWeights":
        """Load the weights of a detector of a library: those of `model.weights`, or of `model.name` of transformers.

        Raises:
            ConfigError: if there are no such weights.
            WeightsError: if they cannot be loaded, or belong to another detector.
        """
        weights = load_library_weights(spec)
        categories = tuple(
            Category(category_id=category_id, name=name)
            for category_id, name in zip(weights.category_ids, weights.class_names, strict=True)
        )
        return cls(
            source=weights.source,
            tensors=weights.tensors,
            categories=categories,
            experiment=None,
            lacking=weights.lacking,
        )

    @property
    def model(self) -> DetectorSpec | None:
        """The configuration of the detector, without the weights that it started from; None for a file."""
        return None if self.experiment is None else replace(self.experiment.model, weights=None)

    def check_fits(self, spec: DetectorSpec, *, names: Collection[str] | None = None) -> None:
        """Check that a detector has the architecture of this one, as far as that is known.

        Args:
            spec: the detector.
            names: dotted names of the fields to check; None checks all.

        Raises:
            ConfigError: naming the fields that differ.
        """
        if self.experiment is None:
            return
        differing = [
            f"{name} is {_shown(before)} there and {_shown(after)} here"
            for name, before, after in self._compare(self.experiment, spec)
            if _size(before) != _size(after) and (names is None or name in names)
        ]
        if differing:
            raise ConfigError(
                f"{_FIELD}: {self.source}: is another detector than this experiment's: {'; '.join(differing)}"
            )

    def load_into(self, model: DetectorModel, categories: Sequence[Category]) -> WeightsReport:
        """Load the weights into a detector; classes are matched by name, and the background is kept.

        Args:
            model: to load into. On the device `meta` it is only checked.
            categories: its classes by label.

        Raises:
            ConfigError: if fields of the architecture differ.
            CheckpointError: if tensors do not fit; the detector is then not changed.
        """
        self.check_fits(model.spec)
        layouts = model.class_layouts
        known = self.categories if layouts.keys() & self.tensors.keys() else ()
        label_of = match_names([each.name for each in categories], [each.name for each in known])
        labels = [label_of.get(label) for label in range(len(categories))]
        rows = {name: layout.rows(labels, num_classes=len(known)) for name, layout in layouts.items()}
        transfer = transfer_weights(model, self.tensors, rows=rows, source=self.source, lacking=self.lacking)
        kept = set(label_of.values())
        return WeightsReport(
            source=self.source,
            transfer=transfer,
            kept=tuple(category.name for label, category in enumerate(categories) if label in label_of),
            added=tuple(category.name for label, category in enumerate(categories) if label not in label_of),
            dropped=tuple(category.name for label, category in enumerate(known) if label not in kept),
            has_scores=bool(known),
            changes=self._changes(model.spec),
        )

    def check(self, spec: ExperimentSpec, categories: Sequence[Category]) -> WeightsReport:
        """Check that the detector of an experiment can start from these weights, and report what it would load.

        Raises:
            ConfigError: if fields of the architecture differ.
            CheckpointError: if tensors do not fit.
        """
        self.check_fits(spec.model)
        with torch.device("meta"):
            model = build_detector(spec.model, num_classes=len(categories), has_weights=False)
        return self.load_into(model, categories)

    def _changes(self, spec: DetectorSpec) -> tuple[str, ...]:
        """Describe the fields that have as many numbers as before, but other ones."""
        if self.experiment is None:
            return ()
        return tuple(
            f"{name} was {_shown(before)} and is {_shown(after)}"
            for name, before, after in self._compare(self.experiment, spec)
            if before != after
        )

    @staticmethod
    def _compare(experiment: ExperimentSpec, spec: DetectorSpec) -> list[tuple[str, Any, Any]]:
        """Return the fields of the architecture that both detectors have, with the values of each."""
        is_rpn_only = experiment.train.rpn_only
        before = _architecture(experiment.model, is_rpn_only=is_rpn_only)
        after = _architecture(spec, is_rpn_only=is_rpn_only)
        return [(name, before[name], after[name]) for name in before if name in after]


def _architecture(spec: DetectorSpec, *, is_rpn_only: bool) -> dict[str, Any]:
    """Return the fields that decide the shapes of the trained tensors, and what their numbers stand for."""
    fields: dict[str, Any] = {"model.kind": spec.kind}
    if spec.kind == "two_stage":
        return fields | _two_stage_architecture(spec, is_rpn_only=is_rpn_only)
    if spec.kind == "transformers":  # the shapes of its tensors are compared when they are loaded
        from sniper.models.transformers_detectors.config import find_model_type

        return fields | {
            "the model_type of model.transformers.config": find_model_type(spec.transformers.config)
        }
    fields["model.name"] = spec.name
    if spec.has_own_backbone:
        return fields
    options = spec.torchvision
    values = {
        "model.backbone.name": spec.backbone.name,
        "model.backbone.deformable": spec.backbone.deformable,
        "model.torchvision.channels": options.channels,
        "model.torchvision.num_convs": options.num_convs,
    }
    if spec.anchor_sizes is not None:
        values["model.torchvision.anchor_sizes"] = spec.anchor_sizes
    return fields | values


def _two_stage_architecture(spec: DetectorSpec, *, is_rpn_only: bool) -> dict[str, Any]:
    fields = {
        "model.backbone": ("name", "neck", "num_feature_maps", "deformable"),
        "model.rpn": ("channels", "anchor_sizes", "aspect_ratios"),
        "model.roi_head": ("channels", "pool_size", "pooling", "hidden_dim"),
    }
    values = {
        f"{section}.{name}": getattr(getattr(spec, section.rpartition(".")[2]), name)
        for section, names in fields.items()
        for name in names
    }
    if spec.mask_head is not None and not is_rpn_only:
        values |= {
            f"model.mask_head.{name}": getattr(spec.mask_head, name)
            for name in ("channels", "num_convs", "class_agnostic", "pool_size")
        }
    if spec.backbone.neck == "fpn":
        del values["model.backbone.num_feature_maps"]
    if is_rpn_only:
        for name in ("pool_size", "pooling", "hidden_dim"):
            del values[f"model.roi_head.{name}"]
        if spec.backbone.neck != "fpn":  # of a feature pyramid, these are the channels of its maps
            del values["model.roi_head.channels"]
    return values


def _size(value: Any) -> Any:
    """Return what decides the shape of a tensor: of a list, its number of items."""
    return len(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{number:g}" for number in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _count_names(names: Sequence[str], noun: str, plural: str | None = None) -> str:
    listed = count_and_list(names, limit=_MAX_LISTED, separator=", ")
    return f"{counted(len(names), noun, plural)} ({listed})"
