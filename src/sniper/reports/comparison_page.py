"""Write a page with several runs side by side: what differs in their experiments, their scores, and their curves."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from sniper.chips import LevelSpec
from sniper.config.experiment import ExperimentSpec
from sniper.config.loading import field_values, load_experiment
from sniper.errors import ConfigError, DetectionsError
from sniper.evaluation.comparison import ResampledAP, bounds_of, resample
from sniper.evaluation.match_table import MatchTable
from sniper.reports.charts import COLORS, Chart, Series
from sniper.reports.page import render, resize_rule, sizes_text, write_page
from sniper.reports.run_page import evaluations, parts_of
from sniper.reports.scores import defined
from sniper.runs.run import Run

MAX_RUNS = len(COLORS)
"""Runs of a page: each has a colour."""

_SCORES = {"ap": ("AP", 10), "ap50": ("AP50", 1)}  # and the number of IoUs that each is a mean of
_CURVES = {"Validation AP": "ap", "Loss": "loss", "Accuracy of positives": "positive_accuracy"}
_MIN_RESAMPLES, _MAX_RESAMPLES = 200, 1000
_MAX_MATCHES = 2e9  # compared in all draws together: a minute
_MAX_POINTS = 80  # of a curve, so that several can be told apart
_MAX_TEXT = 200  # characters of a value
_INFINITY = ".inf"


@dataclass(frozen=True, kw_only=True)
class BoundedScore:
    """A score with its 95 % interval over test images, and its difference to that of the first run.

    Attributes:
        value: the score; None where there is none.
        low: NaN without bounds.
        high: NaN without bounds.
        difference: to the first run, NaN where the two cannot be compared.
        difference_low: NaN without bounds.
        difference_high: NaN without bounds.
    """

    value: float | None
    low: float = math.nan
    high: float = math.nan
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan

    @property
    def has_bounds(self) -> bool:
        """Whether the interval is known."""
        return not math.isnan(self.low)

    @property
    def has_difference(self) -> bool:
        """Whether it can be compared with the first run."""
        return not math.isnan(self.difference_low)

    def as_dict(self, name: str) -> dict[str, float | None]:
        """Return plain data under names that begin with that of the score; None for what is not known."""
        values = {"": self.value} | {
            f"_{key}": None if math.isnan(value) else value
            for key, value in vars(self).items()
            if key != "value"
        }
        return {f"{name}{key}": value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class ComparedStep:
    """A step of a training.

    Attributes:
        megapixels: of the chips from the start up to this step, an RPN stage included.
        minutes: of the steps and of mining, the same.
        entry: its line in the metrics.
    """

    megapixels: float
    minutes: float
    entry: Mapping[str, Any]


Axis = Literal["megapixels", "minutes"]
"""What curves are drawn over."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedRun:
    """A run of the page.

    Attributes:
        run: its folder.
        name: that no other run of the page has.
        spec: its experiment.
        entries: its metrics.
        stage: the metrics of the RPN stage before it; empty without one.
        matches: of its best or last evaluated checkpoint; None if they are not there or cannot be read.
    """

    run: Run
    name: str
    spec: ExperimentSpec
    entries: Sequence[Mapping[str, Any]]
    stage: Sequence[Mapping[str, Any]]
    matches: MatchTable | None

    @classmethod
    def open(cls, run: Run, *, name: str) -> "ComparedRun":
        """Read a run.

        Raises:
            ConfigError: if its experiment cannot be read.
            RunError: if its metrics cannot be read.
        """
        path, matches = parts_of(run).matches_path, None
        if path.exists():
            try:
                matches = MatchTable.load(path)
            except DetectionsError as error:
                warnings.warn(f"{error}; the scores of {run.folder} have no bounds", stacklevel=3)
        return cls(
            run=run,
            name=name,
            spec=load_experiment(run.config_path),
            entries=run.entries(),
            stage=Run(run.folder / "rpn").entries(),
            matches=matches,
        )

    @cached_property
    def steps(self) -> list[ComparedStep]:
        """The steps of the detector's training."""
        entries = [*self.stage, *self.entries]
        megapixels = accumulate(entry.get("megapixels", 0.0) for entry in entries)
        seconds = accumulate(entry.get("seconds", 0.0) for entry in entries)
        return [
            ComparedStep(megapixels=megapixel, minutes=second / 60, entry=entry)
            for megapixel, second, entry in zip(megapixels, seconds, entries, strict=True)
            if entry.get("stage") == "train" and "learning_rate" in entry
        ]

    def series(self, key: str, *, over: Axis, color: int) -> Series:
        """Return the values of the steps under a key."""
        steps = [step for step in self.steps if step.entry.get(key) is not None]
        return Series(
            name=self.name,
            x=[getattr(step, over) for step in steps],
            y=[step.entry[key] for step in steps],
            color=color,
        )

    def score_series(self, key: str, *, over: Axis, color: int) -> Series:
        """Return the scores of the evaluations."""
        places = {step.entry["step"]: getattr(step, over) for step in self.steps}
        scored = [
            entry
            for entry in evaluations(self.entries)
            if entry["step"] in places and defined(entry.get(key)) is not None
        ]
        return Series(
            name=self.name,
            x=[places[entry["step"]] for entry in scored],
            y=[entry[key] for entry in scored],
            is_marked=True,
            color=color,
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        runs: the runs, in the order given.
        fields: what differs: the value of each run by the dotted name of the field; None where it has no such field.
        scores: of each run, by name.
        notes: why scores have no bounds or cannot be compared.
    """

    runs: Sequence[ComparedRun]
    fields: Mapping[str, Sequence[Any]]
    scores: Sequence[Mapping[str, BoundedScore]]
    notes: Sequence[str]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Comparison":
        """Read runs, and compare them.

        Raises:
            ConfigError: if there are too many, or an experiment cannot be read.
            RunError: if metrics cannot be read.
        """
        if len(runs) > MAX_RUNS:
            raise ConfigError(f"expected at most {MAX_RUNS} runs side by side, got {len(runs)}")
        compared = [ComparedRun.open(run, name=name) for run, name in zip(runs, _names(runs), strict=True)]
        scores, notes = _score(compared)
        return cls(runs=compared, fields=_differences(compared), scores=scores, notes=notes)

    @property
    def names(self) -> list[str]:
        """The names of the runs."""
        return [run.name for run in self.runs]

    def describe(self) -> Iterator[str]:
        """Iterate over lines with the scores of each run, and what differs."""
        width = max(map(len, self.names))
        for run, scores in zip(self.runs, self.scores, strict=True):
            texts = [f"{text} {_score_text(scores[key])}" for key, (text, _) in _SCORES.items()]
            yield f"{run.name:<{width}}  {', '.join(texts)}"
        yield from self.notes
        for name, values in self.fields.items():
            yield f"{name}: {', '.join(_to_texts(values))}"

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "runs": [
                {
                    "run": str(each.run.folder),
                    "step": each.matches.step if each.matches else None,
                    "steps": each.steps[-1].entry["step"] if each.steps else 0,
                    "megapixels": round(each.steps[-1].megapixels, 3) if each.steps else 0.0,
                    "minutes": round(each.steps[-1].minutes, 2) if each.steps else 0.0,
                    **{
                        key: value
                        for name, score in scores.items()
                        for key, value in score.as_dict(name).items()
                    },
                }
                for each, scores in zip(self.runs, self.scores, strict=True)
            ],
            "differences": {name: list(values) for name, values in self.fields.items()},
            "notes": list(self.notes),
        }

    def charts(self) -> list[Chart]:
        """Return the curves over megapixels and over minutes."""
        charts = []
        labels: dict[Axis, str] = {
            "megapixels": "megapixels trained on",
            "minutes": "minutes of steps and mining",
        }
        for title, key in _CURVES.items():
            for over, label in labels.items():
                series = [
                    run.score_series(key, over=over, color=index)
                    if key == "ap"
                    else run.series(key, over=over, color=index)
                    for index, run in enumerate(self.runs)
                ]
                charts.append(
                    Chart(
                        title=title,
                        x_label=label,
                        series=series,
                        is_x_from_zero=True,
                        is_percent=key == "positive_accuracy",
                        max_points=_MAX_POINTS,
                    )
                )
        return [chart for chart in charts if chart.drawn]

    def save(self, path: Path) -> None:
        """Write the page; an existing file is replaced atomically."""
        highest = max(
            (
                max(score.value or 0.0, score.high if score.has_bounds else 0.0)
                for row in self.scores
                for score in row.values()
            ),
            default=0.0,
        )
        html = render(
            "comparison.html.j2",
            comparison=self,
            colors=COLORS,
            names={key: text for key, (text, _) in _SCORES.items()},
            charts=self.charts(),
            scale=max(highest, 0.01),
            texts={name: _to_texts(values) for name, values in self.fields.items()},
        )
        write_page(html, path)


def _score_text(score: BoundedScore) -> str:
    if score.value is None:
        return "–"
    text = f"{score.value:.3f}"
    if score.has_bounds:
        text += f" ({score.low:.3f} to {score.high:.3f})"
    if score.has_difference:
        text += f", {score.difference:+.3f} ({score.difference_low:+.3f} to {score.difference_high:+.3f})"
    return text


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the names of folders, with as many parents as tell them apart."""
    parts = [run.folder.absolute().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise ConfigError("expected different runs, one is named twice")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError


def _differences(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Return the fields whose values differ, in the order of the experiment."""
    values = [_without_infinity(field_values(run.spec)) for run in runs]
    names = dict.fromkeys(name for each in values for name in each)
    rows = {name: [each.get(name) for each in values] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _score(runs: Sequence[ComparedRun]) -> tuple[list[dict[str, BoundedScore]], list[str]]:
    """Return the scores of each run, with bounds where the matches of its detections are there."""
    notes = [
        f"{run.name}: its scores have no bounds, since matches of its detections are missing; sniper evaluate "
        f"{run.run.folder} writes them"
        for run in runs
        if run.matches is None
    ]
    scores: list[dict[str, BoundedScore]] = [_logged(run) for run in runs]
    digests = dict.fromkeys(run.matches.digest for run in runs if run.matches is not None)
    if len(digests) > 1:
        notes.append("the runs were scored on different images, so their scores cannot be compared")
    for digest in digests:
        rows = [
            index
            for index, run in enumerate(runs)
            if run.matches is not None and run.matches.digest == digest
        ]
        tables = [runs[row].matches for row in rows]
        if tables[0] is None or tables[0].num_images < 2:
            notes.append("a single image has no bounds")
            continue
        for name, (_, num_ious) in _SCORES.items():
            bounded = _bound(
                [table for table in tables if table is not None], num_ious=num_ious, has_first=rows[0] == 0
            )
            for row, score in zip(rows, bounded, strict=True):
                scores[row][name] = score
    return scores, notes


def _logged(run: ComparedRun) -> dict[str, BoundedScore]:
    """Return the scores of the best checkpoint in the metrics, without bounds."""
    best = run.run.best_scores() or {}
    return {name: BoundedScore(value=defined(best.get(name))) for name in _SCORES}


def _bound(tables: Sequence[MatchTable], *, num_ious: int, has_first: bool) -> list[BoundedScore]:
    """Return a score of each table, from the same drawn images, and the differences to the first."""
    scores = [ResampledAP(table, num_ious=num_ious) for table in tables]
    num_matches = num_ious * sum(len(each.scores) for table in tables for each in table.classes)
    draws = resample(
        scores,
        generator=np.random.default_rng(0),
        num_resamples=int(np.clip(_MAX_MATCHES / max(num_matches, 1), _MIN_RESAMPLES, _MAX_RESAMPLES)),
    )
    every_image = np.ones(tables[0].num_images, dtype=np.int64)
    values = np.array([score(every_image) for score in scores])
    draws[draws < 0] = np.nan
    bounded = []
    for index, value in enumerate(values.tolist()):
        if value < 0:
            bounded.append(BoundedScore(value=None))
            continue
        low, high = bounds_of(draws[:, index])
        compared = has_first and index > 0
        bounded.append(
            BoundedScore(
                value=value, low=low, high=high, **(_difference(draws, values, index) if compared else {})
            )
        )
    return bounded


def _difference(
    draws: Float[np.ndarray, "r k"], values: Float[np.ndarray, " k"], index: int
) -> dict[str, float]:
    low, high = bounds_of(draws[:, index] - draws[:, 0])
    return {
        "difference": float(values[index] - values[0]),
        "difference_low": low,
        "difference_high": high,
    }


def _to_texts(values: Sequence[Any]) -> list[str]:
    """Return values as text, with six digits of a number unless the difference is in the others."""
    texts = [_to_text(_rounded(value)) for value in values]
    hides_difference = len(set(texts)) < len({json.dumps(value) for value in values})
    return [_to_text(value) for value in values] if hides_difference else texts


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _to_text(value: Any) -> str:
    """Return a value as YAML has it, on one line; of levels, what the page of a plan has."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "at_least" in value[0]:
        finite: list[dict[str, Any]] = [
            {key: math.inf if each == _INFINITY else each for key, each in level.items()} for level in value
        ]
        levels = [LevelSpec(**level) for level in finite]
        return "; ".join(f"{resize_rule(level)}: {sizes_text(level)}" for level in levels)
    text = value if isinstance(value, str) else json.dumps(value)
    text = "–" if value is None else text
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def _without_infinity(value: Any) -> Any:
    """Return a value with infinite numbers as YAML writes them, since JSON has none."""
    if isinstance(value, dict):
        return {key: _without_infinity(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_infinity(each) for each in value]
    return _INFINITY if value == math.inf else value
