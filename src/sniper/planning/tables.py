"""A plan as tables for the terminal: the levels, the pixels, and the suggested pyramids."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from sniper.planning.cost import CostPlan
from sniper.planning.page import PlanPage, pixel_rows, pyramid_rows
from sniper.planning.tools import ToolPlan
from sniper.reports.page import resize_rule, sizes_text


def draw_levels(cost: CostPlan) -> Table:
    """Build the table of the levels: their boxes and chips."""
    table = _table(
        f"Chips of {cost.pyramid.chip_size} px",
        ("level", "objects of", "objects", "share", "chips", "/image", "moved", "cropped"),
    )
    for spec, level in zip(cost.pyramid.levels, cost.levels, strict=True):
        share = 100 * level.num_valid / max(cost.num_required, 1)
        table.add_row(
            resize_rule(spec),
            sizes_text(spec),
            f"{level.num_valid:,}",
            f"{share:.0f} %",
            f"{level.num_chips:,}",
            f"{level.num_chips / max(cost.num_images_with_boxes, 1):.2f}",
            f"{level.num_moved_here:,}",
            f"{level.num_cropped:,}",
        )
    return table


def draw_pixels(cost: CostPlan) -> Table:
    """Build the table of the pixels of the chips and of the alternatives."""
    table = _table("Pixels to train on", ("input", "MP/image", "vs. one pass"))
    for name, megapixels in pixel_rows(cost):
        single = cost.megapixels.single
        table.add_row(name, _megapixels(megapixels), f"{megapixels / single if single else 0.0:.2f}")
    return table


def draw_suggestions(page: PlanPage) -> Table:
    """Build the table of the suggested pyramid, its alternatives and, if it is another, that of the experiment."""
    low, high = page.cost.useful_sizes
    table = _table(
        f"Pyramids to choose from (useful: {low:g} to {high:g} px in a chip; per image: chips, megapixels)",
        ("pyramid", "chip", "useful", "chips", "train", "predict"),
    )
    for row in pyramid_rows(page):
        specs = row.pyramid.levels
        table.add_row(
            "\n".join([row.name, *(f"  {resize_rule(spec)}: {sizes_text(spec)}" for spec in specs)]),
            str(row.pyramid.chip_size),
            f"{100 * row.share_useful:.1f} %" if page.cost.num_required else "–",
            f"{row.chips_per_image:.2f}",
            _megapixels(row.megapixels),
            _megapixels(row.test_megapixels),
        )
    return table


def draw_missed(plan: ToolPlan) -> Table:
    """Build the table of the objects that another tool misses, by size."""
    table = _table(
        "Objects that are missed",
        ("size", "objects", "cut by tiles", "too small", "too large", "missed"),
    )
    for each in plan.boxes:
        sides = f"{each.at_least:g} px and more" if math.isinf(each.below) else f"under {each.below:g} px"
        table.add_row(
            f"{each.name} ({sides})",
            f"{each.num_boxes:,}",
            f"{each.num_cut:,}",
            f"{each.num_too_small:,}",
            f"{each.num_too_large:,}",
            f"{100 * each.num_missed / each.num_boxes:.1f} %" if each.num_boxes else "–",
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
        is_text = index == 0 or column == "objects of"
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    return table


def _megapixels(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
