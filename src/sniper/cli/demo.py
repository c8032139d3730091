"""`sniper demo`: the whole pipeline on a small drawn data set."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from sniper.cli.locks import locking
from sniper.cli.options import Device, Json, flag
from sniper.cli.output import announce_compilation, print_line, print_progress, print_result
from sniper.cli.progress import show_progress
from sniper.runs.lock import lock_folder

_SCORES = {
    "ap": ("AP", "mean over classes and IoU 0.50 to 0.95"),
    "ap50": ("AP50", "at IoU 0.5"),
    "ar_100": ("AR", "recall with 100 detections an image and class, mean over classes and IoU 0.50 to 0.95"),
    "ar_100_any_class": ("AR, any class", "recall without regard to classes, 100 detections an image"),
}
_PICTURES = {
    "levels.jpg": "which level detects which object: small ones the finest, large ones the coarsest",
    "detections_*": "test images, with true positives, false positives and false negatives",
    "chips.png": "what it was trained on",
}


def _locks(run: Path, **_: Any) -> Iterator[AbstractContextManager[None]]:
    yield lock_folder(run, option="--run")


@locking(_locks)
def demo(
    *,
    run: Annotated[Path, Parameter(help="Folder of the run; it must not exist.")] = Path("runs/demo"),
    seed: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=0, lte=2**62),
            help="Seed of the images, the initial weights and the order of the chips.",
        ),
    ] = 0,
    quick: Annotated[bool, flag("Take a minute: fewer images, and fewer epochs.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Draw a small data set, train on it, predict, score, and draw pictures.

    Takes about three minutes on two CPU cores.
    """
    from sniper.demo.run import DemoSpec, quick_look, run_demo
    from sniper.runs.processes import select_device
    from sniper.training.callbacks import Callbacks

    with show_progress() as bars, announce_compilation():
        result = run_demo(
            run,
            device=select_device(device),
            callbacks=Callbacks(on_step=bars.step, on_time_left=bars.time_left),
            log=print_progress,
            spec=quick_look(seed) if quick else DemoSpec(seed=seed),
        )
    if json:
        print_result(result, is_json=True)
    else:
        _print_story(result, is_quick=quick)


def _print_story(result: Mapping[str, Any], *, is_quick: bool) -> None:
    """Print the scores, what to look at, and the next command."""
    from sniper.reports.scores import format_score

    print_line(
        f"trained and tested in {result['minutes']:.1f} minutes, on {result['num_images']} test images:"
    )
    for key, (name, meaning) in _SCORES.items():
        print_line(f"  {name:<14} {format_score(result[key])}  {meaning}")
    if is_quick:
        print_line("This was a quick look; `sniper demo` trains for longer and reaches an AP50 above 0.8.")
    print_line(f"Look at the pictures in {result['pictures']}:")
    for name, meaning in _PICTURES.items():
        print_line(f"  {name:<14} {meaning}")
    print_line(f"How it was trained, and where it is wrong: {result['page']}")
    print_line("For data of your own: sniper train your_data")
