"""An epoch's plan: its chips, or whole images or tiles; their order and batches, and which are mirrored."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.baselines import TileSpec, WholeSpec, tiles, whole_images
from sniper.chips.cover import cover
from sniper.chips.negatives import draw_negatives
from sniper.chips.targets import is_learnable
from sniper.data.datasets import Dataset
from sniper.data.images.files import decoded_bytes
from sniper.errors import AnnotationError
from sniper.geometry.boxes import Sides

_IMAGES_AT_ONCE = 256
_DECODED_BYTES = 2_000_000_000
_GRID = 32  # pixels; whole images are padded to multiples of it, as is the custom
_MOST_PADDING = 0.1  # share of a batch that images would not have to be padded with if each were alone
_ALIKE = 1.2  # ratio up to which shapes count as like, until the batches are made


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochOrder:
    """The chips of one epoch, in the order in which they are learnt from.

    Attributes:
        dataset: the data set that the chips are cut from.
        table: the chips of this epoch.
        chip_indices: (k,) indices into the table, in the order of the epoch: every chip at least once, and some again
            to fill the last batch.
        is_flipped: (k,) whether each is mirrored left to right.
        seeds: (k,) one for each; all random draws of learning from it depend on this number alone.
        offsets: (s + 1,) where each batch begins; the last is k.
        num_streams: the order interleaves this many streams of chips: position `i` belongs to stream
            `i % num_streams`. A stream goes through its images one after the other, so only about `num_streams` images
            have to be decoded at a time. 1 where chips are drawn from all images.
        min_visibility: a box of which a chip shows a smaller share of the area is left out of the chip's targets.
        batch_megapixels: the million pixels of a batch that the learning rate refers to; None where all batches have
            equally many chips of equal size.
    """

    dataset: Dataset
    table: ChipTable
    chip_indices: Int[np.ndarray, " k"]
    is_flipped: Bool[np.ndarray, " k"]
    seeds: Int[np.ndarray, " k"]
    offsets: Int[np.ndarray, " s_plus_1"]
    num_streams: int = 1
    min_visibility: float = 0.0
    batch_megapixels: float | None = None

    @property
    def num_steps(self) -> int:
        """The number of batches."""
        return len(self.offsets) - 1

    @property
    def num_padding(self) -> int:
        """The number of chips that are seen again to fill a batch."""
        return len(self.chip_indices) - len(self.table)

    @property
    def megapixels(self) -> float:
        """All pixels that are computed on, in millions; padding and repeated chips count."""
        return float(self.table.pixels[self.chip_indices].sum()) / 1e6

    @cached_property
    def mean_batch_size(self) -> float:
        """The number of chips of this plan that have as many pixels as a batch that the rate is stated for."""
        if self.batch_megapixels is None:
            return len(self.chip_indices) / self.num_steps
        return len(self.chip_indices) * self.batch_megapixels / self.megapixels

    def positions(self, step: int) -> range:
        """Give the places in the order that make up a batch."""
        return range(int(self.offsets[step]), int(self.offsets[step + 1]))

    def weight(self, step: int) -> float:
        """Tell how many times the losses of a batch are to count, which are means over its chips.

        All chips of an epoch count alike, and a million pixels as much as in a plan of any other kind.
        """
        return len(self.positions(step)) / self.mean_batch_size


def to_image_boxes(annotations: Dataset) -> ImageBoxes:
    """Give the boxes of a data set; those that are no crowd and at least 1 px a side are to be covered."""
    return ImageBoxes(
        widths=annotations.widths.astype(np.int64),
        heights=annotations.heights.astype(np.int64),
        offsets=annotations.offsets,
        boxes=annotations.boxes,
        is_wanted=~annotations.is_crowd & is_learnable(annotations.boxes),
    )


def build_table(annotations: Dataset, pyramid: PyramidSpec, *, generator: np.random.Generator) -> ChipTable:
    """Choose the positive chips of a data set."""
    return cover(pyramid, to_image_boxes(annotations), generator=generator)


def order_chips(
    annotations: Dataset,
    pyramid: PyramidSpec,
    *,
    batch_size: int,
    flip: float,
    seed: int,
    epoch: int,
    table: ChipTable | None = None,
    negatives_per_image: int = 2,
    images_at_once: int | None = 0,
) -> EpochOrder:
    """Choose, shuffle and flip the chips of one epoch.

    Args:
        annotations: the data set.
        pyramid: what to cut.
        batch_size: chips in a batch.
        flip: share of chips mirrored left to right.
        seed: of the run.
        epoch: which pass, 0 the first. Equal (seed, epoch) give equal plans.
        table: the chips, if they were chosen before; None chooses positive ones anew each epoch.
        negatives_per_image: of the table's negative chips, at most this many of each image are drawn.
        images_at_once: so many images, in random order, give their chips in turns, so that each needs to be decoded but
            once; see `DataSpec`. 0 draws chips from all images; None takes as many as are good.

    Raises:
        AnnotationError: if there is no chip, because no image has a box that can be learnt from.
    """
    generator = np.random.default_rng([seed, epoch])
    if table is None:
        table = build_table(annotations, pyramid, generator=generator)
    elif table.is_negative.any():
        table = table.select(draw_negatives(table, per_image=negatives_per_image, generator=generator))
    return _shuffled(
        annotations,
        table,
        batch_size=batch_size,
        flip=flip,
        images_at_once=images_at_once,
        generator=generator,
    )


def order_tiles(
    annotations: Dataset,
    spec: TileSpec,
    *,
    batch_size: int,
    flip: float,
    seed: int,
    epoch: int,
    images_at_once: int | None = 0,
) -> EpochOrder:
    """Shuffle and flip the tiles of one epoch; see `order_chips`."""
    return _shuffled(
        annotations,
        tiles(spec, to_image_boxes(annotations)),
        batch_size=batch_size,
        flip=flip,
        images_at_once=images_at_once,
        generator=np.random.default_rng([seed, epoch]),
        min_visibility=spec.min_visibility,
    )


def order_whole_images(
    annotations: Dataset,
    spec: WholeSpec,
    *,
    batch_size: int,
    chip_size: int,
    flip: float,
    seed: int,
    epoch: int,
    num_shares: int = 1,
) -> EpochOrder:
    """Put the whole images of one epoch into batches of like shape, and shuffle and flip them.

    Args:
        annotations: the data set.
        spec: levels, and the pixels of a batch.
        batch_size: images in a batch at the most.
        chip_size: side of the chips whose pixels, in a batch of so many, stand for those of a batch of images, if the
            spec does not say otherwise.
        flip: share of images mirrored left to right.
        seed: of the run.
        epoch: which pass, 0 the first. Equal (seed, epoch) give equal plans.
        num_shares: every batch can be cut into so many equal parts, of an image at least.

    Raises:
        AnnotationError: if no image has a box that can be learnt from.
    """
    generator = np.random.default_rng([seed, epoch])
    table = whole_images(spec, to_image_boxes(annotations))
    _check_learnable(annotations, table)
    megapixels = spec.batch_megapixels or batch_size * chip_size**2 / 1e6
    batches, table = _alike(
        table, most=batch_size, pixels=megapixels * 1e6, unit=num_shares, generator=generator
    )
    batches = [batches[place] for place in generator.permutation(len(batches)).tolist()]
    order = np.concatenate(batches)
    return EpochOrder(
        dataset=annotations,
        table=table,
        chip_indices=order,
        is_flipped=generator.random(len(order)) < flip,
        seeds=generator.integers(2**63 - 1, size=len(order)),
        offsets=np.cumsum([0, *map(len, batches)]),
        batch_megapixels=megapixels,
    )


def _alike(
    table: ChipTable, *, most: int, pixels: float, unit: int, generator: np.random.Generator
) -> tuple[list[Int[np.ndarray, " b"]], ChipTable]:
    """Put whole images of like shape into batches, and give each the sides of its batch.

    Args:
        table: the images at their levels.
        most: of them in a batch.
        pixels: in a batch, padding included.
        unit: a batch has a multiple of this many, also where those are more or have more pixels.
        generator: draws who shares a batch among those that are alike.

    Returns:
        Batches as indices into the table, some indices twice where units are to be filled; and the table, whose windows
        have the sides of their batches.
    """
    padded = -(-np.stack([table.widths, table.heights], axis=1) // _GRID) * _GRID  # (c, 2)
    shape = np.round(np.log(padded[:, 0] / padded[:, 1]) / np.log(_ALIKE))
    order = generator.permutation(len(table))
    order = order[np.lexsort((padded[order].prod(axis=1), shape[order]))]
    order = np.pad(order, (0, -len(order) % unit), mode="edge")
    batches: list[list[int]] = []
    sides = np.zeros(2, dtype=np.int64)
    for start in range(0, len(order), unit):
        some = order[start : start + unit].tolist()
        joined = [*batches[-1], *some] if batches else some
        wanted = np.maximum(sides, padded[some].max(axis=0))
        area = wanted.prod() * len(joined)
        alone = padded[joined].prod(axis=1).sum()
        is_full = len(joined) > most or area > pixels or alone < (1 - _MOST_PADDING) * area
        if batches and not is_full:
            batches[-1], sides = joined, wanted
        else:
            batches.append(some)
            sides = padded[some].max(axis=0)
    for batch in batches:
        padded[batch] = padded[batch].max(axis=0)
    return [np.array(batch) for batch in batches], replace(table, widths=padded[:, 0], heights=padded[:, 1])


def _check_learnable(annotations: Dataset, table: ChipTable) -> None:
    if len(table) == 0:
        raise AnnotationError(f"{annotations.path}: has no box to learn from")


def _shuffled(
    annotations: Dataset,
    table: ChipTable,
    *,
    batch_size: int,
    flip: float,
    images_at_once: int | None,
    generator: np.random.Generator,
    min_visibility: float = 0.0,
) -> EpochOrder:
    """Order chips of one size, in batches of equally many."""
    _check_learnable(annotations, table)
    num_chips = -(-len(table) // batch_size) * batch_size
    num_streams = _count_rows(annotations, table, images_at_once, batch_size=batch_size)
    if num_streams == 0:
        order, num_streams = np.resize(generator.permutation(len(table)), num_chips), 1
    else:
        order = _in_turns(table.image_indices, num_streams, num_chips, generator=generator)
    return EpochOrder(
        dataset=annotations,
        table=table,
        chip_indices=order,
        is_flipped=generator.random(num_chips) < flip,
        seeds=generator.integers(2**63 - 1, size=num_chips),
        offsets=np.arange(0, num_chips + 1, batch_size),
        num_streams=num_streams,
        min_visibility=min_visibility,
    )


def _count_rows(
    annotations: Dataset, table: ChipTable, images_at_once: int | None, *, batch_size: int
) -> int:
    """Tell how many images are at work side by side: a multiple or a divisor of the batch.

    So whatever number of processes can share a batch, each can keep to images of its own.
    """
    used = np.unique(table.image_indices)
    if images_at_once is None:
        largest = max(
            decoded_bytes(
                str(annotations.file_names[image]),
                Sides(int(annotations.widths[image]), int(annotations.heights[image])),
            )
            for image in used.tolist()
        )
        images_at_once = max(min(_IMAGES_AT_ONCE, _DECODED_BYTES // max(largest, 1)), 1)
    most = min(images_at_once, len(used))
    if most >= batch_size:
        return most // batch_size * batch_size
    return max((count for count in range(1, most + 1) if batch_size % count == 0), default=0)


def _in_turns(
    images: Int[np.ndarray, " c"], num_streams: int, num_chips: int, *, generator: np.random.Generator
) -> Int[np.ndarray, " k"]:
    """Order chips image by image, both at random, in rows of equal length, and read them by columns.

    Args:
        images: (c,) the image of each chip.
        num_streams: how many rows.
        num_chips: how many places to fill; chips are repeated for those beyond c.
        generator: draws the order of the images, and that of the chips within each.
    """
    shuffled = generator.permutation(len(images))
    place_of_image = generator.permutation(images.max() + 1)
    by_image = shuffled[np.argsort(place_of_image[images[shuffled]], kind="stable")]
    length, num_longer = divmod(len(images), num_streams)
    column, row = np.divmod(np.arange(len(images)), num_streams)
    return np.resize(by_image[row * length + np.minimum(row, num_longer) + column], num_chips)
