"""Detections handed to other packages."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sniper.geometry import Detections

SOME = Detections(
    boxes=np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 9.0, 9.0]]),
    scores=np.array([0.5, 0.25]),
    labels=np.array([0, 2]),
)


def test_supervision_is_given_what_it_wants() -> None:
    supervision = pytest.importorskip("supervision")
    given = SOME.to_supervision()
    assert isinstance(given, supervision.Detections)
    assert given.xyxy.tolist() == SOME.boxes.tolist()
    assert given.confidence.tolist() == [0.5, 0.25]
    assert given.class_id.tolist() == [0, 2]
    assert len(Detections.empty().to_supervision()) == 0


def test_the_arrays_for_supervision_have_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = ModuleType("supervision")
    stand_in.Detections = lambda **fields: fields
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    given = SOME.to_supervision()
    assert {name: values.dtype.name for name, values in given.items()} == {
        "xyxy": "float32",
        "confidence": "float32",
        "class_id": "int64",
    }
    assert given["xyxy"].shape == (2, 4)
    assert Detections.empty().to_supervision()["xyxy"].shape == (0, 4)


def test_without_supervision_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="supervision"):
        SOME.to_supervision()
