"""Write the generated parts of docs/cli.md and docs/modes.md; ``--check`` only compares.

A generated part lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``; the rest of a page is prose,
kept as it is.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main

from qmamba_cli.cli import app
from qmamba_cli.modes import COLUMNS, DEFAULT_MODE, MODES

FOLDER = Path(__file__).resolve().parent
WIDTH = 100
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> dict[str, Any]:
    """Name → command, in the order of the program's help page."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def help_pages() -> dict[str, str]:
    """Command line → its ``--help``, the program's own first, 100 columns wide."""
    group = typer.main.get_command(app)
    settings: dict[str, Any] = {
        "terminal_width": WIDTH,
        "max_content_width": WIDTH,
        "resilient_parsing": True,
    }
    context = group.make_context("qmamba", [], **settings)
    pages = {"qmamba": group.get_help(context)}
    for name, command in commands().items():
        pages[f"qmamba {name}"] = command.get_help(command.make_context(name, [], parent=context, **settings))
    return pages


def cli_commands() -> str:
    """One section a command."""
    sections = (
        f"## {name}\n\n```text\n" + "\n".join(line.rstrip() for line in page.strip().splitlines()) + "\n```\n"
        for name, page in help_pages().items()
    )
    return "\n".join(sections)


def modes_table() -> str:
    """One row a mode, its columns in table order."""
    rows = [(f"`{row.name}`", *row.columns().values(), row.summary) for row in MODES.values()]
    return _table(("mode", *COLUMNS, "summary"), rows)


def modes_columns() -> str:
    """What each column says, and its values."""
    rows = [
        (f"`{name}`", " · ".join(f"`{value}`" for value in kind), (kind.__doc__ or "").splitlines()[0])
        for name, kind in COLUMNS.items()
    ]
    return _table(("column", "values", "meaning"), rows)


def modes_variables() -> str:
    """Which variables select which mode."""
    rows = [
        (" and ".join(f"`{name}`" for name in sorted(row.variables)), f"`{row.name}`")
        for row in MODES.values()
        if row.variables
    ]
    return _table(("variables that say `true`", "mode"), [*rows, ("none", f"`{DEFAULT_MODE}`")])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "cli.md": {"commands": cli_commands},
    "modes.md": {"table": modes_table, "columns": modes_columns, "variables": modes_variables},
}


def current(name: str) -> str:
    """A page as it must read.

    Raises:
        ValueError: its parts are not those that are generated.
    """
    page, parts = (FOLDER / name).read_text(encoding="utf-8"), PAGES[name]
    found = [match[2] for match in _PART.finditer(page)]
    if sorted(found) != sorted(parts):
        raise ValueError(f"{name} has the generated parts {found}, expected {sorted(parts)}")
    return _PART.sub(lambda match: f"{match[1]}{parts[match[2]]()}{match[3]}", page)


def main() -> int:
    """Write the pages; with ``--check``, report those that are not current."""
    check = "--check" in sys.argv[1:]
    stale = [name for name in PAGES if (FOLDER / name).read_text(encoding="utf-8") != current(name)]
    for name in stale:
        if check:
            sys.stderr.write(f"docs/{name} is not current: run `python docs/generate.py`\n")
        else:
            (FOLDER / name).write_text(current(name), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
