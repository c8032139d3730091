"""The proof runs from data to table, and does not repeat a finished cell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from tests.data.tiny import write_dataset

ROOT = Path(__file__).parent.parent
VARIANTS = ("snip", "grid", "sniper", "negatives")


def prove(folder: Path, *more: str) -> dict[str, Any]:
    data = folder / "data"
    command = [
        *(sys.executable, ROOT / "benchmarks" / "proof.py", folder / "proof"),
        *("--data", "tiny", data / "train.json", data / "test.json"),
        *("--backbone", "test_resnet", "--weights", folder / "test_resnet.safetensors"),
        *("--chip-size", "64", "--batch-size", "4", "--head", "8", "16", "--proposals", "8", "16"),
        *("--rpn-megapixels", "0.05", "--min-proposals", "1", "--jobs", "2", *more),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)["results"]["tiny"]
    return results


@pytest.mark.slow
def test_the_proof_spends_its_budget_on_each_variant_and_keeps_finished_cells(tmp_path: Path) -> None:
    for name, count in (("train", 12), ("test", 3)):
        write_dataset(tmp_path / "data", sides=[(200, 150), (150, 200), (220, 180)] * (count // 3), name=name)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "test_resnet.safetensors")
    first = prove(tmp_path, "--seeds", "1", "--megapixels", "0.3", "--variants", "sniper", "negatives")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "proof" / "tiny").glob("*.json")}
    budgets = prove(tmp_path, "--seeds", "1", "--megapixels", "0.3", "--variants", *VARIANTS)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    variants = budgets["0.3"]
    assert tuple(variants) == VARIANTS
    assert variants["sniper"] == first["0.3"]["sniper"]
    for (cell,) in variants.values():
        assert cell["megapixels"] == pytest.approx(0.3, rel=0.2)
        assert -1 <= cell["as_trained"]["ap"] <= 1
    assert variants["negatives"][0]["rpn_megapixels"] > 0
    assert "against_sniper" in variants["snip"][0]
    budgets = prove(tmp_path, "--seeds", "1", "--megapixels", "0.1", "--variants", "sniper")
    gap = budgets["0.3"]["snip"][0]["against_sniper_at_a_third"]
    aps = [budgets["0.3"]["snip"][0]["as_trained"]["ap"], budgets["0.1"]["sniper"][0]["as_trained"]["ap"]]
    assert gap["difference"] == pytest.approx(aps[0] - aps[1], abs=1e-6)
    table = (tmp_path / "proof" / "table.md").read_text()
    assert all(f"| {variant} |" in table for variant in VARIANTS)
    assert (tmp_path / "proof" / "curve.png").stat().st_size > 5000
    # Other initial weights are another experiment.
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "test_resnet.safetensors")
    with pytest.raises(AssertionError, match="has cells of"):
        prove(tmp_path, "--seeds", "1", "--megapixels", "0.3", "--variants", "sniper")
