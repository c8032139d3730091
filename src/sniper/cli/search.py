"""Search the images of a data set with the detector of a run: what `predict` and `evaluate` share."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sniper.cli.output import print_progress
from sniper.cli.unknown import UnknownOption, parse_overrides
from sniper.errors import ConfigError, counted
from sniper.training.signals import Stopped

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.data.datasets.categories import CategoryMatch
    from sniper.inference.detector import Detector
    from sniper.inference.exported import Engine, ExportedFile
    from sniper.inference.results import ImageToSearch
    from sniper.runs.run import CheckpointChoice, Run


def split_overrides(arguments: Sequence[str], *, sections: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split arguments into paths, and fields of the experiment that are set.

    Args:
        arguments: of the command.
        sections: whose fields it has, such as `predict`.

    Raises:
        UnknownOption: if an argument is no option, or sets another field.
        ConfigError: if a field has no value.
    """
    paths, options = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or Path(argument).exists():
            paths.append(argument)
            continue
        name, has_value, _ = argument.partition("=")
        if not name.startswith(tuple(f"--{section}." for section in sections)):
            raise UnknownOption(name)
        options.append(argument)
        if not has_value and rest:
            options.append(rest.pop(0))
    return paths, {f"--{name}": value for name, value in parse_overrides(options).items()}


def list_images(images: "Dataset | list[Path]") -> list["ImageToSearch"]:
    """List the images of a data set, or image files, numbered from 1."""
    from sniper.inference.results import ImageToSearch

    if not isinstance(images, list):
        return [ImageToSearch(image_id=record.image_id, path=record.path, record=record) for record in images]
    return [
        ImageToSearch(image_id=number, path=path, file_name=str(path))
        for number, path in enumerate(images, start=1)
    ]


def image_folders(dataset: "Dataset") -> set[Path]:
    """Return the folders of the images of a data set, but not that of its annotations: it may have anything."""
    return {record.path.parent for record in dataset} - {dataset.path, dataset.path.parent}


def match_classes(detector: "Detector", truth: "Dataset | None", *, run: Path | str) -> "CategoryMatch":
    """Match the classes of the detector with the categories of the data set that is searched, if there is one."""
    from sniper.data.datasets.categories import match_categories

    return match_categories(
        detector.categories,
        () if truth is None else truth.categories,
        classes_of=str(run),
        categories_of="" if truth is None else str(truth.path),
    )


def describe_match(match: "CategoryMatch") -> Iterator[str]:
    """Yield the differences between the classes of the detector and the categories, and what they lead to."""
    yield from match.warnings
    if match.added:
        ids = ", ".join(f"{category.name!r} {category.category_id}" for category in match.added)
        yield f"detections of classes that the data set lacks are written with ids that it does not use: {ids}"


def parse_checkpoint(text: str) -> "CheckpointChoice":
    """Return the checkpoint that an option selects.

    Raises:
        ConfigError: if it is neither `best` nor `last` nor a number.
    """
    match text:
        case "best" | "last":
            return text
        case _ if text.isdecimal():
            return int(text)
    raise ConfigError(f"--checkpoint {text}: expected best, last, or the number of a step")


@dataclass(frozen=True, kw_only=True)
class LoadedDetector:
    """The detector of a run at one checkpoint.

    Attributes:
        detector: the detector.
        step: of the checkpoint; 0 for a detector of a library, or an exported one.
        source: what detections depend on beside the settings of the detector: its weights and its model.
    """

    detector: "Detector"
    step: int
    source: Mapping[str, Any]


def load_detector(
    run: "Run",
    device: str | None,
    *,
    spec: "ExperimentSpec",
    checkpoint: "CheckpointChoice",
    engine: "Engine" = "torch",
) -> LoadedDetector:
    """Load the detector of a run, which may be trained meanwhile, in an engine.

    Args:
        run: the run.
        device: name of the device, as given; None is a GPU if there is one for torch, and the CPU for the others.
        spec: how to search.
        checkpoint: see `Detector.load`.
        engine: what runs the detector.
    """
    from sniper.files import sha256
    from sniper.inference.detector import Detector

    def load(weights: Path) -> LoadedDetector:
        step = int(weights.parent.name)
        source: dict[str, Any] = {"weights": sha256(weights), "model": asdict(spec.model)}
        if engine == "torch":
            from sniper.runs.processes import select_device

            detector = Detector.load(run, select_device(device), spec=spec, checkpoint=step)
        else:
            from sniper.inference.exporting import load_engine

            source["engine"] = engine
            detector = load_engine(
                run,
                engine,
                spec=spec,
                device=device,
                checkpoint=step,
                on_export=lambda path: print_progress(f"exporting to {path}, once for these weights"),
            )
        return LoadedDetector(detector=detector, step=step, source=source)

    return run.read_weights(checkpoint, load)


def load_library_detector(name: str, device: str | None, *, spec: "ExperimentSpec") -> LoadedDetector:
    """Load a detector of a library, such as `torchvision:fcos_resnet50_fpn`."""
    from sniper.files import sha256
    from sniper.inference import loading
    from sniper.inference.detector import is_library
    from sniper.runs.processes import select_device

    if not is_library(name):
        raise ConfigError(
            f"--detector {name}: expected torchvision:NAME, torchvision:NAME@FILE or transformers:NAME"
        )
    detector, loaded = loading.load_library_detector(name, select_device(device), spec=spec)
    source = {"weights": sha256(loaded.weights), "model": asdict(loaded.model.spec)}
    return LoadedDetector(detector=detector, step=0, source=source)


def load_exported_detector(exported: "ExportedFile", path: Path, *, spec: "ExperimentSpec") -> LoadedDetector:
    """Load a detector that `sniper export` has written."""
    from sniper.files import sha256

    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    source = {"weights": [sha256(file) for file in files], "model": exported.spec.model}
    return LoadedDetector(
        detector=exported.detector(predict=spec.predict, data=spec.data), step=0, source=source
    )


def describe_weights(run: "Run", step: int) -> str:
    """Return which checkpoint is used, and its AP."""
    from sniper.reports.scores import format_score

    line = f"checkpoint: step {step:,}"
    scored = [entry for entry in run.evaluations if entry.step == step]
    if scored:
        line += f", AP {format_score(scored[-1].ap)} on {counted(scored[-1].num_images, 'validation image')}"
    newest = int(run.checkpoints[-1].name)
    return line if step == newest else f"{line}; the newest is {newest:,} (--checkpoint last)"


def describe_focus(loaded: LoadedDetector, spec: "ExperimentSpec", *, run: "Run | None") -> str | None:
    """Return where fine levels are searched, or why the focus that was chosen is not used; None without a focus.

    Args:
        loaded: the detector.
        spec: how to search, before the choice of the run is taken.
        run: None for a detector of a library, or an exported one.
    """
    from sniper.config.experiment import FocusSpec
    from sniper.inference.focus_choice import load_focus

    focus = loaded.detector.spec.focus
    choice = load_focus(run) if run is not None and spec.predict.focus == "auto" else None
    if isinstance(focus, FocusSpec):
        if loaded.detector.window_sides is not None:
            return "focus: not used, as this detector takes images of fixed sides"
        line = (
            f"focus: windows of {focus.window} pixels where scores sum to {focus.min_score:g} ({focus.cues})"
        )
        if choice is None:
            return line
        return (
            f"{line}, as chosen on {counted(choice.num_images, 'image')}: {1 / choice.time_share:.1f} times as fast, "
            f"AP {choice.ap:.3f} instead of {choice.ap_whole:.3f}; --predict.focus null searches everything"
        )
    if choice is None or run is None:
        return None
    reason = (
        "other levels (predict.levels)"
        if choice.step == loaded.step
        else f"the weights of step {choice.step:,}"
    )
    return (
        f"focus: every level is searched as a whole: {run.focus_path} was chosen for {reason}; choose anew with "
        f"sniper focus {shlex.quote(str(run.folder))}"
    )


@contextmanager
def naming_kept_images(continuation: str) -> Iterator[None]:
    """Add to an interrupt that the images searched before are kept.

    Args:
        continuation: how the search is continued.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped.of(stop, f"; the images searched so far are kept, and {continuation}") from stop
