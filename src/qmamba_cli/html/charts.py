"""Charts with axes: bars with intervals, and lines.

Every function takes plain numbers and gives one ``<svg>`` element. What is not finite or cannot be placed on
a logarithmic axis is left out, never drawn at a wrong place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qmamba_cli.html import svg
from qmamba_cli.html.scale import Scale, number, powers_of_two, scale, tick_label

WIDTH = 720.0
# Series beyond these repeat the colours with another dash.
COLOURS = 8
DASHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        label: what it stands for.
        value: its length; None or infinite has no bar, only a text.
        interval: ends of its interval, or None.
        tone: which of the page's series colours, from 0.
        note: behind the value, or empty.
    """

    label: str
    value: float | None
    interval: tuple[float, float] | None = None
    tone: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line.

    Attributes:
        name: for the legend.
        points: (x, y) in the order of x.
        band: (low, high) of each point, or empty.
        tone: its colour and dash, or None for its place in the chart.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    tone: int | None = None


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    *,
    unit: str = "",
    form: Callable[[float | None], str] = number,
    description: str = "",
) -> str:
    """Horizontal bars from 0 with the ends of their intervals and their values.

    Args:
        title: what it shows.
        bars: from top to bottom.
        unit: of the values, below the axis.
        form: how a value is written.
        description: the finding in words, or empty.
    """
    left = min(max((len(bar.label) for bar in bars), default=0) * svg.CHARACTER, 0.42 * WIDTH) + 10
    texts = [" · ".join(filter(None, (form(bar.value), bar.note))) for bar in bars]
    right = WIDTH - max((len(text) for text in texts), default=0) * svg.CHARACTER - 12
    row = 24.0
    bottom = 6 + row * len(bars)
    values = [bar.value for bar in bars if bar.value is not None]
    ends = [end for bar in bars for end in (bar.interval or ())]
    axis = scale([*values, *ends], left, max(right, left + 60), from_zero=True)
    parts = []
    for tick in axis.ticks:
        parts.append(svg.line(axis(tick), 2, axis(tick), bottom, "grid"))
        parts.append(svg.text(axis(tick), bottom + 15, tick_label(tick), anchor="middle", kind="tick"))
    if unit:
        parts.append(svg.text((axis.start + axis.end) / 2, bottom + 33, unit, anchor="middle", kind="tick"))
    for index, (bar, text) in enumerate(zip(bars, texts, strict=True)):
        y = 6 + row * index
        parts.append(svg.text(left - 8, y + 16, svg.shortened(bar.label, left - 8), anchor="end"))
        parts += _bar(bar, axis, y, row, f"{bar.label}: {text}")
        reach = max([value for value in (bar.value, *(bar.interval or ())) if _drawable(value)] or [0.0])
        parts.append(svg.text(axis(reach) + 7, y + 16, text, kind="value"))
    parts.append(svg.line(axis(0.0), 2, axis(0.0), bottom, "axis"))
    return svg.figure(title, WIDTH, bottom + (40 if unit else 22), parts, description=description)


def _bar(bar: Bar, axis: Scale, y: float, row: float, tip: str) -> list[str]:
    parts = []
    if bar.value is not None and math.isfinite(bar.value):
        x1, x2 = sorted((axis(0.0), axis(bar.value)))
        kind = f"fill s{bar.tone % COLOURS}"
        parts.append(svg.rect(x1, y + 4, x2 - x1, row - 8, kind, tip=tip, radius=2))
    if bar.interval is not None and all(map(_drawable, bar.interval)):
        low, high = map(axis, bar.interval)
        middle = y + row / 2
        parts.append(svg.line(low, middle, high, middle, "whisker"))
        parts += [svg.line(x, middle - 4, x, middle + 4, "whisker") for x in (low, high)]
    return parts


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_powers_of_two: bool = False,
    y_log: bool = False,
    description: str = "",
) -> str:
    """Lines with points, a legend, and bands where the series have them.

    Args:
        title: what it shows.
        series: at most 8 can be told apart well.
        x_label: with its unit.
        y_label: with its unit.
        x_powers_of_two: a logarithmic x axis with ticks at powers of two.
        y_log: a logarithmic y axis; values that are not above 0 are left out.
        description: the finding in words, or empty.
    """
    legend, legend_height = _legend(series)
    top, bottom, left, right = legend_height + 26, legend_height + 300, 62.0, WIDTH - 16
    tones = _tones(series)
    drawn = [
        (tone, *_placeable(one, x_powers_of_two, y_log)) for tone, one in zip(tones, series, strict=True)
    ]
    xs = [x for _tone, points, _bands in drawn for x, _y in points]
    ys = [y for _tone, points, _bands in drawn for _x, y in points]
    ys += [end for _tone, _points, bands in drawn for _x, low, high in bands for end in (low, high)]
    x_axis = powers_of_two(xs, left, right) if x_powers_of_two and xs else scale(xs, left, right)
    y_axis = scale(ys, bottom, top, log=y_log, from_zero=not y_log)
    parts = [*legend, svg.text(2, legend_height + 14, y_label, kind="tick")]
    for tick in y_axis.ticks:
        parts.append(svg.line(left, y_axis(tick), right, y_axis(tick), "grid"))
        parts.append(svg.text(left - 8, y_axis(tick) + 4, tick_label(tick), anchor="end", kind="tick"))
    for tick in x_axis.ticks:
        parts.append(svg.line(x_axis(tick), bottom, x_axis(tick), bottom + 4, "axis"))
        parts.append(svg.text(x_axis(tick), bottom + 18, tick_label(tick), anchor="middle", kind="tick"))
    parts.append(svg.line(left, bottom, right, bottom, "axis"))
    parts.append(svg.text((left + right) / 2, bottom + 36, x_label, anchor="middle", kind="tick"))
    for (tone, points, bands), one in zip(drawn, series, strict=True):
        parts += _line(one.name, tone, points, bands, x_axis, y_axis)
    return svg.figure(title, WIDTH, bottom + 44, parts, description=description)


def _tones(series: Sequence[Series]) -> list[int]:
    return [index if one.tone is None else one.tone for index, one in enumerate(series)]


def _line(
    name: str,
    tone: int,
    points: Sequence[tuple[float, float]],
    bands: Sequence[tuple[float, float, float]],
    x_axis: Scale,
    y_axis: Scale,
) -> list[str]:
    kind = f"s{tone % COLOURS} dash{tone % DASHES}"
    parts = []
    if bands:
        edge = [(x_axis(x), y_axis(high)) for x, _low, high in bands]
        edge += [(x_axis(x), y_axis(low)) for x, low, _high in reversed(bands)]
        parts.append(svg.polygon(edge, f"band {kind}"))
    if points:
        parts.append(svg.polyline([(x_axis(x), y_axis(y)) for x, y in points], f"line {kind}"))
    for x, y in points:
        tip = f"{name}: {number(y)} at {number(x, 5)}"
        parts.append(svg.dot(x_axis(x), y_axis(y), f"fill {kind}", tip=tip))
    return parts


def _placeable(
    one: Series, x_log: bool, y_log: bool
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """Points and bands that the axes can hold."""
    points: list[tuple[float, float]] = []
    bands: list[tuple[float, float, float]] = []
    for index, (x, y) in enumerate(one.points):
        if not (_drawable(x) and _drawable(y)) or (x_log and x <= 0) or (y_log and y <= 0):
            continue
        points.append((x, y))
        if index < len(one.band):
            low, high = one.band[index]
            if _drawable(low) and _drawable(high) and (low > 0 or not y_log):
                bands.append((x, low, high))
    return points, bands


def _legend(series: Sequence[Series]) -> tuple[list[str], float]:
    """Samples and names in as many lines as they need, and the height of these."""
    parts, x, y = [], 2.0, 12.0
    for tone, one in zip(_tones(series), series, strict=True):
        width = 34 + len(one.name) * svg.CHARACTER + 16
        if x > 2 and x + width > WIDTH:
            x, y = 2.0, y + 20
        kind = f"s{tone % COLOURS} dash{tone % DASHES}"
        parts += [
            svg.line(x, y - 4, x + 26, y - 4, f"line {kind}"),
            svg.dot(x + 13, y - 4, f"fill {kind}"),
            svg.text(x + 33, y, one.name),
        ]
        x += width
    return parts, y + 10


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
