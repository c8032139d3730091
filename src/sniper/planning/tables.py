"""A plan as tables for the terminal: the levels, the pixels, and what would suit the data set."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from sniper.planning.cost import USEFUL_SIZES, CostPlan
from sniper.planning.page import PlanPage, resize_rule


def draw_levels(budget: CostPlan) -> Table:
    """Give a row for each level: what it takes, and what it costs."""
    columns = ("#", "resize", "sizes", "boxes", "share", "moved", "covered", "cut", "chips", "per img")
    table = _table("Levels", columns)
    for index, (spec, level) in enumerate(zip(budget.pyramid.levels, budget.levels, strict=True), start=1):
        share = 100 * level.num_valid / max(budget.num_wanted, 1)
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
            f"{level.num_chips / max(budget.num_images_with_boxes, 1):.3f}",
        )
    return table


def draw_costs(budget: CostPlan) -> Table:
    """Give a row for each way to feed the images, and its pixels."""
    table = _table("Pixels", ("way", "MP per image", "of a single pass"))
    costs = budget.megapixels
    ways = {
        "chips of this pyramid": costs.chips,
        "one pass at 800×1333": costs.single,
        f"tiles of {budget.pyramid.chip_size} px at ×1": costs.grid,
        "the whole image at every level": costs.pyramid,
    }
    for way, megapixels in ways.items():
        ratio = megapixels / costs.single if costs.single else 0.0
        table.add_row(way, _megapixels(megapixels), f"{ratio:.2f}")
    return table


def draw_offers(page: PlanPage) -> Table:
    """Give a row for the pyramid planned with and for each that would suit, the suggested one first."""
    table = _table(
        f"What would suit (useful: {USEFUL_SIZES[0]:g}–{USEFUL_SIZES[1]:g} px in a chip; MP: per image)",
        ("wanted", "levels: sizes", "chip", "useful", "chips/img", "train MP", "test MP"),
    )
    rows = [("as planned", page.budget, page.test_megapixels)]
    rows += [
        (f"{100 * offer.goal:g} %", offer.budget, offer.budget.megapixels.pyramid)
        for offer in page.suggest_pyramids
    ]
    for name, budget, test_megapixels in rows:
        specs = budget.pyramid.levels
        table.add_row(
            name,
            "\n".join(f"{resize_rule(spec)}: {_sizes(spec.at_least, spec.below)}" for spec in specs),
            str(budget.pyramid.chip_size),
            f"{100 * budget.share_useful:.1f} %" if budget.num_wanted else "–",
            f"{budget.mean_chips_per_image:.2f}",
            _megapixels(budget.megapixels.chips),
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
