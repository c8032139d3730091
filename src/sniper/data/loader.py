"""Batches read ahead by worker processes, each of which decodes images of its own.

The order of an epoch interleaves streams of chips (`EpochOrder.num_streams`). Every batch is read in parts, one by each
worker, and all chips of a stream by the same worker, so that an image is decoded once. The parts are joined here in the
order of the epoch: batches do not depend on the number of workers.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import DataLoader

from sniper.data.batches import Batch, ChipDataset, ChipSample, ChipTransform, collate
from sniper.data.epoch import EpochOrder
from sniper.data.spec import DataSpec

_PREFETCH_FACTOR = 2  # batches, or parts of them, that a worker reads ahead


def load_batches(
    order: EpochOrder,
    spec: DataSpec,
    *,
    steps: range,
    share: tuple[int, int] = (0, 1),
    pin_memory: bool = False,
    transform: ChipTransform | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """Iterate over this training process's share of each batch.

    Args:
        order: the chips of the epoch.
        spec: how chips are read.
        steps: which batches.
        share: (rank, world size) of this training process; the batch size must be divisible by the world size.
        pin_memory: whether to return batches in page-locked memory.
        transform: see `ChipDataset`.
        worker_init_fn: called at the start of each worker process with the worker's number.

    Raises:
        ImageError: if an image cannot be read and `spec.on_bad_image` is `refuse`.
        CacheError: if the chip cache cannot be used.
        TransformError: if the transform returns something other than a chip.
    """
    rank, world_size = share
    # Streams that every training process reads from cannot be divided among workers.
    num_streams = order.num_streams // world_size if order.num_streams % world_size == 0 else 1
    num_parts = max(min(spec.num_workers, num_streams), 1)
    batches = [order.positions(step)[rank::world_size] for step in steps]
    parts = [
        [index for index in indices if index % order.num_streams // world_size % num_parts == part]
        for indices in batches
        for part in range(num_parts)
    ]
    loader = DataLoader(
        ChipDataset(order, spec=spec, transform=transform, kept_images=math.ceil(num_streams / num_parts)),
        batch_sampler=parts,
        num_workers=spec.num_workers if num_parts == 1 else num_parts,
        prefetch_factor=_PREFETCH_FACTOR if spec.num_workers else None,
        collate_fn=_collate,
        worker_init_fn=worker_init_fn,
        pin_memory=pin_memory and num_parts == 1,
    )
    loaded = iter(loader)
    for number, indices in enumerate(batches):
        batch_parts = [next(loaded) for _ in range(num_parts)]
        if num_parts == 1:
            yield batch_parts[0]
            continue
        part_indices = parts[number * num_parts : (number + 1) * num_parts]
        yield Batch.join(
            [part for part in batch_parts if part is not None],
            [[(i - indices.start) // world_size for i in part] for part in part_indices if part],
            pin_memory=pin_memory,
        )


def _collate(samples: Sequence[ChipSample]) -> Batch | None:
    """Collate the part of a batch that one worker reads, which may be empty."""
    return collate(samples) if samples else None
