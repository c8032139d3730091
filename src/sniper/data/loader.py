"""Batches read ahead by processes of which each keeps to its own images.

The chips of an image follow each other at equal distances in the plan (`EpochOrder.num_streams`). So that one
process decodes it for all of them, every batch is read in parts, one by each process, and put together here in the
plan's order: how many processes read changes nothing but the time.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import DataLoader

from sniper.data.batches import Batch, ChipDataset, ChipSample, ChipTransform, collate
from sniper.data.epoch import EpochOrder
from sniper.data.spec import DataSpec

_PREFETCHED = 2  # batches, or parts of them, that a process reads ahead


def load_batches(
    order: EpochOrder,
    spec: DataSpec,
    *,
    steps: range,
    share: tuple[int, int] = (0, 1),
    pin: bool = False,
    transform: ChipTransform | None = None,
    in_process: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """Read this trainer's share of each batch.

    Args:
        order: of the epoch.
        spec: how chips are read.
        steps: which batches.
        share: which of how many trainers this is; they must divide the batch.
        pin: into page-locked memory.
        transform: see `ChipDataset`.
        in_process: called with its number at the start of each process that reads.

    Raises:
        ImageError: if an image cannot be read, and it is not to be skipped.
        CacheError: if the folder of kept chips cannot be used.
        TransformError: if a transform gives back something else than a chip.
    """
    rank, num_ranks = share
    num_processes = spec.num_workers
    # Rows that every trainer reads from cannot be kept apart.
    num_own_rows = order.num_streams // num_ranks if order.num_streams % num_ranks == 0 else 1
    num_parts = max(min(num_processes, num_own_rows), 1)
    own = [order.positions(step)[rank::num_ranks] for step in steps]
    parts = [
        [place for place in places if place % order.num_streams // num_ranks % num_parts == part]
        for places in own
        for part in range(num_parts)
    ]
    loader = DataLoader(
        ChipDataset(
            order,
            spec=spec,
            transform=transform,
            kept_images=math.ceil(num_own_rows / num_parts),
        ),
        batch_sampler=parts,
        num_workers=num_processes if num_parts == 1 else num_parts,
        prefetch_factor=_PREFETCHED if num_processes else None,
        collate_fn=_collate,
        worker_init_fn=in_process,
        pin_memory=pin and num_parts == 1,
    )
    arrived = iter(loader)
    for number, places in enumerate(own):
        read = [next(arrived) for _ in range(num_parts)]
        if num_parts == 1:
            yield read[0]
            continue
        of_step = parts[number * num_parts : (number + 1) * num_parts]
        filled = [(part, own_places) for part, own_places in zip(read, of_step, strict=True) if own_places]
        yield Batch.join(
            [part for part, _ in filled],
            [[(place - places.start) // num_ranks for place in own_places] for _, own_places in filled],
            pin=pin,
        )


def _collate(samples: Sequence[ChipSample]) -> Batch | None:
    """Put a part together; one process may have no part in a batch."""
    return collate(samples) if samples else None
