"""Order one pass over the training set: its chips, tiles or whole images, their batches, and which are mirrored."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.baselines import TileSpec, WholeSpec, tiles, whole_images
from sniper.chips.cover import cover
from sniper.chips.image_boxes import ScoredBoxes
from sniper.chips.negatives import NegativeSpec, choose_on_alarms, draw_negatives
from sniper.chips.targets import is_learnable
from sniper.data.datasets import Dataset
from sniper.data.images.files import decoded_bytes
from sniper.errors import AnnotationError, counted
from sniper.geometry.boxes import Sides

_DEFAULT_IMAGES_AT_ONCE = 256
_DEFAULT_DECODED_BYTES = 2_000_000_000  # of these images together
_SIDE_MULTIPLE = 32  # pixels; sides of whole images are padded to multiples of it, as in torchvision
_MAX_PADDING = 0.1  # share of a batch's pixels that is added by padding its images to common sides
_SHAPE_RATIO = 1.2  # aspect ratios within this factor may share a batch


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochOrder:
    """The chips of one epoch in training order, and their batches.

    Attributes:
        dataset: the data set that the chips are cut from.
        table: the chips of this epoch.
        chip_indices: (k,) indices into the table, in the order of the epoch: every chip at least once, and some again
            to fill up batches.
        is_flipped: (k,) whether each is mirrored left to right.
        seeds: (k,) one for each; all random draws of training on a chip depend on its seed alone.
        offsets: (s + 1,) where each batch begins; the last is k.
        num_streams: the order interleaves this many streams of chips: position `i` belongs to stream
            `i % num_streams`. A stream goes through its images one after the other, so that only about `num_streams`
            images have to be decoded at a time. 1 where chips are drawn from all images.
        min_visibility: a box of which a chip shows a smaller share of the area is left out of the chip's targets.
        batch_megapixels: million pixels of a batch that the learning rate refers to; None where all batches have
            equally many chips of equal sides.
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
        """The number of chips that are repeated to fill up batches."""
        return len(self.chip_indices) - len(self.table)

    @property
    def megapixels(self) -> float:
        """The million pixels of all batches, with padding and repeated chips."""
        return float(self.table.pixels[self.chip_indices].sum()) / 1e6

    @cached_property
    def mean_batch_size(self) -> float:
        """The mean number of chips, or of images, in a batch with the pixels that the learning rate refers to."""
        if self.batch_megapixels is None:
            return len(self.chip_indices) / self.num_steps
        return len(self.chip_indices) * self.batch_megapixels / self.megapixels

    def positions(self, step: int) -> range:
        """Return the positions of a batch in the order."""
        return range(int(self.offsets[step]), int(self.offsets[step + 1]))

    def weight(self, step: int) -> float:
        """Return the weight of a batch's losses, which are means over its chips.

        Every chip of an epoch has equal weight, and the loss of a megapixel is comparable across chips, tiles and whole
        images.
        """
        return len(self.positions(step)) / self.mean_batch_size


def to_image_boxes(dataset: Dataset) -> ImageBoxes:
    """Return the boxes of a data set; chips must cover those that are not crowds and at least 1 pixel a side."""
    return ImageBoxes(
        widths=dataset.widths.astype(np.int64),
        heights=dataset.heights.astype(np.int64),
        offsets=dataset.offsets,
        boxes=dataset.boxes,
        is_required=~dataset.is_crowd & is_learnable(dataset.boxes),
    )


def choose_positive_chips(
    dataset: Dataset,
    pyramid: PyramidSpec,
    *,
    generator: np.random.Generator,
    alarms: ScoredBoxes | None = None,
) -> ChipTable:
    """Choose the positive chips of a data set; see `cover`."""
    return cover(pyramid, to_image_boxes(dataset), generator=generator, alarms=alarms)


def add_drawn_negatives(
    positives: ChipTable,
    alarms: ScoredBoxes,
    spec: NegativeSpec,
    *,
    dose: float | None,
    pyramid: PyramidSpec,
    generator: np.random.Generator,
) -> ChipTable:
    """Add the negative chips of an epoch, drawn from those that cover the false alarms; see `draw_negatives`."""
    pool, masses = choose_on_alarms(positives, alarms, spec, pyramid=pyramid, generator=generator)
    table = positives.merge(pool)
    masses_of_table = np.zeros(len(table))
    masses_of_table[table.is_negative] = masses
    drawn = draw_negatives(
        table, per_image=spec.per_image, dose=dose, masses=masses_of_table, generator=generator
    )
    return table.select(drawn)


def order_chips(
    dataset: Dataset,
    pyramid: PyramidSpec,
    *,
    batch_size: int,
    flip: float,
    seed: int,
    epoch: int,
    table: ChipTable | None = None,
    alarms: ScoredBoxes | None = None,
    negatives: NegativeSpec = NegativeSpec(),
    dose: float | None = None,
    images_at_once: int | None = 0,
) -> EpochOrder:
    """Choose, shuffle and flip the chips of one epoch.

    Args:
        dataset: to train on.
        pyramid: to cut chips from.
        batch_size: chips in a batch.
        flip: share of chips that are mirrored left to right.
        seed: of the run.
        epoch: from 0. Equal (seed, epoch) give equal orders.
        table: the chips, if they are chosen already; None chooses positive chips for this epoch.
        alarms: the false alarms to choose chips on, if no table is given.
        negatives: which negative chips are drawn of the table, or chosen on the false alarms.
        dose: the most negative chips as a share of the positive chips; None does not limit it.
        images_at_once: how many images are trained on side by side; each is decoded once for all its chips. See
            `DataSpec`. 0 draws chips from all images; None chooses a number by the memory that they take.

    Raises:
        AnnotationError: if there are no chips, because no image has a box to learn from.
    """
    generator = np.random.default_rng([seed, epoch])
    if table is None:
        placed_on = alarms if negatives.place_positives else None
        table = choose_positive_chips(dataset, pyramid, generator=generator, alarms=placed_on)
        if alarms is not None:
            table = add_drawn_negatives(
                table, alarms, negatives, dose=dose, pyramid=pyramid, generator=generator
            )
    elif table.is_negative.any():
        drawn = draw_negatives(table, per_image=negatives.per_image, dose=dose, generator=generator)
        table = table.select(drawn)
    return _order_equal_chips(
        dataset,
        table,
        batch_size=batch_size,
        flip=flip,
        images_at_once=images_at_once,
        generator=generator,
    )


def order_tiles(
    dataset: Dataset,
    spec: TileSpec,
    *,
    batch_size: int,
    flip: float,
    seed: int,
    epoch: int,
    images_at_once: int | None = 0,
) -> EpochOrder:
    """Shuffle and flip the tiles of one epoch; see `order_chips`."""
    return _order_equal_chips(
        dataset,
        tiles(spec, to_image_boxes(dataset)),
        batch_size=batch_size,
        flip=flip,
        images_at_once=images_at_once,
        generator=np.random.default_rng([seed, epoch]),
        min_visibility=spec.min_visibility,
    )


def order_whole_images(
    dataset: Dataset,
    spec: WholeSpec,
    *,
    batch_size: int,
    chip_size: int,
    flip: float,
    seed: int,
    epoch: int,
    num_shares: int = 1,
) -> EpochOrder:
    """Batch the whole images of one epoch by shape, and shuffle and flip them.

    Args:
        dataset: to train on.
        spec: levels, and the pixels of a batch.
        batch_size: images in a batch, at most.
        chip_size: side of a chip; unless the spec limits the pixels of a batch, they are those of `batch_size` chips.
        flip: share of images that are mirrored left to right.
        seed: of the run.
        epoch: from 0. Equal (seed, epoch) give equal orders.
        num_shares: every batch has a multiple of this many images, so that it can be split into equal shares.

    Raises:
        AnnotationError: if no image has a box to learn from.
    """
    generator = np.random.default_rng([seed, epoch])
    table = whole_images(spec, to_image_boxes(dataset))
    _check_not_empty(dataset, table)
    megapixels = spec.batch_megapixels or batch_size * chip_size**2 / 1e6
    batches, table = _batch_by_shape(
        table,
        max_images=batch_size,
        max_pixels=megapixels * 1e6,
        multiple=num_shares,
        generator=generator,
    )
    batches = [batches[index] for index in generator.permutation(len(batches)).tolist()]
    chip_indices = np.concatenate(batches)
    return EpochOrder(
        dataset=dataset,
        table=table,
        chip_indices=chip_indices,
        is_flipped=generator.random(len(chip_indices)) < flip,
        seeds=generator.integers(2**63 - 1, size=len(chip_indices)),
        offsets=np.cumsum([0, *map(len, batches)]),
        batch_megapixels=megapixels,
    )


def _batch_by_shape(
    table: ChipTable, *, max_images: int, max_pixels: float, multiple: int, generator: np.random.Generator
) -> tuple[list[Int[np.ndarray, " b"]], ChipTable]:
    """Batch whole images of similar aspect ratio and size, and pad each to the sides of its batch.

    Args:
        table: the images at their levels.
        max_images: images in a batch.
        max_pixels: pixels in a batch, padding included.
        multiple: a batch has a multiple of this many images, even where so many exceed the limits.
        generator: draws which of the similar images share a batch.

    Returns:
        The batches as indices into the table, with repeats where a multiple is filled up; and the table, in which the
        windows have the sides of their batches.
    """
    padded = -(-np.stack([table.widths, table.heights], axis=1) // _SIDE_MULTIPLE) * _SIDE_MULTIPLE  # (c, 2)
    shape = np.round(np.log(padded[:, 0] / padded[:, 1]) / np.log(_SHAPE_RATIO))
    order = generator.permutation(len(table))
    order = order[np.lexsort((padded[order].prod(axis=1), shape[order]))]
    order = np.pad(order, (0, -len(order) % multiple), mode="edge")
    batches: list[list[int]] = []
    sides = np.zeros(2, dtype=np.int64)
    for start in range(0, len(order), multiple):
        images = order[start : start + multiple].tolist()
        joined = [*batches[-1], *images] if batches else images
        joined_sides = np.maximum(sides, padded[images].max(axis=0))
        num_pixels = joined_sides.prod() * len(joined)
        num_unpadded = padded[joined].prod(axis=1).sum()
        is_too_large = len(joined) > max_images or num_pixels > max_pixels
        if batches and not is_too_large and num_unpadded >= (1 - _MAX_PADDING) * num_pixels:
            batches[-1], sides = joined, joined_sides
        else:
            batches.append(images)
            sides = padded[images].max(axis=0)
    for batch in batches:
        padded[batch] = padded[batch].max(axis=0)
    return [np.array(batch) for batch in batches], replace(table, widths=padded[:, 0], heights=padded[:, 1])


def _check_not_empty(dataset: Dataset, table: ChipTable) -> None:
    if len(table) == 0:
        raise AnnotationError(f"{dataset.path}: has no box to learn from; {_describe_boxes(dataset)}")


def _describe_boxes(dataset: Dataset) -> str:
    """Describe why no box of a data set can be learned from."""
    num_crowds = int(dataset.is_crowd.sum())
    num_small = int((~is_learnable(dataset.boxes) & ~dataset.is_crowd).sum())
    num_others = len(dataset.boxes) - num_crowds - num_small
    num_boxes = len(dataset.boxes) + dataset.num_dropped
    if not num_boxes:
        return (
            f"it has {counted(len(dataset), 'image')} without annotations"
            if len(dataset)
            else "it has no images"
        )
    reasons = {
        "crowds or regions to ignore (data.crowds: objects takes them for objects)": num_crowds,
        "less than 1 pixel wide or high": num_small,
        "dropped as unusable": dataset.num_dropped,
        "of a size that no level of the pyramid trains on": num_others,
    }
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    return f"of {counted(num_boxes, 'box', 'boxes')}: {listed}"


def _order_equal_chips(
    dataset: Dataset,
    table: ChipTable,
    *,
    batch_size: int,
    flip: float,
    images_at_once: int | None,
    generator: np.random.Generator,
    min_visibility: float = 0.0,
) -> EpochOrder:
    """Shuffle and flip chips of equal sides, in batches of equally many."""
    _check_not_empty(dataset, table)
    num_positions = -(-len(table) // batch_size) * batch_size
    num_streams = _count_streams(dataset, table, images_at_once, batch_size=batch_size)
    if num_streams == 0:
        chip_indices = generator.permutation(len(table))
    else:
        chip_indices = _interleave(table.image_indices, num_streams, generator=generator)
    return EpochOrder(
        dataset=dataset,
        table=table,
        chip_indices=np.resize(chip_indices, num_positions),
        is_flipped=generator.random(num_positions) < flip,
        seeds=generator.integers(2**63 - 1, size=num_positions),
        offsets=np.arange(0, num_positions + 1, batch_size),
        num_streams=max(num_streams, 1),
        min_visibility=min_visibility,
    )


def _count_streams(dataset: Dataset, table: ChipTable, images_at_once: int | None, *, batch_size: int) -> int:
    """Return the number of streams: `images_at_once`, rounded down to a multiple or a divisor of the batch size.

    Then every process that shares the batches reads streams, and so images, of its own.
    """
    images = np.unique(table.image_indices)
    if images_at_once is None:
        largest = max(
            decoded_bytes(
                str(dataset.file_names[image]),
                Sides(int(dataset.widths[image]), int(dataset.heights[image])),
            )
            for image in images.tolist()
        )
        images_at_once = max(min(_DEFAULT_IMAGES_AT_ONCE, _DEFAULT_DECODED_BYTES // max(largest, 1)), 1)
    limit = min(images_at_once, len(images))
    if limit >= batch_size:
        return limit // batch_size * batch_size
    return max((count for count in range(1, limit + 1) if batch_size % count == 0), default=0)


def _interleave(
    image_indices: Int[np.ndarray, " c"], num_streams: int, *, generator: np.random.Generator
) -> Int[np.ndarray, " c"]:
    """Shuffle images and the chips of each, split them into streams, and take one chip of each stream in turn.

    Args:
        image_indices: (c,) the image of each chip.
        num_streams: the streams are consecutive runs of equal length, give or take one.
        generator: draws the order of the images, and of the chips of each.

    Returns:
        (c,) indices of the chips.
    """
    shuffled = generator.permutation(len(image_indices))
    rank_of_image = generator.permutation(image_indices.max() + 1)
    by_image = shuffled[np.argsort(rank_of_image[image_indices[shuffled]], kind="stable")]
    length, num_longer = divmod(len(by_image), num_streams)
    position, stream = np.divmod(np.arange(len(by_image)), num_streams)
    return by_image[stream * length + np.minimum(stream, num_longer) + position]
