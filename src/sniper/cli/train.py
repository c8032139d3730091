"""`sniper train`: run all stages of an experiment, or continue them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sniper.cli.options import Count, Device, Json, default, flag
from sniper.cli.output import announce_compilation, print_result, print_warnings
from sniper.cli.progress import show_progress
from sniper.errors import ConfigError

if TYPE_CHECKING:
    from sniper.training.callbacks import StepReport


def train(
    config: Annotated[
        str, Parameter(help="Experiment file (YAML), or the name of a recipe (`sniper recipes`).")
    ],
    /,
    *overrides: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="Fields of the experiment to set, as --SECTION.FIELD VALUE, such as --train.epochs 12.",
        ),
    ],
    run: Annotated[
        Path | None,
        Parameter(help="Folder of the run.", show_default=default("runs/NAME, for NAME.yaml or recipe NAME")),
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

    Under torchrun, each process trains on its share of every batch.
    """
    from sniper.pipeline import train as train_experiment
    from sniper.runs.processes import Processes
    from sniper.training.callbacks import Callbacks

    last: dict[str, Any] = {}
    is_first = Processes.from_environment().is_first
    with show_progress(is_shown=is_first) as bars, announce_compilation(is_shown=is_first):

        def report_step(report: "StepReport") -> None:
            last.update(epoch=round(report.epoch, 4), loss=round(report.loss, 5))
            bars.step(report)

        trained = train_experiment(
            config,
            run=run,
            resume=resume,
            step=step,
            device=device,
            overrides=parse_overrides(overrides),
            callbacks=Callbacks(
                on_step=report_step,
                on_mining=bars.mining,
                on_scores=bars.scores,
                on_warning=lambda message: print_warnings([message]),
            ),
        )
    if is_first:
        step_of_run = int(trained.checkpoints[-1].name)
        print_result({"run": str(trained.folder), "step": step_of_run, **last}, is_json=json)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parse `--section.field VALUE` and `--section.field=VALUE` into values by dotted name.

    Raises:
        ConfigError: if an argument is no option, or has no value.
    """
    overrides = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise ConfigError(f"{argument}: expected --section.field VALUE")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{argument}: the value is missing; expected {argument} VALUE")
            value = rest.pop(0)
        overrides[name] = value
    return overrides
