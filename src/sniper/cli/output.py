"""What commands print: their result on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sniper.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

console = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error. What names contain is text: neither markup nor codes of emoji are interpreted."""

STANDARD_OUTPUT = "standard output"
"""Names standard output in errors of the operating system."""

_stdout = Console(highlight=False, markup=False, emoji=False)


def print_result(values: Mapping[str, Any], *, is_json: bool) -> None:
    """Print the result of a command: one JSON object, or a line for each value."""
    if is_json:
        with _naming_output():
            print(json.dumps(values))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print_line(f"{name:<{width}}  {text}")


def print_line(text: str) -> None:
    """Print a line of a result."""
    with _naming_output():
        print(printable(text))


def print_paragraph(text: str) -> None:
    """Print a long line of a result; on a terminal it is broken between words."""
    with _naming_output():
        _stdout.print(printable(text), soft_wrap=not _stdout.is_terminal)


def print_table(table: "Table") -> None:
    """Print a table of a result."""
    with _naming_output():
        _stdout.print(table)


def flush() -> None:
    """Write what is printed of a result but still held in memory, so that an error is noticed."""
    with _naming_output():
        sys.stdout.flush()


@contextmanager
def _naming_output() -> Iterator[None]:
    """Name standard output in errors, such as that of a full disk that it is redirected to."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        error.filename = STANDARD_OUTPUT
        raise


def fits(table: "Table") -> bool:
    """Check whether standard output is wide enough for a table without breaking its lines."""
    unlimited = _stdout.options.update(max_width=100_000)
    return _stdout.measure(table, options=unlimited).maximum <= _stdout.width


def print_progress(text: str) -> None:
    """Print a line about the progress of a command."""
    console.print(printable(text), soft_wrap=True)


def print_error(message: str) -> None:
    """Print a mistake of the user in one paragraph."""
    console.print(f"error: {printable(message)}", soft_wrap=True)


def print_warnings(messages: Iterable[str]) -> None:
    """Print warnings, one line each."""
    for message in messages:
        console.print(f"warning: {printable(message)}", soft_wrap=True)


@contextmanager
def announce_compilation(*, is_shown: bool = True) -> Iterator[None]:
    """Print a line if kernels are compiled while the context is open: once after an installation or an update.

    Args:
        is_shown: False for all but the first of several processes.
    """
    from numba.core import event

    class Announcement(event.Listener):
        is_printed = not is_shown

        def on_start(self, event: event.Event) -> None:
            if not self.is_printed:
                print_progress("compiling kernels; this takes half a minute, once")
            self.is_printed = True

        def on_end(self, event: event.Event) -> None:
            pass

    with event.install_listener("numba:compile", Announcement()):
        yield
