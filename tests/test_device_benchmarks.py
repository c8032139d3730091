"""The benchmarks of a device run all their cells, keep failures as results, and do not repeat finished cells."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.tiny import write_dataset

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks import each other as scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("cells", "device", "train"):
        sys.modules.pop(name, None)


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--device", "cpu", "--tiny", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "loader", "inference"])
def test_every_cell_has_a_result_and_is_not_repeated(name: str, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    arguments: list[object] = ["--lines", lines]
    if name in ("loader", "inference"):
        arguments += ["--annotations", write_dataset(tmp_path / "data")]
    table = run(name, *arguments)
    results: list[dict[str, Any]] = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(results) > 5
    assert [result for result in results if "error" in result] == []
    assert all(result["benchmark"] == name for result in results)
    assert len(table.splitlines()) == 2 * len(results) + 2
    again = run(name, *arguments)
    assert len(again.splitlines()) == len(results) + 2  # the table alone
    assert len(lines.read_text().splitlines()) == len(results)


def test_a_cell_that_fails_is_a_result_and_the_next_one_runs(tmp_path: Path) -> None:
    from cells import ResultLines
    from device import run_in_turn

    calls: list[str] = []

    def measure(name: str) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            calls.append(name)
            if name == "bad":
                raise RuntimeError("no kernel\nand a traceback")
            return {"value": 1}

        return call

    cells = {name: measure(name) for name in ("bad", "good", "other")}
    path = tmp_path / "lines.jsonl"
    run_in_turn(cells, ResultLines(path, benchmark="b"), CPU, only=["bad", "good"])
    results = ResultLines(path, benchmark="b").results
    assert [result["cell"] for result in results] == ["bad", "good"]
    assert results[0]["error"] == "RuntimeError: no kernel"
    run_in_turn(cells, ResultLines(path, benchmark="b"), CPU)
    assert calls == ["bad", "good", "other"]
    run_in_turn({"late": measure("late")}, ResultLines(path, benchmark="b", deadline=0.0), CPU)
    assert "late" not in calls


@pytest.mark.parametrize("largest", [20, 21, 150, 199, 200, 230, 400, 1024])
@pytest.mark.parametrize("estimate", [25, 200, 1024])
def test_the_search_for_the_largest_batch_stays_below_it_and_comes_near(largest: int, estimate: int) -> None:
    from train import MAX_TRIALS, search_largest

    found, trials = search_largest(lambda size: size <= largest, known=20, estimate=estimate, limit=1024)
    assert found <= largest
    assert len(trials) <= MAX_TRIALS
    if abs(estimate - largest) <= 0.15 * largest:
        assert found >= 0.9 * largest
