"""An epoch's plan: its chips, their order, and which of them are mirrored."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from sniper.chips import ChipTable, ImageBoxes, PyramidSpec
from sniper.chips.assign import is_learnable
from sniper.chips.negatives import draw_negatives
from sniper.data.coco import Annotations
from sniper.data.images import decoded_bytes
from sniper.errors import AnnotationError

_IMAGES_AT_ONCE = 256
_DECODED_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """The chips of one epoch, in the order in which they are learnt from.

    Attributes:
        table: the chips of this epoch.
        order: (k,) indices into the table; every chip once, then the first few again to fill the last batch.
        is_flipped: (k,) whether each is mirrored left to right.
        seeds: (k,) a number for each, from which is drawn what learning from it draws.
        batch_size: chips in a batch; divides k.
        num_rows: the chips stand in so many rows, read by columns: the places `i` with equal `i % num_rows` go through
            images one after the other. 1 where images take no turns.
    """

    table: ChipTable
    order: Int[np.ndarray, " k"]
    is_flipped: Bool[np.ndarray, " k"]
    seeds: Int[np.ndarray, " k"]
    batch_size: int
    num_rows: int = 1

    @property
    def num_steps(self) -> int:
        """The number of batches."""
        return len(self.order) // self.batch_size

    @property
    def num_padding(self) -> int:
        """The number of chips that are seen twice to fill the last batch."""
        return len(self.order) - len(self.table)


def to_image_boxes(annotations: Annotations) -> ImageBoxes:
    """Give the boxes of a data set; those that are no crowd and at least 1 px a side are to be covered."""
    return ImageBoxes(
        widths=annotations.widths.astype(np.int64),
        heights=annotations.heights.astype(np.int64),
        offsets=annotations.offsets,
        boxes=annotations.boxes,
        is_wanted=~annotations.is_crowd & is_learnable(annotations.boxes),
    )


def build_table(
    annotations: Annotations, pyramid: PyramidSpec, *, generator: np.random.Generator
) -> ChipTable:
    """Choose the positive chips of a data set."""
    images = to_image_boxes(annotations)
    return ChipTable.build(pyramid, images, digest=annotations.digest, generator=generator)


def plan_epoch(
    annotations: Annotations,
    pyramid: PyramidSpec,
    *,
    batch_size: int,
    flip: float,
    seed: int,
    epoch: int,
    table: ChipTable | None = None,
    negatives_per_image: int = 2,
    images_at_once: int | None = 0,
) -> EpochPlan:
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
    if len(table) == 0:
        raise AnnotationError(f"{annotations.path}: has no box to learn from")
    num_chips = -(-len(table) // batch_size) * batch_size
    num_rows = _count_rows(annotations, table, images_at_once, batch_size=batch_size)
    if num_rows == 0:
        order, num_rows = np.resize(generator.permutation(len(table)), num_chips), 1
    else:
        order = _in_turns(table.image_indices, num_rows, num_chips, generator=generator)
    return EpochPlan(
        table=table,
        order=order,
        is_flipped=generator.random(num_chips) < flip,
        seeds=generator.integers(2**63 - 1, size=num_chips),
        batch_size=batch_size,
        num_rows=num_rows,
    )


def _count_rows(
    annotations: Annotations, table: ChipTable, images_at_once: int | None, *, batch_size: int
) -> int:
    """Tell how many images are at work side by side: a multiple or a divisor of the batch.

    So whatever number of processes can share a batch, each can keep to images of its own.
    """
    used = np.unique(table.image_indices)
    if images_at_once is None:
        largest = max(
            decoded_bytes(
                str(annotations.file_names[image]),
                width=int(annotations.widths[image]),
                height=int(annotations.heights[image]),
            )
            for image in used.tolist()
        )
        images_at_once = max(min(_IMAGES_AT_ONCE, _DECODED_BYTES // max(largest, 1)), 1)
    most = min(images_at_once, len(used))
    if most >= batch_size:
        return most // batch_size * batch_size
    return max((count for count in range(1, most + 1) if batch_size % count == 0), default=0)


def _in_turns(
    images: Int[np.ndarray, " c"], num_rows: int, num_chips: int, *, generator: np.random.Generator
) -> Int[np.ndarray, " k"]:
    """Order chips image by image, both at random, in rows of equal length, and read them by columns.

    Args:
        images: (c,) the image of each chip.
        num_rows: how many rows.
        num_chips: how many places to fill; chips are repeated for those beyond c.
        generator: draws the order of the images, and that of the chips within each.
    """
    shuffled = generator.permutation(len(images))
    place_of_image = generator.permutation(images.max() + 1)
    by_image = shuffled[np.argsort(place_of_image[images[shuffled]], kind="stable")]
    length, num_longer = divmod(len(images), num_rows)
    column, row = np.divmod(np.arange(len(images)), num_rows)
    return np.resize(by_image[row * length + np.minimum(row, num_longer) + column], num_chips)
