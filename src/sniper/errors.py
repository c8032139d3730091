"""Errors that a user can correct, each explained in one paragraph."""

from collections.abc import Sequence


class SniperError(Exception):
    """A mistake in what the user gave; the message says what was wanted, what came, and where."""


class ConfigError(SniperError):
    """An experiment file or an override that cannot be used."""


class AnnotationError(SniperError):
    """Dataset that cannot be trained or scored on."""


class DetectionsError(SniperError):
    """A detections file that cannot be read, or does not belong to its annotations."""


class ImageError(SniperError):
    """An image file that cannot be read."""


class CacheError(SniperError):
    """A folder of kept chips that cannot be used."""


class TransformError(SniperError):
    """A transform that gives back something else than a chip."""


class ChipTableError(SniperError):
    """A chip table that cannot be read, or does not belong to its annotations."""


class ProposalsError(SniperError):
    """Proposals that cannot be read, or do not belong to their annotations."""


class RunError(SniperError):
    """A run folder that is not there, or not empty, or has no checkpoint yet."""


class CheckpointError(SniperError):
    """A checkpoint that cannot be read, or belongs to another model."""


class WeightsError(SniperError):
    """Pretrained weights that cannot be had or do not fit the backbone."""


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
