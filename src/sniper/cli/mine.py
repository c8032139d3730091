"""`sniper mine`: collect false alarms or proposals on the training images, for negative chips."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from sniper.cli.inputs import load_config, load_images, load_split
from sniper.cli.locks import locking
from sniper.cli.options import (
    ANNOTATIONS_HELP,
    Device,
    FollowLinks,
    Images,
    Json,
    TrainSplit,
    default,
    output_option,
)
from sniper.cli.output import announce_compilation, console, print_progress, print_result, print_warnings
from sniper.cli.progress import show_progress
from sniper.cli.search import naming_kept_images
from sniper.errors import AnnotationError, ConfigError, RunError, counted
from sniper.files import temporary_folder
from sniper.runs.lock import lock_file, lock_folder

if TYPE_CHECKING:
    from sniper.chips import PyramidSpec
    from sniper.config.experiment import ExperimentSpec
    from sniper.data.datasets import Dataset
    from sniper.inference.store import BoxStore
    from sniper.runs.run import Run

_Source = Literal["self", "rpn"]
_FOLDERS: dict[_Source, str] = {"self": "false_alarms", "rpn": "proposals"}  # in a run
_DOSE = 0.25


def _locks(
    run: Path, output: Path | None, to: str | None, **_: Any
) -> Iterator[AbstractContextManager[None]]:
    store = output if to is None else None
    if _is_run(run) and (store is None or store.resolve().is_relative_to(run.resolve())):
        yield lock_folder(run, option="-o")
    if store is not None:
        yield lock_folder(store, option="-o")
    elif output is not None:
        yield lock_file(output, option="-o")


@locking(_locks)
def mine(
    run: Annotated[Path, Parameter(help="Folder of the run. With --from, a data set may take its place.")],
    annotations: Annotated[
        Path | None,
        Parameter(
            help=f"Data set of the images. {ANNOTATIONS_HELP}", show_default=default("data.train of the run")
        ),
    ] = None,
    /,
    *,
    source: Annotated[
        _Source | None,
        Parameter(
            help="Collect false alarms of the detector itself (self), or proposals of its RPN (rpn). With --from: the "
            "detections that are on no object (self), or all (rpn).",
            show_default=default(
                "rpn for a run that mines with its RPN or has trained the RPN only, else self"
            ),
        ),
    ] = None,
    images: Images = None,
    split: TrainSplit = None,
    follow_links: FollowLinks = False,
    detections: Annotated[
        Path | None,
        Parameter(
            name="--from", help="COCO result file of any detector, to use instead of searching the images."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        Parameter(
            help="With a data set in place of the run: experiment file (YAML) or name of a recipe whose pyramid and "
            "settings are used.",
            show_default=default("the pyramid that `sniper plan` suggests"),
        ),
    ] = None,
    to: Annotated[
        Literal["coco", "yolo", "voc"] | None,
        Parameter(
            help="Write negative chips, as images with empty annotations in this format, for other trainers: windows "
            "with false alarms that show no object."
        ),
    ] = None,
    dose: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gt=0),
            help="With --to: the most negative chips, as a share of the positive chips that the images have.",
            show_default=default(str(_DOSE)),
        ),
    ] = None,
    output: Annotated[
        Path | None,
        output_option(
            "Folder for the false alarms or proposals, or for the images: then new or empty.",
            default="RUN/false_alarms or RUN/proposals",
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Collect what a detector takes for objects on its training images, for negative chips.

    The folder written is used by `sniper chips --proposals` and `sniper plan --proposals`; with `--to`, the images are
    used by any trainer. A stopped search is continued. Under torchrun, each process searches its share of the images.
    """
    started = time.monotonic()
    from sniper.data.datasets.write import check_new_folder
    from sniper.runs.processes import Processes

    if to is None and dose is not None:
        raise ConfigError("--dose requires --to; that of a training is negatives.dose")
    if to is not None:
        if output is None:
            raise ConfigError(f"--to {to} requires -o FOLDER, the folder to write the images to")
        check_new_folder(output)
    opened = _open_run(run, annotations, detections=detections, config=config)
    if opened is None and output is None:
        raise ConfigError(f"{run} is no run to write into; name a folder to write with -o FOLDER")
    spec = _load_spec(opened, config, follow_links=follow_links)
    source = _choose_source(run, spec, source, is_searched=detections is None)
    if to is not None and source == "rpn":
        raise ConfigError(
            f"--to {to} writes windows with false alarms, not with proposals; add --source self"
        )
    is_first = Processes.from_environment().is_first
    if detections is not None and not is_first:
        return  # there is nothing to search
    dataset = _load_dataset(
        spec,
        run if opened is None else annotations,
        images,
        split,
        has_images=detections is None or to is not None,
    )
    with _store_folder(run, source, output, to=to, is_searched=detections is None) as folder:
        if detections is not None:
            store = _store_detections(detections, dataset, folder, spec=spec, source=source)
        else:
            assert opened is not None
            store = _search(opened, dataset, folder, spec=spec, source=source, device=device)
        if not is_first:
            return
        result: dict[str, Any] = {
            "num_images": len(dataset),
            "skipped_images": [str(dataset[index].path) for index in store.unreadable],
            **_count(store, dataset, spec, source),
        }
        if to is None or output is None:
            result["bytes_per_image"] = round(store.num_bytes / max(len(dataset), 1), 1)
        else:
            if opened is None and config is None:
                spec = replace(spec, pyramid=_suggest_pyramid(dataset))
            written = _write_chips(store, dataset, output, spec=spec, to=to, dose=dose or _DOSE)
            result["skipped_images"] += written.pop("skipped_images")
            result |= written
    result["seconds"] = round(time.monotonic() - started, 3)
    result["output"] = str(folder if to is None else output)
    print_result(result if json else _to_text(result), is_json=json)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _open_run(
    run: Path, annotations: Path | None, *, detections: Path | None, config: Path | None
) -> "Run | None":
    """Open the run; None if there is a data set in its place.

    Raises:
        RunError: if there is neither.
        ConfigError: if an option does not fit to what there is.
    """
    from sniper.runs.run import Run

    if _is_run(run):
        if config is not None:
            raise ConfigError(f"--config {config}: {run} is a run, which has its own settings in config.yaml")
        return Run.open(run)
    if detections is None:
        try:
            return Run.open(run)
        except RunError as error:
            hint = "; a data set may take its place with --from FILE" if run.exists() else ""
            raise RunError(f"{error}{hint}") from error
    if annotations is not None:
        raise ConfigError(
            f"{run} is no run (config.yaml is missing), and a second data set came, {annotations}; expected RUN "
            "[ANNOTATIONS] or ANNOTATIONS alone with --from"
        )
    return None


def _load_spec(opened: "Run | None", config: Path | None, *, follow_links: bool) -> "ExperimentSpec":
    from sniper.config.loading import load_experiment

    spec = load_config(config) if opened is None else load_experiment(opened.config_path)
    return replace(spec, data=replace(spec.data, follow_links=True)) if follow_links else spec


def _choose_source(
    run: Path, spec: "ExperimentSpec", source: _Source | None, *, is_searched: bool
) -> _Source:
    """Return what to collect: what is asked for, or what the run mines with.

    Raises:
        ConfigError: if the run has no detector to search with.
    """
    if source is None:
        return "rpn" if spec.negatives.source == "rpn" or spec.train.rpn_only else "self"
    if source == "rpn" and is_searched and not spec.model.has_rpn:
        raise ConfigError(
            f"--source rpn: {run} has {spec.model.name}, which has no region proposal network; expected --source self"
        )
    if source == "self" and spec.train.rpn_only and is_searched:
        raise ConfigError(
            f"--source self: {run} has trained the RPN only (train.rpn_only), so it has no detections; expected "
            "--source rpn"
        )
    return source


def _load_dataset(
    spec: "ExperimentSpec",
    annotations: Path | None,
    images: Path | None,
    split: str | None,
    *,
    has_images: bool,
) -> "Dataset":
    """Load the annotations given, or those that the run is trained on."""
    if annotations is not None:
        return load_images(annotations, images=images, split=split, data=spec.data, has_images=has_images)
    if split is not None:
        raise ConfigError("--split requires ANNOTATIONS; the run has the split of its own data set")
    if images is not None:
        raise ConfigError("--images requires ANNOTATIONS; the run has the image folder of its own data set")
    return load_split(spec, "train", has_images=has_images)


@contextmanager
def _store_folder(
    run: Path, source: _Source, output: Path | None, *, to: str | None, is_searched: bool
) -> Iterator[Path]:
    """Lock the folder of what is collected for the duration of a block.

    If images are written, a search is kept in the run, to be continued, and detections of a file for the block alone.
    """
    if to is not None and output is not None and not is_searched:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(output.parent) as parent:
            yield parent / _FOLDERS[source]
        return
    folder = run / _FOLDERS[source] if to is not None or output is None else output
    with lock_folder(folder, option="-o"):
        yield folder


def _store_detections(
    detections: Path, dataset: "Dataset", folder: Path, *, spec: "ExperimentSpec", source: _Source
) -> "BoxStore":
    from sniper.evaluation.results import load_detections
    from sniper.inference.mining import proposals_from_detections

    return proposals_from_detections(
        load_detections(detections),
        dataset,
        folder,
        spec=spec.mine,
        source=detections,
        only_false_alarms=source == "self",
    )


def _search(
    opened: "Run",
    dataset: "Dataset",
    folder: Path,
    *,
    spec: "ExperimentSpec",
    source: _Source,
    device: str | None,
) -> "BoxStore":
    from sniper.inference import mining
    from sniper.runs.processes import Processes, select_device

    chosen = select_device(device)
    with (
        Processes.from_environment().process_group(chosen) as processes,
        show_progress(is_shown=processes.is_first) as bars,
        naming_kept_images("the same command continues with the others"),
    ):
        search = mining.mine_alarms if source == "self" else mining.mine
        return search(
            opened, spec, dataset, folder, device=chosen, on_progress=bars.mining, processes=processes
        )


def _count(store: "BoxStore", dataset: "Dataset", spec: "ExperimentSpec", source: _Source) -> dict[str, Any]:
    """Return how many false alarms or proposals a store has."""
    if source == "rpn":
        return {"num_proposals": int(store.counts.sum())}
    import numpy as np

    from sniper.data.epoch import to_image_boxes
    from sniper.inference.proposals import read_alarms

    boxes = to_image_boxes(dataset)
    alarms = read_alarms(store, boxes, min_score=spec.negatives.min_score)
    has_no_objects = ~boxes.has_required
    num_images = int(has_no_objects.sum())
    num_alarms = int(np.diff(alarms.images.offsets)[has_no_objects].sum())
    return {
        "num_false_alarms": len(alarms.scores),
        "min_score": spec.negatives.min_score,
        "num_images_without_objects": num_images,
        "num_false_alarms_without_objects": num_alarms,
        "false_alarms_per_image_without_objects": num_alarms / num_images if num_images else None,
    }


def _suggest_pyramid(dataset: "Dataset") -> "PyramidSpec":
    """Return the pyramid that `sniper plan` suggests.

    Raises:
        AnnotationError: if there is no object to suggest it for.
    """
    from sniper.data.epoch import to_image_boxes
    from sniper.planning.suggest import suggest_pyramid

    with console.status("searching for a pyramid"), announce_compilation():
        suggestion = suggest_pyramid(to_image_boxes(dataset))
    if suggestion is None:
        raise AnnotationError(
            f"{dataset.path}: has no object, so no pyramid can be suggested, and there are no positive chips that "
            "--dose refers to"
        )
    print_progress(f"pyramid: {suggestion.reason}")
    return suggestion.pyramid


def _write_chips(
    store: "BoxStore",
    dataset: "Dataset",
    output: Path,
    *,
    spec: "ExperimentSpec",
    to: Literal["coco", "yolo", "voc"],
    dose: float,
) -> dict[str, Any]:
    """Write negative chips that show no object, and return what was written."""
    import numpy as np

    from sniper.data.chip_labels import ChipFileSpec
    from sniper.data.epoch import to_image_boxes
    from sniper.data.export import ChipExport, ChipSplit, choose_empty_chips
    from sniper.inference.proposals import read_alarms
    from sniper.planning.chip_sets import export_chips
    from sniper.reports.page import resize_rule, sizes_text

    with announce_compilation():
        chips = choose_empty_chips(
            dataset,
            read_alarms(store, to_image_boxes(dataset), min_score=spec.negatives.min_score),
            spec.negatives,
            dose=dose,
            pyramid=spec.pyramid,
            generator=np.random.default_rng(spec.seed),
        )
    if len(chips.table) == 0:
        raise AnnotationError(
            f"{dataset.path}: there is no negative chip to write: "
            f"{counted(chips.num_windows, 'window has', 'windows have')} false alarms with a score of at least "
            f"{spec.negatives.min_score:g}, {chips.num_with_objects} of them with an object, and a dose of {dose:g} "
            f"allows {int(dose * chips.num_positives)} for {counted(chips.num_positives, 'positive chip')}"
        )
    export = ChipExport(
        {"": ChipSplit(dataset=dataset, tables=(chips.table,))},
        output,
        ChipFileSpec(to=to, encoding="png", ignored="keep", is_padded=False),
        data=spec.data,
    )
    with show_progress(is_shown=True) as bars:
        written = export_chips(export, on_progress=bars.writing)
    assert written is not None
    print_warnings(f"{output}: {warning}" for warning in written.warnings)
    return {
        "skipped_images": [str(path) for path in written.skipped_images],
        "chip_size": spec.pyramid.chip_size,
        "levels": [f"{resize_rule(level)}: {sizes_text(level)}" for level in spec.pyramid.levels],
        "num_positive_chips": chips.num_positives,
        "num_windows": chips.num_windows,
        "num_windows_with_objects": chips.num_with_objects,
        "num_negative_chips": written.counts["num_chips"],
    }


def _to_text(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as lines for people."""
    texts = {name: "-" if value is None else value for name, value in result.items()}
    return {name: "; ".join(value) if name == "levels" else value for name, value in texts.items()}
