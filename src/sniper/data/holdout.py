"""Images drawn by a hash of their file names: those that are held out of training, and subsets to evaluate on."""

import hashlib

import numpy as np
from jaxtyping import Int

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
    unique = sorted(set(names), key=lambda name: _draw(name, seed=seed))
    if len(unique) < 2:
        raise AnnotationError(
            f"{dataset.path}: has {len(unique)} image{'s' * (len(unique) != 1)}, so none can be held out; "
            "set data.holdout to 0"
        )
    held = set(unique[: min(max(round(share * len(unique)), 1), len(unique) - 1)])
    is_held = np.array([name in held for name in names])
    return dataset.select(np.flatnonzero(~is_held)), dataset.select(np.flatnonzero(is_held))


def draw_images(dataset: Dataset, *, num_images: int, seed: int) -> Dataset:
    """Draw images by a hash of the seed and their file names.

    Args:
        dataset: to draw from.
        num_images: to draw; all if there are not more.
        seed: of the run.

    Returns:
        The images, in the order of the data set.
    """
    return dataset.select(draw_indices(dataset, num_images=num_images, seed=seed))


def draw_indices(dataset: Dataset, *, num_images: int, seed: int) -> Int[np.ndarray, " n"]:
    """Return the sorted indices of the images that `draw_images` draws."""
    names = dataset.file_names.tolist()
    drawn = sorted(range(len(names)), key=lambda index: _draw(names[index], seed=seed))[:num_images]
    return np.sort(np.array(drawn, dtype=np.int64))


def _draw(name: str, *, seed: int) -> bytes:
    """Return a hash that orders file names at random."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
