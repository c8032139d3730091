"""Detections as a value: indexed, printed, and handed to other packages."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sniper.geometry import Detections

PLAIN = Detections(
    boxes=np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 9.0, 9.0], [0.0, 0.0, 2.0, 2.0]]),
    scores=np.array([0.5, 0.25, 0.125]),
    labels=np.array([0, 2, 2]),
)
NAMED = Detections(
    boxes=PLAIN.boxes, scores=PLAIN.scores, labels=PLAIN.labels, class_names=("car", "bus", "person")
)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (PLAIN.scores > 0.2, [0, 1]),
        (np.array([2, 0]), [2, 0]),
        (np.zeros(0, dtype=np.int64), []),
        (np.zeros(3, dtype=np.bool_), []),
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        (1, [1]),
        (-1, [2]),
        (np.int64(0), [0]),
    ],
)
def test_an_index_of_any_kind_selects_detections(index: Any, rows: list[int]) -> None:
    selected = NAMED[index]
    assert selected.boxes.tolist() == NAMED.boxes[rows].tolist()
    assert selected.scores.tolist() == NAMED.scores[rows].tolist()
    assert selected.labels.tolist() == NAMED.labels[rows].tolist()
    assert selected.class_names == NAMED.class_names


def test_iterating_yields_one_detection_at_a_time() -> None:
    assert [detection.names for detection in NAMED] == [("car",), ("person",), ("person",)]
    with pytest.raises(IndexError):
        NAMED[3]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        (NAMED, "Detections(3: 2 person, 1 car)"),
        (PLAIN, "Detections(3: 2 of class 2, 1 of class 0)"),
        (Detections.empty(), "Detections(0)"),
        (
            Detections(
                boxes=np.zeros((7, 4)), scores=np.zeros(7), labels=np.arange(7), class_names=(*"abcdefg",)
            ),
            "Detections(7: 1 a, 1 b, 1 c, 1 d, 1 e, and 2 more)",
        ),
    ],
)
def test_detections_are_printed_on_one_line(detections: Detections, expected: str) -> None:
    assert repr(detections) == expected


def test_each_detection_has_the_name_of_its_class() -> None:
    assert NAMED.names == ("car", "person", "person")
    with pytest.raises(ValueError, match="have no class names"):
        _ = PLAIN.names


def test_joined_detections_keep_their_order_and_class_names() -> None:
    joined = Detections.join([NAMED[1:], NAMED[:1]])
    assert joined.scores.tolist() == [0.25, 0.125, 0.5]
    assert joined.class_names == NAMED.class_names
    assert len(Detections.join([])) == 0


@pytest.mark.parametrize(
    ("known", "given", "expected"),
    [
        (None, None, [0.9, 0.5]),
        (0.2, None, [0.9, 0.5, 0.25]),
        (0.2, 0.6, [0.9]),
        (None, 0.0, [0.9, 0.5, 0.25, 0.1]),
    ],
)
def test_confident_detections_have_a_score_and_no_duplicates(
    known: float | None, given: float | None, expected: list[float]
) -> None:
    squares = np.array([[0.0, 0.0, 9.0, 9.0]]) + np.array([[0], [20], [20.5], [40], [60]])
    detections = Detections(
        boxes=squares,
        scores=np.array([0.9, 0.5, 0.4, 0.25, 0.1]),
        labels=np.zeros(5, dtype=np.int64),
        class_names=("car",),
        min_score=known,
    )
    confident = detections.confident(given)
    assert confident.scores.tolist() == expected
    assert confident.names == ("car",) * len(expected)


def test_supervision_is_given_confident_detections(stand_in: Callable[[Detections], dict[str, Any]]) -> None:
    pair = Detections.join([replace(NAMED, min_score=0.2), NAMED])
    assert pair.to_supervision()["confidence"].tolist() == [0.5, 0.25]


def test_supervision_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sniper-det\[supervision\]'"):
        NAMED.to_supervision()


def test_supervision_is_given_its_own_type() -> None:
    supervision = pytest.importorskip("supervision")
    converted = NAMED.to_supervision(0)
    assert isinstance(converted, supervision.Detections)
    assert converted.xyxy.tolist() == NAMED.boxes.tolist()
    assert converted.confidence.tolist() == [0.5, 0.25, 0.125]
    assert converted.class_id.tolist() == [0, 2, 2]
    assert converted["class_name"].tolist() == ["car", "person", "person"]
    assert len(Detections.empty().to_supervision()) == 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Detections], dict[str, Any]]:
    """Convert detections with a stand-in for supervision that returns its arguments."""
    module: Any = ModuleType("supervision")
    module.Detections = lambda **fields: fields
    monkeypatch.setitem(sys.modules, "supervision", module)
    return lambda detections: detections.to_supervision(0)


def test_arrays_for_supervision_have_the_types_it_expects(
    stand_in: Callable[[Detections], dict[str, Any]],
) -> None:
    fields = stand_in(NAMED)
    names = fields.pop("data")["class_name"]
    assert {name: values.dtype.name for name, values in fields.items()} == {
        "xyxy": "float32",
        "confidence": "float32",
        "class_id": "int64",
    }
    assert fields["xyxy"].shape == (3, 4)
    assert names.tolist() == ["car", "person", "person"]


@pytest.mark.parametrize(("detections", "num_names"), [(PLAIN, None), (NAMED[:0], 0)])
def test_class_names_go_to_supervision_where_they_are_known(
    detections: Detections, num_names: int | None, stand_in: Callable[[Detections], dict[str, Any]]
) -> None:
    data = stand_in(detections)["data"]
    assert ("class_name" in data) == (num_names is not None)
    assert num_names is None or (len(data["class_name"]), data["class_name"].dtype.kind) == (num_names, "U")


def test_a_missing_supervision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="supervision"):
        PLAIN.to_supervision()


def build_supervised(
    boxes: list[list[float]], *, data: dict[str, Any] | None = None, **fields: Any
) -> SimpleNamespace:
    """Return what `from_supervision` reads of a `supervision.Detections`."""
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return SimpleNamespace(xyxy=array, data=data or {}, **{"class_id": None, "confidence": None, **fields})


TWO = [[0.0, 0.0, 8.0, 8.0], [1.0, 1.0, 5.0, 5.0]]


@pytest.mark.parametrize(
    ("fields", "class_names", "labels", "names"),
    [
        ({"class_id": np.array([2, 0])}, (), [2, 0], ()),
        ({"class_id": np.array([1, 0])}, ("car", "bus"), [1, 0], ("car", "bus")),
        (
            {"class_id": np.array([2, 0]), "data": {"class_name": np.array(["c", "a"])}},
            (),
            [2, 0],
            ("a", "1", "c"),
        ),
        ({"data": {"class_name": np.array(["car", "bus"])}}, (), [1, 0], ("bus", "car")),
        ({"data": {"class_name": ["car", "bus"]}}, ("van", "car", "bus"), [1, 2], ("van", "car", "bus")),
        ({}, (), [0, 0], ()),
    ],
)
def test_classes_come_back_from_supervision(
    fields: dict[str, Any], class_names: tuple[str, ...], labels: list[int], names: tuple[str, ...]
) -> None:
    converted = Detections.from_supervision(build_supervised(TWO, **fields), class_names=class_names)
    assert converted.labels.tolist() == labels
    assert converted.class_names == names
    assert converted.scores.tolist() == [1.0, 1.0]
    assert converted.boxes.tolist() == TWO


@pytest.mark.parametrize(
    ("fields", "class_names", "message"),
    [
        ({"class_id": np.array([0, 2])}, ("car", "bus"), "class_id is 0 to 2, expected 0 to 1"),
        ({"class_id": np.array([0, -1])}, (), "class_id is -1, expected at least 0"),
        (
            {"class_id": np.array([1, 1]), "data": {"class_name": ["a", "b"]}},
            (),
            "class 1 has two names, a and b",
        ),
        ({"data": {"class_name": ["a", "b"]}}, ("a",), "class_name has b, expected a"),
    ],
)
def test_classes_that_contradict_each_other_are_refused(
    fields: dict[str, Any], class_names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Detections.from_supervision(build_supervised(TWO, **fields), class_names=class_names)


def test_no_detections_come_back_from_supervision() -> None:
    assert len(Detections.from_supervision(build_supervised([], class_id=np.zeros(0, dtype=int)))) == 0


def test_detections_go_to_supervision_and_come_back() -> None:
    pytest.importorskip("supervision")
    back = Detections.from_supervision(NAMED.to_supervision(0), class_names=NAMED.class_names)
    assert (back.names, back.scores.tolist()) == (NAMED.names, pytest.approx(NAMED.scores.tolist()))
    np.testing.assert_allclose(back.boxes, NAMED.boxes)
    tracked = NAMED.to_supervision(0)
    tracked.tracker_id = np.arange(len(tracked))
    assert Detections.from_supervision(tracked[:1]).names == NAMED.names[:1]
