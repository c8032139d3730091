"""Measure the benefit of negative chips: how many, from where, and at which length of training.

    python benchmarks/negatives.py runs/negatives --data NAME TRAIN.json --weights mobilenetv2.safetensors \\
        --val NAME VAL.json --images 280 --seeds 0 1 2 --megapixels 60 120 240

All variants train on as many megapixels: `positive` on positive chips alone, which therefore has the extra steps that
the negative chips of the others take. `free` has none either, but places positive chips on the false alarms of the
detector. `self_N` adds negative chips on them for N % of the positive chips, `auto` as many as their loss justifies;
`rpn` chooses them by the number of proposals, as in the paper. `fixed` adds a quarter without placing positive chips.
The training of that RPN, and mining, are not among the megapixels.

Without `--data`, large images are drawn with few objects and many distractors of five kinds. Writes `table.md` and
`dose.png` (AP and false positives over the dose, a curve for each budget) to the folder. See `variants.py` for
the rest.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from variants import Cell, Study, parser_for, run_study

from sniper.demo.shapes import ShapesSpec, draw_shapes

SELF = {"negatives.source": "self"}
STUDY = Study(
    description=__doc__,
    base="positive",
    variants={
        "positive": {"negatives.source": "none"},
        "free": {**SELF, "negatives.dose": 0.0},
        "fixed": {**SELF, "negatives.dose": 0.25, "negatives.place_positives": False},
        "self_10": {**SELF, "negatives.dose": 0.1},
        "self_25": {**SELF, "negatives.dose": 0.25},
        "self_40": {**SELF, "negatives.dose": 0.4},
        "auto": SELF,
        "rpn": {"negatives.source": "rpn", "negatives.dose": 0.25, "negatives.per_image": 2},
    },
    columns=(
        "ap50",
        "ar_100",
        *(f"fp_per_image_at_{recall}" for recall in (50, 80, 90)),
        *(f"fp_per_clean_image_at_{recall}" for recall in (50, 80, 90)),
        "megapixels",
        "negative_share",
    ),
)
POSITIONS = {
    variant: float(position)
    for position, variant in enumerate(
        ("positive", "free", "self_10", "self_25", "self_40", "auto", "fixed", "rpn")
    )
}
GROUPS = (
    (("free", "self_10", "self_25", "self_40", "auto"), "o-"),
    (("positive",), "s"),
    (("fixed",), "D"),
    (("rpn",), "^"),
)
SHAPES = ShapesSpec(
    num_images=96,
    min_side=800,
    max_side=1200,
    min_objects=2,
    max_objects=5,
    min_distractors=20,
    max_distractors=40,
    max_size=200,
)


def main() -> None:
    options = parser_for(STUDY).parse_args()
    if not options.data:
        options.data = [("shapes", draw_data(options.folder / "train", spec=SHAPES, seed=1))]
        options.val = [
            ("shapes", draw_data(options.folder / "val", spec=replace(SHAPES, num_images=48), seed=2))
        ]
    results = run_study(STUDY, options)
    if results:
        draw_curves(results, options)


def draw_data(folder: Path, *, spec: ShapesSpec, seed: int) -> Path:
    """Draw images with objects and distractors, and a third as many with distractors alone."""
    path = folder / "all.json"
    if not path.exists():
        clean = replace(spec, num_images=spec.num_images // 3, min_objects=0, max_objects=0)
        joined, other = (
            json.loads(draw_shapes(folder, spec=part, seed=seed, name=name).read_text())
            for name, part in (("objects", spec), ("clean", clean))
        )
        joined["images"] += [image | {"id": image["id"] + spec.num_images} for image in other["images"]]
        path.write_text(json.dumps(joined))
    return path


def draw_curves(results: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Draw AP and false positives over the dose: a row for each data set, a curve for each budget.

    A curve goes through the doses that are placed on the detector's false alarms. Positive chips alone, and the others,
    are points. Lines are means over the seeds, bars reach from the lowest to the highest.
    """
    cells = {Cell.parse(result["cell"]): result for result in results}
    names = sorted({cell.data for cell in cells})
    budgets = sorted({cell.megapixels for cell in cells})
    columns = {
        "ap": "AP",
        "fp_per_image_at_50": "FP per image at 50 % recall",
        "fp_per_image_at_80": "FP per image at 80 % recall",
    }
    figure = Figure(figsize=(14, 3.8 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, (column, label) in zip(row, columns.items(), strict=True):
            for number, budget in enumerate(budgets):
                values = {
                    variant: [
                        result[column]
                        for cell, result in cells.items()
                        if (cell.data, cell.variant, cell.megapixels) == (name, variant, budget)
                        and result.get(column) is not None
                    ]
                    for variant in STUDY.variants
                }
                for variants, style in GROUPS:
                    shown = [variant for variant in variants if values[variant]]
                    if not shown:
                        continue
                    means = [statistics.mean(values[variant]) for variant in shown]
                    spread = [
                        [mean - min(values[variant]) for variant, mean in zip(shown, means, strict=True)],
                        [max(values[variant]) - mean for variant, mean in zip(shown, means, strict=True)],
                    ]
                    axis.errorbar(
                        [POSITIONS[variant] + 0.08 * number for variant in shown],
                        means,
                        yerr=spread,
                        fmt=style,
                        capsize=3,
                        color=f"C{number}",
                        label=f"{budget:g} megapixels" if len(variants) > 1 else None,
                    )
            axis.set(title=name, ylabel=label)
            if column != "ap":
                axis.set_ylim(bottom=0)
            axis.set_xticks(list(POSITIONS.values()), [variant.replace("_", " ") for variant in POSITIONS])
            axis.tick_params(axis="x", rotation=30)
            axis.grid(axis="y", alpha=0.3)
        row[0].legend()
    figure.savefig(options.folder / "dose.png", dpi=110)


if __name__ == "__main__":
    main()
