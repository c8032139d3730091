"""Format the results of gpu.sh as the tables of docs/benchmarks.md and docs/proof.md, in Markdown.

    python benchmarks/gpu_report.py OUT/lines.jsonl --pack PACK > report.md

With the pack, differences between the variants of the proof get their intervals, from the detections in
`OUT/cells.tar.gz`. They take about half a minute for each cell, which is why no machine with a GPU computes them.
"""

import argparse
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loader
import proof
import train
from cells import read_lines
from gpu import PARTS

import inference
from sniper.evaluation.pair import GroundTruth

Lines = list[dict[str, Any]]
TABLES: dict[str, tuple[str, Callable[[Lines], str]]] = {
    "train": ("A training step", train.to_table),
    "loader": ("Loader and training step", loader.to_table),
    "inference": ("Prediction", inference.to_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Format the results of gpu.sh as Markdown.")
    parser.add_argument("lines", type=Path, help="lines.jsonl of gpu.sh, beside its cells.tar.gz")
    parser.add_argument("--pack", type=Path, help="with the test annotations, to compare detections")
    options = parser.parse_args()
    lines = read_lines(options.lines)
    archive = options.lines.with_name("cells.tar.gz")
    if options.pack is None or not archive.exists():
        print(to_report(lines))
        return
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
        print(to_report(lines, cells=Path(folder), data=options.pack / "data"))


def to_report(lines: Lines, *, cells: Path | None = None, data: Path | None = None) -> str:
    """Return the report: machine, parts, tests, and a table for each benchmark that has results.

    Args:
        lines: of all benchmarks.
        cells: folder of the proof, for the detections of its cells.
        data: folder with the test annotations of each data set.
    """
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        newest.setdefault(line["benchmark"], {})[line["cell"]] = line
    groups = {benchmark: list(cells.values()) for benchmark, cells in newest.items()}
    sections = [to_parts(groups.get("gpu", []))]
    if "tests" in groups:
        sections.append(to_tests(groups["tests"]))
    for benchmark, (title, to_table) in TABLES.items():
        if benchmark in groups:
            # A cell that raised an exception has no more than that.
            results = [line for line in groups[benchmark] if set(line) - BARE or "error" not in line]
            sections.append(f"## {title}\n\n{to_table(results)}\n{to_errors(groups[benchmark])}")
    if "proof" in groups:
        sections.append(to_proof(groups["proof"], cells=cells, data=data))
    return "\n\n".join(section.strip() for section in sections)


BARE = {"benchmark", "cell", "error", "wall_seconds", "output"}


def to_parts(lines: Lines) -> str:
    calls = [line for line in lines if line["cell"].startswith("call ")]
    text = ["# Results on a GPU", ""]
    for call in calls:
        versions = ", ".join(f"{name} {call[name]}" for name in ("python", "torch", "torchvision", "timm"))
        text.append(
            f"- {call['cell']}, {call['minutes']:g} minutes: {call['gpu'] or call['device']}, {call['cores']} cores, "
            f"{versions}, commit {call['commit']}"
        )
    text += ["", "| part | outcome | seconds | of | cells | failed | |", "|---|---|--:|--:|--:|--:|---|"]
    names = ["wheels", *(part.name for part in PARTS)]
    by_name = {line["cell"]: line for line in lines}
    for name in [name for name in names if name in by_name]:
        line = by_name[name]
        counts = [line.get("cells", ""), len(line.get("failed_cells", []))]
        row = [name, line["outcome"], line.get("seconds", ""), line.get("seconds_given", ""), *counts]
        text.append(f"| {' | '.join(map(str, row))} | {line.get('error', '')} |")
    for line in lines:
        if "error" in line:
            output = "\n".join(line.get("output", []))
            text += ["", f"The last output of {line['cell']}:", "", f"```\n{output}\n```"]
    return "\n".join(text)


def to_tests(lines: Lines) -> str:
    (line,) = lines
    counts = ", ".join(f"{line[name]} {name}" for name in ("passed", "failed", "skipped"))
    failures = [f"- `{failure['test']}`: {failure['message']}" for failure in line["failures"]]
    return "\n".join(["## Tests that need a GPU", "", counts, "", *failures])


def to_errors(lines: Lines) -> str:
    return "\n".join(f"- {line['cell']} failed: {line['error']}" for line in lines if "error" in line)


def to_proof(lines: Lines, *, cells: Path | None, data: Path | None) -> str:
    """Return the tables of the proof, by data set and budget, in the form of its own `table.md`."""
    results = [line for line in lines if "variant" in line]
    sections = ["## The proof"]
    for name in dict.fromkeys(proof.Cell.parse(line["cell"]).data for line in results):
        budgets = proof.group_cells([line for line in results if proof.Cell.parse(line["cell"]).data == name])
        if cells is not None and data is not None:
            ground_truth = GroundTruth.of(data / name / "test.json")
            proof.add_differences(cells, budgets, ground_truth)
        sections += [
            f"{name}, {megapixels:g} megapixels\n\n{proof.scores_table(variants)}"
            for megapixels, variants in budgets.items()
        ]
    return "\n\n".join([*sections, to_errors(lines)])


if __name__ == "__main__":
    main()
