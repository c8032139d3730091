"""Trackers are checked before a training starts."""

import sys
from pathlib import Path

import pytest

from sniper.errors import ConfigError
from sniper.training.trackers import check_trackers


def test_a_folder_of_the_name_of_a_tracker_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B leaves it in the working folder
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="Weights & Biases is not installed"):
        check_trackers(("wandb",))
