"""What makes a class a spec: a frozen dataclass that checks the types and ranges of its fields."""

from typing import Annotated, TypeVar, cast, dataclass_transform

from annotated_types import Ge, Le
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

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
