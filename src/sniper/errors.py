"""Errors that a user can correct, each explained in one paragraph."""

from collections.abc import Sequence


class SniperError(Exception):
    """An input that cannot be used; the message names it, what was expected, and what it contains."""


class ConfigError(SniperError):
    """An experiment, an override or an option that cannot be used."""


class AnnotationError(SniperError):
    """A data set that cannot be trained or evaluated on."""


class DetectionsError(SniperError):
    """Detections that cannot be read, or do not belong to their annotations."""


class ImageError(SniperError):
    """An image file that cannot be read."""


class CacheError(SniperError):
    """A cache of chips that cannot be used."""


class TransformError(SniperError):
    """A transform that does not return a chip."""


class ChipTableError(SniperError):
    """A chip table that cannot be read, or does not belong to its annotations."""


class ProposalsError(SniperError):
    """Proposals that cannot be read, or do not belong to their annotations."""


class RunError(SniperError):
    """A run folder that is missing, not empty, in use, or without a checkpoint."""


class CheckpointError(SniperError):
    """A checkpoint that cannot be read, or that belongs to another model."""


class WeightsError(SniperError):
    """Pretrained weights that cannot be loaded, or do not fit the backbone."""


class TrainingDiverged(SniperError):
    """A loss that is not finite; the message names the step and the chips."""


class OutOfMemory(SniperError):
    """A batch that does not fit into the memory of its device."""


def count_and_list(problems: Sequence[str], *, limit: int = 3, separator: str = "; ") -> str:
    """Join the first few of many problems, and count the rest.

    Example:
        >>> count_and_list(["a", "b", "c"], limit=2)
        'a; b; and 1 more'
    """
    shown = list(problems[:limit])
    if len(problems) > limit:
        shown.append(f"and {len(problems) - limit} more")
    return separator.join(shown)
