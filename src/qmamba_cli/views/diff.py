"""The outcome of `diff`."""

import json
import math
from typing import TYPE_CHECKING, Any

from qmamba_cli import console
from qmamba_cli.console import Column

if TYPE_CHECKING:
    from qmamba_cli.stages.diff import Difference

# Rows of a table that people are shown; --json has all of them.
_ROWS = 40


def show_difference(found: "Difference", *, as_json: bool) -> None:
    """The outcome of `diff`: in words, then what differs in tables."""
    if as_json:
        console.write_json(_finite(found.to_dict()))
        return
    lines = [f"{found.kind}: a {found.a}, b {found.b}", *(f"  {sentence}" for sentence in found.words)]
    console.write("\n".join(lines) + "\n")
    _table(
        "options",
        (Column("option"), Column("a"), Column("b")),
        [(row.name, _value(row.a), _value(row.b)) for row in found.options],
    )
    _table(
        "scales, by how much they changed",
        (Column("site"), Column("absmax a", True), Column("absmax b", True), Column("b / a", True)),
        [(row.site, _number(row.a), _number(row.b), _number(row.ratio)) for row in found.scales],
    )
    _table(
        "tensors",
        (Column("tensor"), Column("differs in"), Column("a"), Column("b")),
        [(row.name, row.change, row.a, row.b) for row in found.tensors],
    )
    _table(
        "metrics",
        (
            Column("task"),
            Column("metric"),
            Column("a", True),
            Column("b", True),
            Column("b - a", True),
            Column("standard error", True),
        ),
        [
            (row.task, row.metric, *map(_number, (row.a, row.b, row.difference, row.stderr)))
            for row in found.metrics
        ],
    )


def _table(title: str, columns: tuple[Column, ...], rows: list[tuple[str, ...]]) -> None:
    if rows:
        rest = len(rows) - _ROWS
        console.table(title, columns, rows[:_ROWS], f"and {rest} more, see --json" if rest > 0 else "")


def _value(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _finite(value: Any) -> Any:
    """A copy in which numbers that JSON cannot hold are strings, as in results."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
