"""What commands print: their result on standard output, everything else on standard error."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sniper.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

console = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Standard error. What names contain is text: neither markup nor codes of emoji are interpreted."""

_stdout = Console(highlight=False, markup=False, emoji=False)


def print_result(values: Mapping[str, Any], *, is_json: bool) -> None:
    """Print the result of a command: one JSON object, or a line for each value."""
    if is_json:
        print(json.dumps(values))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print_line(f"{name:<{width}}  {text}")


def print_line(text: str) -> None:
    """Print a line of a result."""
    print(printable(text))


def print_table(table: "Table") -> None:
    """Print a table of a result."""
    _stdout.print(table)


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
