"""Inline SVG charts for the report: no script, no external asset, colours from the page's CSS."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 680, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 10, 44  # margins that hold the axes' labels
BAR_HEIGHT, BAR_GAP = 20, 8
BAR_LABEL, BAR_TEXT = 190, 90  # widths of what stands before and after a bar


class Series(NamedTuple):
    """A line of a chart; `style` is a CSS class of the page."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str
    markers: bool = False


class Bar(NamedTuple):
    """A bar made of one or more parts, each (value, CSS class), with what is written beside it."""

    label: str
    parts: Sequence[tuple[float, str]]
    text: str


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Lines over a common x axis that starts at zero; the y axis spans the data."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x_ticks, y_ticks = ticks(0.0, max(xs)), ticks(min(ys), max(ys))

    def across(x: float) -> float:
        return LEFT + x / x_ticks[-1] * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        share = (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0])
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        y = down(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        parts.append(_text(across(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    for line in series:
        points = [(across(x), down(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.markers:
            parts += [
                f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points
            ]
    legend = [(f"{line.label} ({y_label})", line.style) for line in series]
    return _figure(title, HEIGHT, parts, legend)


def bar_chart(title: str, bars: Sequence[Bar], legend: Sequence[tuple[str, str]] = ()) -> str:
    """Horizontal bars from a common zero; `legend` names the CSS classes of their parts."""
    longest = max(sum(value for value, _ in bar.parts) for bar in bars)
    scale = (WIDTH - BAR_LABEL - BAR_TEXT) / longest
    parts = []
    for row, bar in enumerate(bars):
        x, y = float(BAR_LABEL), row * (BAR_HEIGHT + BAR_GAP)
        baseline = y + BAR_HEIGHT / 2 + 4
        parts.append(_text(x - 8, baseline, bar.label, "end"))
        for value, style in bar.parts:
            width = value * scale
            parts.append(
                f'<rect class="{style}" x="{x:.1f}" y="{y}" '
                f'width="{width:.1f}" height="{BAR_HEIGHT}"/>'
            )
            x += width
        parts.append(_text(x + 8, baseline, bar.text, "start"))
    return _figure(title, len(bars) * (BAR_HEIGHT + BAR_GAP), parts, legend)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count`, that enclose [low, high]."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window` - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(
    title: str, height: float, parts: Sequence[str], legend: Sequence[tuple[str, str]]
) -> str:
    keys = "".join(
        f'<span><i class="{style}"></i>{escape(label)}</span>' for label, style in legend
    )
    caption = f"<figcaption>{escape(title)}<div class=legend>{keys}</div></figcaption>"
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
