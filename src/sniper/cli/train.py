"""`sniper train`: run all stages of an experiment, or continue them."""

import math
import shlex
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from sniper.cli.locks import locking
from sniper.cli.options import ANNOTATIONS_HELP, Count, Device, Json, default, flag
from sniper.cli.output import (
    announce_compilation,
    console,
    print_line,
    print_progress,
    print_result,
    print_warnings,
)
from sniper.cli.progress import show_progress
from sniper.cli.unknown import parse_overrides
from sniper.errors import printable
from sniper.runs.default import default_run
from sniper.runs.lock import lock_folder
from sniper.training.signals import Stopped

if TYPE_CHECKING:
    from rich.table import Table

    from sniper.config.derived import DerivedSetting
    from sniper.runs.run import Run
    from sniper.training.callbacks import EpochReport, StepReport


def _locks(data: str, run: Path | None, **_: Any) -> Iterator[AbstractContextManager[None]]:
    yield lock_folder(default_run(data) if run is None else run, option="--run")


@locking(_locks)
def train(
    data: Annotated[
        str,
        Parameter(
            help=f"Data set: {ANNOTATIONS_HELP} Or an experiment file (YAML), or the name of a recipe "
            "(`sniper recipes`)."
        ),
    ],
    /,
    *overrides: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="Fields of the experiment to set, as --SECTION.FIELD VALUE, such as --train.batch_size 8.",
        ),
    ],
    val: Annotated[
        Path | None,
        Parameter(
            help="Data set to validate on.",
            show_default=default("the split val or test, or else a tenth of the images"),
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gt=0, lt=math.inf),
            help="Epochs to train for.",
            show_default=default("by the size of the data set"),
        ),
    ] = None,
    time: Annotated[
        str | None,
        Parameter(
            help="Instead of --epochs: the time that the whole command may take, such as 90s, 10m or 1h30m. The number "
            "of epochs is estimated from a few steps, and corrected while it trains.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        Parameter(
            help="With a data set: YAML file of some fields of an experiment, which are not derived.",
            show_default=False,
        ),
    ] = None,
    weights_from: Annotated[
        Path | None,
        Parameter(
            help="Detector to start from: the folder of a run, or a safetensors file of its weights. Classes are "
            "matched by name; with a data set, the model is that of the run.",
            show_default=default("a pretrained backbone"),
        ),
    ] = None,
    run: Annotated[
        Path | None,
        Parameter(
            help="Folder of the run.", show_default=default("runs/NAME, for a file, folder or recipe NAME")
        ),
    ] = None,
    resume: Annotated[
        bool, flag("Continue a stopped run; fields that are not set keep the values of the run.")
    ] = False,
    step: Annotated[
        Count | None,
        Parameter(
            help="With --resume: continue from the checkpoint of this step, and rename later ones to end in .old.",
            show_default=default("the newest checkpoint"),
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train a detector.

    From a data set, every field that is not set is derived from the data and the machine, and listed with its reason
    before the first step. An experiment states its fields.

    Under torchrun, each process trains on its share of every batch.
    """
    started = clock.monotonic()
    from sniper.pipeline import train as train_experiment
    from sniper.planning.auto import parse_time
    from sniper.runs.processes import Processes
    from sniper.training.callbacks import Callbacks

    last: dict[str, Any] = {}
    is_first = Processes.from_environment().is_first
    with show_progress(is_shown=is_first) as bars, announce_compilation(is_shown=is_first):

        def report_step(report: "StepReport") -> None:
            last.update(epoch=round(report.epoch, 4), loss=round(report.loss, 5))
            bars.step(report)

        def report_epoch(report: "EpochReport") -> None:
            last.update(epoch=report.epoch, loss=report.loss, positive_accuracy=report.positive_accuracy)
            bars.epoch(report)

        options = "" if run is None else f" --run {shlex.quote(str(run))}"
        with _naming_continuation(
            default_run(data) if run is None else run,
            f"sniper train {shlex.quote(data)}{options} --resume",
        ):
            trained = train_experiment(
                data,
                run=run,
                resume=resume,
                step=step,
                device=device,
                val=val,
                epochs=epochs,
                time=None if time is None else parse_time(time) - (clock.monotonic() - started),
                config=config,
                weights_from=weights_from,
                overrides={f"--{name}": value for name, value in parse_overrides(overrides).items()},
                callbacks=Callbacks(
                    on_start=bars.start,
                    on_step=report_step,
                    on_epoch=report_epoch,
                    on_mining=bars.mining,
                    on_evaluation=bars.evaluating,
                    on_time_left=bars.time_left,
                    on_notice=print_progress,
                    on_derived=lambda settings: console.print(draw_settings(settings)),
                    on_weights=lambda report: print_progress(str(report)),
                    on_warning=lambda message: print_warnings([message]),
                ),
            )
    if not is_first:
        return
    result = {"run": str(trained.folder), "step": int(trained.checkpoints[-1].name), **last}
    scores = trained.best_scores()
    if scores:
        result["best_step"] = scores["step"]
        result |= {name: round(scores[name], 4) for name in _SCORES if scores.get(name) is not None}
        result["num_images"] = scores.get("num_images", 0)
    minutes = round((clock.monotonic() - started) / 60, 2)
    if json:
        print_result({**result, "minutes": minutes}, is_json=True)
        return
    print_result(_summary(trained, result, minutes=minutes), is_json=False)
    print_line(f"next: {_next_command(trained)}")


@contextmanager
def _naming_continuation(folder: Path, command: str) -> Iterator[None]:
    """Add to an interrupt what is saved, and the command that continues the run."""
    from sniper.runs.run import Run

    try:
        yield
    except KeyboardInterrupt as stop:
        run, note = Run(folder), ""
        if run.checkpoints:
            note = f" after step {int(run.checkpoints[-1].name):,}, which is saved"
        if run.config_path.exists():
            note += f"; to continue: {command}"
        raise Stopped.of(stop, note) from stop


_SCORES = ("ap", "ap50", "ap75", "ar_100", "segm_ap", "segm_ap50")


def _summary(run: "Run", result: Mapping[str, Any], *, minutes: float) -> dict[str, Any]:
    """Return the result of a training as lines for people: what was reached, and where it is."""
    from sniper.reports.scores import format_score

    best, step = result.get("best_step"), result["step"]
    lines: dict[str, Any] = {"run": result["run"]}
    if best is None:
        lines["checkpoint"] = f"step {step:,}"
        lines["AP"] = "not evaluated"
    else:
        lines["checkpoint"] = f"step {best:,} has the best AP" + (f"; the last is {step:,}" * (best != step))
        lines["AP"] = format_score(result.get("ap", -1))
        lines["AP50"] = format_score(result.get("ap50", -1))
        if "segm_ap" in result:
            lines["mask AP"] = format_score(result["segm_ap"])
            lines["mask AP50"] = format_score(result["segm_ap50"])
        lines["AR (100 per image)"] = format_score(result.get("ar_100", -1))
        lines["images"] = f"{result['num_images']:,}"
    lines["minutes"] = f"{minutes:.1f}"
    lines["metrics"] = str(run.metrics_path)
    if run.report_path.exists():
        lines["page"] = str(run.report_path)
    return lines


def draw_settings(settings: Sequence["DerivedSetting"]) -> "Table":
    """Build the table of derived settings: value, reason, and the option that sets another value."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("setting", "value", "reason", "option"):
        table.add_column(column, no_wrap=column == "option", overflow="fold")
    for setting in settings:
        table.add_row(setting.name, printable(setting.value), setting.reason, setting.option)
    return table


def _next_command(run: "Run") -> str:
    """Return the command that searches the validation images of a run, or others if it has none."""
    from sniper.config.loading import load_experiment
    from sniper.pipeline import has_test_images

    folder = shlex.quote(str(run.folder))
    images = "" if has_test_images(load_experiment(run.config_path)) else " IMAGES"
    return f"sniper predict {folder}{images} --draw {shlex.quote(str(run.folder / 'pictures'))}"
