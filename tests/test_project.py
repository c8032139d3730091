"""Facts that stand in more than one file of the project agree."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import sniper
from sniper.cli import run

ROOT = Path(__file__).parents[1]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_that_of_the_changelog(capsys: pytest.CaptureFixture[str]) -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    if newest[1] == "Unreleased":
        assert re.fullmatch(r"\d+\.\d+\.\d+\.dev\d+", sniper.__version__)
    else:
        assert sniper.__version__ == newest[1]
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == sniper.__version__


def test_contributing_shows_the_layers_that_are_checked() -> None:
    contract = next(
        one for one in pyproject()["tool"]["importlinter"]["contracts"] if one["type"] == "layers"
    )
    line = f"    {' > '.join(contract['layers'])}\n"
    assert line in (ROOT / "CONTRIBUTING.md").read_text()


def test_every_python_version_named_is_tested() -> None:
    classifiers = pyproject()["project"]["classifiers"]
    named = [name.rpartition(" ")[2] for name in classifiers if re.search(r"Python :: 3\.\d+$", name)]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert pyproject()["project"]["requires-python"] == f">={named[0]}"


def test_the_tools_of_pre_commit_are_those_of_the_constraints() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert "script/check" in hooks
