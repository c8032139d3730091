"""Held-out images: a part of a data set that is evaluated on and not trained on."""

import hashlib

import numpy as np

from sniper.data.datasets import Dataset
from sniper.errors import AnnotationError


def hold_out(dataset: Dataset, *, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a data set into the images to train on and those that are held out.

    An image is held out by a hash of the seed and its file name, so that neither the order of the images nor their ids
    matter, and entries of one file stay together.

    Args:
        dataset: at least two images.
        share: of the images that are held out, above 0 and below 1; at least one is, and at least one is not.
        seed: of the run.

    Returns:
        The images to train on and the images held out, each in the order of the data set.

    Raises:
        AnnotationError: if there are fewer than two image files.
    """
    names = dataset.file_names.tolist()
    unique = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    if len(unique) < 2:
        raise AnnotationError(
            f"{dataset.path}: has {len(unique)} image{'s' * (len(unique) != 1)}, so none can be held out; "
            "set data.holdout to 0"
        )
    held = set(unique[: min(max(round(share * len(unique)), 1), len(unique) - 1)])
    is_held = np.array([name in held for name in names])
    return dataset.select(np.flatnonzero(~is_held)), dataset.select(np.flatnonzero(is_held))
