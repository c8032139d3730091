"""Bring the page of a run up to date after a command that has searched images."""

from pathlib import Path
from typing import TYPE_CHECKING

from sniper.cli.output import console, print_warnings
from sniper.errors import counted

if TYPE_CHECKING:
    from sniper.cli.search import LoadedDetector
    from sniper.data.datasets import Dataset
    from sniper.reports.reporter import RunReporter
    from sniper.runs.run import Run


def page_reporter(run: "Run") -> "RunReporter":
    """Return the reporter of a run, which writes nothing if the run has `train.report: false`."""
    from sniper.config.loading import load_experiment
    from sniper.reports.reporter import RunReporter

    return RunReporter(
        run=run,
        on_warning=lambda message: print_warnings([message]),
        is_enabled=load_experiment(run.config_path).train.report,
    )


def update_scored_page(
    run: "Run",
    loaded: "LoadedDetector",
    results: Path,
    dataset: "Dataset",
    *,
    num_images: int,
    min_score: float | None,
) -> None:
    """Write the page of a run with the scores and the errors of detections; what fails is a warning.

    Args:
        run: the run.
        loaded: its detector.
        results: COCO results of the detector.
        dataset: the images that were searched, with ground truth.
        num_images: of these, from the first; those that were searched.
        min_score: detections from this score on count; None chooses the one with the best F1.
    """
    from sniper.errors import SniperError
    from sniper.evaluation.pair import EvaluationPair
    from sniper.reports.scored import Subject

    reporter = page_reporter(run)
    if not reporter.is_enabled or not len(dataset.boxes):
        return
    try:
        pair = EvaluationPair.of(results, dataset).first_images(num_images)
    except SniperError as error:
        reporter.on_warning(f"{run.report_path}: is not up to date ({error})")
        return
    subject = Subject(
        pair=pair,
        dataset=dataset,
        levels=loaded.detector.spec.levels,
        read=loaded.detector.data.read,
        min_score=min_score,
        title=f"{counted(pair.truth.num_images, 'image')} of {dataset.path.name}",
        step=loaded.step,
    )
    with console.status("drawing the page of the run"):
        reporter.save_scored(subject)
        reporter.write()
