"""SVG elements as text: escaped, with finite numbers and a title that screen readers and pointers find.

Colours are CSS variables of the page, so that one drawing serves light, dark and paper.
"""

import math
from collections.abc import Iterable
from html import escape

# Width of an average character of the charts' 13-unit labels, in user units; a little more than measured.
CHARACTER = 7.9
LINE = 16.0


def figure(title: str, width: float, height: float, parts: Iterable[str], *, description: str = "") -> str:
    """One drawing of ``width`` by ``height`` user units, which scales with its box.

    Args:
        title: what it shows; also its label for assistive software.
        width: user units.
        height: user units.
        parts: elements.
        description: the finding in words, or empty.
    """
    text = f"<title>{escape(title)}</title>"
    if description:
        text += f"<desc>{escape(description)}</desc>"
    return (
        f'<svg class="chart" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {coordinate(width)} {coordinate(height)}">{text}{"".join(parts)}</svg>'
    )


def coordinate(value: float) -> str:
    """A coordinate with at most two decimals.

    >>> coordinate(3.0), coordinate(1 / 3)
    ('3', '0.33')

    Raises:
        ValueError: the value is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"a coordinate must be finite, got {value}")
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def text(
    x: float, y: float, content: str, *, anchor: str = "start", kind: str = "label", turn: float = 0.0
) -> str:
    """A line of text; ``y`` is its baseline, ``anchor`` is start, middle or end, ``turn`` in degrees."""
    turned = f' transform="rotate({coordinate(turn)} {coordinate(x)} {coordinate(y)})"' if turn else ""
    return (
        f'<text class="{escape(kind)}" x="{coordinate(x)}" y="{coordinate(y)}" '
        f'text-anchor="{escape(anchor)}"{turned}>{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return (
        f'<line class="{escape(kind)}" x1="{coordinate(x1)}" y1="{coordinate(y1)}" '
        f'x2="{coordinate(x2)}" y2="{coordinate(y2)}"/>'
    )


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    kind: str,
    *,
    tip: str = "",
    opacity: float | None = None,
    radius: float = 0.0,
) -> str:
    """A rectangle; ``tip`` is shown under the pointer."""
    extra = "" if opacity is None else f' fill-opacity="{coordinate(opacity)}"'
    extra += f' rx="{coordinate(radius)}"' if radius else ""
    body = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect class="{escape(kind)}" x="{coordinate(x)}" y="{coordinate(y)}" '
        f'width="{coordinate(max(width, 0.0))}" height="{coordinate(max(height, 0.0))}"{extra}>{body}</rect>'
    )


def polyline(points: Iterable[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    path = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)
    return f'<polyline class="{escape(kind)}" points="{path}"/>'


def dot(x: float, y: float, kind: str, *, radius: float = 3.2, tip: str = "") -> str:
    """A point; ``tip`` is shown under the pointer."""
    body = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<circle class="{escape(kind)}" cx="{coordinate(x)}" cy="{coordinate(y)}" '
        f'r="{coordinate(radius)}">{body}</circle>'
    )


def polygon(points: Iterable[tuple[float, float]], kind: str) -> str:
    """A filled shape through points."""
    path = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)
    return f'<polygon class="{escape(kind)}" points="{path}"/>'


def shortened(label: str, room: float) -> str:
    """A label cut to ``room`` user units.

    >>> shortened("layers.3.x_proj:input", 80.0)
    'layers.3.…'
    """
    characters = max(1, int(room / CHARACTER))
    return label if len(label) <= characters else label[: characters - 1] + "…"
