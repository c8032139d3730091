"""Recognise category ids of detections that stand for other classes than in the annotations."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from sniper.errors import count_and_list
from sniper.evaluation.confusion import MAX_CLASSES, count_pairs
from sniper.evaluation.pair import EvaluationPair

_MAX_IMAGES = 500  # compared: enough to recognise classes, and fast
_MAX_DETECTIONS = 100  # of each image
_MIN_MATCHES = 20  # of a class, so that chance does not look like an exchange
_MIN_OTHER, _MAX_OWN = 0.6, 0.2  # shares of the matches of an exchanged class
_MIN_SHARE = 0.5  # of all matches that exchanged classes have


def find_exchanged_classes(pair: EvaluationPair) -> tuple[str, ...]:
    """Check whether classes of the detections lie on objects of other classes, one for one.

    Files that number the same classes otherwise give low scores without an error. Detections and objects are matched
    whatever their classes (IoU 0.5). At least two classes whose matches are mostly of one other class each, and
    which have at least half of all matches, are reported. A detector confuses classes, too, but rarely so.

    Returns:
        A warning, or nothing.
    """
    if len(pair) == 0 or not 2 <= len(pair.truth.categories) <= MAX_CLASSES:
        return ()
    confusion = _count_confusions(pair)  # (objects, detections)
    matches = confusion.sum(axis=0)
    others = confusion.argmax(axis=0)
    is_exchanged = (
        (matches >= _MIN_MATCHES)
        & (confusion.max(axis=0) >= _MIN_OTHER * matches)
        & (np.diagonal(confusion) <= _MAX_OWN * matches)
    )
    labels = np.flatnonzero(is_exchanged)
    is_one_to_one = len(np.unique(others[labels])) == len(labels)
    if len(labels) < 2 or not is_one_to_one or matches[labels].sum() < _MIN_SHARE * matches.sum():
        return ()
    listed = count_and_list(list(_describe(pair, labels, others, confusion)))
    return (
        f"categories of the detections look exchanged: {listed} (IoU 0.5). Compare the category ids of both files",
    )


def _count_confusions(pair: EvaluationPair) -> Int[np.ndarray, "c c"]:
    """Return how many detections of each class (columns) lie on objects of each class (rows)."""
    step = -(-pair.truth.num_images // _MAX_IMAGES)
    images = np.argsort(pair.image_ranks)[::step]
    counts = count_pairs(pair.select_images(images), iou=0.5, max_detections=_MAX_DETECTIONS)
    return counts[:-1, :-1]  # without background


def _describe(
    pair: EvaluationPair,
    labels: Int[np.ndarray, " k"],
    others: Int[np.ndarray, " c"],
    confusion: Int[np.ndarray, "c c"],
) -> Iterator[str]:
    for label in labels.tolist():
        category, other = pair.truth.categories[label], pair.truth.categories[int(others[label])]
        count, matches = int(confusion[others[label], label]), int(confusion[:, label].sum())
        yield (
            f"{count} of {matches} matched detections with category {category.category_id} ({category.name!r}) "
            f"lie on objects of {other.category_id} ({other.name!r})"
        )
