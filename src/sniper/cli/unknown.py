"""Explain options that a command does not have: those of other libraries, of earlier versions, of other commands."""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sniper.errors import ConfigError

RENAMED = {
    ("mine", "image-root"): "images",
    ("plan", "crowd"): "crowded-above",
    ("predict", "image-root"): "images",
}
"""Options of commands of earlier versions, and the options that replace them."""

_OUTPUT = ("output", "OUT", "run")
_RUN = ("weights-from", "RUN")
_DATA = ("DATA", "ANNOTATIONS", "SOURCE", "annotations")
_MIN_SCORE = ("min-score", "predict.score_threshold")
_IOU = ("predict.merge_iou",)
_SIDE = ("pyramid.chip_size", "predict.levels")
_RATE = ("train.learning_rate",)
_BATCH = ("batch-size", "train.batch_size")
_LIMIT = ("max-detections", "predict.max_detections")

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "amp": ("train.precision", "predict.precision"),
    "ann": ("ANNOTATIONS", "annotations"),
    "annotation": ("ANNOTATIONS", "annotations"),
    "annotations": _DATA,
    "backbone": ("model.backbone.name",),
    "batch": _BATCH,
    "batch-size": _BATCH,
    "bs": _BATCH,
    "cache": ("data.cache.folder",),
    "cfg": ("config",),
    "checkpoint": _RUN,
    "chip": _SIDE,
    "ckpt": _RUN,
    "conf": _MIN_SCORE,
    "conf-thres": _MIN_SCORE,
    "confidence": _MIN_SCORE,
    "cpu": ("device",),
    "cuda": ("device",),
    "data": _DATA,
    "detections": ("DETECTIONS", "from"),
    "dt": ("DETECTIONS", "detections"),
    "ema": ("train.ema_decay",),
    "folder": ("FILES", *_OUTPUT),
    "freeze": ("model.backbone.frozen_stages",),
    "gpu": ("device",),
    "gpus": ("device",),
    "gt": ("ANNOTATIONS", "annotations"),
    "half": ("train.precision", "predict.precision"),
    "image-root": ("root", "images", "data.train.images"),
    "image-size": _SIDE,
    "images": ("data.train.images", "root", "FILES"),
    "img": _SIDE,
    "img-size": _SIDE,
    "imgsz": _SIDE,
    "input": ("FILES", "SOURCE", "DATA", "ANNOTATIONS"),
    "iou": _IOU,
    "iou-thres": _IOU,
    "levels": ("pyramid.levels", "predict.levels"),
    "lr": _RATE,
    "lr0": _RATE,
    "max-det": _LIMIT,
    "max-dets": _LIMIT,
    "model": ("RUN", "model.backbone.name"),
    "name": _OUTPUT,
    "nms": ("predict.merge",),
    "nms-iou": _IOU,
    "num-images": ("limit",),
    "optim": ("train.optimizer",),
    "out": _OUTPUT,
    "output": _OUTPUT,
    "output-dir": _OUTPUT,
    "pred": ("DETECTIONS", "detections"),
    "predictions": ("DETECTIONS", "detections"),
    "project": _OUTPUT,
    "results": ("DETECTIONS", "detections"),
    "save-dir": _OUTPUT,
    "save-img": ("draw",),
    "score": _MIN_SCORE,
    "score-thr": _MIN_SCORE,
    "score-threshold": _MIN_SCORE,
    "show": ("draw",),
    "size": _SIDE,
    "source": ("FILES", "SOURCE"),
    "split": ("data.train.split",),
    "test": ("val",),
    "threshold": _MIN_SCORE,
    "visualize": ("draw",),
    "warmup": ("train.warmup_steps",),
    "warmup-epochs": ("train.warmup_steps",),
    "wd": ("train.weight_decay",),
    "weights": ("weights-from or model.backbone.weights", "RUN"),
    "workers": ("data.num_workers",),
}
"""Names of options in other libraries, and ours in the order of preference: options, arguments without a name (in upper
case), and fields of an experiment (with a dot)."""

OTHER_COMMANDS = {
    "detect": "predict",
    "eval": "evaluate",
    "fit": "train",
    "infer": "predict",
    "inference": "predict",
    "score": "evaluate",
    "test": "evaluate",
    "tune": "train",
    "val": "evaluate",
    "validate": "check",
}
"""Names of commands in other libraries, and ours."""

_FIELDS_OF_RUN = {"mine": ("mine.", "predict.levels", "model.rpn.")}
"""Commands that read the `config.yaml` of a run, and the fields that they use."""


class UnknownOption(ConfigError):
    """An option that a command does not have.

    Attributes:
        option: as it was given, with its dashes.
    """

    def __init__(self, option: str) -> None:
        super().__init__(f"{option}: no such option")
        self.option = option


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a command accepts.

    Attributes:
        name: of the command.
        usage: its arguments, as the help shows them.
        options: names of its options, with their dashes.
    """

    name: str
    usage: str
    options: Sequence[str]

    def has(self, name: str) -> bool:
        """Check whether the command has an option, an argument or a field."""
        if "." in name:
            parts = name.split(".")
            sections = ["SECTION", *(".".join(parts[:count]) for count in range(1, len(parts)))]
            return any(f"--{section}.FIELD" in self.usage for section in sections)
        if name.isupper():
            return name in self.usage.replace("[", " ").replace("]", " ").split()
        return f"--{name}" in self.options

    def spell(self, name: str) -> str:
        """Return how an option, an argument or a field is given."""
        return f"{name} (sniper {self.name} {self.usage})" if name.isupper() else f"--{name}"


def explain_option(option: str, command: Command, commands: Sequence[Command]) -> str:
    """Explain an option that a command does not have, and name the one that it stands for.

    Args:
        option: as it was given, with its dashes.
        command: the command that it was given to.
        commands: all commands.
    """
    name = option.lstrip("-").lower().replace("_", "-")
    if (command.name, name) in RENAMED:
        return f"{option} was renamed to --{RENAMED[command.name, name]}"
    if command.has(name):
        return f"{option}: no such option; use --{name}"
    candidates = [*OTHER_NAMES.get(name, ()), *_fields(name)]
    usable = _usable(candidates, command)
    if usable:
        return f"{option}: no such option; use {usable}"
    near = None if candidates else _near(name, command)
    if near:
        return f"{option}: no such option; did you mean {near}?"
    return (
        f"{option}: sniper {command.name} has no such option{_elsewhere(name, candidates, command, commands)}"
    )


def _elsewhere(name: str, candidates: Sequence[str], command: Command, commands: Sequence[Command]) -> str:
    """Describe where an option is that the command does not have: in an experiment, a run, or another command."""
    names = [each for candidate in candidates for each in candidate.split(" or ")]
    fields = [each for each in names if "." in each]
    for field in fields:
        if any(field.startswith(start) for start in _FIELDS_OF_RUN.get(command.name, ())):
            return f"; it is {field} in config.yaml of the run"
    if fields and command.has("config"):
        return f"; it is {fields[0]} in an experiment file (--config FILE)"
    for each in [name, *names]:
        others = [other.name for other in commands if other is not command and other.has(each)]
        if others and not each.isupper():
            verb = "has" if len(others) == 1 else "have"
            listed = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
            return f"; sniper {listed} {verb} {'it' if each == name else f'--{each}'}"
    listed = ", ".join(each for each in command.options if each.startswith("--"))
    return f"; it has {listed}" + (
        ", and fields of an experiment (docs/configuration.md)" if "FIELD" in command.usage else ""
    )


def _usable(candidates: Sequence[str], command: Command) -> str | None:
    """Return how the first of some candidates is given that the command has; None if it has none."""
    for candidate in candidates:
        names = candidate.split(" or ")
        if all(map(command.has, names)):
            return " or ".join(map(command.spell, names))
    return None


def _near(name: str, command: Command) -> str | None:
    """Return the option that a misspelled name stands for: of the command, of an experiment, of another library."""
    from sniper.config.loading import list_fields

    near = difflib.get_close_matches(f"--{name}", command.options, n=1, cutoff=0.75)
    if near:
        return near[0]
    fields = {field.rpartition(".")[2].replace("_", "-") for field in list_fields()}
    for other in difflib.get_close_matches(name, sorted(fields | set(OTHER_NAMES)), cutoff=0.8):
        usable = _usable([*OTHER_NAMES.get(other, ()), *_fields(other)], command)
        if usable:
            return usable
    return None


def _fields(name: str) -> list[str]:
    """Return the fields of an experiment of this name, with hyphens for underscores, as one candidate."""
    from sniper.config.loading import find_fields

    fields = [field for field in find_fields(name.replace("-", "_")) if "." in field]
    return [" or ".join(fields)] if fields else []


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parse `--section.field VALUE` and `--section.field=VALUE` into values by dotted name.

    Raises:
        UnknownOption: if an option is neither a field nor a section.
        ConfigError: if an argument is no option, or has no value.
    """
    overrides: dict[str, str] = {}
    rest = list(arguments)
    last: tuple[str, str] | None = None
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("-"):
            raise ConfigError(_explain_value(argument, rest, last=last))
        if not argument.startswith("--") or not _is_field(name):
            raise UnknownOption(argument.partition("=")[0])
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{argument}: the value is missing; expected {argument} VALUE")
            value = rest.pop(0)
        if name in overrides:
            raise ConfigError(f"--{name}: is set twice, to {overrides[name]} and to {value}")
        overrides[name], last = value, (name, value)
    return overrides


def _is_field(name: str) -> bool:
    """Check whether an option is meant for an experiment: it has a section, or is a field or section at the top."""
    from sniper.config.loading import list_fields

    tops = {field.partition(".")[0] for field in list_fields()}
    return "." in name or (name in tops and name not in OTHER_NAMES)


def _explain_value(argument: str, rest: Sequence[str], *, last: tuple[str, str] | None) -> str:
    """Explain an argument that belongs to no option.

    Args:
        argument: the argument.
        rest: those after it.
        last: field and value of the option before it.
    """
    name, equals, value = argument.partition("=")
    if equals and name:
        return f"{argument}: expected an option with dashes, such as --{name} {value}"
    if last is None:
        return f"{argument}: expected --section.field VALUE; there is one data set or experiment"
    values = [last[1], argument, *itertools.takewhile(lambda each: not each.startswith("-"), rest)]
    items = ", ".join(value.strip("[], ") for value in values)
    return f"{argument}: belongs to no option; a list is written in quotes, such as --{last[0]} '[{items}]'"
