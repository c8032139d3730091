"""Read an experiment from YAML and write it back; all problems of a file are reported at once."""

import difflib
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sniper.chips import PyramidSpec
from sniper.config.experiment import ExperimentSpec, widened
from sniper.config.recipes import find_recipe
from sniper.errors import ConfigError, describe_os_error
from sniper.files import expand_path, read_bytes
from sniper.models.spec import ON_BACKBONE
from sniper.remote import is_url

_VALIDATOR = TypeAdapter(ExperimentSpec)

_MAX_VALUES, _MAX_DEPTH = 20_000, 30  # of a YAML file; an experiment has about 150 values in 5 levels

_PATHS = (
    ("data", "train", "annotations"),
    ("data", "train", "images"),
    ("data", "test", "annotations"),
    ("data", "test", "images"),
    ("data", "chips"),
    ("data", "cache", "folder"),
    ("model", "name"),
    ("model", "weights"),
    ("model", "weights_from"),
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
    "train.tensorboard": "train.trackers, a list such as [tensorboard]",
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
    "model.weights_from",
    "model.backbone.pretrained",
    "model.backbone.weights",
    "train.epochs",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.accumulation_steps",  # as the number of devices may change
    "train.compile",
    "train.evaluate_every",
    "train.evaluate_images",
    "train.patience",
    "train.trackers",
    "train.report",
    "data.test",
    "data.num_workers",
    "data.on_bad_image",
    "data.follow_links",
    "data.cache.gigabytes",
    "data.remote",
    "predict",
    "mine.batch_megapixels",
)


class _Loader(yaml.SafeLoader):
    """Loads YAML 1.1 with numbers such as `1e-4` as in YAML 1.2, every key as a string, and dates as text.

    Values are null, flags, numbers, text, lists and mappings. Errors are other tags, a key that occurs twice, deep
    nesting, and aliases that stand for very many values.
    """

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document, and check its structure."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping; a node of another kind, whose tag is that of a mapping, is an error."""
        mapping = super().construct_mapping(node, deep=deep)  # type: ignore[arg-type]
        return {str(key): value for key, value in mapping.items()}


def _measure(node: yaml.Node, sizes: dict[int, tuple[float, int]]) -> tuple[float, int]:
    """Count the values of a document with aliases expanded, and how deep they are nested.

    Args:
        node: of the document.
        sizes: results by the identity of nodes; filled.

    Raises:
        yaml.constructor.ConstructorError: if either is too large, an alias stands for a value that it is part of, or a
            key occurs twice.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = (math.inf, 0)  # until its parts are measured: an alias in them would be infinite
    parts: list[yaml.Node] = []
    problem = None
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        problem = next((f"the key {key!r} occurs twice" for key, count in keys.items() if count > 1), None)
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    measured = [_measure(part, sizes) for part in parts]
    size, depth = 1 + sum(size for size, _ in measured), 1 + max((depth for _, depth in measured), default=0)
    if size > _MAX_VALUES or depth > _MAX_DEPTH:
        problem = f"expected at most {_MAX_VALUES} values in {_MAX_DEPTH} levels, with aliases expanded"
    if problem is not None:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    sizes[id(node)] = (size, depth)
    return size, depth


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
for _pairs in _Loader.yaml_implicit_resolvers.values():
    _pairs[:] = [(tag, pattern) for tag, pattern in _pairs if tag != "tag:yaml.org,2002:timestamp"]
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in _Loader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}


def load_experiment(
    path: Path | str, *, overrides: Mapping[str, str] | None = None, base: ExperimentSpec | None = None
) -> ExperimentSpec:
    """Load an experiment.

    Args:
        path: a YAML file, or the name of a recipe (see `list_recipes`) where no such file exists. Relative paths in a
            file start from its folder. `~` and `$NAME` are expanded.
        overrides: values by dotted name, such as `train.epochs`, written as in YAML. Relative paths among them start
            from the working folder. An error names the override as it is here, which may be the name of the option.
        base: values of the fields that neither the file nor the overrides give; by default those of `ExperimentSpec`,
            for `predict.levels` the levels of the pyramid, widened, if it is not the default one, and a feature pyramid
            for a detector of torchvision on another backbone.

    Raises:
        ConfigError: naming all problems of the file and the overrides, with the nearest known name for unknown ones.
    """
    path = expand_path(path)
    source = path if path.exists() else find_recipe(path)
    return parse_experiment(_read_text(source, label=str(path)), source=path, overrides=overrides, base=base)


def parse_experiment(
    text: str,
    *,
    source: Path,
    overrides: Mapping[str, str] | None = None,
    base: ExperimentSpec | None = None,
) -> ExperimentSpec:
    """Parse an experiment from YAML text; `source` is the file it comes from. See `load_experiment`."""
    in_file, changes = _parse_file(text, source=source), _parse_overrides(overrides or {})
    in_file = _merged(_needed_neck(_put_over(in_file, changes)), in_file)
    if base is not None:
        return _validate(_merged(asdict(base), in_file), changes, source=source)
    spec = _validate(in_file, changes, source=source)
    values = _put_over(in_file, changes)
    has_levels = "predict.levels" in flatten(values)
    if has_levels or spec.pyramid.levels == PyramidSpec().levels:
        return spec
    return replace(spec, predict=replace(spec.predict, levels=widened(spec.pyramid.levels)))


def load_partial(
    path: Path | str | None, *, overrides: Mapping[str, str] | None = None
) -> tuple[ExperimentSpec, frozenset[str]]:
    """Load some fields of an experiment.

    Args:
        path: a YAML file; None loads the overrides alone.
        overrides: as in `load_experiment`.

    Returns:
        The experiment, with the defaults for the other fields, and the dotted names of the fields that were given. A
        chip size without levels has one level, the whole image; early stopping without an interval evaluates after
        every epoch; and a detector of torchvision on another backbone has a feature pyramid.

    Raises:
        ConfigError: naming all problems of the file and the overrides.
    """
    source = Path("options") if path is None else expand_path(path)
    text = "" if path is None else _read_text(source, label=f"--config {path}")
    in_file, changes = _parse_file(text, source=source), _parse_overrides(overrides or {})
    values = _put_over(in_file, changes)
    pyramid = values.get("pyramid")
    needed: dict[str, Any] = {}  # by the fields that were given, in place of defaults that exclude them
    if isinstance(pyramid, dict) and isinstance(pyramid.get("chip_size"), int):
        needed["pyramid"] = {"levels": [{"long_side": pyramid["chip_size"]}]}
    names = frozenset(flatten(values))
    if "train.patience" in names:
        needed["train"] = {"evaluate_every": 1}
    needed |= _needed_neck(values)
    return _validate(_merged(needed, in_file), changes, source=source), names


def _needed_neck(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the neck that a detector of torchvision on another backbone must have, in place of the default."""
    model = values.get("model")
    if (
        not isinstance(model, dict)
        or model.get("kind") != "torchvision"
        or model.get("name") not in ON_BACKBONE
    ):
        return {}
    return {"model": {"backbone": {"neck": "fpn"}}}


def is_given(name: str, names: Collection[str]) -> bool:
    """Check whether a field, or a field within a section, is among the names of fields that were set."""
    return any(given == name or given.startswith(f"{name}.") for given in names)


def list_fields() -> list[str]:
    """Return the dotted names of all fields of an experiment."""
    return list(field_values(ExperimentSpec()))


def field_values(spec: ExperimentSpec) -> dict[str, Any]:
    """Return all values of an experiment by their dotted names, as YAML has them; a list is one value."""
    return flatten(to_plain(spec))


def find_fields(name: str) -> list[str]:
    """Return the dotted names of the fields of an experiment whose last part is a name.

    Example:
        >>> find_fields("batch_size")
        ['train.batch_size']
    """
    return [field for field in list_fields() if field.rpartition(".")[2] == name]


def merge_experiment(
    base: ExperimentSpec, path: Path | None, *, overrides: Mapping[str, str]
) -> ExperimentSpec:
    """Put the fields of a file, and overrides, over an experiment; `path` is None if there is no file."""
    if path is None:
        return parse_experiment("", source=Path("options"), overrides=overrides, base=base)
    return load_experiment(path, overrides=overrides, base=base)


def is_experiment(path: Path) -> bool:
    """Check whether a path names an experiment: a file with its sections, or the name of a recipe; else it is data.

    Raises:
        ConfigError: if it is neither, or has the keys of both.
    """
    if path.is_dir():
        return False
    if not path.exists():
        source = find_recipe(path)
        if source == path:
            raise ConfigError(
                f"{path}: no such file; expected a data set (an annotation file or a folder), an experiment (YAML) or "
                "the name of a recipe"
            )
        return True
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    values = _parse_yaml(_read_text(path, label=str(path)), source=str(path))
    keys = set(values) if isinstance(values, dict) else set()
    sections = {field.name for field in fields(ExperimentSpec)}
    as_data = sorted(
        key
        for key in keys & {"train", "val", "test", "names", "nc"}
        if not isinstance(values[key], dict) or key == "names"
    )
    as_experiment = sorted(key for key in keys & sections if key not in as_data)
    if as_data and as_experiment:
        raise ConfigError(
            f"{path}: has keys of YOLO's data.yaml ({', '.join(as_data)}) and sections of an experiment "
            f"({', '.join(as_experiment)}); expected one of the two"
        )
    if not as_data and not as_experiment and values is not None:
        raise ConfigError(
            f"{path}: is neither YOLO's data.yaml (train, val, names) nor an experiment "
            f"({', '.join(sorted(sections))}); it has {', '.join(sorted(keys)) or 'no keys'}"
        )
    return not as_data


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A value that is put over those of a file.

    Attributes:
        label: what errors call it: an option, or the dotted name of the field.
        name: dotted name of the field, or of a section.
        value: from YAML, with absolute paths.
    """

    label: str
    name: str
    value: Any

    def as_sections(self) -> dict[str, Any]:
        """Return the value in its sections."""
        value = self.value
        for key in reversed(self.name.split(".")):
            value = {key: value}
        return dict(value)


def _read_text(path: Path, *, label: str) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: cannot be read ({error})") from error
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read ({describe_os_error(error)})") from error


def _parse_file(text: str, *, source: Path) -> dict[str, Any]:
    """Return the values of a file as nested mappings, with absolute paths."""
    values = _parse_yaml(text, source=str(source))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections such as data and train, got {type(values).__name__}")
    known = [field.name for field in fields(ExperimentSpec)]
    if len(values) > 1 and not values.keys() & set(known):
        raise ConfigError(
            f"{source}: is no experiment: expected sections ({', '.join(known)}), got {', '.join(values)}"
        )
    _resolve_paths(values, folder=source.parent)
    train = values.get("train")
    if isinstance(train, dict) and "trackers" not in train and isinstance(train.get("tensorboard"), bool):
        train["trackers"] = _as_trackers(train.pop("tensorboard"))
    return values


def _as_trackers(tensorboard: bool) -> list[str]:
    """Return what replaces the flag `train.tensorboard` of version 0.1.0, which is in the `config.yaml` of its runs."""
    return ["tensorboard"] if tensorboard else []


def _parse_overrides(overrides: Mapping[str, str]) -> list[_Change]:
    """Return the values of overrides, with absolute paths."""
    changes = []
    names = {label.removeprefix("--") for label in overrides}
    for label, text in overrides.items():
        if text.lstrip()[:1] in ("[", "{") and text.rstrip()[-1:] not in ("]", "}"):
            raise ConfigError(f"{label} {text}: the bracket is not closed; in a shell, quote the whole list")
        change = _Change(label=label, name=label.removeprefix("--"), value=_parse_yaml(text, source=label))
        sections = change.as_sections()
        _resolve_paths(sections, folder=Path())
        for key in change.name.split("."):
            sections = sections[key]
        change = replace(change, value=sections)
        if (
            change.name == "train.tensorboard"
            and isinstance(sections, bool)
            and "train.trackers" not in names
        ):
            change = replace(change, name="train.trackers", value=_as_trackers(sections))
        changes.append(change)
    return changes


def _put_over(values: Mapping[str, Any], changes: Sequence[_Change]) -> dict[str, Any]:
    """Put the values of overrides over others."""
    merged = dict(values)
    for change in changes:
        merged = _merged(merged, change.as_sections())
    return merged


def _validate(in_file: Mapping[str, Any], changes: Sequence[_Change], *, source: Path) -> ExperimentSpec:
    """Build an experiment from nested mappings; errors name the file, or the overrides that they come from."""
    try:
        _check_encodable(in_file, label=str(source))
        for change in changes:
            _check_encodable({change.name: change.value}, label=change.label)
        return _build(_put_over(in_file, changes))
    except ValidationError as error:
        raise ConfigError("; ".join(_problems(error, in_file, changes, source=source))) from error
    except (ValueError, RecursionError) as error:  # an alias within itself
        raise ConfigError(f"{source}: not a valid YAML mapping ({error})") from error


def _build(values: Mapping[str, Any]) -> ExperimentSpec:
    """Build an experiment, as from JSON: a strict spec takes lists for tuples and mappings for dataclasses only there.

    Raises:
        ValidationError: with all problems.
    """
    return _VALIDATOR.validate_json(json.dumps(values, default=str))


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
    before, after = field_values(old), field_values(new)
    free = [name for name in _FREE_TO_CHANGE if name != "predict" or new.mine.every_epochs is None]
    if old.train.schedule == "cosine":
        free.remove("train.epochs")  # on which all learning rates after the warm-up depend
    is_remote = is_url(new.data.train.images or new.data.train.annotations)
    if (
        is_remote
        or new.data.cache.format == "png"
        or None not in (old.data.cache.folder, new.data.cache.folder)
    ):
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
    except RecursionError as error:
        raise ConfigError(f"{source}: not YAML (nested too deeply)") from error
    except (AttributeError, LookupError, ValueError) as error:  # a tag before text that is not of its kind
        raise ConfigError(
            f"{source}: not YAML (a value is not of the kind that it is marked as: {error})"
        ) from error


def _check_encodable(values: Mapping[str, Any], *, label: str) -> None:
    """Refuse bytes that are not UTF-8, which neither YAML nor JSON can express, and zero bytes, which no path has."""
    names = [
        name
        for name, text in _texts(values)
        if "\0" in text or text.encode(errors="replace").decode() != text
    ]
    if names:
        raise ConfigError(
            f"{label}: {', '.join(names)}: expected a path in UTF-8; rename the folder or file, or link to it"
        )


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield all keys and texts among nested values, each with its dotted name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{name}.{key}".removeprefix(".")
            yield inner, key
            yield from _texts(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, name)
    elif isinstance(value, str):
        yield name, value


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
            path = (folder / expand_path(inner[last], folder=folder)).absolute()
            if _is_path(".".join([*sections, last]), inner[last], path):
                inner[last] = str(path)


def _is_path(field: str, text: str, path: Path) -> bool:
    """Check whether a value is a path: `model.weights` may be a name, such as COCO_V1, and `model.name` a folder."""
    match field:
        case "model.name":
            return text.startswith((".", "/", "~", "$")) or (path / "config.json").is_file()
        case "model.weights":
            return re.fullmatch("[A-Z][A-Z0-9_]*", text) is None
    return True


def _problems(
    error: ValidationError, in_file: Mapping[str, Any], changes: Sequence[_Change], *, source: Path
) -> list[str]:
    """Describe the errors of pydantic, each as one phrase: those of the file after its name, then those of overrides.

    An error that the file alone does not have comes from the overrides in its section.
    """
    alone = _faults_alone(in_file) if changes else []
    of_file = {(fault["loc"], fault["type"]) for fault in _without_tags(alone)}
    file_phrases: list[str] = []
    phrases: list[str] = []
    for fault in _distinct(_without_tags(error.errors())):
        name = _without_indices(fault["loc"])
        direct = [change for change in changes if name == change.name or name.startswith(f"{change.name}.")]
        if direct:
            phrases.append(_describe(fault, change=direct[-1]))
        elif not changes or (fault["loc"], fault["type"]) in of_file:
            file_phrases.append(_describe(fault))
        else:
            is_rule = fault["type"] == "value_error"  # which names its fields
            message = _describe({**fault, "loc": ()} if is_rule else fault)
            phrases.append(f"{_labels_of(fault, changes)}: {message}")
    return [f"{source}: {'; '.join(file_phrases)}", *phrases] if file_phrases else phrases


def _faults_alone(in_file: Mapping[str, Any]) -> list[ErrorDetails]:
    try:
        _build(in_file)
    except ValidationError as error:
        return error.errors()
    return []


def _without_tags(faults: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return errors at the places of fields.

    Where a field takes one of several kinds, pydantic reports what each of them finds wrong, and puts a name of the
    kind into the place. Of a mapping, the errors of the section remain; of another value, one that has all kinds.
    """
    found: dict[tuple[tuple[str | int, ...], str], ErrorDetails] = {}
    for fault in faults:
        loc = fault["loc"]
        length, kinds = _find_choice(loc)
        place = loc[:length]
        of_value = [
            other for other in faults if len(other["loc"]) == length + 1 and other["loc"][:length] == place
        ]
        names = [kind.__name__ for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
        if names and any(isinstance(other["input"], Mapping) for other in of_value):
            if loc[length] in names:
                place += loc[length + 1 :]
                found[place, fault["type"]] = {**fault, "loc": place}
        elif kinds:
            accepted = [_accepted(other, kinds) for other in of_value]
            accepted += ["null"] if type(None) in kinds else []
            message = f"Input should be {' or '.join(accepted)}"
            found[place, "union"] = {**fault, "loc": place, "type": "union", "msg": message}
        else:
            found[loc, fault["type"]] = fault
    return list(found.values())


def _find_choice(loc: Sequence[str | int]) -> tuple[int, tuple[Any, ...]]:
    """Return where a place has the name of a kind, and the kinds of the field before it; none if it has no such name.

    Kinds include that of null, if a field may be null.
    """
    hint: Any = ExperimentSpec
    for length, key in enumerate(loc):
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        values = [kind for kind in kinds if kind is not type(None)]
        if len(values) > 1:
            return length, kinds
        hint = values[0]
        items = next(iter(get_args(hint)), None)  # of a list
        hint = get_type_hints(hint).get(str(key)) if is_dataclass(hint) else items
    return len(loc), ()


def _accepted(fault: ErrorDetails, kinds: Sequence[Any]) -> str:
    """Return what one of the kinds of a field would accept instead."""
    for kind in kinds:
        if is_dataclass(kind) and fault["loc"][-1] == getattr(kind, "__name__", None):
            return f"a mapping ({', '.join(field.name for field in fields(kind))})"
    return fault["msg"].removeprefix("Input should be ")


def _distinct(faults: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Yield errors except lists that are reported as too short, too, since pydantic counts the valid items only."""
    sections = {fault["loc"][:length] for fault in faults for length in range(len(fault["loc"]))}
    for fault in faults:
        if fault["type"] != "too_short" or fault["loc"] not in sections:
            yield fault


def _labels_of(fault: ErrorDetails, changes: Sequence[_Change]) -> str:
    """Return the overrides that an error of several fields comes from.

    Those of the field that it begins with, else those that it mentions, else all of its section.
    """
    section = _without_indices(fault["loc"])
    field = f"{section}.{fault['msg'].removeprefix('Value error, ').partition(':')[0]}".removeprefix(".")
    direct = [change for change in changes if change.name == field or change.name.startswith(f"{field}.")]
    if direct:
        return " and ".join(change.label for change in direct)
    inside = [change for change in changes if not section or change.name.startswith(f"{section}.")] or changes
    mentioned = [change for change in inside if change.name.removeprefix(f"{section}.") in fault["msg"]]
    return " and ".join(change.label for change in mentioned or inside)


_PHRASES = {
    "dataclass_type": "must be a mapping",
    "tuple_type": "must be a list",
}


def _describe(fault: ErrorDetails, *, change: _Change | None = None) -> str:
    """Describe one error of pydantic: the field's dotted name, the accepted values, the given one.

    Args:
        fault: the error.
        change: the override that it comes from.
    """
    kind, place, value = fault["type"], _dotted(fault["loc"]), fault["input"]
    is_option = change is not None and change.label.startswith("--")
    dashes = "--" if is_option else ""
    if change is not None:
        place = dashes + place
    if kind == "unexpected_keyword_argument":
        return f"{place} {_unknown_key_hint(fault['loc'], dashes=dashes)}"
    if kind == "missing":
        return f"{place} is missing"
    if kind == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    if kind == "dataclass_type" and change is not None and not isinstance(value, Mapping):
        first = fields(_section_at(fault["loc"]))[0].name
        return f"{place}: is a section, not a field; its fields are set one by one, such as {place}.{first}"
    message = fault["msg"].replace("Input should", "must", 1).replace("Tuple should", "must", 1)
    message = _PHRASES.get(kind, message.replace(" after validation", ""))
    if kind not in ("too_long", "too_short"):  # these give the number of items themselves
        message += f", not {_shown(value)}"
    hint = _value_hint(fault["loc"], value)
    form = _other_form(kind, fault["loc"], value)
    if form is not None:
        hint = f"{place} {shlex.quote(form)}" if is_option else f"such as {form}"
    return f"{place}: {message}" + (f" ({hint})" if hint else "")


def _other_form(kind: str, loc: Sequence[str | int], value: Any) -> str | None:
    """Write a value as a list where a list is expected, and the other way round; None if that is not the mistake."""
    if kind == "tuple_type":
        if loc[-1] == "levels":
            return "[{long_side: 512}]"
        if isinstance(value, str) and "," in value:
            return f"[{', '.join(part.strip() for part in value.split(','))}]"
        return f"[{value}]" if isinstance(value, int | float | str) else None
    if kind in ("int_type", "float_type", "string_type", "bool_type") and isinstance(value, list) and value:
        return str(value[0])
    return None


def _dotted(loc: Sequence[str | int]) -> str:
    """Write a place in an experiment as `pyramid.levels[0].factor`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc).removeprefix(".")


def _shown(value: Any) -> str:
    """Write a value as YAML has it, strings in quotes, at most 200 characters."""
    text = json.dumps(value) if isinstance(value, bool) or value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _value_hint(loc: Sequence[str | int], value: Any) -> str:
    """Explain a value that was renamed, or that YAML reads as a flag."""
    new = RENAMED_VALUES.get(_without_indices(loc), {}).get(str(value))
    if new is not None:
        return f"{value} was renamed to {new}"
    return "YAML reads yes, no, on and off as true and false" if isinstance(value, bool) else ""


def _unknown_key_hint(loc: Sequence[str | int], *, dashes: str = "") -> str:
    """Explain an unknown key: its new name, its section, or the nearest known key, after the dashes of an option."""
    new = RENAMED.get(_without_indices(loc))
    if new is not None:
        return f"was renamed to {dashes}{new}"
    elsewhere = find_fields(str(loc[-1])) if len(loc) > 1 else []
    if elsewhere:
        return f"is not known; did you mean {' or '.join(dashes + field for field in elsewhere)}?"
    known = [field.name for field in fields(_section_at(loc[:-1]))]
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    if near:
        return f"is not known; did you mean {dashes}{_dotted([*loc[:-1], near[0]])}?"
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


def to_yaml(changes: Mapping[str, Any]) -> dict[str, str]:
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


def _changes(spec: Any) -> Any:
    """Return the fields of a spec that differ from their defaults, nested specs included."""
    if isinstance(spec, tuple):
        return [_changes(item) for item in spec]
    if not is_dataclass(spec):
        return to_plain(spec)
    values = [(field, getattr(spec, field.name)) for field in fields(spec)]
    return {field.name: _changes(value) for field, value in values if value != field.default}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
