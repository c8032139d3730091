"""A tiny data set, its experiment, and a short run of it that is trained once per test process."""

import shutil
from pathlib import Path

import pytest

from sniper.cli import run
from sniper.config.loading import dump_experiment
from tests.cli.commands import CommandLine
from tests.data.tiny import write_dataset
from tests.training.experiments import tiny_experiment


@pytest.fixture
def sniper(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with `train.json`, its images, and `experiment.yaml`."""
    return write_experiment(tmp_path)


@pytest.fixture
def trained_folder(tmp_path: Path, trained_folder_once: Path) -> Path:
    """Return a folder like `folder` with the run `run`, which has a checkpoint; the test may change all of it."""
    shutil.copytree(trained_folder_once, tmp_path, dirs_exist_ok=True)
    for config in (tmp_path / "experiment.yaml", tmp_path / "run" / "config.yaml"):
        config.write_text(config.read_text().replace(str(trained_folder_once), str(tmp_path)))
    return tmp_path


@pytest.fixture(scope="session")
def trained_folder_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_experiment(tmp_path_factory.mktemp("trained"))
    tokens = ["train", folder / "experiment.yaml", "--run", folder / "run", "--train.epochs", "0.2"]
    assert run(list(map(str, tokens))) == 0
    return folder


def write_experiment(folder: Path) -> Path:
    write_dataset(folder)
    (folder / "experiment.yaml").write_text(dump_experiment(tiny_experiment(folder / "train.json")))
    return folder
