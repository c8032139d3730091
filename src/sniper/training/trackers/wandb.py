"""Metrics in Weights & Biases: its server, or files to sync later."""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from sniper.errors import RunError
from sniper.training.callbacks import EndReport, StartReport
from sniper.training.trackers.tracking import Entry, numbers_of

PROJECT = "sniper"
_SECONDS_TO_START, _SECONDS_TO_FINISH = 30.0, 120.0


def build_service() -> "WandB":
    """Return the service."""
    return WandB()


class WandB:
    """Records a run as the settings of W&B say, such as `WANDB_MODE` and `WANDB_PROJECT`, in the folder of the run."""

    name = "wandb"
    # The process of W&B ends when this one is killed. Offline, it has not written its last block of 32 KB then.
    num_unsure = 200

    def __init__(self) -> None:
        self._run: Any = None

    def open(self, start: StartReport, state: Mapping[str, str]) -> tuple[dict[str, str], str]:
        """Start a run with the experiment as its configuration, or continue one."""
        is_online = wandb.setup().settings.mode == "online"
        # Without a key, wandb.init asks for one on a terminal, and would wait for an answer.
        if is_online and not wandb.login(prompt=False):
            raise RunError("no API key; log in with `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", start.folder.name),
            id=state.get("id", secrets.token_hex(4)),
            resume="allow",
            reinit="create_new",  # beside a run that the calling program may have
            dir=os.environ.get("WANDB_DIR", start.folder),
            config={**start.config, "origin": dict(start.origin), "run": str(start.folder.absolute())},
            allow_val_change=True,
            settings=wandb.Settings(
                console="off",  # standard output belongs to the command
                silent=True,
                init_timeout=_SECONDS_TO_START,
                finish_timeout=_SECONDS_TO_FINISH,
                finish_timeout_raises=True,
            ),
        )
        # The steps of W&B only rise, but those of the stages, and of a training that was killed, start over.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        folder = Path(self._run.dir).parent
        where = f"recorded offline; to upload: wandb sync {folder}" if self._run.offline else self._run.url
        return {"id": self._run.id}, where or f"not recorded, by WANDB_MODE={self._run.settings.mode}"

    def write(self, part: str, entries: Sequence[Entry], *, after: int) -> None:
        """Hand lines of the metrics to the process of W&B."""
        for entry in entries:
            self._run.log({**numbers_of(entry, part), "step": entry["step"]})

    def close(self, end: EndReport) -> None:
        """Record scores and path of the weights to predict with, and how the training ended."""
        scores = {f"best/{name}": value for name, value in (end.scores or {}).items() if name != "stage"}
        weights = {} if end.weights is None else {"weights": str(end.weights)}
        self._run.summary.update({**scores, **weights, "status": end.status})
        self._run.finish(exit_code=0 if end.status == "completed" else 1)
