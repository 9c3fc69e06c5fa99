"""Drawings: well formed, finite, escaped, and true to their numbers."""

import math

import pytest
from html_checks import checked_drawings, parsed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qmamba_cli.html import svg
from qmamba_cli.html.charts import Bar, Series, bar_chart, line_chart
from qmamba_cli.html.grids import heat_map, histogram
from qmamba_cli.html.scale import number, powers_of_two, scale

# Values as a broken model gives them, too.
VALUES = st.floats(allow_nan=True, allow_infinity=True, width=32)
BAD = '<script>alert("&")</script>'


def only(text):
    (drawing,) = checked_drawings(text)
    return drawing


def at(element, *names):
    return [float(element.attributes[name]) for name in names]


def test_bars_are_as_long_as_their_values():
    bars = [
        Bar(label="a", value=4.0, interval=(3.0, 5.0)),
        Bar(label="b", value=1.0),
        Bar(label="c", value=0.0),
    ]
    drawing = only(bar_chart("costs", bars, unit="nats"))
    long, short, none = [at(rect, "width")[0] for rect in drawing.find("rect")]
    assert long == pytest.approx(4 * short, rel=1e-3)
    assert none == 0
    low, high = sorted(at(line, "x1")[0] for line in drawing.find("line", "whisker")[1:])
    assert (low - at(drawing.find("rect")[0], "x")[0]) / short == pytest.approx(3, rel=1e-2)
    assert (high - low) / short == pytest.approx(2, rel=1e-2)


def test_a_bar_without_a_length_is_a_text_only():
    drawing = only(bar_chart("costs", [Bar(label="broken", value=math.inf), Bar(label="none", value=None)]))
    assert drawing.find("rect") == []
    assert {"inf", "n/a"} <= {text.text for text in drawing.find("text")}


def test_text_from_outside_is_escaped():
    drawings = (
        bar_chart(BAD, [Bar(label=BAD, value=1.0, note=BAD)], unit=BAD, description=BAD),
        line_chart(BAD, [Series(name=BAD, points=[(1, 1)])], x_label=BAD, y_label=BAD),
        heat_map(BAD, [BAD], [BAD], [[1.0]], x_label=BAD),
        histogram(BAD, [0.0, 1.0], [3], x_label=BAD),
    )
    for drawing in drawings:
        only(drawing)
        assert "<script" not in drawing
        assert parsed(drawing).find("svg")[0].attributes["aria-label"] == BAD


@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, max_size=12), log=st.booleans())
def test_any_values_give_a_legal_drawing(values, log):
    points = [(1 << index, value) for index, value in enumerate(values)]
    band = [(value, value) for value in values]
    only(bar_chart("bars", [Bar(label="x", value=value, interval=(value, value)) for value in values]))
    only(
        line_chart(
            "lines",
            [Series(name="one", points=points, band=band)],
            x_label="t",
            y_label="y",
            x_powers_of_two=bool(points),
            y_log=log,
        )
    )
    only(heat_map("map", ["row"], ["c"] * len(values), [values], x_label="x", log=log))


def test_a_line_leaves_out_what_has_no_place():
    points = [(1, 0.1), (2, math.nan), (4, 0.0), (8, math.inf), (16, 10.0)]
    drawing = only(
        line_chart(
            "kl",
            [Series(name="mode 0", points=points)],
            x_label="t",
            y_label="kl",
            x_powers_of_two=True,
            y_log=True,
        )
    )
    (line,) = drawing.find("polyline")
    first, last = [tuple(map(float, pair.split(","))) for pair in line.attributes["points"].split()]
    assert first[0] < last[0]
    assert first[1] > last[1], "a larger value stands higher"


def test_the_darkest_cell_is_the_worst():
    def shades(**options):
        drawing = only(
            heat_map("map", ["a"], ["1", "2", "3"], [[1.0, 100.0, None]], x_label="layer", **options)
        )
        cells = drawing.find("rect", "cell")[:3]
        assert "missing" in cells[2].attributes["class"]
        return [at(cell, "fill-opacity")[0] for cell in cells[:2]]

    for options in ({}, {"log": True}):
        faint, dark = shades(**options)
        assert faint < 0.1 and dark == 1
    dark, faint = shades(reverse=True)
    assert faint < 0.1 and dark == 1


def test_a_histogram_marks_what_is_clipped():
    edges, counts = [0.0, 1.0, 2.0, 3.0, 4.0], [1000, 100, 0, 1]
    drawing = only(histogram("magnitudes", edges, counts, clip=2.0))
    bars = drawing.find("rect")
    assert [("s1" in bar.attributes["class"]) for bar in bars] == [False, False, True]
    (clip,) = drawing.find("line", "clip")
    assert at(bars[1], "x")[0] < at(clip, "x1")[0] < at(bars[2], "x")[0]
    heights = [at(bar, "height")[0] for bar in bars]
    assert heights[0] > heights[1] > heights[2] > 0, "a single value is still seen"
    # On a logarithmic axis equal ratios are equal distances.
    assert heights[0] - heights[1] == pytest.approx(heights[1] / 2, rel=0.02)
    assert only(histogram("magnitudes", edges, counts)).find("line", "clip") == []


@given(
    values=st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=8),
    log=st.booleans(),
    from_zero=st.booleans(),
)
# Their logarithms are rounded to whole numbers.
@example(values=[999999999999.998], log=True, from_zero=False)
@example(values=[math.nextafter(1000.0, 2000.0)], log=True, from_zero=False)
def test_an_axis_holds_its_values_and_rises(values, log, from_zero):
    axis = scale(values, 10.0, 110.0, log=log, from_zero=from_zero)
    assert axis.low <= min(values) * (1 + 1e-9) and max(values) <= axis.high * (1 + 1e-9)
    assert 2 <= len(axis.ticks) <= 13
    assert list(axis.ticks) == sorted(set(axis.ticks))
    places = [axis(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(10.0 - 1e-9 <= place <= 110.0 + 1e-9 for place in places)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 2), (1, 8192), (3, 1000)])
def test_powers_of_two_stay_few(low, high):
    axis = powers_of_two([low, high], 0.0, 100.0)
    assert 1 <= len(axis.ticks) <= 8
    assert axis.low <= axis.ticks[0] and axis.ticks[-1] <= axis.high


@given(st.floats(-1e300, 1e300))
def test_a_number_keeps_three_digits(value):
    # A subnormal number has fewer digits itself.
    assert float(number(value)) == pytest.approx(value, rel=6e-3, abs=1e-300)


def test_a_coordinate_is_never_infinite():
    with pytest.raises(ValueError, match="finite, got nan"):
        svg.coordinate(math.nan)
