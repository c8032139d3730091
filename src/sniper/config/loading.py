"""Read an experiment from YAML and write it back; all problems of a file are reported at once."""

import difflib
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sniper.config.experiment import ExperimentSpec
from sniper.config.recipes import find_recipe
from sniper.errors import ConfigError
from sniper.files import expand_path, read_bytes

_VALIDATOR = TypeAdapter(ExperimentSpec)

_PATHS = (
    ("data", "train", "annotations"),
    ("data", "train", "images"),
    ("data", "test", "annotations"),
    ("data", "test", "images"),
    ("data", "chips"),
    ("data", "cache", "folder"),
    ("model", "backbone", "weights"),
)

RENAMED = {
    "data.color": "data.color_jitter",
    "data.loader_processes": "data.num_workers",
    "data.read.grey_range": "data.read.intensity_range",
    "data.read.orientation": "data.read.exif_orientation (turned is now apply, stored is now ignore)",
    "data.tiles.min_visible_share": "data.tiles.min_visibility",
    "model.backbone.features": "model.backbone.num_feature_maps",
    "model.backbone.frozen_stride": "model.backbone.frozen_stages (stride 4 is now 1, stride 8 is now 2)",
    "model.roi_head.pooled_side": "model.roi_head.pool_size",
    "model.roi_head.score_floor": "model.roi_head.score_threshold",
    "model.roi_head.width": "model.roi_head.hidden_dim",
    "model.rpn.anchors_per_chip": "model.rpn.batch_size_per_image",
    "model.rpn.num_candidates": "model.rpn.pre_nms_top_n",
    "model.rpn.num_proposals": "model.rpn.post_nms_top_n",
    "model.rpn.num_training_proposals": "model.rpn.post_nms_top_n_train",
    "model.rpn.positive_share": "model.rpn.positive_fraction",
    "negatives.at_least": "negatives.min_proposals",
    "predict.score_floor": "predict.score_threshold",
    "train.accumulate": "train.accumulation_steps",
    "train.clip_gradient": "train.clip_grad_norm",
    "train.decay": "train.gamma",
    "train.decay_at": "train.milestones",
    "train.reference_batch": "train.reference_batch_size",
    "train.warm_up_rate": "train.warmup_start_factor (now a fraction of train.learning_rate)",
    "train.warm_up_steps": "train.warmup_steps",
}
"""Configuration keys of earlier versions, and the keys that replace them; the items of a list have no index here."""

RENAMED_VALUES = {
    "data.read.exif_orientation": {"turned": "apply", "stored": "ignore"},
    "model.backbone.neck": {"joined": "concat"},
}
"""Values of earlier versions by their key, and the values that replace them."""

# Fields that may change when a run is resumed: its finished steps did not depend on them.
_FREE_TO_CHANGE = (
    "data.train",  # the checkpoint has the digest of its training set
    "model.backbone.pretrained",
    "model.backbone.weights",
    "train.epochs",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.accumulation_steps",  # as the number of devices may change
    "train.compile",
    "train.evaluate_every",
    "train.tensorboard",
    "data.test",
    "data.num_workers",
    "data.on_bad_image",
    "data.follow_links",
    "data.cache.gigabytes",
    "predict",
    "mine.batch_megapixels",
)


class _Loader(yaml.SafeLoader):
    """Loads YAML 1.1, with numbers such as `1e-4` as in YAML 1.2, and every key as a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping."""
        return {str(key): value for key, value in super().construct_mapping(node, deep=deep).items()}


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` reads as numbers, and writes whole numbers without a point."""

    def represent_float(self, data: float) -> yaml.ScalarNode:
        """Write 80.0 as 80."""
        return self.represent_int(int(data)) if data.is_integer() else super().represent_float(data)


_Dumper.add_representer(float, _Dumper.represent_float)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_experiment(
    path: Path | str, *, overrides: Mapping[str, str] | None = None, base: ExperimentSpec | None = None
) -> ExperimentSpec:
    """Load an experiment.

    Args:
        path: a YAML file, or the name of a recipe (see `list_recipes`) where no such file exists. Relative paths in a
            file start from its folder. `~` and `$NAME` are expanded.
        overrides: values by dotted name, such as `train.epochs`, written as in YAML. Relative paths among them start
            from the working folder.
        base: values of the fields that neither the file nor the overrides give; by default those of `ExperimentSpec`.

    Raises:
        ConfigError: naming all problems of the file and the overrides, with the nearest known name for unknown ones.
    """
    path = expand_path(path)
    source = path if path.exists() else find_recipe(path)
    try:
        text = read_bytes(source).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return parse_experiment(text, source=path, overrides=overrides, base=base)


def parse_experiment(
    text: str,
    *,
    source: Path,
    overrides: Mapping[str, str] | None = None,
    base: ExperimentSpec | None = None,
) -> ExperimentSpec:
    """Parse an experiment from YAML text; `source` is the file it comes from. See `load_experiment`."""
    values = _parse_yaml(text, source=str(source))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections such as data and train, got {type(values).__name__}")
    _resolve_paths(values, folder=source.parent)
    if base is not None:
        values = _merged(asdict(base), values)
    for name, value in (overrides or {}).items():
        change = _nested(name, _parse_yaml(value, source=f"--{name}"))
        _resolve_paths(change, folder=Path())
        values = _merged(values, change)
    try:
        _check_encodable(values, source=source)
        # As JSON: a strict spec takes lists for tuples and mappings for dataclasses only there.
        return _VALIDATOR.validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(_problems(error))}") from error
    except (ValueError, RecursionError) as error:  # an alias within itself
        raise ConfigError(f"{source}: not a valid YAML mapping ({error})") from error


def dump_experiment(spec: ExperimentSpec) -> str:
    """Write an experiment with all its fields as YAML text."""
    return yaml.dump(to_plain(spec), Dumper=_Dumper, sort_keys=False)


def dump_changes(spec: ExperimentSpec) -> str:
    """Write the fields of an experiment that differ from the defaults as YAML text."""
    return yaml.dump(_changes(spec), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def check_resumable(old: ExperimentSpec, new: ExperimentSpec, *, source: Path) -> None:
    """Check that a run can be resumed with another experiment: its finished steps would have been the same.

    Raises:
        ConfigError: naming each field that differs and must not.
    """
    before, after = _flat(to_plain(old)), _flat(to_plain(new))
    free = [name for name in _FREE_TO_CHANGE if name != "predict" or new.mine.every_epochs is None]
    if new.data.cache.format == "png" or None not in (old.data.cache.folder, new.data.cache.folder):
        free.append("data.cache.folder")  # the pixels are the same
    differing = [
        f"{name} was {before.get(name)}, not {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not any(name == prefix or name.startswith(f"{prefix}.") for prefix in free)
    ]
    if differing:
        raise ConfigError(f"{source}: the run was started with other settings: {'; '.join(differing)}")


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML ({' '.join(str(error).split())})") from error


def _check_encodable(values: Mapping[str, Any], *, source: Path) -> None:
    """Refuse paths with bytes that are not UTF-8, which neither YAML nor JSON can express."""
    names = [
        name
        for name, value in _flat(values).items()
        if isinstance(value, str) and value.encode(errors="replace").decode() != value
    ]
    if names:
        raise ConfigError(
            f"{source}: {', '.join(names)}: expected a path in UTF-8; rename the folder or file, or link to it"
        )


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Turn `a.b` and a value into sections."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return dict(value)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes over values, section by section; a list is replaced whole."""
    merged = dict(values)
    for name, change in changes.items():
        old = merged.get(name)
        are_sections = isinstance(change, Mapping) and isinstance(old, dict)
        merged[name] = _merged(old, change) if are_sections else change  # type: ignore[arg-type]
    return merged


def _resolve_paths(values: dict[str, Any], *, folder: Path) -> None:
    """Expand `~` and `$NAME` in the paths among the values, and make them absolute, in place."""
    for *sections, last in _PATHS:
        inner: Any = values
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get(last), str) and inner[last]:
            inner[last] = str((folder / expand_path(inner[last], folder=folder)).absolute())


def _problems(error: ValidationError) -> list[str]:
    """Describe the errors of pydantic, each as one phrase."""
    faults = error.errors()
    # A list with invalid items is reported as too short, too, since pydantic counts the valid ones.
    sections = {fault["loc"][:length] for fault in faults for length in range(len(fault["loc"]))}
    return [
        _describe(fault) for fault in faults if fault["type"] != "too_short" or fault["loc"] not in sections
    ]


_PHRASES = {
    "dataclass_type": "must be a mapping",
    "tuple_type": "must be a list",
}


def _describe(fault: ErrorDetails) -> str:
    """Describe one error of pydantic: the field's dotted name, the accepted values, the given one."""
    kind, place, value = fault["type"], _dotted(fault["loc"]), fault["input"]
    if kind == "unexpected_keyword_argument":
        return f"{place} {_unknown_key_hint(fault['loc'])}"
    if kind == "missing":
        return f"{place} is missing"
    if kind == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    message = fault["msg"].replace("Input should", "must", 1).replace("Tuple should", "must", 1)
    message = _PHRASES.get(kind, message.replace(" after validation", ""))
    if kind not in ("too_long", "too_short"):  # these give the number of items themselves
        message += f", not {_shown(value)}"
    hint = _value_hint(fault["loc"], value)
    return f"{place}: {message}" + (f" ({hint})" if hint else "")


def _dotted(loc: Sequence[str | int]) -> str:
    """Write a place in an experiment as `pyramid.levels[0].factor`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc).removeprefix(".")


def _shown(value: Any) -> str:
    """Write a value as YAML has it, strings in quotes."""
    return json.dumps(value) if isinstance(value, bool) or value is None else repr(value)


def _value_hint(loc: Sequence[str | int], value: Any) -> str:
    """Explain a value that was renamed, or that YAML reads as a flag."""
    new = RENAMED_VALUES.get(_without_indices(loc), {}).get(str(value))
    if new is not None:
        return f"{value} was renamed to {new}"
    return "YAML reads yes, no, on and off as true and false" if isinstance(value, bool) else ""


def _unknown_key_hint(loc: Sequence[str | int]) -> str:
    """Explain an unknown key: its new name, or the nearest known one."""
    new = RENAMED.get(_without_indices(loc))
    if new is not None:
        return f"was renamed to {new}"
    known = [field.name for field in fields(_section_at(loc[:-1]))]
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if near:
        return f"is not known; did you mean {_dotted([*loc[:-1], near[0]])}?"
    return f"is not known; known are {', '.join(known)}"


def _without_indices(loc: Sequence[str | int]) -> str:
    return _dotted([key for key in loc if isinstance(key, str)])


def _section_at(loc: Sequence[str | int]) -> Any:
    """Return the spec class of a section."""
    section: Any = ExperimentSpec
    for key in loc:
        if isinstance(key, str):
            hint = get_type_hints(section)[key]
            section = next(kind for kind in (hint, *get_args(hint)) if is_dataclass(kind))
    return section


def to_plain(value: Any) -> Any:
    """Turn tuples, specs and NumPy numbers into the lists, mappings and numbers that YAML has."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def _changes(spec: Any) -> Any:
    """Return the fields of a spec that differ from their defaults, nested specs included."""
    if isinstance(spec, tuple):
        return [_changes(item) for item in spec]
    if not is_dataclass(spec):
        return to_plain(spec)
    values = [(field, getattr(spec, field.name)) for field in fields(spec)]
    return {field.name: _changes(value) for field, value in values if value != field.default}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return all values by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
