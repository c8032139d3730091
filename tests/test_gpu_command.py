"""The command for a GPU: parts end in time, keep what they measured, and are not repeated; the pack is complete."""

import importlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from tests.data.tiny import write_dataset

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a benchmark by name, as scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def folders(tmp_path: Path) -> Namespace:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    out = tmp_path / "out"
    return Namespace(out=out, work=tmp_path / "work", log=out / "log.txt", lines=out / "lines.jsonl")


def write_pack(pack: Any, folder: Path, *, has_weights: bool) -> None:
    """Write a pack of two tiny data sets, without wheels."""
    sources = []
    for name in ("first", "second"):
        sides = [(200, 150), (150, 200), (220, 180)]
        splits = {
            split: write_dataset(folder / "source" / name, sides=sides * count, name=split)
            for split, count in (("train", 4), ("test", 1))
        }
        sources.append(pack.SourceData(name=name, splits=splits))
    data = pack.pack_data(sources, folder / "data", max_bytes=1e7, quality=80)
    (folder / "manifest.json").write_text(json.dumps({"data": data}))
    (folder / "weights").mkdir()
    if has_weights:
        write_weights(folder)


def write_weights(folder: Path) -> None:
    state = timm.create_model("mobilenetv2_100").state_dict()
    save_file(state, folder / "weights" / "mobilenetv2_100.safetensors")


def rehearse(folder: Path) -> list[dict[str, Any]]:
    """Run the command with its tiny sizes, and return the lines that it added."""
    lines = folder / "out" / "lines.jsonl"
    before = len(lines.read_text().splitlines()) if lines.exists() else 0
    command = [
        ROOT / "benchmarks" / "gpu.sh",
        "--tiny",
        "--device",
        "cpu",
        "--minutes",
        "30",
    ]  # a busy machine
    for name in ("pack", "out", "work"):
        command += [f"--{name}", folder / name]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in lines.read_text().splitlines()[before:]]


def outcomes(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {
        line["cell"]: line["outcome"] for line in lines if line["benchmark"] == "gpu" and "outcome" in line
    }


@pytest.mark.slow
def test_a_rehearsal_measures_every_part_once_and_survives_failures(benchmark: Any, tmp_path: Path) -> None:
    write_pack(benchmark("gpu_pack"), tmp_path / "pack", has_weights=False)
    first = rehearse(tmp_path)
    measured = dict.fromkeys(("tests", "train", "loader", "inference"), "complete")
    assert outcomes(first) == {**measured, "proof": "failed"}
    (error,) = [line["error"] for line in first if "error" in line]
    assert "needs weights of mobilenetv2_100" in error
    assert not [line["failed_cells"] for line in first if line.get("failed_cells")]
    write_weights(tmp_path / "pack")
    second = rehearse(tmp_path)
    assert outcomes(second) == {"proof": "complete"}
    assert {line["benchmark"] for line in second} == {"gpu", "proof"}
    third = rehearse(tmp_path)
    assert [line["cell"].split()[0] for line in third] == ["call"]
    report = benchmark("gpu_report").to_report([*first, *second, *third])
    for title in ("A training step", "Loader", "Prediction", "first, 0.1 megapixels"):
        assert title in report
    assert (tmp_path / "out" / "cells.tar.gz").stat().st_size > 1000


@pytest.mark.slow
def test_every_test_that_needs_a_gpu_is_in_a_file_that_runs(benchmark: Any) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    files = {str(path.relative_to(ROOT)) for path in benchmark("gpu").find_tests()}
    assert "tests/training/test_gpu.py" in collected
    assert collected == files


def test_a_part_that_hangs_is_killed_with_its_children(benchmark: Any, folders: Namespace) -> None:
    gpu = benchmark("gpu")
    marker = folders.work / "alive"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; print('measuring'); subprocess.run([sys.executable, '-c', {child!r}])"
    part = gpu.Part(name="hang", expected=1, limit=1, command=lambda *_: [sys.executable, "-u", "-c", code])
    result = gpu.run_part(part, folders, seconds=1.5)
    assert result["outcome"] == "failed"
    assert result["error"] == "killed after 2 s"
    assert result["output"] == ["measuring"]
    time.sleep(3)
    assert not marker.exists()
    assert "measuring" in folders.log.read_text()


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [
        ("pass", 20, "complete"),
        ("raise MemoryError('no memory left')", 20, "failed"),
        ("time.sleep(2)", 2.5, "cut short"),
    ],
)
def test_the_outcome_of_a_part(
    benchmark: Any, folders: Namespace, code: str, seconds: float, outcome: str
) -> None:
    gpu = benchmark("gpu")
    command = [sys.executable, "-c", f"import time; {code}"]
    part = gpu.Part(name="part", expected=1, limit=1, command=lambda *_: command)
    result = gpu.run_part(part, folders, seconds=seconds)
    assert result["outcome"] == outcome
    assert ("no memory left" in "".join(result.get("output", []))) == (outcome == "failed")


def test_tests_are_counted_and_failures_named(benchmark: Any, folders: Namespace) -> None:
    gpu = benchmark("gpu")
    (folders.work / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad">'
        '<failure message="assert 1 == 2"/></testcase><testcase classname="a" name="not"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    gpu.add_test_line(folders, 1)
    (line,) = benchmark("cells").read_lines(folders.lines)
    assert (line["passed"], line["failed"], line["skipped"]) == (1, 1, 1)
    assert line["failures"] == [{"test": "a.bad", "message": "assert 1 == 2"}]


def test_a_part_gets_what_later_ones_are_not_expected_to_take(benchmark: Any) -> None:
    gpu = benchmark("gpu")
    first, second = (gpu.Part(name=name, expected=40, limit=100, command=list) for name in "ab")
    assert gpu.share_of(first, [second], left=120) == 80
    assert gpu.share_of(first, [second], left=400) == 100
    assert gpu.share_of(first, [second], left=400, stretch=2) == 200
    assert gpu.share_of(first, [second], left=50) == 40
    assert gpu.share_of(first, [second], left=30) == 30
    assert gpu.share_of(second, [], left=400) == 400


def test_a_part_does_not_start_in_a_time_that_is_too_short(benchmark: Any) -> None:
    gpu = benchmark("gpu")
    parts = [
        gpu.Part(name=name, expected=expected, limit=100, command=list)
        for name, expected in (("a", 90), ("b", 20))
    ]
    scheduled = list(gpu.schedule(parts, until=time.time() + 15, minutes=1))
    assert [(part.name, round(seconds)) for part, seconds in scheduled] == [("b", 15)]


def test_failed_parts_are_repeated_last_and_complete_ones_not_at_all(
    benchmark: Any, folders: Namespace
) -> None:
    gpu = benchmark("gpu")
    lines = benchmark("cells").ResultLines(folders.lines, benchmark="gpu")
    for name, outcome in (("tests", "complete"), ("train", "failed"), ("loader", "cut short")):
        lines.add(name, {"outcome": outcome})
    parts = gpu.parts_to_run(Namespace(parts=None), lines)
    assert [part.name for part in parts] == ["loader", "inference", "proof", "train"]


def test_results_of_a_rehearsal_are_not_taken_for_those_of_a_gpu(benchmark: Any, folders: Namespace) -> None:
    gpu = benchmark("gpu")
    lines = benchmark("cells").ResultLines(folders.lines, benchmark="gpu")
    lines.add("call 1", {"minutes": 8, "device": "cpu", "tiny": True})
    gpu.check_calls(Namespace(out=folders.out, device="cpu", tiny=True), lines)
    with pytest.raises(SystemExit, match="has results of --device cpu --tiny; name another folder"):
        gpu.check_calls(Namespace(out=folders.out, device="cuda", tiny=False), lines)


def test_the_cells_of_a_gpu_pair_sniper_with_snip_at_equal_epochs(benchmark: Any) -> None:
    gpu, proof = benchmark("gpu"), benchmark("proof")
    cells = [proof.Cell.parse(name) for name in gpu.cells_of(["hit_uav", "deeppcb"])]
    assert len(set(cells)) == len(cells)
    assert [cell.variant for cell in cells[:4]] == ["sniper", "snip"] * 2
    assert cells[1].megapixels == 3 * cells[0].megapixels
    assert {cell.variant for cell in cells} <= set(proof.VARIANTS)
    budgets = {cell.megapixels for cell in cells if cell.variant == "sniper"}
    assert all(cell.megapixels in budgets for cell in cells if cell.variant not in ("sniper", "snip"))


def test_a_line_that_was_cut_off_is_reported_and_the_next_ones_are_kept(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = benchmark("cells")
    path = tmp_path / "lines.jsonl"
    lines = cells.ResultLines(path, benchmark="b")
    lines.add("one", {"seconds": 1})
    with path.open("a") as file:
        file.write('{"benchmark": "b", "ce')
    cells.ResultLines(path, benchmark="b").add("two", {"error": "out of memory"})
    read = cells.ResultLines(path, benchmark="b")
    assert [line["cell"] for line in read.results] == ["one", "two"]
    assert "lines.jsonl:2: ignored, the line is incomplete" in capsys.readouterr().err
    assert "two" in read
    assert (read.has_result("one"), read.has_result("two")) == (True, False)


CELLS = """
import signal, sys, time
from pathlib import Path
import cells

cells.GRACE_SECONDS = 1
folder = Path(sys.argv[1])
if "--cell" in sys.argv:
    cell = sys.argv[-1]
    (folder / f"{cell}.started").touch()
    if cell == "saves":
        signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(1)))
    if cell == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if cell in ("saves", "hangs"):
        time.sleep(60)
    print(f"{cell} prints")
    sys.exit(cell == "bad")
ends = []
cells.run_cells_until(
    ["needs_bad", "bad", "needs_good", "long", "good", "saves", "hangs"],
    jobs=2,
    until=time.time() + 6,
    on_end=lambda cell, status: ends.append((cell, status)),
    needs={"needs_bad": "bad", "needs_good": "good"},
    fits=lambda cell: cell != "long",
    log_path=lambda cell: folder / f"{cell}.log",
)
print(ends)
"""


def test_cells_run_in_order_of_need_until_the_time_is_up(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CELLS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 15
    ends = dict(eval(done.stdout))
    assert ends == {"bad": 1, "good": 0, "needs_good": 0}
    assert not (tmp_path / "needs_bad.started").exists()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "hangs.started").exists()
    assert not (tmp_path / "long.started").exists()  # the others fit, and two of them took all the time
    assert (tmp_path / "bad.log").read_text() == "bad prints\n"


def test_imports_are_collected_and_missing_ones_refused(benchmark: Any, tmp_path: Path) -> None:
    pack = benchmark("gpu_pack")
    imports = pack.find_imports(pack.entry_files())
    modules = {item.module for item in imports}
    assert {"torch", "numpy", "cyclopts", "hotcoco", "beartype", "hypothesis"} <= modules
    assert not modules & {"sniper", "tests", "cells", "json"}
    optional = [item for item in imports if item.module == "rasterio"]
    assert optional
    assert all(item.is_lazy for item in optional)
    provided = {name for item in imports for name in pack.distributions_of(item.module)}
    assert pack.check_imports(imports, provided - {"rasterio"}, []) == sorted(
        {"rasterio"} | {item.module for item in imports if not pack.distributions_of(item.module)}
    )
    with pytest.raises(SystemExit, match=r"imports torch of \['torch'\]"):
        pack.check_imports(imports, provided - {"torch"}, [])
    with pytest.raises(SystemExit, match="imports hotcoco"):
        pack.check_imports(imports, provided - {"hotcoco"}, [])


def test_the_pack_has_the_dependencies_that_are_not_provided(benchmark: Any) -> None:
    pack = benchmark("gpu_pack")
    provided = pack.read_provided(ROOT / "benchmarks" / "gpu_provided.txt")
    roots = {pack.name_of(text) for text in pack.roots_of(pack.find_imports(pack.entry_files()), provided)}
    assert {"cyclopts", "hotcoco", "pydantic", "beartype"} <= roots
    assert not roots & provided
    assert not roots & {"mypy", "ruff", "rasterio"}


def test_a_pack_that_is_too_large_keeps_a_fraction_of_the_images(benchmark: Any, tmp_path: Path) -> None:
    pack = benchmark("gpu_pack")
    sides = [(200, 150)] * 20
    splits = {
        split: write_dataset(tmp_path / "source", sides=sides, name=split) for split in ("train", "test")
    }
    source = pack.SourceData(name="tiny", splits=splits)
    whole = pack.pack_data([source], tmp_path / "whole", max_bytes=1e7, quality=80)
    assert whole["tiny"]["train"]["images"] == 20
    assert whole["tiny"]["train"]["images_reencoded"] == 20  # they were PNG
    assert whole["tiny"]["train"]["seed"] is None
    limit = 0.6 * pack.size_of(tmp_path / "whole")
    part = pack.pack_data([source], tmp_path / "part", max_bytes=limit, quality=80)
    assert pack.size_of(tmp_path / "part") <= limit
    assert 8 <= part["tiny"]["train"]["images"] < 13
    assert part["tiny"]["train"]["seed"] == 0
    coco = json.loads((tmp_path / "part" / "tiny" / "train.json").read_text())
    ids = {image["id"] for image in coco["images"]}
    assert {box["image_id"] for box in coco["annotations"]} == ids
    for image in coco["images"]:
        with Image.open(tmp_path / "part" / "tiny" / "images" / image["file_name"]) as pixels:
            assert (pixels.format, pixels.size) == ("JPEG", (image["width"], image["height"]))
            assert np.asarray(pixels).std() > 1
    with pytest.raises(SystemExit, match=r"no image fits: wheels and weights leave 0\.0 MB"):
        pack.pack_data([source], tmp_path / "none", max_bytes=10, quality=80)
