"""Specs: frozen dataclasses that check the types and ranges of their fields, and JSON that is checked likewise."""

from functools import cache
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

from annotated_types import Ge, Le
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sniper.errors import count_and_list

T = TypeVar("T")

Fraction = Annotated[float, Ge(0), Le(1)]
"""A number from 0 to 1."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def spec_dataclass(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose fields pydantic checks, however a value is constructed.

    Types are strict: a string or a flag is not a number, but an integer is a valid float. Numbers are finite unless a
    field allows otherwise.

    Raises:
        ValueError: when constructed, if a field is unknown, of another type or out of its range.

    Example:
        >>> @spec_dataclass
        ... class Grid:
        ...     overlap: Fraction = 0.2
        >>> Grid(overlap=1)
        Grid(overlap=1.0)
        >>> Grid(overlap=2)
        Traceback (most recent call last):
            ...
        pydantic_core._pydantic_core.ValidationError: 1 validation error for Grid
        overlap
          Input should be less than or equal to 1 [type=less_than_equal, input_value=2, input_type=int]
        ...
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return cast(type[T], dataclass(cls, frozen=True, kw_only=True, config=config))


@cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def parse_json(content: str | bytes, kind: type[T]) -> T:
    """Parse JSON into a dataclass or another type that pydantic knows.

    Args:
        content: the JSON.
        kind: of its content. Types are strict, as in a spec.

    Raises:
        ValueError: if it is not JSON, or not of this kind; the message is one line with the problems.

    Example:
        >>> parse_json("[1, 2]", list)
        [1, 2]
        >>> parse_json('{"a": 1}', list)
        Traceback (most recent call last):
            ...
        ValueError: Input should be a valid array
    """
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(content, strict=True))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        problems = [
            ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"]))) for fault in faults
        ]
        raise ValueError(count_and_list(problems)) from error
