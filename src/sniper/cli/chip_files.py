"""Write chips as images with annotations: what `sniper chips --to` does for training, and for a search."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sniper.cli.images import find_image_files
from sniper.cli.inputs import load_images, scored_split
from sniper.cli.output import announce_compilation, console, print_progress, print_warnings
from sniper.cli.progress import show_progress
from sniper.errors import AnnotationError, ConfigError
from sniper.training.signals import Stopped

if TYPE_CHECKING:
    from sniper.chips import ChipTable
    from sniper.chips.image_boxes import ScoredBoxes
    from sniper.data.chip_labels import ChipFileSpec
    from sniper.data.datasets import Dataset
    from sniper.data.export import ChipSplit
    from sniper.data.spec import DataSpec
    from sniper.evaluation.results import DetectionTable
    from sniper.planning.chip_sets import ChipSettings

_DOSE = 0.25


@dataclass(frozen=True, kw_only=True)
class ChipOptions:
    """What is written, and with which settings.

    Attributes:
        annotations: the data set, or images to search.
        folder: to write.
        config: experiment file or recipe.
        overrides: fields of the experiment, by option.
        images: folder of the images.
        split: of the data set.
        follow_links: whether images may be links that leave their folder.
        seed: of the choice; None is that of the experiment.
        files: how chips are written.
    """

    annotations: Path
    folder: Path
    config: Path | None
    overrides: Mapping[str, str]
    images: Path | None
    split: str | None
    follow_links: bool
    seed: int | None
    files: "ChipFileSpec"

    def load_settings(self) -> "ChipSettings":
        """Load the experiment, and put the options over it."""
        from sniper.planning.chip_sets import ChipSettings

        settings = ChipSettings.load(self.config, self.overrides)
        spec = settings.spec
        if self.follow_links:
            spec = replace(spec, data=replace(spec.data, follow_links=True))
        if self.seed is not None:
            spec = replace(spec, seed=self.seed)
        return replace(settings, spec=spec)

    def check_folder(self) -> None:
        """Check that the folder to write is new, or has chips, before anything is searched for.

        Raises:
            ConfigError: if it has something else, or its format cannot express what is to be written.
        """
        from sniper.data.chip_manifest import MANIFEST
        from sniper.data.datasets.write import check_new_folder

        self.files.check()
        if not (self.folder / MANIFEST).is_file():
            check_new_folder(self.folder)


def write_training(
    options: ChipOptions,
    *,
    val: Path | None,
    val_as: Literal["chips", "windows", "whole", "none"],
    num_epochs: int,
    dose: float | None,
    detections: Path | None,
    proposals: Path | None,
) -> dict[str, Any] | None:
    """Write chips to train on, and to validate on.

    Returns:
        The result of the command, in the first process; None in the others.
    """
    from sniper.data.export import ChipSplit
    from sniper.evaluation.results import load_detections
    from sniper.planning.chip_sets import choose_tables, validation_split

    options.check_folder()
    settings = options.load_settings()
    has_chips = settings.spec.data.tiles is None and settings.spec.data.whole is None
    if not has_chips and (dose is not None or detections is not None or proposals is not None):
        raise ConfigError(
            "negative chips (--dose, --from, --proposals) are of chips, not of tiles or whole images"
        )
    found = None if detections is None else load_detections(detections)
    dataset, validated = _load_train_and_val(options, settings, val=val, has_val=val_as != "none")
    is_first = _is_first()
    with announce_compilation(is_shown=is_first):
        with console.status("searching for a pyramid"):
            settings = settings.complete(
                dataset, on_reason=lambda reason: print_progress(f"pyramid: {reason}") if is_first else None
            )
        share = _DOSE if dose is None else dose
        alarms, table = _find_negatives(
            dataset, settings, detections=detections, found=found, proposals=proposals
        )
        tables = choose_tables(
            dataset, settings, num_epochs=num_epochs, share=share, alarms=alarms, table=table
        )
        splits = {"train": ChipSplit(dataset=dataset, tables=tables)}
        if validated is not None and val_as != "none":
            splits["val"] = validation_split(validated, settings, written_as=val_as, share=share)
    return _export(options, settings, splits)


def write_search(options: ChipOptions) -> dict[str, Any] | None:
    """Write the windows in which images are searched.

    Returns:
        The result of the command, in the first process; None in the others.
    """
    from sniper.planning.chip_sets import search_split

    options.check_folder()
    settings = options.load_settings()
    if not settings.has_levels and not settings.has("predict.levels"):
        raise ConfigError(
            "--search: needs the scales that the detector is trained at; expected --config CHIPS/experiment.yaml, "
            "which sniper chips --to writes beside the chips to train on, or --predict.levels"
        )
    settings = settings.with_search_levels()
    dataset = _load_searched(options, settings)
    return _export(options, settings, {"test": search_split(dataset, settings)})


def _export(
    options: ChipOptions, settings: "ChipSettings", splits: Mapping[str, "ChipSplit"]
) -> dict[str, Any] | None:
    import torch

    from sniper.data.export import ChipExport
    from sniper.planning.chip_sets import export_chips
    from sniper.reports.page import resize_rule, sizes_text
    from sniper.runs.processes import Processes

    spec = settings.spec
    export = ChipExport(
        splits,
        options.folder,
        replace(options.files, min_visible_side=spec.data.min_visible_side),
        data=spec.data,
        experiment=settings.to_yaml(),
    )
    with (
        Processes.from_environment().process_group(torch.device("cpu")) as processes,
        show_progress(is_shown=processes.is_first) as bars,
        _naming_kept_chips(),
    ):
        written = export_chips(export, on_progress=bars.writing, processes=processes)
    if written is None:
        return None
    print_warnings(f"{options.folder}: {warning}" for warning in written.warnings)
    num_lost, num_objects = written.counts["objects_in_no_chip"], written.counts["num_objects"]
    if num_lost:
        print_warnings([f"{num_lost:,} of {num_objects:,} objects are annotated in no chip"])
    levels = spec.predict.levels if "test" in splits else _training_levels(settings)
    return {
        "chip_size": settings.window if "test" in splits else settings.chip_side,
        "levels": [f"{resize_rule(level)}: {sizes_text(level)}" for level in levels],
        **written.counts,
        "skipped_images": [str(path) for path in written.skipped_images],
    }


def _training_levels(settings: "ChipSettings") -> tuple[Any, ...]:
    data = settings.spec.data
    if data.tiles is not None or data.whole is not None:
        return settings.spec.predict.levels
    return settings.spec.pyramid.levels


def _load_train_and_val(
    options: ChipOptions, settings: "ChipSettings", *, val: Path | None, has_val: bool
) -> tuple["Dataset", "Dataset | None"]:
    """Load the images to train and to validate on: the ones given, the split val or test, or a tenth held out."""
    from sniper.data.holdout import hold_out
    from sniper.planning.auto import HOLDOUT

    data = settings.spec.data
    dataset = load_images(options.annotations, images=options.images, split=options.split, data=data)
    if not has_val:
        if val is not None:
            raise ConfigError(f"--val {val}: is not written with --val-as none")
        return dataset, None
    if val is not None:
        return dataset, load_images(val, images=None, split=scored_split(val, None), data=data)
    scored = scored_split(options.annotations, None)
    if scored is not None and scored != options.split:
        return dataset, load_images(options.annotations, images=options.images, split=scored, data=data)
    print_progress(f"val: {HOLDOUT:.0%} of the images are held out, as there is no split to validate on")
    return hold_out(dataset, share=HOLDOUT, seed=settings.spec.seed)


def _find_negatives(
    dataset: "Dataset",
    settings: "ChipSettings",
    *,
    detections: Path | None,
    found: "DetectionTable | None",
    proposals: Path | None,
) -> "tuple[ScoredBoxes | None, ChipTable | None]":
    """Return false alarms to cut negative chips around, or a table with negative chips, if there are any."""
    if detections is None and proposals is None:
        return None, None
    import tempfile

    from sniper.data.epoch import to_image_boxes
    from sniper.inference.mining import proposals_from_detections
    from sniper.inference.proposals import has_false_alarms, open_proposals, read_alarms
    from sniper.planning.plan import choose_chips

    spec, boxes = settings.spec, to_image_boxes(dataset)
    if proposals is not None:
        store = open_proposals(proposals, dataset)
        if not has_false_alarms(store):
            return None, choose_chips(dataset, spec, proposals=proposals, seed=spec.seed)
        return read_alarms(store, boxes, min_score=spec.negatives.min_score), None
    assert detections is not None
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        store = proposals_from_detections(
            found,
            dataset,
            Path(folder) / "alarms",
            spec=spec.mine,
            source=detections,
            only_false_alarms=True,
        )
        return read_alarms(store, boxes, min_score=spec.negatives.min_score), None


def _load_searched(options: ChipOptions, settings: "ChipSettings") -> "Dataset":
    """Load the images to search: those of a data set, or image files; with the classes of the chips trained on."""
    from sniper.data.chip_manifest import MANIFEST, read_head
    from sniper.data.datasets.load import find_splits

    data = settings.spec.data
    try:
        find_splits(options.annotations)
    except AnnotationError as error:
        try:
            dataset = _load_files(options.annotations, data)
        except ConfigError:
            raise error from None
        if options.split is not None or options.images is not None:
            raise ConfigError("--split and --images require a data set, not image files") from None
    else:
        split = scored_split(options.annotations, options.split)
        dataset = load_images(options.annotations, images=options.images, split=split, data=data)
    head = None if options.config is None else read_head(options.config.parent / MANIFEST)
    if head is None and not dataset.categories:
        print_warnings(
            [
                "the classes of the detector are not known, so detections keep the category ids they have; --config "
                "CHIPS/experiment.yaml beside the chips trained on names them"
            ]
        )
    return dataset if head is None else replace(dataset, categories=head.categories)


def _load_files(annotations: Path, data: "DataSpec") -> "Dataset":
    """Return image files as a data set without objects; their names are those that were given, as in `predict`."""
    import numpy as np

    from sniper.data.datasets.load import load_image_files

    found = find_image_files([str(annotations)])
    print_warnings(found.warnings)
    dataset = load_image_files(found.images, path=annotations, data=data)
    print_warnings(dataset.warnings)
    names = [str(found.images[number - 1]) for number in dataset.image_ids.tolist()]
    return replace(dataset, file_names=np.array(names, dtype=np.str_), follow_links=True)


def _is_first() -> bool:
    from sniper.runs.processes import Processes

    return Processes.from_environment().is_first


@contextmanager
def _naming_kept_chips() -> Iterator[None]:
    """Add to an interrupt that what is written before is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped.of(
            stop, "; the chips written so far are kept, and the same command continues with the others"
        ) from stop
