"""COCO results files: read as a table, and the problems of their entries."""

import gc
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniper.errors import DetectionsError
from sniper.evaluation import results
from sniper.evaluation.results import DetectionTable, load_detections, save_detections
from tests.evaluation.entries import entry


def rows_of(table: DetectionTable) -> list[Any]:
    columns = (table.image_ids, table.category_ids, table.boxes, table.scores)
    return [*zip(*(column.tolist() for column in columns), strict=True), table.class_names]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "detections", [[], [entry(), entry(score=1, bbox=[0, 0, 0, 0.1], segmentation=[[1, 2, 3, 4, 5, 6]])]]
)
def test_saved_detections_load_unchanged(tmp_path: Path, detections: list[dict[str, Any]]) -> None:
    path = tmp_path / "detections.json"
    path.write_text("an older file")
    save_detections(path, detections)
    assert rows_of(load_detections(path)) == rows_of(DetectionTable.from_entries(detections))
    assert len(load_detections(path)) == len(detections)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    save_detections(path, [entry()])
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_detections(path, [entry(score=float("nan"))])
    assert len(load_detections(path)) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"image_id": 1, "score": 0.5}, "entry 1: has no category_id, bbox"),
        ([1, 2], "entry 1: expected an object with image_id, category_id, bbox, score, got [1, 2]"),
        (entry(image_id=1.5), "entry 1: image_id must be an integer of at most 64 bits or a string, not 1.5"),
        (
            entry(category_name="a" * 1025),
            'entry 1: category_name must have at most 1,024 characters, not 1,025, as "aaa',
        ),
        (entry(image_id=2**63), "64 bits or a string, not 9223372036854775808"),
        (entry(image_id=1e16), "64 bits or a string, not 1e+16"),
        (entry(category_id=True), "category_id must be an integer of at most 64 bits or a string, not true"),
        (entry(category_id=None), "category_id must be an integer of at most 64 bits or a string, not null"),
        (entry(category_name=["a"]), 'category_name must be a string, not ["a"]'),
        (
            {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": [[1, 2, 3]]},
            "entry 1: has no bbox (it has a segmentation, but boxes are scored)",
        ),
        (entry(bbox=["1", 2, 3, 4]), 'not ["1", 2, 3, 4]'),
        (entry(bbox=[True, 2, 3, 4]), "not [true, 2, 3, 4]"),
        (entry(bbox=[1, 2, 3, 4, 5]), "not [1, 2, 3, 4, 5]"),
        (entry(score=float("nan")), "entry 1: score must be a finite number, not NaN"),
        (entry(score=None), "entry 1: score must be a finite number, not null"),
        (entry(score=10**400), "entry 1: score must be a finite number, not 1000"),
        (
            entry(bbox=[1, 2, 3]),
            "entry 1: bbox must be four finite numbers (x, y, width, height), not [1, 2, 3]",
        ),
        (entry(bbox=[1, 2, 3, float("inf")]), "not [1, 2, 3, Infinity]"),
        (
            entry(bbox={"x": 1}),
            "entry 1: bbox must be four finite numbers (x, y, width, height), not an object",
        ),
        (entry(bbox=[5, 5, -2, 4]), "entry 1: bbox has a negative width or height: [5, 5, -2, 4]"),
    ],
)
def test_an_invalid_entry_is_reported_with_its_index_and_value(
    tmp_path: Path, bad: Any, message: str
) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([entry(), bad]))
    with pytest.raises(
        DetectionsError, match=f"^{re.escape(str(path))}: 1 problem in 2 entries\n.*{re.escape(message)}"
    ):
        load_detections(path)
    with pytest.raises(DetectionsError, match=f"^detections: 1 problem in 2 entries\n.*{re.escape(message)}"):
        DetectionTable.from_entries([entry(), bad])


def test_all_problems_are_counted_and_twenty_listed(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([entry(score=None, bbox=None)] * 12))
    with pytest.raises(DetectionsError) as refusal:
        load_detections(path)
    first, *listed, last = str(refusal.value).splitlines()
    assert first == f"{path}: 24 problems in 12 entries"
    assert len(listed) == 20
    assert listed[-1] == "  entry 9: bbox must be four finite numbers (x, y, width, height), not null"
    assert last == "  and 4 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"is not JSON \(Expecting"),
        (b"\xff\xfe\xfd", r"is not JSON \("),
        (b"[" * 100_000, r"is not JSON \(maximum recursion"),
        (b'[{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", r"is not JSON \(maximum recursion"),
        (b"7", r"expected a list of detections \(COCO results\), got 7$"),
        (b'{"images": [], "annotations": []}', "expected a list .* got an object with images, annotations$"),
    ],
)
def test_a_file_without_a_list_of_results_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "detections.json"
    path.write_bytes(content)
    with pytest.raises(DetectionsError, match=f"^{re.escape(str(path))}: {message}"):
        load_detections(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DetectionsError, match=r"nowhere.json: cannot be read \(No such file or directory\)$"):
        load_detections(tmp_path / "nowhere.json")


@pytest.mark.parametrize("chunk", [1, 100, 1 << 17])
@settings(max_examples=25)
@given(
    entries=st.lists(
        st.fixed_dictionaries(
            {
                "image_id": st.integers(-(2**63), 2**63 - 1),
                "category_id": st.integers(0, 3),
                "bbox": st.lists(st.floats(0, 1e9) | st.integers(0, 9), min_size=4, max_size=4),
                "score": st.floats(-1, 1) | st.integers(0, 1),
            },
            optional={
                "segmentation": st.just({"size": [3, 4], "counts": "a}, {"})
                | st.just([[1, 2, 3, 4, 5, 6.5]]),
                "keypoints": st.just([[{"x": 1}, {"x": 2}]]),
                "caption": st.text(max_size=5) | st.just('"}, {"'),
            },
        ),
        max_size=30,
    ),
    indent=st.sampled_from([None, 1]),
)
def test_the_fast_reader_equals_the_slow_one(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, entries: list[dict[str, Any]], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("results") / "found.json"
    path.write_text(json.dumps(entries, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_CHUNK_BYTES", chunk)
        table = load_detections(path)
    expected = DetectionTable.from_entries(entries)
    assert rows_of(table) == rows_of(expected)
    masks, expected_masks = (each and each.to_coco() for each in (table.masks, expected.masks))
    assert masks == expected_masks
    assert gc.isenabled()


def test_a_file_of_the_usual_types_is_read_without_a_dict_per_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = entry(category_name="ship", file_name="a.jpg", area=3, keypoints=[1, 2])
    path = write(tmp_path / "found.json", [entry(), named] * 5000)
    monkeypatch.setattr(results, "read_json", None)
    table = load_detections(path)
    assert (len(table), table.class_names) == (10_000, {1: "ship"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 2], [1, 2]),
        ([1.0, 2], [1, 2]),
        ([-5, -(2**63)], [-5, -(2**63)]),
        (["a", 7], ["a", "7"]),
        (["007", "8"], ["007", "8"]),
    ],
)
def test_ids_are_integers_or_else_text(tmp_path: Path, given: list[Any], expected: list[Any]) -> None:
    table = load_detections(
        write(tmp_path / "found.json", [entry(image_id=each, category_id=each) for each in given])
    )
    assert table.image_ids.tolist() == table.category_ids.tolist() == expected


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "found.json", [entry(file_name="\udcb2.jpg", category_name="\udcb2")])
    assert load_detections(path).class_names == {1: "\udcb2"}


def test_a_category_with_two_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "found.json", [entry(category_name="ship"), entry(category_name="boat")])
    with pytest.raises(DetectionsError, match="category 1 has two names in category_name: 'boat' and 'ship'"):
        load_detections(path)


def test_numpy_numbers_and_arrays_are_numbers() -> None:
    values = entry(image_id=np.int64(3), bbox=np.arange(4, dtype=np.float32), score=np.float32(0.5))
    table = DetectionTable.from_entries([values])
    assert rows_of(table) == [(3, 1, [0.0, 1.0, 2.0, 3.0], 0.5), {}]
