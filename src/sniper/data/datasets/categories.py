"""Match the classes of a detector with the categories of a data set, by name."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int64

from sniper.data.datasets.dataset import Category
from sniper.errors import AnnotationError, count_and_list, counted
from sniper.geometry import Detections

_MAX_LISTED = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class CategoryMatch:
    """The categories under which the detections of a detector are written, drawn and scored.

    Attributes:
        categories: those of the data set by label, and after them the classes that it lacks, with unused ids.
        labels: (c,) for each class of the detector its label in `categories`.
        is_known: (c,) whether the data set has the class.
        warnings: differences between the two, one line for each kind.
    """

    categories: tuple[Category, ...]
    labels: Int64[np.ndarray, " c"]
    is_known: Bool[np.ndarray, " c"]
    warnings: tuple[str, ...] = ()

    @property
    def added(self) -> tuple[Category, ...]:
        """The classes that the data set lacks, with unused ids."""
        return tuple(
            self.categories[label]
            for label, is_known in zip(self.labels.tolist(), self.is_known, strict=True)
            if not is_known
        )

    def relabel(self, detections: Detections) -> Detections:
        """Return detections with labels of `categories` in place of those of the detector."""
        return replace(
            detections,
            labels=self.labels[detections.labels],
            class_names=tuple(category.name for category in self.categories),
        )


def match_categories(
    classes: Sequence[Category],
    categories: Sequence[Category],
    *,
    classes_of: str = "the detector",
    categories_of: str = "the data set",
    are_all: bool = True,
) -> CategoryMatch:
    """Match the classes of a detector with the categories of a data set, by name.

    Names that differ only in case, spacing, hyphens, underscores or Unicode form match, with a warning. Ids and order
    do not matter, except where two categories have one name: then both sides must be equal, ids included.

    Args:
        classes: of the detector, by label.
        categories: of the data set, by label. A data set without categories has those of the detector.
        classes_of: name of the first side for messages, such as `runs/data`.
        categories_of: name of the second side for messages, such as the path of a file.
        are_all: whether the detector has no other classes. Of results, only classes with a detection are known.

    Raises:
        AnnotationError: if no name is on both sides, or two categories of one side have the same name.

    Example:
        >>> match = match_categories(
        ...     [Category(category_id=1, name="car"), Category(category_id=2, name="bus")],
        ...     [Category(category_id=0, name="bus"), Category(category_id=7, name="car")],
        ... )
        >>> match.labels.tolist()
        [1, 0]
    """
    if not categories or tuple(classes) == tuple(categories):
        return CategoryMatch(
            categories=tuple(classes),
            labels=np.arange(len(classes), dtype=np.int64),
            is_known=np.ones(len(classes), dtype=np.bool_),
        )
    _check_distinct(classes, classes_of)
    _check_distinct(categories, categories_of)
    label_of = match_names([each.name for each in classes], [each.name for each in categories])
    if not label_of:
        raise AnnotationError(
            f"{classes_of} and {categories_of} have no category name in common: "
            f"{_list_names(classes)} and {_list_names(categories)}"
        )
    unknown = [index for index in range(len(classes)) if index not in label_of]
    new_ids = _unused_ids(classes, categories)
    added = [Category(category_id=next(new_ids), name=classes[index].name) for index in unknown]
    label_of |= {index: len(categories) + position for position, index in enumerate(unknown)}
    matched = (*categories, *added)
    labels = [label_of[index] for index in range(len(classes))]
    detected = set(labels)
    undetected = [each for label, each in enumerate(categories) if are_all and label not in detected]
    return CategoryMatch(
        categories=matched,
        labels=np.array(labels, dtype=np.int64),
        is_known=np.array([label < len(categories) for label in labels], dtype=np.bool_),
        warnings=tuple(
            _warnings(
                [
                    (classes[index], matched[label])
                    for index, label in enumerate(labels)
                    if label < len(categories)
                ],
                added,
                undetected,
                classes_of=classes_of,
                categories_of=categories_of,
            )
        ),
    )


def match_names(names: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Match names with other names: equal ones, or else those that differ in case, spacing, hyphens or Unicode form.

    Args:
        names: to match. A name that is there more than once is matched only if both sides are equal.
        others: to match with.

    Returns:
        For each index of a name that has a match, the index of the match.

    Example:
        >>> match_names(["car", "Traffic Light"], ["traffic_light", "bus", "car"])
        {0: 2, 1: 0}
    """
    if list(names) == list(others):
        return {index: index for index in range(len(names))}
    num_names, num_others = Counter(names), Counter(others)
    index_of = {other: index for index, other in enumerate(others) if num_others[other] == 1}
    matches = {
        index: index_of[name] for index, name in enumerate(names) if name in index_of and num_names[name] == 1
    }
    rest = [index for index in range(len(names)) if index not in matches]
    matched = set(matches.values())
    free = [index for index in range(len(others)) if index not in matched]
    counts = Counter(_simplify(names[index]) for index in rest)
    other_counts = Counter(_simplify(others[index]) for index in free)
    similar = {
        _simplify(others[index]): index for index in free if other_counts[_simplify(others[index])] == 1
    }
    return matches | {
        index: similar[simple]
        for index in rest
        if counts[simple := _simplify(names[index])] == 1 and simple in similar
    }


def _simplify(name: str) -> str:
    """Return a name without differences of case, spacing, hyphens, underscores and Unicode form."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(folded.replace("_", " ").replace("-", " ").split())


def _check_distinct(categories: Sequence[Category], owner: str) -> None:
    counts = Counter(category.name for category in categories)
    repeated = [f"{name!r} ({count} times)" for name, count in counts.items() if count > 1]
    if repeated:
        raise AnnotationError(
            f"{owner}: categories cannot be matched by name, since some names are used more than once: "
            f"{count_and_list(repeated, limit=_MAX_LISTED, separator=', ')}"
        )


def _unused_ids(*sides: Sequence[Category]) -> Iterator[int]:
    """Yield ids above all ids that are in use."""
    used = [each.category_id for side in sides for each in side if isinstance(each.category_id, int)]
    number = max(used, default=0)
    while True:
        number += 1
        yield number


def _warnings(
    known: Sequence[tuple[Category, Category]],
    added: Sequence[Category],
    undetected: Sequence[Category],
    *,
    classes_of: str,
    categories_of: str,
) -> Iterator[str]:
    """Yield one line for each kind of difference; `known` are the categories that both sides have."""
    renamed = [f"{mine.name!r} is {theirs.name!r}" for mine, theirs in known if mine.name != theirs.name]
    if renamed:
        listed = count_and_list(renamed, limit=_MAX_LISTED)
        yield f"{categories_of} spells category names otherwise than {classes_of}: {listed}"
    renumbered = [
        f"{theirs.name!r} is {theirs.category_id}, not {mine.category_id}"
        for mine, theirs in known
        if mine.category_id != theirs.category_id
    ]
    if renumbered:
        listed = count_and_list(renumbered, limit=_MAX_LISTED)
        yield f"{categories_of} has other category ids than {classes_of}, matched by name: {listed}"
    if undetected:
        yield (
            f"{classes_of} does not know {counted(len(undetected), 'category', 'categories')} of {categories_of}, "
            f"whose objects cannot be detected: {_list_names(undetected)}"
        )
    if added:
        lacking = counted(len(added), "category", "categories")
        yield f"{categories_of} lacks {lacking} of {classes_of}: {_list_names(added)}"


def _list_names(categories: Sequence[Category]) -> str:
    return count_and_list([repr(each.name) for each in categories], limit=_MAX_LISTED, separator=", ")
