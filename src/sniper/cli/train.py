"""`sniper train`: run all stages of an experiment, or continue them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sniper.cli.inputs import load_source, select_device
from sniper.cli.options import Count, Device, Json, default, flag
from sniper.cli.output import print_result
from sniper.cli.progress import show_progress
from sniper.errors import ConfigError

if TYPE_CHECKING:
    from sniper.training.loop import StepReport


def train(
    config: Annotated[Path, Parameter(help="Experiment file (YAML).")],
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
        Parameter(help="Folder of the run.", show_default=default("runs/NAME, for experiment NAME.yaml")),
    ] = None,
    resume: Annotated[
        bool, flag("Continue a stopped run; fields that are not set keep the values of the run.")
    ] = False,
    step: Annotated[
        Count | None,
        Parameter(
            help="With --resume: continue from the checkpoint of this step, and set later ones aside.",
            show_default=default("the newest checkpoint"),
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train a detector.

    Under torchrun, each process trains on its share of every batch.
    """
    from sniper.config.loading import check_resumable, dump_experiment, load_experiment
    from sniper.pipeline import train_experiment
    from sniper.runs.processes import Processes
    from sniper.runs.run import Run

    folder = run or Path("runs") / config.stem
    changes = parse_overrides(overrides)
    if step is not None and not resume:
        raise ConfigError("--step requires --resume")
    if resume:
        opened = Run.open(folder)
        old = load_experiment(opened.config_path)
        spec = load_experiment(config, overrides=changes, base=old)
        check_resumable(old, spec, source=opened.config_path)
    else:
        spec = load_experiment(config, overrides=changes)
    dataset = load_source(spec.data.train, "data.train", config=config, data=spec.data)
    place = select_device(device)
    last: dict[str, Any] = {}
    with Processes.from_environment().joined(place) as processes:
        if not resume and processes.is_first:
            Run.create(folder, config=dump_experiment(spec))
        elif processes.is_first:
            if step is not None:
                opened.go_back_to(step)
            opened.save_config(dump_experiment(spec))
        processes.wait()
        opened = Run.open(folder)
        with show_progress(is_shown=processes.is_first) as bars:

            def report_step(report: "StepReport") -> None:
                last.update(epoch=round(report.epoch, 4), loss=round(report.loss, 5))
                bars.step(report)

            train_experiment(
                opened,
                spec,
                dataset,
                device=place,
                watch=report_step,
                watch_mining=bars.mining,
                watch_scores=bars.scores,
                ranks=processes,
            )
    if processes.is_first:
        print_result({"run": str(folder), "step": int(opened.checkpoints[-1].name), **last}, is_json=json)


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
            if not rest:
                raise ConfigError(f"{argument}: a value is missing")
            value = rest.pop(0)
        overrides[name] = value
    return overrides
