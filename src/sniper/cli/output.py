"""What commands print: their result on standard output, everything else on standard error."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

console = Console(stderr=True, highlight=False)


def print_result(values: Mapping[str, Any], *, is_json: bool) -> None:
    """Print the result of a command: one JSON object, or a line for each value."""
    if is_json:
        print(json.dumps(values))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def print_error(message: str) -> None:
    """Print a mistake of the user in one paragraph."""
    console.print(f"error: {message}", markup=False, soft_wrap=True)


def print_warnings(messages: Iterable[str]) -> None:
    """Print warnings, one line each."""
    for message in messages:
        console.print(f"warning: {message}", markup=False, soft_wrap=True)
