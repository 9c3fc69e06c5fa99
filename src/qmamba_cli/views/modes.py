"""The table of modes."""

from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.modes import COLUMNS, MODES

if TYPE_CHECKING:
    pass


def show_modes(*, as_json: bool) -> None:
    """The table of modes."""
    if as_json:
        rows = [
            {"name": row.name, "summary": row.summary, **row.columns(), "variables": sorted(row.variables)}
            for row in MODES.values()
        ]
        console.write_json({"modes": rows, "columns": {name: list(kind) for name, kind in COLUMNS.items()}})
        return
    columns = [Column("mode"), *(Column(name) for name in COLUMNS), Column("selected by")]
    cells = [
        (row.name, *row.columns().values(), " ".join(sorted(row.variables)) or "-") for row in MODES.values()
    ]
    console.table("numeric modes", columns, cells)
    console.facts("", {row.name: row.summary for row in MODES.values()})
