"""The chip table on disk: what goes in comes out, and what does not belong is refused."""

from pathlib import Path

import numpy as np
import pytest

from sniper.chips import ChipTable, PyramidSpec
from sniper.chips.cover import cover
from sniper.errors import ChipTableError
from tests.chips.worlds import SMALL_PYRAMID, build_world


def build_table() -> ChipTable:
    world = build_world(3, num_images=6)
    return cover(SMALL_PYRAMID, world, generator=np.random.default_rng(0))


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = build_table()
    table.save(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="abc")
    loaded = ChipTable.load(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="abc")
    assert len(loaded) == len(table) > 0
    assert loaded.chips_per_level.tolist() == table.chips_per_level.tolist()
    assert [loaded.chip(i) for i in range(len(table))] == [table.chip(i) for i in range(len(table))]
    assert [path.name for path in tmp_path.iterdir()] == ["chips.npz"]


def test_a_table_of_other_annotations_is_refused(tmp_path: Path) -> None:
    build_table().save(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="abc")
    with pytest.raises(
        ChipTableError, match=r"chips\.npz: made for other annotations \(digest abc, expected xyz\)"
    ):
        ChipTable.load(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="xyz")


def test_a_table_of_another_pyramid_is_refused(tmp_path: Path) -> None:
    build_table().save(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="abc")
    other = PyramidSpec(chip_size=64, stride=16, levels=SMALL_PYRAMID.levels)
    with pytest.raises(ChipTableError, match=r"made with another pyramid \(stride differ\)"):
        ChipTable.load(tmp_path / "chips.npz", pyramid=other, digest="abc")


def test_a_table_of_another_version_or_without_its_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chips.npz"
    build_table().save(path, pyramid=SMALL_PYRAMID, digest="abc")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{name: value for name, value in arrays.items() if name != "moved_to"})
    with pytest.raises(ChipTableError, match="not a chip table"):
        ChipTable.load(path, pyramid=SMALL_PYRAMID, digest="abc")
    np.savez(path, head=np.array('{"version": 99}'))
    with pytest.raises(ChipTableError, match=r"of version 99; this program reads 3\. Write it again"):
        ChipTable.load(path, pyramid=SMALL_PYRAMID, digest="abc")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chips.npz").write_bytes(content)
    with pytest.raises(ChipTableError, match="not a chip table"):
        ChipTable.load(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="abc")


def test_a_table_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChipTableError, match="cannot be read"):
        ChipTable.load(tmp_path / "chips.npz", pyramid=SMALL_PYRAMID, digest="abc")
