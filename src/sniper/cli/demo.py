"""`sniper demo`: the whole pipeline on a small drawn data set."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sniper.cli.options import Device, Json
from sniper.cli.output import print_progress, print_result
from sniper.cli.progress import show_progress


def demo(
    *,
    run: Annotated[Path, Parameter(help="Folder of the run; it must not exist.")] = Path("runs/demo"),
    device: Device = None,
    json: Json = False,
) -> None:
    """Draw a small data set, train on it, predict, score, and draw pictures.

    Takes a few minutes on two CPU cores.
    """
    from sniper.demo.run import run_demo
    from sniper.runs.processes import select_device

    with show_progress() as bars:
        result = run_demo(run, device=select_device(device), watch=bars.step, log=print_progress)
    print_result(result, is_json=json)
