"""Situations from public reports about other tools; see `tests/cases/run-all`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


@pytest.mark.processes
@pytest.mark.parametrize("case", sorted(path.parent.name for path in CASES.glob("*/run.sh")))
def test_a_reported_situation_is_handled(case: str, scratch: Path) -> None:
    environment = {
        **os.environ,
        "START": str(Path.cwd()),
        "PY": sys.executable,
        "SNIPER": str(Path(sys.executable).with_name("sniper")),
        "SCRATCH": str(scratch),
    }
    done = subprocess.run(
        ["bash", CASES / case / "run.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
