"""Draw charts for pages as SVG, in the colours of the page's scheme."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sniper.errors import printable
from sniper.reports.palette import BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION

COLORS = (SKY_BLUE, ORANGE, GREEN, VERMILION, PURPLE, BLUE)
"""Of the series of a chart, in order; light and dark grounds suit them."""

_MAX_POINTS = 240  # of a series; more are averaged
_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 34
_NUM_TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    Attributes:
        name: in the legend.
        x: of the points, rising.
        y: of the points.
        is_marked: draw each point, since there are few.
        color: index of `COLORS`; None for the position in the chart.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_marked: bool = False
    color: int | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of lines.

    Attributes:
        title: what it shows.
        x_label: of the horizontal axis.
        series: the lines; those without points are left out.
        note: how to read it, one sentence.
        from_zero: begin the vertical axis at 0.
        is_x_from_zero: begin the horizontal axis at 0.
        is_percent: values are fractions, written in percent.
        is_log: a logarithmic vertical axis; all values are above 0.
        max_points: of a line; of more, neighbours are averaged.
    """

    title: str
    x_label: str
    series: Sequence[Series]
    note: str = ""
    from_zero: bool = True
    is_x_from_zero: bool = False
    is_percent: bool = False
    is_log: bool = False
    max_points: int = _MAX_POINTS

    @property
    def drawn(self) -> list[Series]:
        """The series with points, averaged where they have many."""
        return [_thin(series, self.max_points) for series in self.series if len(series.x)]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """The names and colours of the lines; empty for a single one."""
        drawn = self.drawn
        if len(drawn) < 2:
            return []
        return [(each.name, self._color(index, each)) for index, each in enumerate(drawn)]

    def svg(self) -> str:
        """Return the chart as SVG, with its points as JSON for the script of the page."""
        drawn = self.drawn
        if not drawn:
            return ""
        x_axis = _Axis.of([x for each in drawn for x in each.x], is_log=False, from_zero=self.is_x_from_zero)
        y_axis = _Axis.of(
            [y for each in drawn for y in each.y],
            is_log=self.is_log,
            from_zero=self.from_zero and not self.is_log,
            is_nice=True,
        )

        def to_x(value: float) -> float:
            return _LEFT + x_axis.position(value) * (_WIDTH - _LEFT - _RIGHT)

        def to_y(value: float) -> float:
            return _HEIGHT - _BOTTOM - y_axis.position(value) * (_HEIGHT - _TOP - _BOTTOM)

        parts = [
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self._summary())}">'
        ]
        for tick in y_axis.ticks:
            y = to_y(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{self._format(tick)}</text>'
            )
        for tick in x_axis.ticks:
            parts.append(
                f'<text x="{to_x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>'
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
        points = []
        for index, each in enumerate(drawn):
            color = self._color(index, each)
            corners = [(to_x(x), to_y(y)) for x, y in zip(each.x, each.y, strict=True)]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
            if len(corners) > 1:
                parts.append(f'<path class="line" d="M{path}" stroke="{color}"/>')
            if each.is_marked or len(corners) == 1:
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in corners]
            points.append(
                {
                    "name": each.name,
                    "points": [
                        [round(px, 1), round(py, 1), _short(x), self._format(y)]
                        for (px, py), x, y in zip(corners, each.x, each.y, strict=True)
                    ],
                }
            )
        data = json.dumps({"label": self.x_label, "series": points})
        parts.append(
            f'<path class="cursor" d="M-9 {_TOP}V{_HEIGHT - _BOTTOM}"/><desc>{escape(data)}</desc></svg>'
        )
        return "".join(parts)

    def _color(self, index: int, series: Series) -> str:
        return COLORS[(index if series.color is None else series.color) % len(COLORS)]

    def _format(self, value: float) -> str:
        return f"{_short(100 * value)} %" if self.is_percent else _short(value)

    def _summary(self) -> str:
        """Return what a reader without the picture has to know."""
        ends = [f"{each.name} {self._format(each.y[-1])}" for each in self.drawn]
        return f"{self.title}: at {self.x_label} {_short(self.drawn[0].x[-1])} {', '.join(ends)}"


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """A range of values and its ticks."""

    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool

    @classmethod
    def of(cls, values: Sequence[float], *, is_log: bool, from_zero: bool, is_nice: bool = False) -> "_Axis":
        low, high = min(values), max(values)
        if is_log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high) - 1e-9) + 1)
            ticks = [10.0**power for power in powers]
            return cls(low=ticks[0], high=max(ticks[-1], 10 * ticks[0]), ticks=ticks, is_log=True)
        low = min(low, 0.0) if from_zero else low
        high = high if high > low else low + (abs(low) or 1.0) * 0.1
        step = _nice_step((high - low) / _NUM_TICKS)
        if is_nice:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        return cls(low=low, high=high, ticks=[(first + i) * step for i in range(count)], is_log=False)

    def position(self, value: float) -> float:
        """Return the place of a value along the axis, 0 to 1."""
        if self.is_log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def escape(text: str) -> str:
    """Return text that stands for itself in HTML, in quotes too."""
    return html.escape(printable(text))


def _nice_step(step: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _thin(series: Series, max_points: int) -> Series:
    """Average neighbouring points where there are more than can be seen."""
    if len(series.x) <= max_points:
        return series
    edges = np.linspace(0, len(series.x), max_points + 1).astype(int)
    counts = np.diff(edges)
    x, y = (
        np.add.reduceat(np.array(values, dtype=np.float64), edges[:-1]) / counts
        for values in (series.x, series.y)
    )
    return Series(name=series.name, x=x.tolist(), y=y.tolist(), color=series.color)


def _short(value: float) -> str:
    """Return a number with three digits, without exponent where it is not tiny."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
