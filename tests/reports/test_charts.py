"""Charts as SVG: axes with round numbers, few points, and nothing of a name that could be markup."""

import html
import json
import re

import pytest

from sniper.reports.charts import Chart, Series


def chart_of(*ys: list[float], **fields: object) -> Chart:
    series = [
        Series(name=f"line {index}", x=[float(x) for x in range(len(y))], y=y) for index, y in enumerate(ys)
    ]
    return Chart(title="title", x_label="epoch", series=series, **fields)  # type: ignore[arg-type]


def texts_of(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize(
    ("values", "fields", "ticks"),
    [
        ([0.1, 0.42], {}, ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]),
        ([0.1, 0.42], {"is_percent": True}, ["0 %", "10 %", "20 %", "30 %", "40 %", "50 %"]),
        ([0.02, 30.0], {"is_log": True}, ["0.01", "0.1", "1", "10", "100"]),
        ([3.0, 3.0], {"from_zero": False}, ["3", "3.1", "3.2", "3.3"]),
        ([0.0, 0.0], {}, ["0", "0.02", "0.04", "0.06", "0.08", "0.1"]),
    ],
)
def test_the_vertical_axis_has_round_numbers(
    values: list[float], fields: dict[str, bool], ticks: list[str]
) -> None:
    texts = texts_of(chart_of(values, **fields).svg())
    assert texts[: len(ticks)] == ticks


def test_many_points_are_averaged_and_few_are_kept() -> None:
    (long,) = chart_of([float(value) for value in range(1000)]).drawn
    assert len(long.x) == 240
    assert sum(long.y) / 240 == pytest.approx(499.5, abs=1.0)
    (short,) = chart_of([1.0, 2.0]).drawn
    assert short.y == [1.0, 2.0]


def test_a_line_without_points_is_left_out() -> None:
    chart = chart_of([], [1.0, 2.0])
    assert [each.name for each in chart.drawn] == ["line 1"]
    assert chart.legend == []
    assert chart_of([]).svg() == ""


def test_a_single_point_is_drawn() -> None:
    assert "<circle" in chart_of([1.0]).svg()


def test_names_are_escaped() -> None:
    chart = Chart(
        title="<b>", x_label="<i>", series=[Series(name="</desc><script>", x=[0.0, 1.0], y=[1.0, 2.0])]
    )
    svg = chart.svg()
    assert "<script>" not in svg
    assert "<b>" not in svg
    assert "<i>" not in svg


def test_the_points_are_there_for_the_script() -> None:
    svg = chart_of([1.0, 2.0], [3.0, 4.0]).svg()
    description = re.search(r"<desc>(.*)</desc>", svg)
    assert description is not None
    data = json.loads(html.unescape(description[1]))
    assert [series["name"] for series in data["series"]] == ["line 0", "line 1"]
    assert [point[3] for point in data["series"][1]["points"]] == ["3", "4"]
