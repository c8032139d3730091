"""The proof runs from data to table, and a finished cell is not run again."""

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
WAYS = ("snip", "grid", "sniper", "negatives")


def prove(folder: Path, *more: str) -> dict[str, Any]:
    data = folder / "world"
    command = [
        *(sys.executable, ROOT / "benchmarks" / "proof.py", folder / "proof"),
        *("--data", "tiny", data / "train.json", data / "test.json"),
        *("--backbone", "test_resnet", "--weights", folder / "test_resnet.safetensors"),
        *("--chip-size", "64", "--batch-size", "4", "--head", "8", "16", "--proposals", "8", "16"),
        *("--rpn-megapixels", "0.05", "--at-least", "1", "--jobs", "2", *more),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.slow
def test_the_proof_runs_all_ways_spends_the_budget_and_keeps_what_is_finished(tmp_path: Path) -> None:
    for name, count in (("train", 12), ("test", 3)):
        write_dataset(
            tmp_path / "world", sides=[(200, 150), (150, 200), (220, 180)] * (count // 3), name=name
        )
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "test_resnet.safetensors")
    first = prove(tmp_path, "--seeds", "1", "--megapixels", "0.3", "--ways", "sniper", "negatives")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "proof" / "tiny").glob("*.json")}
    told = prove(tmp_path, "--seeds", "1", "--megapixels", "0.3", "--ways", *WAYS)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    ways = told["results"]["tiny"]["0.3"]
    assert tuple(ways) == WAYS
    assert ways["sniper"] == first["results"]["tiny"]["0.3"]["sniper"]
    for (cell,) in ways.values():
        assert cell["megapixels"] == pytest.approx(0.3, rel=0.2)
        assert -1 <= cell["own"]["ap"] <= 1
    assert ways["negatives"][0]["rpn_megapixels"] > 0
    assert "against_sniper" in ways["snip"][0]
    less = prove(tmp_path, "--seeds", "1", "--megapixels", "0.1", "--ways", "sniper")
    budgets = less["results"]["tiny"]
    gap = budgets["0.3"]["snip"][0]["against_sniper_at_a_third"]
    aps = [budgets["0.3"]["snip"][0]["own"]["ap"], budgets["0.1"]["sniper"][0]["own"]["ap"]]
    assert gap["difference"] == pytest.approx(aps[0] - aps[1], abs=1e-6)
    table = (tmp_path / "proof" / "table.md").read_text()
    assert all(f"| {way} |" in table for way in WAYS)
    assert (tmp_path / "proof" / "curve.png").stat().st_size > 5000
    # Other first weights would be another experiment.
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "test_resnet.safetensors")
    with pytest.raises(AssertionError, match="holds cells of"):
        prove(tmp_path, "--seeds", "1", "--megapixels", "0.3", "--ways", "sniper")
