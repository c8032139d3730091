"""A plan as tables for the terminal: the levels, the pixels, and the suggested pyramids."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from sniper.planning.cost import USEFUL_SIZES, CostPlan
from sniper.planning.page import PlanPage, resize_rule


def draw_levels(cost: CostPlan) -> Table:
    """Build the table of the levels: their boxes and chips."""
    columns = ("#", "resize", "sizes", "boxes", "share", "moved", "covered", "cropped", "chips", "/img")
    table = _table("Levels", columns)
    for index, (spec, level) in enumerate(zip(cost.pyramid.levels, cost.levels, strict=True), start=1):
        share = 100 * level.num_valid / max(cost.num_required, 1)
        table.add_row(
            str(index),
            resize_rule(spec),
            _sizes(spec.at_least, spec.below),
            f"{level.num_valid:,}",
            f"{share:.0f} %",
            f"{level.num_moved_here:,}",
            f"{level.num_covered:,}",
            f"{level.num_cropped:,}",
            f"{level.num_chips:,}",
            f"{level.num_chips / max(cost.num_images_with_boxes, 1):.3f}",
        )
    return table


def draw_pixels(cost: CostPlan) -> Table:
    """Build the table of the pixels of the chips and of the alternatives."""
    table = _table("Pixels", ("input", "MP per image", "vs. single pass"))
    inputs = {
        "chips of this pyramid": cost.megapixels.chips,
        "one pass at 800×1333": cost.megapixels.single,
        f"tiles of {cost.pyramid.chip_size} px at ×1": cost.megapixels.grid,
        "the whole image at every level": cost.megapixels.pyramid,
    }
    single = cost.megapixels.single
    for name, megapixels in inputs.items():
        ratio = megapixels / single if single else 0.0
        table.add_row(name, _megapixels(megapixels), f"{ratio:.2f}")
    return table


def draw_suggestions(page: PlanPage) -> Table:
    """Build the table of the experiment's pyramid and of the suggestions, the first of which is written."""
    table = _table(
        f"Suggested pyramids (useful: {USEFUL_SIZES[0]:g}–{USEFUL_SIZES[1]:g} px in a chip; MP: per image)",
        ("goal", "levels: sizes", "chip", "useful", "chips/img", "train MP", "test MP"),
    )
    rows = [("as planned", page.cost, page.test_megapixels)]
    rows += [
        (f"{100 * suggestion.goal:g} %", suggestion.cost, suggestion.cost.megapixels.pyramid)
        for suggestion in page.suggestions
    ]
    for name, cost, test_megapixels in rows:
        specs = cost.pyramid.levels
        table.add_row(
            name,
            "\n".join(f"{resize_rule(spec)}: {_sizes(spec.at_least, spec.below)}" for spec in specs),
            str(cost.pyramid.chip_size),
            f"{100 * cost.share_useful:.1f} %" if cost.num_required else "–",
            f"{cost.mean_chips_per_image:.2f}",
            _megapixels(cost.megapixels.chips),
            _megapixels(test_megapixels),
        )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, column in enumerate(columns):
        is_text = index == 0 or column in ("resize", "levels: sizes")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    return table


def _megapixels(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def _sizes(at_least: float, below: float) -> str:
    return f"{at_least:g}–{'∞' if math.isinf(below) else f'{below:g}'}"
