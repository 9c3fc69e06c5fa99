"""Heat maps and histograms."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from qmamba_cli.html import svg
from qmamba_cli.html.charts import WIDTH
from qmamba_cli.html.scale import number, scale, tick_label

# Narrower cells hold no text.
_CELL_TEXT = 44.0
_FAINTEST = 0.04

# From this opacity on a cell's text is in the colour for dark fills: there the two contrasts meet, over the
# light and the dark page alike to within a tenth.
_DARK = 0.72


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    x_label: str,
    log: bool = False,
    reverse: bool = False,
    form: Callable[[float | None], str] = lambda value: number(value, 2),
    description: str = "",
) -> str:
    """A table of values in which the worst cells are the darkest.

    Args:
        title: what it shows.
        rows: labels from top to bottom.
        columns: labels from left to right; only some are written where they stand close.
        values: one row a label; None where there is none.
        x_label: what the columns are.
        log: shade by the logarithm; values that are not above 0 are the faintest.
        reverse: the smallest value is the darkest.
        form: how a value is written.
        description: the finding in words, or empty.
    """
    left = min(max((len(row) for row in rows), default=0) * svg.CHARACTER, 0.3 * WIDTH) + 10
    width = (WIDTH - left - 2) / max(len(columns), 1)
    height = 26.0
    shade = _shades([value for row in values for value in row], log=log, reverse=reverse)
    every = max(1, math.ceil((max((len(c) for c in columns), default=1) + 1) * svg.CHARACTER / width))
    parts = [
        svg.text(left + width * (index + 0.5), 30, column, anchor="middle", kind="tick")
        for index, column in enumerate(columns)
        if index % every == 0
    ]
    parts.append(svg.text((left + WIDTH) / 2, 12, x_label, anchor="middle", kind="tick"))
    for line, (label, cells) in enumerate(zip(rows, values, strict=True)):
        y = 38 + height * line
        parts.append(svg.text(left - 8, y + 17, svg.shortened(label, left - 8), anchor="end"))
        for index, value in enumerate(cells):
            x = left + width * index
            opacity = shade(value)
            tip = f"{label}, {columns[index]}: {form(value)}"
            kind = "cell" if opacity is not None else "cell missing"
            gap = 1.0 if width > 6 else 0.2
            parts.append(
                svg.rect(x + gap, y + 1, width - 2 * gap, height - 2, kind, tip=tip, opacity=opacity or 1.0)
            )
            if width >= _CELL_TEXT:
                on = "value on" if opacity is not None and opacity > _DARK else "value"
                parts.append(svg.text(x + width / 2, y + 17, form(value), anchor="middle", kind=on))
    bottom = 38 + height * len(rows)
    parts += _key(values, bottom, left, form, reverse=reverse)
    return svg.figure(title, WIDTH, bottom + 34, parts, description=description)


def _shades(
    values: Sequence[float | None], *, log: bool, reverse: bool
) -> Callable[[float | None], float | None]:
    def place(value: float | None) -> float | None:
        if value is None or math.isnan(value):
            return None
        if math.isinf(value):
            return math.inf if value > 0 else -math.inf
        return value if not log else math.log(value) if value > 0 else -math.inf

    finite = [p for p in map(place, values) if p is not None and math.isfinite(p)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)

    def shade(value: float | None) -> float | None:
        placed = place(value)
        if placed is None:
            return None
        share = 1.0 if high == low else min(max((placed - low) / (high - low), 0.0), 1.0)
        return _FAINTEST + (1 - _FAINTEST) * (1 - share if reverse else share)

    return shade


def _key(
    values: Sequence[Sequence[float | None]],
    y: float,
    left: float,
    form: Callable[[float | None], str],
    *,
    reverse: bool,
) -> list[str]:
    """Smallest and largest value with the shades between them."""
    finite = [value for row in values for value in row if value is not None and math.isfinite(value)]
    if not finite:
        return []
    ends = [form(min(finite)), form(max(finite))]
    if reverse:
        ends.reverse()
    x = left + len(ends[0]) * svg.CHARACTER + 8
    parts = [svg.text(left, y + 24, ends[0], kind="tick")]
    parts += [
        svg.rect(x + 12 * step, y + 12, 12, 14, "cell", opacity=_FAINTEST + (1 - _FAINTEST) * step / 9)
        for step in range(10)
    ]
    return [*parts, svg.text(x + 128, y + 24, ends[1], kind="tick")]


def histogram(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    clip: float | None = None,
    x_label: str = "magnitude",
    description: str = "",
) -> str:
    """Counts on a logarithmic axis, with a line at the value from which on the grid clips.

    Args:
        title: what it shows.
        edges: one more than there are counts, rising.
        counts: values of each bar.
        clip: the chosen absmax, or None; bars beyond it have another colour.
        x_label: with its unit.
        description: the finding in words, or empty.
    """
    left, right, top, bottom = 62.0, WIDTH - 16, 30.0, 210.0
    x_axis = scale([0.0, edges[-1]], left, right, from_zero=True)
    y_axis = scale([1.0, *(count for count in counts if count > 0)], bottom, top, log=True)
    parts = [svg.text(2, 14, "values", kind="tick")]
    for tick in y_axis.ticks:
        parts.append(svg.line(left, y_axis(tick), right, y_axis(tick), "grid"))
        parts.append(svg.text(left - 8, y_axis(tick) + 4, tick_label(tick), anchor="end", kind="tick"))
    for count, (low, high) in zip(counts, pairwise(edges), strict=True):
        if count < 1:
            continue
        beyond = clip is not None and (low + high) / 2 > clip
        x, y = x_axis(low), y_axis(float(count))
        # A single value would stand at the foot of a logarithmic axis and be invisible.
        height = max(bottom - y, 1.5)
        parts.append(
            svg.rect(
                x,
                bottom - height,
                x_axis(high) - x - 0.6,
                height,
                f"fill {'s1' if beyond else 's0'}",
                tip=f"{number(low)} to {number(high)}: {count}",
            )
        )
    for tick in x_axis.ticks:
        parts.append(svg.text(x_axis(tick), bottom + 18, tick_label(tick), anchor="middle", kind="tick"))
    parts.append(svg.line(left, bottom, right, bottom, "axis"))
    parts.append(svg.text((left + right) / 2, bottom + 36, x_label, anchor="middle", kind="tick"))
    if clip is not None and math.isfinite(clip):
        x = x_axis(clip)
        side = "end" if x > (left + right) / 2 else "start"
        parts.append(svg.line(x, top - 12, x, bottom, "clip"))
        shift = -6 if side == "end" else 6
        parts.append(svg.text(x + shift, top - 8, f"clip {number(clip)}", anchor=side, kind="value"))
    return svg.figure(title, WIDTH, bottom + 44, parts, description=description)
