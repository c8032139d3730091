"""`sniper check`: read every image of a data set and report all problems."""

import time
from dataclasses import replace
from typing import Annotated

from sniper.cli.inputs import load_annotations, load_config
from sniper.cli.options import Annotations, ClassProperty, Config, FollowLinks, Images, Json, split_option
from sniper.cli.output import console, print_result
from sniper.errors import ImageError, counted


def check(
    annotations: Annotations,
    /,
    *,
    images: Images = None,
    split: Annotated[str, split_option("all")] = "all",
    follow_links: FollowLinks = False,
    class_property: ClassProperty = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Check annotations and read every pixel of their images.

    All problems are reported at once. The section `data.read` of the experiment specifies how images are read.
    """
    started = time.monotonic()
    from rich.progress import track

    from sniper.data.reader import find_bad_images

    data = load_config(config).data
    if follow_links:
        data = replace(data, follow_links=True)
    if class_property is not None:
        data = replace(data, class_property=class_property)
    # The boxes may show that sides have to be exchanged, which takes the headers of the files.
    skipping = replace(data, on_bad_image="skip")
    dataset = load_annotations(
        annotations, images=images, split=split, data=skipping, has_images=True, warns_of_left_out=False
    )
    results = find_bad_images(dataset, data.read) if len(dataset) else []
    shown = track(
        results,
        "check",
        total=len(dataset),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    problems = [problem for problem in shown if problem is not None]
    problems += dataset.left_out
    if problems:
        listed = "\n  ".join(problems)
        raise ImageError(f"{annotations}: {counted(len(problems), 'bad image')}\n  {listed}")
    print_result(
        {
            "num_images": len(dataset),
            "num_boxes": len(dataset.boxes),
            "seconds": round(time.monotonic() - started, 3),
        },
        is_json=json,
    )
