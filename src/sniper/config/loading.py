"""One YAML experiment to typed specs and back; every fault told at once."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from sniper.config.experiment import ExperimentSpec
from sniper.errors import ConfigError

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
    "data.read.orientation": "data.read.exif_orientation (turned is now apply, stored is ignore)",
    "data.tiles.min_visible_share": "data.tiles.min_visibility",
    "model.backbone.features": "model.backbone.num_feature_maps",
    "model.backbone.frozen_stride": "model.backbone.frozen_stages (stride 4 is 1, stride 8 is 2)",
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
    "train.warm_up_rate": "train.warmup_start_factor (as a fraction of train.learning_rate)",
    "train.warm_up_steps": "train.warmup_steps",
}
"""Configuration keys of earlier versions, and the keys that replace them."""

# What may change when a run goes on: nothing that its finished steps depended on.
_FREE_TO_CHANGE = (
    "data.train",  # the checkpoint knows the digest of what it learnt from
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
    "data.cache.gigabytes",
    "predict",
    "mine.batch_megapixels",
)


def load_experiment(
    path: Path, *, overrides: Mapping[str, str] | None = None, base: ExperimentSpec | None = None
) -> ExperimentSpec:
    """Read an experiment.

    Args:
        path: the YAML file. Paths in it start from its folder.
        overrides: values by dotted name, such as `train.epochs`, written as in YAML. Paths among them start from the
            working folder.
        base: what holds where neither says anything; the paper's experiment if there is none.

    Raises:
        ConfigError: telling every fault of the file and the overrides, with the nearest known name for unknown ones.
    """
    try:
        text = path.read_text()
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
    """Read an experiment from YAML text; `source` is the file that it stands for, see `load_experiment`."""
    values = _parse_yaml(text, source=str(source))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: wanted sections such as data and train, got {type(values).__name__}")
    _resolve_paths(values, folder=source.parent)
    if base is not None:
        values = _merged(_plain(asdict(base)), values)
    for name, value in (overrides or {}).items():
        change = _nested(name, _parse_yaml(value, source=f"--{name}"))
        _resolve_paths(change, folder=Path())
        values = _merged(values, change)

    problems = _misfits(values, ExperimentSpec, prefix="")
    try:
        spec = TypeAdapter(ExperimentSpec).validate_python(values)
    except ValidationError as error:
        problems += [_tell(fault) for fault in error.errors()]
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return spec


def dump_experiment(spec: ExperimentSpec) -> str:
    """Write an experiment as YAML, complete: every field stands in it."""
    return yaml.safe_dump(_plain(asdict(spec)), sort_keys=False)


def dump_changes(spec: ExperimentSpec) -> str:
    """Write what an experiment says otherwise than the defaults, as YAML."""
    return yaml.safe_dump(_changes(spec), sort_keys=False, default_flow_style=None, width=110)


def check_resumable(old: ExperimentSpec, new: ExperimentSpec, *, source: Path) -> None:
    """Refuse to go on with a run under numbers that its finished steps did not have.

    Raises:
        ConfigError: naming each field that differs and must not.
    """
    before, after = _flat(_plain(asdict(old))), _flat(_plain(asdict(new)))
    free = [name for name in _FREE_TO_CHANGE if name != "predict" or new.mine.every_epochs is None]
    if new.data.cache.format == "png" or None not in (old.data.cache.folder, new.data.cache.folder):
        free.append("data.cache.folder")  # the pixels are the same
    differing = [
        f"{name} was {before.get(name)}, not {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not any(name == one or name.startswith(one + ".") for one in free)
    ]
    if differing:
        raise ConfigError(f"{source}: the run to go on with was started otherwise: {'; '.join(differing)}")


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{source}: not YAML ({told})") from error


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Turn `a.b` and a value into sections."""
    for part in reversed(name.split(".")):
        value = {part: value}
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
    for *sections, last in _PATHS:
        inner: Any = values
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get(last), str) and inner[last]:
            inner[last] = str((folder / inner[last]).absolute())


def _misfits(values: Any, spec: type, *, prefix: str) -> list[str]:
    """Tell the keys that no field has, each with the nearest that one has, and the flags that stand for no flag."""
    if not isinstance(values, dict):
        return []
    hints = get_type_hints(spec)
    names = [field.name for field in fields(spec)]
    problems = []
    for key, value in values.items():
        if key not in names:
            problems.append(f"{prefix}{key} {_unknown_key_hint(f'{prefix}{key}', names, prefix=prefix)}")
            continue
        if isinstance(value, bool) and hints[key] is not bool:
            problems.append(
                f"{prefix}{key} is {str(value).lower()}, as YAML reads yes and no; no flag is wanted here"
            )
        inner = [hints[key], *get_args(hints[key])]
        part = next((kind for kind in inner if is_dataclass(kind)), None)
        if isinstance(part, type):
            parts = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, one in parts:
                place = f"{prefix}{key}." if index is None else f"{prefix}{key}[{index}]."
                problems += _misfits(one, part, prefix=place)
    return problems


def _unknown_key_hint(name: str, known: Sequence[str], *, prefix: str) -> str:
    """Say what to use instead of an unknown key: its new name, or the nearest one."""
    if name in RENAMED:
        return f"was renamed to {RENAMED[name]}"
    near = difflib.get_close_matches(name.removeprefix(prefix), known, n=1)
    return (
        f"is not known; did you mean {prefix}{near[0]}?"
        if near
        else f"is not known; known are {', '.join(known)}"
    )


_PLAIN_WORDS = {
    "dataclass_type": "wanted a section with fields of its own",
    "tuple_type": "wanted a list",
}


def _tell(fault: Mapping[str, Any]) -> str:
    place = ""
    for part in fault["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{place}: {message}" if place else message
    message = _PLAIN_WORDS.get(fault["type"], f"{message[0].lower()}{message[1:]}")
    return f"{place}: {message}, not {fault['input']!r}"


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _changes(spec: Any) -> Any:
    """Give the fields of a spec that differ from their defaults, in its parts too; other values as YAML has them."""
    if isinstance(spec, tuple):
        return [_changes(one) for one in spec]
    if not is_dataclass(spec):
        return _plain(spec)
    values = [(field, getattr(spec, field.name)) for field in fields(spec)]
    return {field.name: _changes(value) for field, value in values if value != field.default}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
