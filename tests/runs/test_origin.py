"""Where a run comes from: what is known, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sniper.runs.environment import Environment
from sniper.runs.origin import describe_origin

ENVIRONMENT = Environment.current(
    torch.device("cpu"), world_size=2, accumulation_steps=1, precision="fp32", compile=False
)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_working_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sniper", "train", "my cars.yaml"])
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    origin = describe_origin(ENVIRONMENT)
    assert origin["command"] == "sniper train 'my cars.yaml'"
    assert origin["git_commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert origin["git_has_changes"] == "false"
    assert (origin["processes"], origin["torch"]) == ("2", torch.__version__)
    (tmp_path / "a").write_text("2")
    assert describe_origin(ENVIRONMENT)["git_has_changes"] == "true"


def test_without_a_repository_or_git_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git_commit" not in describe_origin(ENVIRONMENT)
    monkeypatch.setenv("PATH", "")
    assert "git_commit" not in describe_origin(ENVIRONMENT)
