"""Specs are frozen dataclasses that check their fields, also in Python, a copy or another process."""

import dataclasses
import json
import math
import pickle
from typing import Annotated, Any

import pytest
from annotated_types import Ge
from pydantic import AllowInfNan

from sniper.specs import Fraction, parse_json, spec_dataclass


@spec_dataclass
class Inner:
    """A nested spec."""

    fraction: Fraction = 0.5
    bound: Annotated[float, AllowInfNan(True)] = math.inf


@spec_dataclass
class Outer:
    """A spec with every kind of field."""

    count: Annotated[int, Ge(1)] = 1
    sizes: tuple[float, ...] = (1.0, 2.0)
    inner: Inner = Inner()


def test_a_spec_is_a_frozen_dataclass() -> None:
    spec = Outer(count=2, inner=Inner(fraction=1))
    assert spec == dataclasses.replace(Outer(), count=2, inner=Inner(fraction=1.0))
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    assert dataclasses.asdict(spec)["inner"] == {"fraction": 1.0, "bound": math.inf}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.count = 3  # type: ignore[misc]
    with pytest.raises(Exception, match="positional"):
        Outer(2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count\n  Input should be greater than or equal to 1"),
        ({"count": True}, "count\n  Input should be a valid integer"),
        ({"count": 2.0}, "count\n  Input should be a valid integer"),
        ({"count": "2"}, "count\n  Input should be a valid integer"),
        ({"sizes": [1.0]}, "sizes\n  Input should be a valid tuple"),
        ({"sizes": (1.0, math.inf)}, r"sizes\.1\n  Input should be a finite number"),
        ({"inner": {"fraction": 1.0}}, "inner\n  Input should be an instance of Inner"),
        ({"cuont": 2}, "cuont\n  Unexpected keyword argument"),
    ],
)
def test_a_field_that_is_not_valid_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Outer(**fields)
    if "cuont" not in fields:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(Outer(), **fields)


@pytest.mark.parametrize(("value", "is_valid"), [(0, True), (1, True), (-0.01, False), (math.nan, False)])
def test_a_fraction_is_from_0_to_1(value: float, is_valid: bool) -> None:
    if is_valid:
        assert Inner(fraction=value).fraction == value
    else:
        with pytest.raises(ValueError, match="fraction"):
            Inner(fraction=value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"count": 1.5}', "^count: Input should be a valid integer"),
        (
            '{"count": 0, "inner": {"fraction": 2}}',
            "^count: .*; inner.fraction: Input should be less than or equal to 1$",
        ),
        ("[1]", "^Input should be"),
        ("[" * 100_000, "^Invalid JSON: recursion limit exceeded"),
        (b"\xff", "^Invalid JSON"),
        ("", "^Invalid JSON: EOF"),
    ],
)
def test_json_that_is_no_spec_is_refused_in_one_line(content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(content, Outer)
    assert "\n" not in str(caught.value)


def test_json_becomes_a_spec() -> None:
    spec = Outer(count=2, inner=Inner(fraction=1), sizes=(1.0, 2.0))
    assert parse_json(json.dumps(dataclasses.asdict(spec)), Outer) == spec
