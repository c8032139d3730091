"""The chip table: selections, joins, and the file."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sniper.chips import ChipTable, PyramidSpec
from sniper.chips.cover import cover
from sniper.errors import ChipTableError
from tests.chips.worlds import SMALL_PYRAMID, build_world

WORLD = build_world(3, num_images=6)
COLUMNS = ("image_indices", "level", "x", "y", "widths", "heights", "is_negative")


@pytest.fixture(scope="module")
def table() -> ChipTable:
    return cover(SMALL_PYRAMID, WORLD, generator=np.random.default_rng(0))


@pytest.fixture
def path(table: ChipTable, tmp_path: Path) -> Path:
    table.save(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="abc")
    return tmp_path / "chips.npz"


def load(path: Path, *, pyramid: PyramidSpec = SMALL_PYRAMID, digest: str = "abc") -> ChipTable:
    return ChipTable.load(path, pyramid=pyramid, images=WORLD, digest=digest)


def rewrite(path: Path, **arrays: np.ndarray) -> None:
    """Replace arrays of a file."""
    with np.load(path) as file:
        np.savez(path, **{**file, **arrays})


def assert_equal_chips(table: ChipTable, other: ChipTable) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(table, name), getattr(other, name))


def test_a_saved_table_is_loaded_unchanged(table: ChipTable, path: Path) -> None:
    loaded = load(path)
    assert len(loaded) == len(table) > 0
    assert_equal_chips(loaded, table)
    assert loaded.moved_to.tolist() == table.moved_to.tolist()
    assert [loaded.chip(i) for i in range(len(table))] == [table.chip(i) for i in range(len(table))]
    assert [file.name for file in path.parent.iterdir()] == ["chips.npz"]


def test_offsets_are_where_the_chips_of_each_image_begin(table: ChipTable) -> None:
    for image in range(6):
        chips = np.flatnonzero(table.image_indices == image)
        assert chips.tolist() == list(range(table.offsets[image], table.offsets[image + 1]))


def test_a_selection_has_its_chips_in_order(table: ChipTable) -> None:
    indices = np.array([4, 0, 2])
    selection = table.select(indices)
    assert [selection.chip(i) for i in range(3)] == [table.chip(i) for i in indices.tolist()]


def test_a_table_is_the_concatenation_of_its_images(table: ChipTable) -> None:
    parts = [table.of_images(images) for images in (range(2), range(2, 2), range(2, 6))]
    joined = ChipTable.concatenate(parts)
    assert_equal_chips(joined, table)
    assert joined.image_widths.tolist() == table.image_widths.tolist()


def test_merged_chips_come_last_in_their_image(table: ChipTable) -> None:
    some = np.array([len(table) - 1, 1])
    negatives = dataclasses.replace(table.select(some), is_negative=np.ones(2, dtype=bool))
    merged = table.merge(negatives)
    assert_equal_chips(merged.select(np.flatnonzero(~merged.is_negative)), table)
    assert merged.moved_to is table.moved_to
    for index in np.flatnonzero(merged.is_negative).tolist():
        assert index == merged.offsets[merged.image_indices[index] + 1] - 1


def test_a_table_of_other_annotations_is_refused(path: Path) -> None:
    message = r"chips\.npz: made for other annotations \(digest abc, expected xyz\)"
    with pytest.raises(ChipTableError, match=message):
        load(path, digest="xyz")


def test_a_table_of_another_pyramid_is_refused(path: Path) -> None:
    other = PyramidSpec(chip_size=64, stride=16, levels=SMALL_PYRAMID.levels)
    with pytest.raises(ChipTableError, match=r"made with another pyramid \(stride differ\)"):
        load(path, pyramid=other)


def test_a_table_of_another_version_is_refused(path: Path) -> None:
    np.savez(path, head=np.array('{"version": 2}'))
    with pytest.raises(
        ChipTableError, match=r"of version 2; this program reads 3\. Write it again with `sniper"
    ):
        load(path)


def test_a_table_without_an_array_is_refused(path: Path) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{name: value for name, value in arrays.items() if name != "moved_to"})
    with pytest.raises(ChipTableError, match="not a chip table"):
        load(path)


Change = Callable[[np.ndarray], np.ndarray]


def with_first(value: int) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.astype(np.int64)
        changed[0] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("level", with_first(3), r"level\[0\] is 3, expected 0 to 2 \(1 such values\)"),
        ("level", with_first(-1), r"level\[0\] is -1"),
        (
            "level",
            lambda array: array > 0,
            r"level has \d+ values of type bool, expected \d+ integers",
        ),
        ("level", lambda array: array.astype(np.uint8), "of type uint8"),
        ("x", lambda array: array[:-1], r"x has \d+ values of type int32, expected \d+ integers"),
        ("x", with_first(10**9), r"x\[0\] is 1000000000, expected a window that shows a part of the image"),
        ("y", with_first(-64), r"y\[0\] is -64, expected a window"),
        ("widths", with_first(63), r"widths\[0\] is 63, expected 64 \(pyramid\.chip_size\)"),
        ("image_indices", with_first(6), r"image_indices\[0\] is 6, expected 0 to 5"),
        (
            "image_indices",
            lambda array: array[::-1],
            r"image_indices\[\d+\] is \d, expected ascending numbers",
        ),
        ("image_widths", with_first(7), r"image_widths\[0\] is 7, expected those of the annotations"),
        (
            "image_heights",
            lambda array: array[:5],
            "image_heights has 5 values of type int64, expected 6 integers",
        ),
        (
            "is_negative",
            lambda array: array.astype(np.int8),
            "is_negative has .* of type int8, expected .* flags",
        ),
        ("moved_to", with_first(3), r"moved_to\[0\] is 3, expected -1 to 2"),
        ("moved_to", lambda array: array[:0], r"moved_to has 0 values of type int8, expected \d+ integers"),
    ],
)
def test_a_table_with_values_that_no_table_has_is_refused(
    path: Path, name: str, change: Change, message: str
) -> None:
    with np.load(path) as file:
        rewrite(path, **{name: change(file[name])})
    with pytest.raises(ChipTableError, match=rf"chips\.npz: damaged: .*{message}"):
        load(path)


def test_all_problems_of_a_table_are_listed(path: Path) -> None:
    with np.load(path) as file:
        rewrite(path, level=file["level"] + 5, widths=file["widths"] * 2)
    with pytest.raises(ChipTableError, match=r"level\[0\] .*; widths\[0\] "):
        load(path)


def test_a_table_without_chips_is_loaded(table: ChipTable, tmp_path: Path) -> None:
    none = table.select(np.zeros(0, dtype=np.int64))
    none.save(tmp_path / "none.npz", pyramid=SMALL_PYRAMID, digest="abc")
    assert len(load(tmp_path / "none.npz")) == 0


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("[]", "Input should be an object|Input should be a dictionary"),
        ("[" * 5000, "Invalid JSON"),
        (json.dumps({"version": "3"}), "version: Input should be a valid integer"),
        (json.dumps({"version": 3, "digest": 7}), "digest: Input should be a valid string"),
        (json.dumps({"version": 3, "digest": "abc", "pyramid": []}), "pyramid: Input should be a"),
    ],
)
def test_a_table_with_a_damaged_head_is_refused(path: Path, head: str, message: str) -> None:
    rewrite(path, head=np.array(head))
    with pytest.raises(ChipTableError, match=rf"chips\.npz: not a chip table \(.*({message})"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ChipTableError, match="not a chip table"):
        load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChipTableError, match=r"none\.npz: cannot be read"):
        load(tmp_path / "none.npz")
