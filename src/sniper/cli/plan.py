"""`sniper plan`: report what training on chips costs, and suggest a pyramid."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from sniper.cli.inputs import load_annotations, load_config
from sniper.cli.options import (
    Annotations,
    Config,
    Count,
    FollowLinks,
    Images,
    Json,
    Proposals,
    Seed,
    TrainSplit,
    default,
    output_option,
)
from sniper.cli.output import console, print_line, print_result, print_table

if TYPE_CHECKING:
    from sniper.planning.page import PlanPage

_MOST_LEVELS = 4


def plan(
    annotations: Annotations,
    /,
    *,
    config: Config = None,
    proposals: Proposals = None,
    images: Images = None,
    split: TrainSplit = None,
    follow_links: FollowLinks = False,
    output: Annotated[
        Path | None,
        output_option("Folder for plan.html and suggested.yaml.", default="plans/FOLDER_NAME of ANNOTATIONS"),
    ] = None,
    batch_size: Annotated[
        Count | None, Parameter(help="Chips per step.", show_default=default("as in the experiment"))
    ] = None,
    crowded_above: Annotated[
        Count, Parameter(help="Report how many chips show more than this many boxes.")
    ] = 100,
    levels: Annotated[
        Count | None,
        Parameter(
            help="Number of levels to suggest.", show_default=default(f"the cheapest of 1 to {_MOST_LEVELS}")
        ),
    ] = None,
    share: Annotated[
        float,
        Parameter(
            validator=validators.Number(gt=0, lte=1),
            help="Fraction of the boxes that the suggested pyramid must bring to a useful size.",
        ),
    ] = 0.99,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Report what training on chips would cost, and suggest a pyramid.

    Writes plan.html, a page with figures and pictures, and suggested.yaml, an experiment with the suggested pyramid.
    The image files are not needed; pictures are drawn if they are there.
    """
    started = time.monotonic()
    from sniper.planning import plan as planning

    spec = load_config(config)
    if batch_size is not None:
        spec = replace(spec, train=replace(spec.train, batch_size=batch_size))
    if follow_links:
        spec = replace(spec, data=replace(spec.data, follow_links=True))
    dataset = load_annotations(annotations, images=images, split=split, data=spec.data)
    folder = output or Path("plans") / f"{annotations.absolute().parent.name}_{annotations.stem}"
    with console.status("searching for a pyramid"):
        page = planning.plan(
            dataset,
            experiment=spec,
            images=images,
            split=split,
            proposals=proposals,
            num_levels=levels,
            share=share,
            crowded_above=crowded_above,
            seed=seed,
        )
    page.save(folder)
    if json:
        seconds = round(time.monotonic() - started, 3)
        print_result({**page.as_dict(), "seconds": seconds, "output": str(folder)}, is_json=True)
    else:
        _show(page, folder)


def _show(page: "PlanPage", folder: Path) -> None:
    """Print a plan as tables."""
    from sniper.planning.tables import draw_levels, draw_pixels, draw_suggestions

    cost = page.cost
    parts = [
        f"{cost.num_images:,} images, {cost.num_images_with_boxes:,} with boxes",
        f"{cost.num_required:,} boxes to cover, {cost.num_uncovered} covered by no chip",
        f"{cost.num_steps(page.batch_size):,} steps of {page.batch_size} chips per epoch",
        f"{page.num_crowded:,} chips show more than {page.crowded_above} boxes",
    ]
    if cost.num_negatives:
        parts.append(
            f"{cost.num_negatives_per_epoch:,} negative chips per epoch, out of {cost.num_negatives:,}"
        )
    print_line("; ".join(parts))
    for table in (draw_levels(cost), draw_pixels(cost), draw_suggestions(page)):
        print_table(table)
    print_line(f"page:   {folder / 'plan.html'}")
    if page.suggested_yaml:
        print_line(f"train:  sniper train {folder / 'suggested.yaml'}")
    else:
        print_line("no pyramid brings that many boxes to a useful size; try a lower --share")
