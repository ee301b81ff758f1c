"""Charts: well-formed, to scale, and with round ticks."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from qlora_native.cli.charts import Bar, Series, bar_chart, line_chart, smooth, ticks


def parse(figure):
    """A figure is also XML, but for an attribute without quotes."""
    return ElementTree.fromstring(figure.replace("class=legend", 'class="legend"'))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 360), (1.03, 5.61), (-2, 3), (0.0921, 0.0973), (5, 5)]
)
def test_ticks_are_round_and_enclose_the_range(low, high):
    values = ticks(low, high)
    assert values[0] <= low
    assert values[-1] >= high
    assert 2 <= len(values) <= 9
    steps = [round(b - a, 9) for a, b in pairwise(values)]
    assert len(set(steps)) == 1
    assert f"{steps[0]:e}"[0] in "125"


def test_smooth_is_a_trailing_mean():
    assert smooth([4.0, 2.0, 0.0, 2.0], 2) == [4.0, 3.0, 1.0, 1.0]


def test_bars_are_to_scale():
    bars = [Bar("a", [(1.0, "s1"), (3.0, "s2")], "4"), Bar("b & c", [(2.0, "s1")], "2")]
    figure = parse(bar_chart("Title", bars, [("first", "s1")]))
    widths = [float(rect.get("width")) for rect in figure.iter("rect")]
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-2)
    assert widths[2] == pytest.approx(2 * widths[0], rel=1e-2)
    assert "b & c" in [text.text for text in figure.iter("text")]


def test_lines_are_to_scale():
    series = Series("loss", [(0, 3.0), (10, 2.0), (20, 1.0)], "s1", markers=True)
    figure = parse(line_chart("Title", "step", "nats", [series]))
    (line,) = figure.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.2)
    assert points[0][1] < points[2][1]  # down the page is a lower loss
    assert len(list(figure.iter("circle"))) == 3
    assert re.search("nats", "".join(figure.itertext()))
