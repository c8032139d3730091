"""Run everything that needs a GPU, most valuable first, in limited time; see docs/gpu.md.

    benchmarks/gpu.sh --pack PACK --out OUT --minutes 10
    benchmarks/gpu.sh --pack PACK --out OUT --tiny --device cpu     # a rehearsal

Each part runs in its own process group, which is killed at the limit of the part. What it measured until then is kept
in `OUT/lines.jsonl`. A failure, a hang or exhausted memory in one part does not end the next. A later call with the
same folders runs what has no result yet, the failed parts last.

Needs only the standard library, so that it reports a broken installation like any other failure.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cells import GRACE_SECONDS, ResultLines, last_lines

ROOT = Path(__file__).absolute().parents[1]
BACKBONE = "mobilenetv2_100"
USUAL_MINUTES = 10.0
COMPLETE, CUT_SHORT, FAILED = "complete", "cut short", "failed"
RESERVED_SECONDS = 10.0
"""Kept at the end of a call for packing the results."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A benchmark, and its time in seconds.

    Attributes:
        expected: what it should take; parts before it leave that much.
        limit: the most that it gets in a call of `USUAL_MINUTES` while later parts wait.
        command: builds the command, from the options and the `time.time()` to start nothing more at.
    """

    name: str
    expected: float
    limit: float
    command: Callable[[argparse.Namespace, float], list[str]]


class MissingInput(Exception):
    """A part needs data, weights or tests that are not there."""


def main() -> None:
    options = parse_options()
    until = time.time() + 60 * options.minutes - RESERVED_SECONDS
    signal.signal(signal.SIGTERM, stop)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    lines = ResultLines(options.lines, benchmark="gpu")
    check_calls(options, lines)
    restore_cells(options)
    lines.add(f"call {time.strftime('%Y-%m-%d %H:%M:%S')}", describe_machine(options))
    install_wheels(options, lines)
    try:
        for part, seconds in schedule(parts_to_run(options, lines), until=until, minutes=options.minutes):
            lines.add(part.name, run_part(part, options, seconds=seconds))
    finally:
        keep_cells(options)
    print(f"{options.lines}: complete are {[part.name for part in PARTS if is_complete(part, lines)]}")


def stop(*_: object) -> None:
    """End this process with an exception, so that the part in progress is killed, too."""
    sys.exit(143)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run everything that needs a GPU, in limited time.")
    parser.add_argument("--pack", type=Path, help="folder with data, weights and wheels (gpu_pack.py)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="a few small files: results, log, scored cells"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "sniper-gpu",
        help="wheels and trainings; kept between calls",
    )
    parser.add_argument("--minutes", type=float, default=USUAL_MINUTES, help="of this call")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal on a CPU")
    options = parser.parse_args()
    options.out, options.work = options.out.absolute(), options.work.absolute()
    options.pack = options.pack and options.pack.absolute()
    options.lines, options.log = options.out / "lines.jsonl", options.out / "log.txt"
    options.proof = options.work / ("proof_tiny" if options.tiny else "proof")
    return options


def check_calls(options: argparse.Namespace, lines: ResultLines) -> None:
    """Refuse to take the results of a rehearsal or of another device for those of this call."""
    for line in lines.results:
        if "minutes" in line and (line["device"], line["tiny"]) != (options.device, options.tiny):
            before = f"--device {line['device']}" + " --tiny" * line["tiny"]
            raise SystemExit(f"{options.out}: has results of {before}; name another folder")


def describe_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Describe device and versions without importing torch, which takes seconds."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    manifest = options.pack / "manifest.json" if options.pack else None
    return {
        "minutes": options.minutes,
        "device": options.device,
        "tiny": options.tiny,
        "gpu": output_of(query),
        "commit": output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        **{name: version_of(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "data": json.loads(manifest.read_text())["data"] if manifest and manifest.exists() else None,
    }


def output_of(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install_wheels(options: argparse.Namespace, lines: ResultLines) -> None:
    """Install the wheels of the pack below the work folder; on failure the parts run without them."""
    wheels = sorted((options.pack / "wheels").glob("*.whl")) if options.pack else []
    site, stamp = options.work / "site", options.work / "wheels.json"
    names = json.dumps([wheel.name for wheel in wheels])
    if not wheels or (stamp.exists() and stamp.read_text() == names):
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    command = [*pip, "--disable-pip-version-check", "--target", str(site), *map(str, wheels)]
    log = options.work / "wheels.log"
    try:
        status = run_in_group(command, log, seconds=120)
    except subprocess.TimeoutExpired:
        status = -signal.SIGKILL
    if status:
        lines.add("wheels", {"outcome": FAILED, "error": f"exit status {status}", "output": last_lines(log)})
    else:
        stamp.write_text(names)


def parts_to_run(options: argparse.Namespace, lines: ResultLines) -> list[Part]:
    """Return the parts without a result: those that have not failed yet come first."""
    parts = [part for part in PARTS if options.parts is None or part.name in options.parts]
    outcomes = {line["cell"]: line.get("outcome") for line in lines.results}
    waiting = [part for part in parts if not is_complete(part, lines)]
    return sorted(waiting, key=lambda part: outcomes.get(part.name) == FAILED)  # stable


def is_complete(part: Part, lines: ResultLines) -> bool:
    return any(line["cell"] == part.name and line.get("outcome") == COMPLETE for line in lines.results)


def schedule(parts: Sequence[Part], *, until: float, minutes: float) -> Iterator[tuple[Part, float]]:
    """Yield the parts with the seconds that each may take, computed when it is its turn."""
    stretch = max(minutes / USUAL_MINUTES, 1)
    for number, part in enumerate(parts):
        seconds = share_of(part, parts[number + 1 :], left=until - time.time(), stretch=stretch)
        if seconds >= part.expected / 3:  # less would only make it fail
            yield part, seconds


def share_of(part: Part, later: Sequence[Part], *, left: float, stretch: float = 1.0) -> float:
    """Return the seconds of a part: what the later ones are not expected to take, up to its limit.

    Where the time is too short for all, the first parts get what they are expected to take, and the last ones less.
    """
    if not later:
        return left
    reserved = sum(other.expected for other in later)
    return min(max(left - reserved, part.expected), part.limit * stretch, left)


def run_part(part: Part, options: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """Run a part and return its line: complete, cut short at its deadline, or failed with the end of its output."""
    started = time.time()
    # The rest is for the cell in progress at the deadline.
    deadline = started + seconds - min(0.25 * seconds, GRACE_SECONDS + 10)
    result: dict[str, Any] = {"outcome": FAILED, "seconds_given": round(seconds, 1)}
    log = options.work / f"{part.name}.log"
    log.unlink(missing_ok=True)
    try:
        status = run_in_group(part.command(options, deadline), log, seconds=seconds)
        result["seconds"] = round(time.time() - started, 1)
        if part.name == "tests":
            add_test_line(options, status)
            status = 0 if status == 1 else status  # failures are a result
        if status == 0:
            result["outcome"] = COMPLETE if time.time() < deadline or part.name == "tests" else CUT_SHORT
        else:
            result |= {"error": f"exit status {status}", "output": last_lines(log)}
    except subprocess.TimeoutExpired:
        result["seconds"] = round(time.time() - started, 1)
        result |= {"error": f"killed after {seconds:.0f} s", "output": last_lines(log)}
    except (MissingInput, OSError, ElementTree.ParseError) as error:
        result |= {"error": f"{type(error).__name__}: {error}", "output": last_lines(log)}
    finally:
        with options.log.open("a") as file:
            file.write(f"===== {part.name}\n" + (log.read_text(errors="replace") if log.exists() else ""))
    cells = ResultLines(options.lines, benchmark=part.name).results
    failed = [line["cell"] for line in cells if "error" in line]
    return {**result, "cells": len(cells), "failed_cells": failed}


def run_in_group(command: list[str], log: Path, *, seconds: float) -> int:
    """Run a command, and kill its whole process group once it has ended or its time is up.

    Raises:
        subprocess.TimeoutExpired: if it was killed.
    """
    packages = [ROOT / "src", ROOT, log.parent / "site", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "PYTHONUNBUFFERED": "1",
    }
    print(f"{seconds:.0f} s: {' '.join(command)}", flush=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_tests() -> list[Path]:
    """Return the test files that have the marker `gpu`, or import a module of the tests that has it."""
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
    marked = {path for path, text in texts.items() if re.search(r"\bmark\.gpu\b", text)}
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in marked]
    return [
        path
        for path, text in texts.items()
        if path.name.startswith("test_")
        and (path in marked or any(re.search(rf"\b{re.escape(name)}\b", text) for name in names))
    ]


def pytest_command(options: argparse.Namespace, _: float) -> list[str]:
    """Return the command of the tests that need a GPU; only files that have some are imported.

    Raises:
        MissingInput: if there are none; pytest would then import all tests.
    """
    files = find_tests()
    if not files:
        raise MissingInput("no test has the marker gpu")
    junit = options.work / "tests.xml"
    junit.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no"]
    return [*pytest, "--junitxml", str(junit), *(str(path.relative_to(ROOT)) for path in files)]


def add_test_line(options: argparse.Namespace, status: int) -> None:
    """Add the counts and the failures of the tests.

    Raises:
        OSError, ElementTree.ParseError: if pytest wrote no report.
    """
    root = ElementTree.parse(options.work / "tests.xml").getroot()
    cases = list(root.iter("testcase"))
    failures = [
        {
            "test": f"{case.get('classname')}.{case.get('name')}",
            "message": (problem.get("message") or "")[:500],
        }
        for case in cases
        for problem in [*case.findall("failure"), *case.findall("error")]
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = len({failure["test"] for failure in failures})
    counts = {"passed": len(cases) - skipped - failed, "failed": failed, "skipped": skipped}
    result = {"exit_status": status, **counts, "failures": failures}
    ResultLines(options.lines, benchmark="tests").add("gpu", result)


def benchmark(
    script: str, *, annotations: str | None = None
) -> Callable[[argparse.Namespace, float], list[str]]:
    """Return the function that builds the command of a script with our common options.

    Args:
        script: its file name.
        annotations: the split of the first data set that the script needs, `train` or `test`.
    """

    def build(options: argparse.Namespace, deadline: float) -> list[str]:
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--device", options.device]
        command += ["--lines", str(options.lines), "--deadline", f"{deadline:.0f}"]
        if annotations is not None:
            _, *paths = data_of(options)[0]
            command += ["--annotations", paths[annotations == "test"]]
            if weights := find_weights(options):  # without them networks have random weights
                command += ["--weights", weights]
        return [*command, "--tiny"] if options.tiny else command

    return build


def data_of(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Return name, training and test annotations of the data sets of the pack, in its order.

    Raises:
        MissingInput: if there are none.
    """
    manifest = options.pack / "manifest.json" if options.pack else None
    if manifest is None or not manifest.exists():
        raise MissingInput("needs data: --pack names no folder of gpu_pack.py")
    names = json.loads(manifest.read_text())["data"]
    folder = options.pack / "data"
    return [(name, str(folder / name / "train.json"), str(folder / name / "test.json")) for name in names]


def find_weights(options: argparse.Namespace) -> str | None:
    """Return the initial weights of the pack, if it has some."""
    files = sorted((options.pack / "weights").glob("*.safetensors")) if options.pack else []
    return str(files[0]) if files else None


BUDGETS = {"coco_person": (1000, 3000)}
USUAL_BUDGETS = (1500, 4500)
"""Megapixels of `sniper` for a first result and for a longer training; `snip` also has three times as many."""
PROOF = (
    *("--jobs", "3", "--num-workers", "4", "--rpn-megapixels", "450"),
    *("--optimizer", "adamw", "--learning-rate", "0.0005", "--warmup-steps", "40"),
)
TINY_PROOF = (
    *("--chip-size", "64", "--batch-size", "4", "--head", "8", "16", "--proposals", "8", "16"),
    *("--rpn-megapixels", "0.05", "--min-proposals", "1", "--train-images", "8", "--test-images", "2"),
)


def cells_of(names: Sequence[str]) -> list[str]:
    """Return the cells of the proof, most informative first; docs/gpu.md has the reasons."""
    cells: list[str] = []
    for name in names:
        short, long = BUDGETS.get(name, USUAL_BUDGETS)
        first = [f"sniper:{short}", f"snip:{3 * short}", f"sniper:{long}", f"snip:{3 * long}"]
        others = [f"{variant}:{long}" for variant in ("grid_twice", "negatives", "single", "sniper_two")]
        cells += [f"{name}:{cell}:0" for cell in [*first, *others]]
    for seed in (1, 2):
        for name in names:
            _, long = BUDGETS.get(name, USUAL_BUDGETS)
            pairs = [f"sniper:{long}", f"snip:{3 * long}", f"grid_twice:{long}", f"negatives:{long}"]
            cells += [f"{name}:{cell}:{seed}" for cell in pairs]
    return cells


def proof_command(options: argparse.Namespace, deadline: float) -> list[str]:
    data = data_of(options)
    names = [name for name, _, _ in data]
    weights = find_weights(options)
    if weights is None:
        raise MissingInput(f"needs weights of {BACKBONE} in the folder weights of --pack")
    command = [sys.executable, str(ROOT / "benchmarks" / "proof.py"), str(options.proof)]
    for name, train, test in data:
        command += ["--data", name, train, test]
    command += ["--backbone", BACKBONE, "--weights", weights, "--device", options.device]
    command += ["--lines", str(options.lines), "--until", f"{deadline:.0f}"]
    if options.tiny:
        tiny = [f"{names[0]}:{cell}:0" for cell in ("sniper:0.1", "snip:0.3", "negatives:0.15")]
        return [*command, *TINY_PROOF, "--cells", *tiny]
    return [*command, *PROOF, "--cells", *cells_of(names)]


def keep_cells(options: argparse.Namespace) -> None:
    """Keep results, detections and metrics of the proof's finished cells in one small file, without checkpoints."""
    root = options.proof
    results = sorted(root.glob("*/*.json"))
    if not results:
        return
    unfinished = options.out / ".cells.tar.gz"
    with tarfile.open(unfinished, "w:gz", compresslevel=6) as archive:
        for path in [root / "options.json", *results]:
            archive.add(path, arcname=str(path.relative_to(root)))
        for path in [result.with_suffix("") / name for result in results for name in KEPT]:
            if path.exists():
                archive.add(path, arcname=str(path.relative_to(root)))
    unfinished.replace(options.out / "cells.tar.gz")


KEPT = ("detections.json", "config.yaml", "metrics.jsonl", "chips.npz")


def restore_cells(options: argparse.Namespace) -> None:
    """Unpack the cells of a call on another machine."""
    archive, root = options.out / "cells.tar.gz", options.proof
    if archive.exists() and not root.exists():
        with tarfile.open(archive) as file:
            file.extractall(root, filter="data")


PARTS = (
    Part(name="tests", expected=45, limit=100, command=pytest_command),
    Part(name="train", expected=120, limit=170, command=benchmark("train.py")),
    Part(name="loader", expected=80, limit=120, command=benchmark("loader.py", annotations="train")),
    Part(name="inference", expected=90, limit=130, command=benchmark("inference.py", annotations="test")),
    Part(name="proof", expected=150, limit=3600, command=proof_command),
)


if __name__ == "__main__":
    main()
