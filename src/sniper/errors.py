"""Errors that a user can correct, each explained in one paragraph."""

import errno
import os
import re
from collections import Counter
from collections.abc import Sequence

_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, except tab and newline
    r"\u202a-\u202e\u2066-\u2069"  # changes of the direction of the text that follows
    r"\u2028\u2029\ud800-\udfff]"
)

_REMEDIES = {
    errno.ENOSPC: "free space on its disk, or use a folder on another one",
    errno.EDQUOT: "free space within your quota, or use a folder on another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use a folder on another disk",
    errno.EROFS: "use a folder that can be written",
    errno.EACCES: "check the permissions of the file and its folders, or use another folder",
    errno.EPERM: "check the owner and the attributes of the file and its folders, or use another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer processes (data.num_workers)",
    errno.ENFILE: "close other programs, or use fewer processes (data.num_workers)",
    errno.ENAMETOOLONG: "choose shorter names of folders and files",
    errno.EIO: "the disk or the connection to it fails: check it (dmesg), or use a folder on another one",
    errno.ESTALE: "the connection to its disk was lost: mount it again, or use a folder on another one",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTEMPTY: "choose another name, or remove the folder",
    errno.EEXIST: "choose another name, or remove it",
    errno.ELOOP: "links lead in a circle: name the file that they are meant to lead to",
    errno.ENOMEM: "free memory, or use fewer processes (data.num_workers)",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or use fewer (data.num_workers)",
}
"""What to do about errors of the operating system, by number; where an error says it all, nothing."""

_NO_FILE = "a file of a library, such as one in TMPDIR"
_SHARED_MEMORY = re.compile(
    r"shared memory|</torch_|Bus error|items of ancdata|Too many open files", re.IGNORECASE
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
    """A run folder that is missing, not empty, or without a checkpoint."""


class InUseError(SniperError):
    """A run or an output that another process writes to; the message names that process."""


class CheckpointError(SniperError):
    """A checkpoint that cannot be read, or that belongs to another model."""


class WeightsError(SniperError):
    """Pretrained weights that cannot be loaded, or do not fit the backbone."""


class ExportError(SniperError):
    """A detector that cannot be exported, or an exported one that cannot be used."""


class TrainingDiverged(SniperError):
    """A loss that is not finite; the message names the step and the chips."""


class OutOfMemory(SniperError):
    """A batch that does not fit into the memory of its device."""


def describe_os_error(error: OSError) -> str:
    """Return what went wrong and what to do about it, without the path, for the end of a message.

    Example:
        >>> describe_os_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        'No space left on device; free space on its disk, or use a folder on another one'
    """
    lines = " ".join(map(str, error.args)).strip().splitlines()  # from a loader process: its traceback, too
    reason = error.strerror or (lines[-1] if lines else type(error).__name__)
    remedy = _REMEDIES.get(error.errno) if error.errno is not None else None
    return reason if remedy is None else f"{reason}; {remedy}"


def explain_os_error(error: OSError) -> str:
    """Return a message that names the file of an error of the operating system, what went wrong, and what to do.

    Example:
        >>> explain_os_error(OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/a"))
        'runs/a: Read-only file system; use a folder that can be written'
    """
    path = _NO_FILE if error.filename is None else os.fsdecode(error.filename)
    return f"{path}: {describe_os_error(error)}"


def explain_shared_memory(error: Exception) -> str | None:
    """Explain an error of torch that means that loader processes lack shared memory or open files; None for others.

    Example:
        >>> text = "unable to write to file </torch_12>: No space left on device (28)"
        >>> explain_shared_memory(RuntimeError(text)).partition(";")[0]
        '/dev/shm: unable to write to file </torch_12>: No space left on device (28)'
    """
    text = " ".join(str(error).split())
    if not _SHARED_MEMORY.search(text):
        return None
    return (
        f"/dev/shm: {text}; use fewer loader processes (data.num_workers, 0 for none), allow more open files (ulimit "
        "-n), or provide more shared memory (docker run --shm-size=8g)"
    )


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


def shorten_repeated(problems: Sequence[str]) -> list[str]:
    """Replace what many problems of the form `PATH: REASON` have in common by "likewise", except in the first.

    Args:
        problems: one line each. A reason that at most three of them have is kept.

    Example:
        >>> shorten_repeated(["a: is a pipe", *(f"{name}: has 2 bands" for name in "bcde")])
        ['a: is a pipe', 'b: has 2 bands', 'c: likewise', 'd: likewise', 'e: likewise']
    """
    counts = Counter(reason for _, _, reason in (problem.partition(": ") for problem in problems))
    seen: set[str] = set()
    lines = []
    for problem in problems:
        path, _, reason = problem.partition(": ")
        is_repeated = bool(reason) and counts[reason] > 3 and reason in seen
        lines.append(f"{path}: likewise" if is_repeated else problem)
        seen.add(reason)
    return lines


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, in the singular or the plural.

    Args:
        number: of the things that are counted; a fraction is shown with up to six digits.
        noun: for one of them.
        plural: for several; None adds an s.

    Example:
        >>> counted(1, "box", "boxes"), counted(1_200, "box", "boxes"), counted(2.5, "epoch")
        ('1 box', '1,200 boxes', '2.5 epochs')
    """
    text = f"{int(number):,}" if number == int(number) else f"{number:,g}"
    return f"{text} {noun if number == 1 else plural or f'{noun}s'}"


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
