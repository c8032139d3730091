"""Errors that a user can correct, each explained in one paragraph."""

import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, except tab and newline
    r"\u202a-\u202e\u2066-\u2069"  # changes of the direction of the text that follows
    r"\u2028\u2029\ud800-\udfff]"
)


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


class LoaderError(SniperError):
    """A process that reads chips and was killed, or ran out of memory."""


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


def printable(text: str) -> str:
    r"""Return text that a terminal, a page or a picture can show: other characters become escape sequences of Python.

    Names of files and classes may contain anything. Control characters command a terminal, and bytes of a file name
    that are not UTF-8 cannot be encoded.

    Example:
        >>> printable("\x1b[31mred caf\udce9")
        '\\x1b[31mred caf\\xe9'
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 in a file name, as Python decodes it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
