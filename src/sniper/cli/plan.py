"""`sniper plan`: report what training on chips costs, and suggest a pyramid."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from sniper.cli.inputs import load_annotations
from sniper.cli.options import (
    Annotations,
    ClassProperty,
    Config,
    Count,
    Device,
    FollowLinks,
    Images,
    Json,
    Proposals,
    Seed,
    TrainSplit,
    default,
    flag,
    output_option,
)
from sniper.cli.output import (
    announce_compilation,
    console,
    print_line,
    print_paragraph,
    print_result,
    print_table,
)
from sniper.errors import ConfigError, counted

if TYPE_CHECKING:
    from sniper.planning.page import PlanPage
    from sniper.planning.tools import ToolPlan


def plan(
    annotations: Annotations,
    /,
    *,
    config: Config = None,
    proposals: Proposals = None,
    images: Images = None,
    split: TrainSplit = None,
    follow_links: FollowLinks = False,
    class_property: ClassProperty = None,
    output: Annotated[
        Path | None,
        output_option("Folder for plan.html and suggested.yaml.", default="plans/FOLDER_NAME of ANNOTATIONS"),
    ] = None,
    batch_size: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=1, lte=65_536),
            help="Chips per step.",
            show_default=default("as in the experiment"),
        ),
    ] = None,
    crowded_above: Annotated[
        Count, Parameter(help="Report how many chips show more than this many boxes.")
    ] = 100,
    levels: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=1, lte=8),
            help="Number of levels to suggest.",
            show_default=default("the fewest of 1 to 4 within 5 % of the least cost"),
        ),
    ] = None,
    share: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gt=0, lte=1),
            help="Fraction of the boxes that the suggested pyramid must bring to a useful size.",
            show_default=default("0.95, or 0.99 where that costs at most 5 % more"),
        ),
    ] = None,
    useful_sizes: Annotated[
        tuple[float, float] | None,
        Parameter(
            negative=(),
            help="Sizes from and to which detectors do well, chip pixels.",
            show_default=default("16 480 with a feature pyramid, 32 480 with one feature map"),
        ),
    ] = None,
    tool: Annotated[
        Literal["ultralytics", "sahi", "supervision", "rfdetr"] | None,
        Parameter(
            name="--for",
            help="Print settings of this tool that suit the data set, what they cost, and which objects they miss.",
            show_default=False,
        ),
    ] = None,
    measure: Annotated[bool, flag("Train three steps, and report minutes and memory.")] = False,
    gpus: Annotated[
        str | None,
        Parameter(
            help="Report hours, cores and cache for a cluster: machines x GPUs of each, such as 8x8. The speed of a "
            "GPU is measured on --device, unless it is given (--chips-per-second).",
            show_default=False,
        ),
    ] = None,
    chips_per_second: Annotated[
        float | None,
        Parameter(
            validator=validators.Number(gt=0),
            help="Chips that one GPU trains on in a second, for a GPU that is not here; with --gpus.",
            show_default=default("measured"),
        ),
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Suggest a pyramid, and report what training on its chips would cost.

    Writes plan.html, a page with figures and pictures, and suggested.yaml, an experiment that trains as it is. With an
    experiment (`--config`), the cost is that of its pyramid; the values of a file of some fields are kept. The image
    files are needed only by `--measure` and by formats without the sides of images; pictures are drawn if they are
    there.
    """
    started = time.monotonic()
    from sniper.data.epoch import to_image_boxes
    from sniper.planning import plan as planning
    from sniper.planning.cluster import Cluster
    from sniper.planning.given import Given
    from sniper.planning.tools import plan_tool

    if useful_sizes is not None and not 0 < useful_sizes[0] < useful_sizes[1]:
        raise ConfigError(
            f"--useful-sizes: expected two sizes, the smaller first, not {useful_sizes[0]:g} {useful_sizes[1]:g}"
        )
    if chips_per_second is not None and gpus is None:
        raise ConfigError("--chips-per-second: is of the GPUs of --gpus, which is missing")
    if gpus is not None:
        Cluster.parse(gpus)
        measure = measure or chips_per_second is None
    experiment, given = (None, Given()) if config is None else planning.load_given(config)
    data = (experiment or given.spec).data
    data = replace(
        data,
        follow_links=data.follow_links or follow_links,
        class_property=class_property or data.class_property,
    )
    dataset = load_annotations(annotations, images=images, split=split, data=data, has_images=measure)
    folder = output or Path("plans") / f"{annotations.absolute().parent.name}_{annotations.stem}"
    with console.status("searching for a pyramid"), announce_compilation():
        page = planning.plan(
            dataset,
            experiment=config,
            images=images,
            split=split,
            class_property=class_property,
            proposals=proposals,
            num_levels=levels,
            share=share,
            useful_sizes=useful_sizes,
            batch_size=batch_size,
            crowded_above=crowded_above,
            is_measured=measure,
            device=device,
            gpus=gpus,
            chips_per_second=chips_per_second,
            seed=seed,
        )
    page.save(folder)
    tool_plan = None
    if tool is not None:
        boxes = to_image_boxes(dataset)
        tool_plan = plan_tool(tool, boxes, data=annotations, useful_sizes=page.cost.useful_sizes)
    if json:
        seconds = round(time.monotonic() - started, 3)
        of_tool = {} if tool_plan is None else {"for": tool_plan.as_dict()}
        print_result({**page.as_dict(), **of_tool, "seconds": seconds, "output": str(folder)}, is_json=True)
        return
    _show(page, folder)
    if tool_plan is not None:
        _show_tool(tool_plan, page)


def _show(page: "PlanPage", folder: Path) -> None:
    """Print a plan as tables."""
    from sniper.planning.tables import draw_levels, draw_pixels, draw_suggestions

    cost = page.cost
    parts = [
        f"{counted(cost.num_images, 'image')}, {cost.num_images_with_boxes:,} with boxes",
        f"{counted(cost.num_required, 'box', 'boxes')} to cover, {cost.num_uncovered} covered by no chip",
        f"{counted(page.num_steps, 'step')} of {counted(page.batch_size, 'chip')} per epoch",
        f"chips with more than {counted(page.crowded_above, 'box', 'boxes')}: {page.num_crowded:,}",
    ]
    if cost.num_negatives:
        parts.append(
            f"{counted(cost.num_negatives_per_epoch, 'negative chip')} per epoch, out of {cost.num_negatives:,}"
        )
    if page.measurement is not None:
        parts.append(
            f"{page.measurement.minutes_per_epoch:.1f} minutes per epoch, {page.measurement.minutes:.0f} in all, and "
            f"{page.measurement.peak_memory / 1e9:.1f} GB on {page.measurement.device}"
        )
    print_paragraph("; ".join(parts))
    for line in page.cluster.describe() if page.cluster else ():
        print_paragraph(line)
    for table in (draw_levels(cost), draw_pixels(cost), draw_suggestions(page)):
        print_table(table)
    if page.suggestion is not None:
        print_paragraph(page.suggestion.reason)
        print_line("")
    print_line(f"page:   {folder / 'plan.html'}")
    if page.suggested_yaml:
        print_line(f"train:  {page.train_command(folder)[0]}")
    elif not cost.num_required:
        print_line("no pyramid is suggested: there are no boxes to learn from")
    else:
        print_line("no box to learn from, so there is nothing to suggest")


def _show_tool(plan: "ToolPlan", page: "PlanPage") -> None:
    """Print the settings of another tool, what they cost beside chips, and which objects they miss."""
    from sniper.planning.tables import draw_missed

    print_line("")
    print_line(f"for {plan.tool}:")
    for line in plan.lines:
        print_line(f"  {line}")
    for note in plan.notes:
        print_line(f"  ({note})")
    print_paragraph(
        f"{plan.tool}: {plan.train_megapixels:.2f} megapixels of an image in training and {plan.megapixels:.2f} in "
        f"prediction; {100 * plan.share_missed:.1f} % of the objects are missed. {_describe_chips(plan, page)}"
    )
    if page.cost.num_required:
        print_table(draw_missed(plan))


def _describe_chips(plan: "ToolPlan", page: "PlanPage") -> str:
    """Describe what chips would cost beside a tool."""
    cost = page.cost
    if not cost.num_required or not plan.megapixels:
        return "There are no objects to cut chips around."
    trained, searched = cost.megapixels.chips, page.test_megapixels
    return (
        f"Chips: {trained:.2f} in training ({trained / plan.train_megapixels:.2f} times as many) and {searched:.2f} in "
        f"prediction ({searched / plan.megapixels:.2f} times); {100 * (1 - cost.share_useful):.1f} % are missed."
    )
