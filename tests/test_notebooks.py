"""The notebooks run in a fresh folder, as they are stored, and show their pictures."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

nbformat: Any = pytest.importorskip("nbformat")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs_and_explains_each_cell(path: Path) -> None:
    cells = read(path).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert 5 <= len(code) <= 10
    before = [cells[index - 1].cell_type for index, cell in enumerate(cells) if cell.cell_type == "code"]
    assert set(before) == {"markdown"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's packages
def test_a_notebook_runs_in_a_fresh_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    source = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", source)
    notebook = read(path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    client.NotebookClient(
        notebook, timeout=3_600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 180
    )  # on one core, whatever else it does
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [
        output
        for output in outputs
        if "image/png" in output.get("data", {}) or "image/jpeg" in output.get("data", {})
    ]
    assert len(pictures) >= 2
    assert not any(output.get("name") == "stderr" and "Traceback" in output.text for output in outputs)
