"""The page of a run: one file with everything, written whatever is missing, and never in the way of a training."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sniper.config.loading import load_experiment
from sniper.data.datasets import Dataset
from sniper.reports.parts import Budget
from sniper.reports.reporter import RunReporter
from sniper.reports.run_page import parts_of, training_charts, write_run_page
from sniper.reports.scored import build_scored
from sniper.runs.run import Run
from sniper.training.epochs import order_epoch
from tests.reports.runs import page_of, part_of, subject_of


def reporter_of(run: Run) -> tuple[RunReporter, list[str]]:
    warnings: list[str] = []
    return RunReporter(run=run, on_warning=warnings.append), warnings


def test_the_page_needs_no_other_file_and_no_network(read_only_run: Run) -> None:
    html = page_of(read_only_run)
    links = re.findall(r"""(?:src|href)=["']([^"'#]+)""", html)
    assert links
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "default-src 'none'" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html


def test_every_kind_of_error_is_found_and_shown(read_only_run: Run) -> None:
    scored = part_of(read_only_run, "scored")
    counts = {row["kind"]: row["count"] for row in scored["error_counts"]}
    assert counts == {
        "background": 1,
        "missed": 1,
        "wrong_class": 1,
        "loose": 1,
        "wrong_class_and_loose": 0,
        "duplicate": 0,
    }
    assert sorted(error["kind"] for error in scored["errors"]) == [
        "background",
        "loose",
        "missed",
        "wrong_class",
    ]
    html = page_of(read_only_run)
    assert "nothing is annotated here" in html
    assert re.search(r"wrong class: annotated as (dark|bright), overlap 1\.00", html)
    assert html.count('class="error"') == 4


def test_a_crop_has_the_scale_of_the_level_that_sees_the_object(world: Dataset, read_only_run: Run) -> None:
    spec = load_experiment(read_only_run.config_path)
    (alarm,) = [
        error for error in part_of(read_only_run, "scored")["errors"] if error["kind"] == "background"
    ]
    (mark,) = [mark for mark in alarm["shown"]["marks"] if mark["kind"] == "wrong"]
    width = mark["box"][2] - mark["box"][0]
    scales = [level.at(width=200, height=160).scale for level in spec.predict.levels]
    assert min(abs(width - 20 * scale) for scale in scales) < 1
    assert "20 px" in alarm["place"]


def test_the_page_has_curves_chips_settings_and_the_configuration(read_only_run: Run) -> None:
    html = page_of(read_only_run)
    for title in (
        "Validation AP",
        "Losses",
        "Learning rate",
        "Chips per second",
        "Wait for data",
        "Peak memory",
    ):
        assert title in html
    spec = load_experiment(read_only_run.config_path)
    assert html.count('<div class="row">') == len(spec.pyramid.levels)
    assert 'class="mark valid"' in html
    assert "4 images &lt;of few objects&gt;" in html
    assert "keep_checkpoints: 3" in html
    assert "0.500" in html  # the best AP


def test_a_run_that_was_only_scored_afterwards_has_its_ap_at_the_top(run: Run) -> None:
    assert "AP of step" not in page_of(run)
    lines = run.metrics_path.read_text().splitlines(keepends=True)
    run.metrics_path.write_text("".join(line for line in lines if '"evaluate"' not in line))
    write_run_page(run)
    html = page_of(run)
    assert "best AP" not in html
    scored = part_of(run, "scored")
    figure = f"<b>{scored['ap']:.3f}</b>AP of step {scored['step']} on "
    assert figure in html


def test_the_page_is_written_anew_without_images(run: Run) -> None:
    before = page_of(run)
    run.report_path.unlink()
    assert write_run_page(run) == run.report_path
    assert page_of(run) == before


def test_a_run_without_any_part_has_a_page(run: Run) -> None:
    for path in (*run.report_folder.iterdir(), run.metrics_path):
        path.unlink()
    write_run_page(run)
    assert "No step has been made yet" in page_of(run)


def test_a_damaged_part_is_left_out_with_a_warning(run: Run) -> None:
    (run.report_folder / "scored.json").write_text('{"title": 3}')
    with pytest.warns(UserWarning, match=r"scored\.json: cannot be read, and is left out of the page"):
        write_run_page(run)
    assert "There are no scores yet" in page_of(run)


def test_what_fails_is_a_warning(run: Run, world: Dataset) -> None:
    reporter, warnings = reporter_of(run)
    run.metrics_path.unlink()
    run.metrics_path.mkdir()
    reporter.write()
    (warning,) = warnings
    assert re.search(r"report\.html: is not up to date \(\S*metrics\.jsonl: cannot be read", warning)


def test_nothing_is_written_if_the_page_is_switched_off(run: Run, world: Dataset) -> None:
    spec = load_experiment(run.config_path)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    off = RunReporter(run=run, on_warning=lambda _: None, is_enabled=False)
    off.save_scored(subject_of(world, spec))
    off.save_chips(order_epoch(spec, world, epoch=0), spec.data, epoch=0)
    off.write()
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_no_random_state_is_used(run: Run, world: Dataset) -> None:
    spec = load_experiment(run.config_path)
    order = order_epoch(spec, world, epoch=0)
    reporter, warnings = reporter_of(run)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    reporter.save_scored(subject_of(world, spec))
    reporter.save_chips(order, spec.data, epoch=0)
    assert warnings == []
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]


def test_pictures_stop_where_the_budget_ends(run: Run, world: Dataset, tmp_path: Path) -> None:
    spec = load_experiment(run.config_path)
    for budget in (Budget(seconds=0.0, num_bytes=1_000_000), Budget(seconds=60.0, num_bytes=0)):
        part = build_scored(subject_of(world, spec), budget=budget, per_kind=5, matches_path=None)
        assert (part.errors, part.images) == ([], [])
        assert part.num_left_out == 3 + 4
        assert sum(each.count for each in part.error_counts) == 4


def test_each_kind_has_a_limited_number_of_pictures_the_worst(run: Run, world: Dataset) -> None:
    spec = load_experiment(run.config_path)
    budget = Budget(seconds=60.0, num_bytes=1_000_000)
    part = build_scored(subject_of(world, spec, min_score=0.0), budget=budget, per_kind=1, matches_path=None)
    kinds = [error.kind for error in part.errors]
    assert len(kinds) == len(set(kinds)) == 4


def test_without_a_match_the_default_score_is_used(run: Run, world: Dataset) -> None:
    spec = load_experiment(run.config_path)
    subject = subject_of(world, spec, min_score=None, shift=500.0)
    part = build_scored(
        subject, budget=Budget(seconds=60.0, num_bytes=1_000_000), per_kind=5, matches_path=None
    )
    assert (part.min_score, part.score_reason) == (0.3, "the default, since no detection matches an object")
    assert part.ap == 0.0


def test_a_new_run_in_the_folder_begins_without_the_old_page(run: Run) -> None:
    for path in (run.folder / "checkpoints").iterdir():
        path.rmdir()
    Run.create(run.folder, config=run.config_path.read_text())
    assert not run.report_path.exists()
    assert not parts_of(run).folder.exists()


def test_charts_without_values_are_left_out(read_only_run: Run) -> None:
    entries = [entry for entry in read_only_run.entries() if entry["stage"] == "train"]
    drawn = [chart.title for chart in training_charts(entries) if chart.drawn]
    assert "Losses" in drawn
    assert "Validation AP" not in drawn


def test_scores_of_zero_are_drawn_and_undefined_ones_left_out() -> None:
    entries = [
        {"stage": "evaluate", "step": step, "epoch": step, "ap": ap, "ap50": -1.0, "num_images": 4}
        for step, ap in ((1, 0.0), (2, 0.1))
    ]
    chart = next(chart for chart in training_charts(entries) if chart.title == "Validation AP")
    assert [(each.name, each.x, each.y) for each in chart.drawn] == [("AP", [1, 2], [0.0, 0.1])]
