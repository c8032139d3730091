"""`sniper plan`: report what training on chips costs, and suggest a pyramid."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators
from rich.console import Console

from sniper.cli.chips import choose_chips
from sniper.cli.inputs import load_annotations, load_config
from sniper.cli.options import (
    Annotations,
    Config,
    Count,
    Images,
    Json,
    Proposals,
    Seed,
    default,
    output_option,
)
from sniper.cli.output import console, print_result

if TYPE_CHECKING:
    from sniper.config.experiment import ExperimentSpec
    from sniper.planning.page import PlanPage
    from sniper.planning.suggest import Suggestion

_MOST_LEVELS = 4


def plan(
    annotations: Annotations,
    /,
    *,
    config: Config = None,
    proposals: Proposals = None,
    images: Images = None,
    output: Annotated[
        Path | None,
        output_option("Folder for plan.html and suggested.yaml.", default="plans/FOLDER_NAME of ANNOTATIONS"),
    ] = None,
    batch_size: Annotated[
        Count | None, Parameter(help="Chips per step.", show_default=default("as in the experiment"))
    ] = None,
    crowd: Annotated[Count, Parameter(help="Count the chips that show more boxes than this.")] = 100,
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
    from sniper.config.loading import dump_changes
    from sniper.data.epoch import to_image_boxes
    from sniper.planning.cost import compute_cost, levels_megapixels
    from sniper.planning.page import PlanPage
    from sniper.planning.suggest import suggest_pyramids

    spec = load_config(config)
    if batch_size is not None:
        spec = replace(spec, train=replace(spec.train, batch_size=batch_size))
    dataset = load_annotations(annotations, images=images)
    folder = output or Path("plans") / f"{annotations.absolute().parent.name}_{annotations.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    boxes = to_image_boxes(dataset)
    table = choose_chips(dataset, spec, proposals=proposals, seed=seed)
    cost = compute_cost(table, boxes, pyramid=spec.pyramid, negatives_per_image=spec.negatives.per_image)
    with console.status("searching for a pyramid"):
        num_levels = [levels] if levels else range(1, _MOST_LEVELS + 1)
        suggestions = suggest_pyramids(boxes, base=spec.pyramid, num_levels=num_levels, share=share)
    suggested = _suggest_experiment(suggestions, spec, annotations=annotations, images=images)
    page = PlanPage(
        dataset=dataset,
        table=table,
        cost=cost,
        suggestions=suggestions,
        test_megapixels=levels_megapixels(spec.predict.levels, boxes) / max(cost.num_images, 1),
        batch_size=spec.train.batch_size,
        crowded_above=crowd,
        suggested_yaml="" if suggested is None else dump_changes(suggested),
        read=spec.data.read,
    )
    _save(page, folder)
    if json:
        seconds = round(time.monotonic() - started, 3)
        print_result({**page.as_dict(), "seconds": seconds, "output": str(folder)}, is_json=True)
    else:
        _show(page, folder)


def _suggest_experiment(
    suggestions: Sequence["Suggestion"], spec: "ExperimentSpec", *, annotations: Path, images: Path | None
) -> "ExperimentSpec | None":
    """Return the experiment with the first suggested pyramid, trained on the planned data set."""
    from sniper.data.spec import SourceSpec

    if not suggestions:
        return None
    path = annotations.absolute()
    root: str | Path | None = images
    if images is None and Path(spec.data.train.annotations) == path:
        root = spec.data.train.images
    source = SourceSpec(annotations=str(path), images=None if root is None else str(Path(root).absolute()))
    return spec.with_pyramid(suggestions[0].cost.pyramid, train=source)


def _save(page: "PlanPage", folder: Path) -> None:
    """Write the page and the suggested experiment; a suggestion of an earlier plan is removed."""
    from sniper.files import atomic_write

    page.save(folder / "plan.html")
    (folder / "suggested.yaml").unlink(missing_ok=True)
    if page.suggested_yaml:
        with atomic_write(folder / "suggested.yaml") as file:
            file.write(page.suggested_yaml.encode())


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
    out = Console()
    out.print("; ".join(parts), highlight=False)
    for table in (draw_levels(cost), draw_pixels(cost), draw_suggestions(page)):
        out.print(table)
    out.print(f"page:   {folder / 'plan.html'}", soft_wrap=True, markup=False)
    if page.suggested_yaml:
        out.print(f"train:  sniper train {folder / 'suggested.yaml'}", soft_wrap=True, markup=False)
    else:
        out.print(
            "no pyramid brings that many boxes to a useful size; try a lower --share",
            soft_wrap=True,
            markup=False,
        )
