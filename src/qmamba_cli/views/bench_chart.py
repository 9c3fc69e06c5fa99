"""The chart of `bench`: one HTML file that needs nothing but itself, in light and in dark."""

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmamba_cli.stages.bench import BenchReport, BenchRow
    from qmamba_cli.stages.bench_measure import Measured, Spread

_LABEL, _BARS, _NUMBERS = 190, 460, 110
_ROW, _BAR = 26, 16
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2024; --faint: #667078; --line: #d9dee2;
  --float: #8a949e; --mode: #2a6fdb; --whisker: #1c2024; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e7eaed; --faint: #98a2ab;
  --line: #343b41; --float: #77828c; --mode: #6aa2ff; --whisker: #e7eaed; } }
body { background: var(--page); color: var(--ink); font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p, figcaption, dt { color: var(--faint); } figure { margin: 0; overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .faint { fill: var(--faint); }
svg .axis { stroke: var(--line); } svg .whisker { stroke: var(--whisker); }
svg .float { fill: var(--float); } svg .mode { fill: var(--mode); }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem .15rem 0; text-align: right;
  border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; }
"""
_QUANTITIES: Sequence[tuple[str, "Callable[[Measured], Spread]"]] = (
    ("Milliseconds a token", lambda measured: measured.token_ms),
    ("Milliseconds to the first token", lambda measured: measured.first_token_ms),
)


def chart_html(report: "BenchReport", command: str) -> str:
    """The report as a page: bars of the medians with whiskers at the quartiles, breakdowns, the machine.

    Args:
        report: what was measured.
        command: the command line that made it.
    """
    groups: dict[tuple[int, int], list[BenchRow]] = {}
    for row in report.rows:
        groups.setdefault((row.batch_size, row.prompt_length), []).append(row)
    parts = [f"<h1>{escape(report.model)}</h1>", "<p>Shorter bars are better.</p>"]
    for (batch, length), rows in groups.items():
        parts += [_figure(name, batch, length, rows, value) for name, value in _QUANTITIES]
    parts += [_breakdown(row) for row in report.rows]
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    facts = {**report.machine, "command": command}
    parts.append(
        "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"
    )
    title = escape(f"qmamba bench: {report.model}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _figure(
    name: str, batch: int, length: int, rows: "Sequence[BenchRow]", value: "Callable[[Measured], Spread]"
) -> str:
    values = [value(row.measured) for row in rows if row.measured is not None]
    most = max((spread.high for spread in values), default=0.0) or 1.0
    heading = f"{name}, batch {batch}, prompts of {length} tokens"
    lines = [
        f'<line class="axis" x1="{_LABEL}" y1="0" x2="{_LABEL}" y2="{_ROW * len(rows)}"/>',
        *(_bar(index, row, value, most) for index, row in enumerate(rows)),
    ]
    width, height = _LABEL + _BARS + _NUMBERS, _ROW * len(rows)
    return (
        f"<h2>{escape(heading)}</h2>\n<figure>"
        f'<svg role="img" aria-label="{escape(heading)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">\n' + "\n".join(lines) + "\n</svg></figure>"
    )


def _bar(index: int, row: "BenchRow", value: "Callable[[Measured], Spread]", most: float) -> str:
    top = _ROW * index + (_ROW - _BAR) / 2
    middle = top + _BAR / 2
    label = escape(f"{row.mode}, {row.weights}")
    text = f'<text x="{_LABEL - 8}" y="{middle + 4:.1f}" text-anchor="end">{label}</text>'
    if row.measured is None:
        reason = escape(row.error or "did not run")
        return text + f'<text class="faint" x="{_LABEL + 8}" y="{middle + 4:.1f}">{reason}</text>'
    spread = value(row.measured)
    low, median, high = (_LABEL + _BARS * x / most for x in (spread.low, spread.median, spread.high))
    kind = "mode" if row.weights.startswith("W") else "float"
    return (
        text
        + f'<rect class="{kind}" x="{_LABEL}" y="{top:.1f}" width="{median - _LABEL:.1f}" height="{_BAR}">'
        + f"<title>{label}: {spread.median:.4g} ms ({spread.low:.4g} to {spread.high:.4g})</title></rect>"
        + f'<line class="whisker" x1="{low:.1f}" y1="{middle:.1f}" x2="{high:.1f}" y2="{middle:.1f}"/>'
        + f'<text x="{high + 8:.1f}" y="{middle + 4:.1f}">{spread.median:.4g} ms</text>'
    )


def _breakdown(row: "BenchRow") -> str:
    measured = row.measured
    if measured is None or not measured.prompt_breakdown:
        return ""
    heading = (
        f"Mode {row.mode}, {row.weights}, batch {row.batch_size}, prompts of {row.prompt_length}, by stage"
    )
    stages = dict.fromkeys((*measured.prompt_breakdown, *measured.decode_breakdown))
    lines = "".join(
        f"<tr><td>{escape(stage)}</td><td>{measured.prompt_breakdown.get(stage, 0.0):.4g}</td>"
        f"<td>{measured.decode_breakdown.get(stage, 0.0):.4g}</td></tr>"
        for stage in stages
    )
    head = "<tr><th>stage</th><th>prompt, ms</th><th>step, ms</th></tr>"
    return f"<h2>{escape(heading)}</h2>\n<table>{head}{lines}</table>"
