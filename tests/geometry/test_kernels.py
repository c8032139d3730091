"""Kernels run in threads to the same result, leave torch alone, and work where nothing can be written."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniper.chips.cover import cover
from sniper.chips.visibility import chip_visibility
from sniper.geometry import kernels
from sniper.geometry.kernels import run_in_threads
from tests.chips.worlds import SMALL_PYRAMID, build_world

SOURCE = Path(kernels.__file__).parents[2]


@given(counts=st.lists(st.integers(0, 9), max_size=30), num_threads=st.integers(1, 5))
def test_slices_hold_every_row_once(counts: list[int], num_threads: int) -> None:
    slices: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "NUMBA_NUM_THREADS", num_threads)
        patch.setattr(kernels, "_MIN_ITEMS", 1)
        run_in_threads(lambda first, last: slices.append((first, last)), 7 + np.cumsum([0, *counts]))
    rows = [row for first, last in sorted(slices) for row in range(first, last)]
    assert rows == list(range(len(counts)))


def test_chips_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MIN_ITEMS", 1)
    world = build_world(3, num_images=200)
    tables, visibilities = [], []
    for num_threads in (1, 4):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", num_threads)
        tables.append(cover(SMALL_PYRAMID, world, generator=np.random.default_rng(0)))
        visibilities.append(chip_visibility(tables[-1], world))
    for name in ("image_indices", "level", "x", "y", "moved_to"):
        np.testing.assert_array_equal(getattr(tables[0], name), getattr(tables[1], name))
    for of_one, of_many in zip(*visibilities, strict=True):
        np.testing.assert_array_equal(of_one, of_many)


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MIN_ITEMS", 1)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)

    def fail(first: int, last: int) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run_in_threads(fail, np.arange(10))


def run_python(program: str, **environment: str) -> str:
    """Run a program in a process of its own, and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.getcwd()]), **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


CHOOSE = """
import numpy as np
from sniper.chips.cover import cover
from sniper.chips.visibility import chip_visibility
from tests.chips.worlds import SMALL_PYRAMID, build_world
world = build_world(0, num_images=10_000)
assert len(world.boxes) > 30_000
table = cover(SMALL_PYRAMID, world, generator=np.random.default_rng(0))
chip_visibility(table, world)
"""


def test_choosing_chips_leaves_the_threads_of_torch_alone() -> None:
    program = (
        f"import torch\nbefore = torch.get_num_threads()\n{CHOOSE}\nprint(before, torch.get_num_threads())"
    )
    assert run_python(program, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="2") == "1 1\n"


def test_kernels_work_where_no_cache_can_be_written() -> None:
    program = """
from sniper.geometry.kernels import kernel
@kernel
def add(a, b):
    return a + b
print(add(1, 2), add.stats.cache_path)
"""
    printed = run_python(program, NUMBA_CACHE_LOCATOR_CLASSES="IPythonCacheLocator")  # for notebooks only
    assert printed.split() == ["3", "None"]
