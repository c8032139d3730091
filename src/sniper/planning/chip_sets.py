"""The chips that `sniper chips --to` writes: chosen as for training, as windows of a search, tiles or whole images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from sniper.chips import ChipTable, LevelSpec
from sniper.chips.baselines import tiles, whole_images
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.negatives import choose_background
from sniper.config.experiment import ExperimentSpec, widened
from sniper.config.loading import dump_experiment, is_given, load_partial
from sniper.config.recipes import find_recipe
from sniper.data.datasets import Dataset
from sniper.data.epoch import order_chips, to_image_boxes
from sniper.data.export import ChipExport, ChipSplit, WrittenChips
from sniper.errors import AnnotationError
from sniper.files import expand_path
from sniper.inference.windows import list_windows
from sniper.planning.suggest import suggest_unless_given
from sniper.runs.processes import SINGLE_PROCESS, Processes

ValidationImages = Literal["chips", "windows", "whole"]

_SHOWN_FIELDS = ("read", "on_bad_image", "follow_links", "crowds", "class_property", "whole", "tiles")
"""Fields of the section data that are written beside chips."""


@dataclass(frozen=True, kw_only=True)
class ChipSettings:
    """An experiment that chips are cut with.

    Attributes:
        spec: the experiment.
        names: dotted names of the fields that were set.
    """

    spec: ExperimentSpec
    names: frozenset[str]

    @classmethod
    def load(cls, config: Path | None, overrides: Mapping[str, str]) -> "ChipSettings":
        """Load a file or a recipe, and overrides.

        Args:
            config: experiment file, or name of a recipe; None has the overrides alone.
            overrides: see `load_experiment`.

        Raises:
            ConfigError: naming all problems.
        """
        path = None if config is None else expand_path(config)
        if path is not None and not path.exists():
            path = find_recipe(path)
        spec, names = load_partial(path, overrides=overrides)
        return cls(spec=spec, names=names)

    def has(self, name: str) -> bool:
        """Check whether a field, or a field within a section, was set."""
        return is_given(name, self.names)

    @property
    def has_levels(self) -> bool:
        """Whether the scales are set: by a pyramid, by tiles or by whole images."""
        data = self.spec.data
        return self.has("pyramid.levels") or data.tiles is not None or data.whole is not None

    def complete(self, dataset: Dataset, *, on_reason: Callable[[str], None]) -> "ChipSettings":
        """Return the settings with the pyramid that suits a data set, if none is set, and the levels of a search.

        Args:
            dataset: the images to train on.
            on_reason: called with the reason for a pyramid that is suggested.

        Raises:
            AnnotationError: if there is no object to suggest it for.
        """
        if self.has_levels:
            return self.with_search_levels()
        neck = self.spec.model.backbone.neck if self.has("model.backbone.neck") else "fpn"
        suggestion = suggest_unless_given(to_image_boxes(dataset), self.spec, self.names, neck=neck)
        if suggestion is None:
            # This explains what there is instead.
            order_chips(dataset, self.spec.pyramid, batch_size=1, flip=0.0, seed=0, epoch=0)
            raise AnnotationError(f"{dataset.path}: has no object, so no pyramid can be suggested")
        on_reason(suggestion.reason)
        spec = replace(self.spec, pyramid=suggestion.pyramid)
        return ChipSettings(spec=spec, names=self.names | {"pyramid.levels"}).with_search_levels()

    def with_search_levels(self) -> "ChipSettings":
        """Return the settings with the levels of a search that suit the training, unless they are set."""
        if self.has("predict.levels"):
            return self
        data = self.spec.data
        if data.tiles is not None:
            levels: tuple[LevelSpec, ...] = (LevelSpec(factor=data.tiles.factor),)
        else:
            levels = widened(self.spec.pyramid.levels) if data.whole is None else data.whole.levels
        return replace(self, spec=replace(self.spec, predict=replace(self.spec.predict, levels=levels)))

    @property
    def chip_side(self) -> int:
        """The side of a written chip or tile, pixels."""
        tiles_spec = self.spec.data.tiles
        return self.spec.pyramid.chip_size if tiles_spec is None else tiles_spec.side

    @property
    def window(self) -> int:
        """The longest side of a window of a search, pixels: that which is set, or that of a chip."""
        return self.spec.predict.window if self.has("predict.window") else self.chip_side

    def to_yaml(self) -> str:
        """Write what is needed to cut chips alike, and to search other images at the same scales, as YAML."""
        values = yaml.safe_load(dump_experiment(self.spec))
        data = {name: values["data"][name] for name in _SHOWN_FIELDS if values["data"][name] is not None}
        predict = values["predict"]
        if not self.has("predict.window"):
            del predict["window"]
        written = {"seed": values["seed"], "data": data, "pyramid": values["pyramid"], "predict": predict}
        return "# The settings of these chips; sniper chips --search --config reads them.\n" + yaml.safe_dump(
            written, sort_keys=False
        )


def choose_tables(
    dataset: Dataset,
    settings: ChipSettings,
    *,
    num_epochs: int,
    share: float,
    alarms: ScoredBoxes | None = None,
    table: ChipTable | None = None,
) -> tuple[ChipTable, ...]:
    """Choose the chips of some epochs as a training does, with negative chips; or the tiles or whole images.

    Args:
        dataset: the images.
        settings: complete ones.
        num_epochs: tables to return.
        share: the most negative chips as a share of the positive ones.
        alarms: false alarms that negative chips are cut around; None takes windows at random that show no object.
        table: chips to draw the negative ones of each epoch from, instead of choosing chips for each.

    Raises:
        AnnotationError: if there is no box to learn from.
    """
    spec, boxes = settings.spec, to_image_boxes(dataset)
    if spec.data.whole is not None:
        return (whole_images(spec.data.whole, boxes),) * num_epochs
    if spec.data.tiles is not None:
        return (tiles(spec.data.tiles, boxes),) * num_epochs
    tables = []
    for epoch in range(num_epochs):
        chosen = order_chips(
            dataset,
            spec.pyramid,
            batch_size=1,
            flip=0.0,
            seed=spec.seed,
            epoch=epoch,
            table=table,
            alarms=alarms,
            negatives=spec.negatives,
            dose=share,
        ).table
        if alarms is None and table is None:
            generator = np.random.default_rng([spec.seed, epoch, 1])
            count = int(share * len(chosen))
            chosen = chosen.merge(
                choose_background(chosen, boxes, pyramid=spec.pyramid, count=count, generator=generator)
            )
        tables.append(chosen)
    return tuple(tables)


def validation_split(
    dataset: Dataset, settings: ChipSettings, *, written_as: ValidationImages, share: float
) -> ChipSplit:
    """Return the images to validate on: as chips like those of training, windows of a search, or whole.

    Args:
        dataset: the images.
        settings: complete ones.
        written_as: which.
        share: of the negative chips, as in `choose_tables`.
    """
    if written_as == "windows":
        return replace(search_split(dataset, settings), has_labels=True)
    if written_as == "whole":
        return ChipSplit(dataset=dataset, tables=(_as_they_are(dataset),))
    return ChipSplit(dataset=dataset, tables=choose_tables(dataset, settings, num_epochs=1, share=share))


def _as_they_are(dataset: Dataset) -> ChipTable:
    """Return all images whole, without resizing them."""
    images, count = to_image_boxes(dataset), len(dataset)
    zeros = np.zeros(count, dtype=np.int64)
    return ChipTable(
        levels=(LevelSpec(factor=1.0),),
        image_widths=images.widths,
        image_heights=images.heights,
        image_indices=np.arange(count),
        level=zeros,
        x=zeros,
        y=zeros,
        widths=images.widths,
        heights=images.heights,
        is_negative=zeros.astype(np.bool_),
        moved_to=np.full(len(images.boxes), -1, dtype=np.int8),
    )


def search_split(dataset: Dataset, settings: ChipSettings) -> ChipSplit:
    """Return the windows in which a detector sees images in a search, without annotations."""
    boxes = to_image_boxes(dataset)
    table = list_windows(settings.spec.predict.levels, boxes, limit=settings.window)
    return ChipSplit(dataset=dataset, tables=(table,), has_labels=False, window=settings.window)


def export_chips(
    export: ChipExport,
    *,
    on_progress: Callable[[int, int], None],
    processes: Processes = SINGLE_PROCESS,
) -> WrittenChips | None:
    """Write chips; all processes call this.

    Returns:
        What was written, in the first process; None in the others.

    Raises:
        ConfigError: if the folder has something else.
        ImageError: if an image cannot be read and is not to be skipped.
    """
    written = export.find_written()
    processes.barrier()  # all have looked before the first one moves the folder
    if written is not None:
        return written if processes.is_first else None
    if processes.is_first:
        export.start()
    processes.barrier()
    export.write((processes.rank, processes.world_size), on_progress=on_progress)
    processes.barrier()
    return export.finish() if processes.is_first else None
