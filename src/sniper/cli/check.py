"""`sniper check`: read every image of a data set and report all problems."""

import shlex
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from sniper.cli.inputs import load_annotations, load_config
from sniper.cli.options import Annotations, ClassProperty, Config, FollowLinks, Images, Json, split_option
from sniper.cli.output import console, print_line, print_result, print_table
from sniper.errors import ImageError, counted, printable, shorten_repeated

if TYPE_CHECKING:
    from sniper.data.datasets import Dataset

_MAX_CLASSES = 20
"""Classes that are listed without `--json`."""


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
        listed = "\n  ".join(shorten_repeated(problems))
        raise ImageError(f"{annotations}: {counted(len(problems), 'bad image')}\n  {listed}")
    classes = _count_classes(dataset)
    if json:
        result = {"num_images": len(dataset), "num_boxes": len(dataset.boxes), "classes": classes}
        print_result({**result, "seconds": round(time.monotonic() - started, 3)}, is_json=True)
        return
    given = {"--images": images, "--config": config, "--class-property": class_property}
    options = [str(each) for name, value in given.items() if value is not None for each in (name, value)]
    options += ["--follow-links"] if follow_links else []
    _show(dataset, classes, next_command=shlex.join(["sniper", "plan", str(annotations), *options]))


def _count_classes(dataset: "Dataset") -> list[dict[str, Any]]:
    """Count the objects of each class, its crowds, and the images that have them, in the order of the classes."""
    import numpy as np

    image_of_box = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    classes = []
    for label, category in enumerate(dataset.categories):
        is_class = dataset.labels == label
        num_crowds = int((is_class & dataset.is_crowd).sum())
        num_images = len(np.unique(image_of_box[is_class]))
        num_objects = int(is_class.sum()) - num_crowds
        classes.append(
            {
                "name": category.name,
                "num_objects": num_objects,
                "num_crowds": num_crowds,
                "num_images": num_images,
            }
        )
    return classes


def _show(dataset: "Dataset", classes: list[dict[str, Any]], *, next_command: str) -> None:
    """Print that all images can be used, the classes with most objects, and the next command."""
    from rich.box import SIMPLE
    from rich.table import Table

    num_objects = sum(each["num_objects"] for each in classes)
    num_crowds = sum(each["num_crowds"] for each in classes)
    crowds = f" and {counted(num_crowds, 'crowd')}" if num_crowds else ""
    print_line(
        f"{counted(len(dataset), 'image')} with {counted(num_objects, 'object')}{crowds} of "
        f"{counted(len(classes), 'class', 'classes')}; all images can be read"
    )
    columns = {"num_objects": "objects", "num_crowds": "crowds", "num_images": "images"}
    if not num_crowds:
        del columns["num_crowds"]
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("class", overflow="fold")
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    by_count = sorted(classes, key=lambda each: -each["num_objects"])
    for each in by_count[:_MAX_CLASSES]:
        table.add_row(printable(each["name"]), *(f"{each[name]:,}" for name in columns))
    if classes:
        print_table(table)
    if len(classes) > _MAX_CLASSES:
        print_line(
            f"{counted(len(classes) - _MAX_CLASSES, 'more class', 'more classes')} with fewer objects\n"
        )
    print_line(f"plan:  {next_command}")
