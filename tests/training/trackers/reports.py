"""A training that only writes metrics and reports, for the tests of trackers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sniper.runs.checkpoints import Progress
from sniper.runs.run import Run
from sniper.training.callbacks import Callbacks, EndReport, ScoresReport, StartReport, StepReport

_STEP = StepReport(
    stage="train",
    progress=Progress(),
    epoch=1.0,
    epochs=2.0,
    steps_left=0,
    losses={"rpn_box": 0.5},
    gradient_norm=1.0,
    learning_rate=0.1,
    seconds=1.0,
    chips_per_second=4.0,
    data_wait=0.0,
    megapixels=0.1,
    peak_memory=0,
)
CONFIG = {"seed": 0, "train": {"epochs": 2.0, "trackers": ["mlflow"]}}
ORIGIN = {"command": "sniper train cars.yaml", "git_commit": "c0ffee", "torch": "2.11"}


@dataclass(frozen=True)
class WrittenRun:
    """A run without weights."""

    folder: Path

    def metrics_path(self, part: str = "train") -> Path:
        return self.folder / "metrics.jsonl" if part == "train" else self.folder / part / "metrics.jsonl"

    def start(self, callbacks: Callbacks, *, config: Mapping[str, Any] = CONFIG) -> None:
        """Start a training, as of version 0.1 of an experiment."""
        callbacks.on_start(
            StartReport(
                steps=10,
                steps_done=0,
                epochs=2.0,
                rpn_steps=0,
                num_mined=0,
                num_evaluations=0,
                num_scored=0,
                num_images=0,
                download=None,
                folder=self.folder,
                config=config,
                origin=ORIGIN,
            )
        )

    def step(self, callbacks: Callbacks, number: int, *, part: str = "train") -> None:
        """Make a step: log it, then report it."""
        self.log({"stage": part, "step": number, "loss": 1 / number, "learning_rate": 0.1}, part=part)
        progress = Progress(step=number, epoch=0, step_in_epoch=number)
        callbacks.on_step(replace(_STEP, stage=part, progress=progress))

    def scores(self, callbacks: Callbacks, step: int, *, ap: float, is_final: bool = False) -> None:
        """Evaluate: log the scores, then report them."""
        stage = "final" if is_final else "evaluate"
        self.log({"stage": stage, "step": step, "epoch": 1.0, "ap": ap})
        callbacks.on_scores(ScoresReport(step=step, epoch=1.0, scores={"ap": ap}, is_final=is_final))

    def end(self, callbacks: Callbacks, *, step: int = 3) -> None:
        """Complete the training."""
        callbacks.on_end(
            EndReport(
                status="completed",
                folder=self.folder,
                step=step,
                weights=self.folder / "checkpoints/00000003/weights.safetensors",
                scores={"stage": "evaluate", "step": step, "ap": 0.5},
            )
        )

    def log(self, entry: Mapping[str, Any], *, part: str = "train") -> None:
        path = self.metrics_path(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        Run(path.parent).log(entry)

    def cut(self, step: int) -> None:
        """Drop what is later than a checkpoint, as a training does that continues from it."""
        Run(self.folder).truncate_metrics(step=step)

    def lines(self, part: str = "train") -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics_path(part).read_text().splitlines()]
