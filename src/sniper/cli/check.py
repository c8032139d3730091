"""`sniper check`: read every image of a data set and report all problems."""

import time

from sniper.cli.inputs import load_annotations, load_config
from sniper.cli.options import Annotations, Config, Images, Json
from sniper.cli.output import console, print_result
from sniper.errors import ImageError


def check(
    annotations: Annotations, /, *, images: Images = None, config: Config = None, json: Json = False
) -> None:
    """Check annotations and read every pixel of their images.

    All problems are reported at once. The section `data.read` of the experiment specifies how images are read.
    """
    started = time.monotonic()
    from rich.progress import track

    from sniper.data.reader import find_bad_images

    read = load_config(config).data.read
    dataset = load_annotations(annotations, images=images)
    results = find_bad_images(dataset, read)
    shown = track(
        results,
        "check",
        total=len(dataset),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    problems = [problem for problem in shown if problem is not None]
    if problems:
        plural = "s" if len(problems) > 1 else ""
        listed = "\n  ".join(problems)
        raise ImageError(f"{annotations}: {len(problems)} bad image{plural}\n  {listed}")
    print_result(
        {
            "num_images": len(dataset),
            "num_boxes": len(dataset.boxes),
            "seconds": round(time.monotonic() - started, 3),
        },
        is_json=json,
    )
