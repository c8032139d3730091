"""Write the page of a run: how its training goes, what it learns from, and where it is wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sniper.config.loading import load_experiment
from sniper.evaluation.errors import ErrorKind
from sniper.reports.charts import Chart, Series, escape
from sniper.reports.page import render, write_page
from sniper.reports.parts import ClassRow, PartsFolder, RunParts
from sniper.reports.scores import defined
from sniper.runs.run import Run

KINDS: Mapping[str, str] = {
    ErrorKind.BACKGROUND: "false alarm",
    ErrorKind.MISSED: "missed object",
    ErrorKind.WRONG_CLASS: "wrong class",
    ErrorKind.LOOSE: "loose box",
    ErrorKind.WRONG_CLASS_AND_LOOSE: "wrong class and loose box",
    ErrorKind.DUPLICATE: "second box on an object",
}
"""What the page calls the kinds of errors."""

_EXPLAINED: Mapping[str, str] = {
    ErrorKind.BACKGROUND: "a detection where nothing is annotated (IoU with every object at most 0.1)",
    ErrorKind.MISSED: "an object without a detection, not even one of a wrong class or with a loose box",
    ErrorKind.WRONG_CLASS: "a detection that fits an object of another class",
    ErrorKind.LOOSE: "a detection of the right class whose IoU with the object is 0.1 to 0.5",
    ErrorKind.WRONG_CLASS_AND_LOOSE: "a detection of a wrong class whose IoU with the object is 0.1 to 0.5",
    ErrorKind.DUPLICATE: "a detection of an object that a better one has already found",
}
_SIZES = (("small", "under 32 px"), ("medium", "32 to 96 px"), ("large", "96 px and more"))
_LOSSES = {
    "loss": "total",
    "rpn_objectness": "RPN objectness",
    "rpn_box": "RPN boxes",
    "head_class": "head classes",
    "head_box": "head boxes",
    "mask": "masks",
    "focus": "focus",
}
_MAX_CURVES = 24  # classes whose curves are shown before the others are unfolded


def parts_of(run: Run) -> PartsFolder:
    """Return the folder of the parts of a run's page."""
    return PartsFolder(run.report_folder)


def write_run_page(run: Run, path: Path | None = None) -> Path:
    """Write the page of a run from its metrics and the parts that are there; return its path.

    No image and no annotation is read.

    Args:
        run: the run.
        path: of the page; `report.html` in the run if None.

    Raises:
        ConfigError: if the configuration cannot be read.
        RunError: if the metrics cannot be read.
        OSError: if the page cannot be written; names the file.
    """
    parts, entries = parts_of(run).load(), run.entries()
    html = render(
        "run.html.j2",
        name=run.folder.absolute().name,
        parts=parts,
        state=_state(run, entries),
        charts=[chart for chart in training_charts(entries, parts) if chart.drawn],
        curves=[(row, precision_svg(row)) for row in parts.scored.classes if row.curve]
        if parts.scored
        else [],
        false_positive_chart=_false_positive_chart(parts),
        max_curves=_MAX_CURVES,
        kinds=KINDS,
        explained=_EXPLAINED,
        sizes=_SIZES,
        config=run.config_path.read_text(),
    )
    path = run.report_path if path is None else path
    write_page(html, path)
    return path


def _state(run: Run, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far the training has come, and its best scores."""
    steps = [entry for entry in entries if "learning_rate" in entry]
    last, best = steps[-1] if steps else {}, run.best_scores()
    return {
        "step": last.get("step", 0),
        "epoch": last.get("epoch", 0.0),
        "epochs": load_experiment(run.config_path).train.epochs,
        "minutes": sum(entry.get("seconds", 0.0) for entry in steps) / 60,
        "megapixels": sum(entry.get("megapixels", 0.0) for entry in steps),
        "loss": last.get("loss"),
        "best": best and {**best, **{name: defined(best.get(name)) for name in ("ap", "ap50", "segm_ap")}},
        "skipped": sum(entry.get("skipped_chips", 0) for entry in steps),
    }


def training_charts(entries: Sequence[Mapping[str, Any]], parts: RunParts | None = None) -> list[Chart]:
    """Return the charts of a training from the lines of its metrics."""
    steps = [entry for entry in entries if "learning_rate" in entry]
    scores = evaluations(entries)

    def of_steps(name: str, key: str, color: int | None = None) -> Series:
        pairs = [(entry["epoch"], entry[key]) for entry in steps if entry.get(key) is not None]
        return Series(name=name, x=[x for x, _ in pairs], y=[y for _, y in pairs], color=color)

    def of_scores(name: str, key: str) -> Series:
        pairs = [(entry["epoch"], entry[key]) for entry in scores if defined(entry.get(key)) is not None]
        return Series(name=name, x=[x for x, _ in pairs], y=[y for _, y in pairs], is_marked=True)

    losses = [of_steps(text, key) for key, text in _LOSSES.items()]
    by_chip = [of_steps(f"{kind} chips", f"{kind}_loss") for kind in ("positive", "negative")]
    charts = [
        Chart(
            title="Validation AP",
            x_label="epoch",
            series=[
                of_scores("AP", "ap"),
                of_scores("AP50", "ap50"),
                of_scores("mask AP", "segm_ap"),
                of_scores("mask AP50", "segm_ap50"),
            ],
            note="On the validation images. Should rise, and then level off.",
        ),
        Chart(
            title="Losses",
            x_label="epoch",
            series=[
                *losses,
                *(
                    Series(name=key.replace("_", " "), x=each.x, y=each.y)
                    for key in _other_losses(steps)
                    for each in [of_steps(key, key)]
                ),
            ],
            note="Should fall. The class loss alone may stay flat while proposals become better.",
        ),
        Chart(
            title="Accuracy of the classes of positive proposals",
            x_label="epoch",
            series=[of_steps("accuracy", "positive_accuracy")],
            is_percent=True,
            note="Share of the proposals on objects whose most probable class is right. Should rise.",
        ),
        Chart(title="Learning rate", x_label="epoch", series=[of_steps("learning rate", "learning_rate")]),
        Chart(
            title="Chips per second",
            x_label="epoch",
            series=[of_steps("chips per second", "chips_per_second")],
            note="On all devices, data loading included.",
        ),
        Chart(
            title="Wait for data",
            x_label="epoch",
            series=[of_steps("share of the step", "data_wait")],
            is_percent=True,
            note="Share of a step spent waiting for chips. Far above 0: more data.num_workers, or a chip cache.",
        ),
        Chart(
            title="Peak memory, GB",
            x_label="epoch",
            series=[of_steps("GB", "peak_memory_gb")],
            note="Of the first device; without a GPU, of the process.",
        ),
    ]
    if len(by_chip[1].x):
        charts.insert(
            3,
            Chart(
                title="Classification loss by kind of chip",
                x_label="epoch",
                series=by_chip,
                note="Negative chips have false alarms and no object.",
            ),
        )
    return charts


def evaluations(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the evaluations on as many images as the newest one, whose scores can be compared."""
    scored = [entry for entry in entries if entry.get("stage") == "evaluate"]
    return [entry for entry in scored if entry.get("num_images") == scored[-1].get("num_images")]


def _other_losses(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of losses of heads that this page does not know by name."""
    names = {
        name for entry in steps[:1] for name in entry if name.startswith(("rpn_", "head_", "mask", "focus"))
    }
    return sorted(names - _LOSSES.keys())


def _false_positive_chart(parts: RunParts) -> Chart | None:
    """Return the chart of false positives per image over recall; a count of 0 cannot be drawn on its axis."""
    if parts.scored is None:
        return None
    points = [(recall, count) for recall, count in parts.scored.false_positive_curve if count > 0]
    chart = Chart(
        title="False positives per image, by recall",
        x_label="recall, all classes together",
        series=[Series(name="per image", x=[x for x, _ in points], y=[y for _, y in points])],
        is_log=True,
    )
    return chart if chart.drawn else None


def precision_svg(row: ClassRow) -> str:
    """Return the curve of precision over recall of a class as SVG, with the chosen score marked."""
    width, height, left, bottom = 168, 112, 26, 16

    def point(recall: float, precision: float) -> str:
        x = left + recall * (width - left - 4)
        return f"{x:.1f} {4 + (1 - precision) * (height - bottom - 4):.1f}"

    label = f"{row.name}: precision over recall"
    if row.recall is not None and row.precision is not None:
        label += f"; at the chosen score recall {row.recall:.2f}, precision {row.precision:.2f}"
    lines = "".join(
        f'<path class="grid" d="M{point(0, value)}L{point(1, value)}M{point(value, 0)}L{point(value, 1)}"/>'
        for value in (0, 0.5, 1)
    )
    ticks = "".join(
        f'<text x="{left - 4}" y="{float(point(0, value).split()[1]) + 4}" text-anchor="end">{value:g}</text>'
        f'<text x="{point(value, 0).split()[0]}" y="{height - 3}" text-anchor="middle">{value:g}</text>'
        for value in (0, 0.5, 1)
    )
    path = "L".join(point(*each) for each in row.curve)
    mark = ""
    if row.recall is not None and row.precision is not None:
        x, y = point(row.recall, row.precision).split()
        mark = f'<circle cx="{x}" cy="{y}" r="4"/>'
    return (
        f'<svg class="precision" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f'{lines}{ticks}<path class="line" d="M{path}"/>{mark}</svg>'
    )
