"""Write negative chips as a data set of images without objects, for trainers that have no chips of their own."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sniper.chips import Chip, ChipTable, PyramidSpec
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.negatives import NegativeSpec, choose_on_alarms, draw_negatives
from sniper.chips.visibility import chip_visibility
from sniper.data.datasets import Dataset
from sniper.data.datasets.write import FormatName, check_new_folder, write_dataset
from sniper.data.epoch import choose_positive_chips, to_image_boxes
from sniper.data.reader import ChipReader
from sniper.data.spec import DataSpec
from sniper.errors import ImageError
from sniper.files import naming_path, temporary_folder

_PNG_COMPRESSION = (
    3  # as that of the cache: a third of the time of the default, for a few per cent of the bytes
)


@dataclass(frozen=True, kw_only=True, eq=False)
class EmptyChips:
    """Negative chips that show no object.

    Attributes:
        table: the chips that were drawn, ordered by image.
        num_positives: number of positive chips, which the dose refers to.
        num_windows: number of windows that were chosen on the false alarms.
        num_with_objects: number of those that show at least a part of an object, a crowd or a region to ignore.
    """

    table: ChipTable
    num_positives: int
    num_windows: int
    num_with_objects: int


def choose_empty_chips(
    dataset: Dataset,
    alarms: ScoredBoxes,
    spec: NegativeSpec,
    *,
    dose: float,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> EmptyChips:
    """Choose windows on false alarms that show no object, crowd or region to ignore, not even in part.

    Args:
        dataset: the images with their objects.
        alarms: false alarms in the same images.
        spec: which false alarms the positive chips exclude, and the most chips of an image.
        dose: the most chips, as a share of the positive chips. They are drawn with probabilities in proportion to the
            scores of their false alarms; see `draw_negatives`.
        pyramid: to cut chips from.
        generator: breaks ties and draws.
    """
    positives = choose_positive_chips(dataset, pyramid, generator=generator)
    windows, masses = choose_on_alarms(positives, alarms, spec, pyramid=pyramid, generator=generator)
    _, num_boxes = chip_visibility(windows, to_image_boxes(dataset))
    is_empty = num_boxes == 0
    table = positives.merge(windows.select(np.flatnonzero(is_empty)))
    masses_of_table = np.zeros(len(table))
    masses_of_table[table.is_negative] = masses[is_empty]
    drawn = draw_negatives(
        table, per_image=spec.per_image, dose=dose, masses=masses_of_table, generator=generator
    )
    return EmptyChips(
        table=table.select(drawn[table.is_negative[drawn]]),
        num_positives=len(positives),
        num_windows=len(windows),
        num_with_objects=int((~is_empty).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class WrittenChips:
    """What was written.

    Attributes:
        num_chips: number of chips.
        skipped_images: of which no chip was written, as they cannot be read and are to be skipped.
        warnings: one line for each kind.
    """

    num_chips: int
    skipped_images: tuple[Path, ...]
    warnings: tuple[str, ...]


def write_empty_chips(
    dataset: Dataset,
    table: ChipTable,
    folder: Path,
    *,
    to: FormatName,
    data: DataSpec,
    on_progress: Callable[[int, int], None],
) -> WrittenChips:
    """Write chips as PNG files with empty annotations to a folder, which appears only once it is complete.

    A file has the pixels that are trained on, without padding. Its name is that of the image, with the level and the
    window in image pixels: `day/a.jpg` becomes `day/a_level0_128_0_640_512.png`.

    Args:
        dataset: the images of the chips. The written data set has the same categories.
        table: the chips, ordered by image. They must show no object.
        folder: to write, absent or empty.
        to: format; see `write_dataset`.
        data: how images are read, and whether those that cannot be read are skipped.
        on_progress: called after each chip with the number of chips so far, and of all.

    Raises:
        ConfigError: if the folder is not empty.
        ImageError: if an image cannot be read and is not to be skipped.
    """
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    reader = ChipReader(data.read)
    written: list[tuple[int, Chip]] = []
    skipped: dict[Path, None] = {}
    with temporary_folder(folder.parent) as unfinished:
        for index in range(len(table)):
            chip, record = table.chip(index), dataset[int(table.image_indices[index])]
            try:
                pixels = reader.read_record(record, chip)
            except ImageError:
                if data.on_bad_image != "skip":
                    raise
                skipped[record.path] = None
            else:
                width, height = chip.visible
                path = unfinished / _file_name(len(written))
                with naming_path(path):
                    Image.fromarray(pixels[:height, :width]).save(path, compress_level=_PNG_COMPRESSION)
                written.append((int(table.image_indices[index]), chip))
            on_progress(index + 1, len(table))
        chips = _to_dataset(dataset, written, unfinished)
        warnings = write_dataset({"": chips}, folder, to=to, images="move")
    return WrittenChips(num_chips=len(written), skipped_images=tuple(skipped), warnings=tuple(warnings))


def _file_name(number: int) -> str:
    return f"{number}.png"


def _to_dataset(dataset: Dataset, chips: list[tuple[int, Chip]], folder: Path) -> Dataset:
    """Return a data set of images without objects, whose files are numbered in a folder."""
    sides = np.array([chip.visible for _, chip in chips], dtype=np.int32).reshape(-1, 2)
    names = [_name(str(dataset.image_paths[image]), chip) for image, chip in chips]
    none = np.zeros(0, dtype=np.int64)
    return Dataset(
        path=dataset.path,
        image_root=folder,
        categories=dataset.categories,
        image_ids=np.arange(1, len(chips) + 1),
        file_names=np.array(names, dtype=np.str_),
        image_paths=np.array([_file_name(number) for number in range(len(chips))], dtype=np.str_),
        widths=sides[:, 0],
        heights=sides[:, 1],
        offsets=np.zeros(len(chips) + 1, dtype=np.int64),
        boxes=np.zeros((0, 4)),
        labels=none,
        is_crowd=none.astype(np.bool_),
        areas=none.astype(np.float64),
    )


def _name(image: str, chip: Chip) -> str:
    """Return the name of a chip: that of its image, the level, and the visible window in image pixels."""
    width, height = chip.visible
    window = np.array([[chip.x, chip.y, chip.x + width, chip.y + height]], dtype=np.float64)
    x1, y1, x2, y2 = chip.level.to_image(window)[0].round().astype(int).tolist()
    return f"{os.path.splitext(image)[0]}_level{chip.level.index}_{x1}_{y1}_{x2}_{y2}.png"
