"""A run with its page, written once for the tests that only read it."""

import shutil
from pathlib import Path

import pytest

from sniper.data.datasets import Dataset
from sniper.runs.run import Run
from tests.reports.runs import write_run, write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def read_only_run(world: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "first", world)


@pytest.fixture(scope="session")
def run_with_masks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run, which no test may change, whose objects and detections have masks."""
    world = write_world(tmp_path_factory.mktemp("world_of_masks"), has_masks=True)
    return write_run(tmp_path_factory.mktemp("runs") / "masks", world)


@pytest.fixture
def run(read_only_run: Run, tmp_path: Path) -> Run:
    """Return a copy that the test may change."""
    shutil.copytree(read_only_run.folder, tmp_path / "first")
    return Run(tmp_path / "first")
