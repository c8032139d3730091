"""Keep the page of a run up to date while it is trained: what fails in it is a warning, and never ends the training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sniper.config.derived import DerivedSetting
from sniper.data.datasets import Category
from sniper.data.epoch import EpochOrder
from sniper.data.spec import DataSpec, ReadSpec
from sniper.errors import SniperError, explain_os_error
from sniper.evaluation.coco import Scores
from sniper.evaluation.results import load_detections
from sniper.inference.results import ImageToSearch
from sniper.reports.chip_rows import cut_chips
from sniper.reports.images import build_searched
from sniper.reports.parts import CHIPS_BYTES, SCORED_BYTES, SEARCHED_BYTES, Budget, SettingsPart
from sniper.reports.run_page import parts_of, write_run_page
from sniper.reports.scored import Subject, build_scored
from sniper.runs.run import Run

CHIPS_SECONDS, TRAINING_SECONDS, EVALUATION_SECONDS = 3.0, 10.0, 60.0
"""Seconds after which no further picture is cut: of chips, of errors while training, and by a command of its own."""

TRAINING_PICTURES, EVALUATION_PICTURES = 18, 36
"""Pictures of each of the six kinds of errors, while training and by a command of its own."""


@dataclass(frozen=True, kw_only=True)
class RunReporter:
    """Writes the page of a run.

    Attributes:
        run: the run.
        on_warning: called with what has failed.
        is_enabled: False to write nothing.
    """

    run: Run
    on_warning: Callable[[str], None]
    is_enabled: bool = True

    def save_settings(self, settings: Sequence[DerivedSetting]) -> None:
        """Keep the settings that were derived, if there are any."""
        if settings and self.is_enabled:
            with self._guarded():
                parts_of(self.run).save(SettingsPart(settings=list(settings)))

    def save_chips(self, order: EpochOrder, data: DataSpec, *, epoch: int) -> None:
        """Cut chips of an epoch, 0 the first, and write the page."""
        if not self.is_enabled:
            return
        with self._guarded():
            budget = Budget(seconds=CHIPS_SECONDS, num_bytes=CHIPS_BYTES)
            parts_of(self.run).save(cut_chips(order, data, epoch=epoch, budget=budget))
        self.write()

    def save_scored(
        self,
        subject: Subject,
        *,
        scores: Scores | None = None,
        is_training: bool = False,
        is_best: bool = True,
    ) -> None:
        """Keep scores and errors. The page is not written.

        Args:
            subject: what is scored.
            scores: of it, if they are known.
            is_training: cut fewer pictures, in less time.
            is_best: keep the matches, by which runs are compared.
        """
        if not self.is_enabled:
            return
        seconds, per_kind = (
            (TRAINING_SECONDS, TRAINING_PICTURES)
            if is_training
            else (EVALUATION_SECONDS, EVALUATION_PICTURES)
        )
        with self._guarded():
            parts = parts_of(self.run)
            parts.folder.mkdir(exist_ok=True)
            part = build_scored(
                subject,
                budget=Budget(seconds=seconds, num_bytes=SCORED_BYTES),
                per_kind=per_kind,
                matches_path=parts.matches_path if is_best else None,
                scores=scores,
            )
            parts.save(part)

    def save_searched(
        self,
        detections: Path,
        images: Sequence[ImageToSearch],
        *,
        categories: Sequence[Category],
        read: ReadSpec,
        min_score: float,
        step: int,
    ) -> None:
        """Keep pictures of images without ground truth; see `build_searched`. The page is not written."""
        if not self.is_enabled:
            return
        with self._guarded():
            part = build_searched(
                load_detections(detections),
                images,
                categories=categories,
                read=read,
                min_score=min_score,
                step=step,
                budget=Budget(seconds=EVALUATION_SECONDS, num_bytes=SEARCHED_BYTES),
            )
            parts_of(self.run).save(part)

    def write(self) -> None:
        """Write the page."""
        if self.is_enabled:
            with self._guarded():
                write_run_page(self.run)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn any failure into a warning."""
        try:
            yield
        except OSError as error:
            self._warn(explain_os_error(error))
        except SniperError as error:
            self._warn(str(error))
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        self.on_warning(f"{self.run.report_path}: is not up to date ({' '.join(reason.split())})")
