"""The splits of a data set: their names, and which of them are read."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sniper.errors import AnnotationError
from sniper.files import list_folder

ALL = "all"
"""Stands for all splits together."""

_SYNONYMS = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
}


def canonical(name: str) -> str:
    """Return the name of a split in lower case, and `train`, `val` or `test` for their synonyms.

    Example:
        >>> [canonical(name) for name in ("Validation", "valid", "train", "night")]
        ['val', 'val', 'train', 'night']
    """
    lower = name.lower()
    return _SYNONYMS.get(lower, lower)


def choose_splits(path: Path, available: Sequence[str], wanted: str | None) -> list[str]:
    """Return the splits to read.

    Args:
        path: of the data set, for errors.
        available: names of its splits, canonical. Empty where it has none.
        wanted: name of one, or `all`. None is the training split, or the only one.

    Raises:
        AnnotationError: if there is no such split, or none is wanted and there are several but no training split.
    """
    listed = ", ".join(available)
    if wanted is None:
        if len(available) <= 1:
            return list(available)
        if "train" not in available:
            raise AnnotationError(
                f"{path}: has the splits {listed} and no training split; name one of them, or all"
            )
        return ["train"]
    name = canonical(wanted)
    if name == ALL:
        return list(available)
    if not available:
        raise AnnotationError(f"{path}: has no splits, so there is no split {wanted}")
    if name not in available:
        raise AnnotationError(f"{path}: has no split {wanted}, expected one of {listed}, or all")
    return [name]


def scored_split(available: Sequence[str]) -> str | None:
    """Return the split that scores are computed on: val, else test, else None."""
    return next((name for name in ("val", "test") if name in available), None)


def find_split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder that are named after a split, by canonical name: train, val, test."""
    names, _ = list_folder(folder)
    return by_split((name, folder / name) for name in names)


def by_split(entries: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return the entries that are named train, val or test, or a synonym, by canonical name in this order."""
    named = {canonical(name): entry for name, entry in entries}
    return {name: named[name] for name in ("train", "val", "test") if name in named}
