"""Runs side by side: what differs, scores with bounds, and curves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sniper.chips import LevelSpec
from sniper.config.loading import dump_experiment, load_experiment
from sniper.data.datasets import Dataset
from sniper.errors import ConfigError
from sniper.evaluation.coco import score
from sniper.evaluation.match_table import MatchTable
from sniper.reports.comparison_page import Comparison
from sniper.reports.run_page import parts_of
from sniper.runs.run import Run
from tests.reports.runs import subject_of, write_run


@pytest.fixture(scope="session")
def worse(world: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run of another seed whose boxes are moved."""
    return write_run(tmp_path_factory.mktemp("runs") / "second", world, shift=4.0, seed=5)


@pytest.fixture(scope="module")
def comparison(read_only_run: Run, worse: Run) -> Comparison:
    return Comparison.of([read_only_run, worse])


def test_fields_that_differ_are_listed_and_no_others(comparison: Comparison) -> None:
    assert comparison.fields == {"seed": [0, 5]}


def test_levels_are_listed_as_a_plan_has_them(read_only_run: Run, run: Run) -> None:
    spec = load_experiment(run.config_path)
    levels = (LevelSpec(factor=2.0, below=48), LevelSpec(long_side=64, at_least=40))
    run.save_config(dump_experiment(replace(spec, predict=replace(spec.predict, levels=levels))))
    comparison = Comparison.of([read_only_run, run])
    (line,) = [line for line in comparison.describe() if line.startswith("predict.levels")]
    assert line.endswith(", ×2: up to 48 px; long side 64: 40 px and more")
    json.dumps(comparison.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("epochs", "others", "line"),
    [
        (4.108135516826923, 4.763055671683389, "train.epochs: 4.10814, 4.76306"),
        (4.0, 4.0000000001, "train.epochs: 4.0, 4.0000000001"),
    ],
)
def test_numbers_have_six_digits_unless_they_differ_in_others(
    run: Run, tmp_path: Path, epochs: float, others: float, line: str
) -> None:
    compared = []
    for name, value in (("first", epochs), ("second", others)):
        copy = Run(tmp_path / "copies" / name)
        shutil.copytree(run.folder, copy.folder)
        spec = load_experiment(copy.config_path)
        train = replace(spec.train, epochs=value, milestones=())
        copy.save_config(dump_experiment(replace(spec, train=train)))
        compared.append(copy)
    assert line in Comparison.of(compared).describe()


def test_scores_are_those_of_coco_and_have_bounds(comparison: Comparison, world: Dataset) -> None:
    assert comparison.notes == []
    first, second = (row["ap"] for row in comparison.scores)
    spec = comparison.runs[0].spec
    assert first.value == pytest.approx(score(subject_of(world, spec).pair).ap, abs=1e-9)
    assert second.value == pytest.approx(score(subject_of(world, spec, shift=4.0).pair).ap, abs=1e-9)
    assert first.value is not None
    assert second.value is not None
    assert first.low <= first.value <= first.high
    assert not first.has_difference
    assert second.difference == pytest.approx(second.value - first.value)
    assert second.difference < 0
    assert second.difference_low <= second.difference <= second.difference_high


def test_curves_count_megapixels_and_minutes_from_the_start(comparison: Comparison) -> None:
    megapixels, minutes = [chart for chart in comparison.charts() if chart.title == "Validation AP"]
    assert megapixels.series[0].x == pytest.approx([2.5, 5.0])
    assert minutes.series[1].x == pytest.approx([0.25, 0.5])
    assert megapixels.series[0].y == [0.25, 0.5]


def test_an_rpn_stage_counts(run: Run) -> None:
    stage = Run.create(run.folder / "rpn", config="")
    stage.log(
        {
            "stage": "rpn",
            "step": 1,
            "epoch": 0.1,
            "loss": 1.0,
            "learning_rate": 0.1,
            "seconds": 60,
            "megapixels": 4,
        }
    )
    (compared,) = Comparison.of([run]).runs
    first = compared.steps[0]
    assert (first.megapixels, first.minutes) == pytest.approx((4.25, 1.025))
    assert len(compared.steps) == 20


def test_a_run_without_matches_has_the_scores_of_its_metrics(run: Run, worse: Run) -> None:
    parts_of(run).matches_path.unlink()
    comparison = Comparison.of([worse, run])
    assert comparison.scores[1]["ap"].value == 0.5
    assert not comparison.scores[1]["ap"].has_bounds
    (note,) = comparison.notes
    assert note.startswith("first: its scores have no bounds, since matches of its detections are missing")
    assert note.endswith(f"sniper evaluate {run.folder} writes them")


def test_scores_on_other_images_are_not_compared(run: Run, worse: Run, world: Dataset) -> None:
    other = Run(run.folder.with_name("other"))
    shutil.copytree(run.folder, other.folder)
    subject = subject_of(world, Comparison.of([run]).runs[0].spec)
    pair = subject.pair.first_images(2)
    MatchTable.of(pair).save(parts_of(other).matches_path)
    comparison = Comparison.of([run, other])
    assert comparison.notes == [
        "the runs were scored on different images, so their scores cannot be compared"
    ]
    assert comparison.scores[1]["ap"].has_bounds
    assert not comparison.scores[1]["ap"].has_difference


def test_names_have_as_many_folders_as_they_need(run: Run, read_only_run: Run) -> None:
    names = Comparison.of([run, read_only_run]).names
    assert names == [f"{run.folder.parent.name}/first", f"{read_only_run.folder.parent.name}/first"]


@pytest.mark.parametrize(
    ("count", "message"), [(2, "expected different runs"), (7, "expected at most 6 runs side by side, got 7")]
)
def test_too_many_runs_and_the_same_run_are_refused(read_only_run: Run, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Comparison.of([read_only_run] * count)


def test_the_page_has_the_figures(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "<code>seed</code>" in html
    ap = comparison.scores[1]["ap"]
    assert f"{ap.difference:+.3f}" in html
    assert html.count('<svg class="chart"') == 6
