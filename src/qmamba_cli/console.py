"""The only place that prints: data on stdout, progress, notes and errors on stderr."""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qmamba_cli.errors import QmambaError
from qmamba_cli.progress import Advance, Progress, silent


class ReaderGoneError(Exception):
    """The reader of stdout has gone, as in ``qmamba modes | head -1``, which is no failure.

    No `OSError`, since the parser of options turns a broken pipe into an exit code of its own.
    """


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its heading, and whether it is right-aligned."""

    heading: str
    number: bool = False


def write(text: str) -> None:
    """Data on stdout, as it is.

    Raises:
        QmambaError: stdout takes no more, as on a full disk.
        ReaderGoneError: the reader of stdout has gone.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer goes nowhere, or the interpreter would fail on it again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise ReaderGoneError from None
        raise QmambaError(
            f"cannot write to stdout, got `{error.strerror or error}`",
            hint="free some space or send the output elsewhere",
        ) from error


def write_json(value: Any) -> None:
    """One JSON object on stdout."""
    write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A table on stdout; plain text where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sheet = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        sheet.add_column(column.heading, justify="right" if column.number else "left", overflow="fold")
    for row in rows:
        sheet.add_row(*(Text(cell) for cell in row))
    # Off a terminal a table is as wide as it needs to be, so that no log wraps it.
    terminal = sys.stdout.isatty()
    page = io.StringIO()
    console = Console(file=page, force_terminal=terminal, width=None if terminal else 200)
    for text, style in ((title, "bold"), (sheet, ""), (caption, "dim")):
        if text:
            console.print(Text(text, style) if isinstance(text, str) else text, soft_wrap=True)
    write("".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines()))


def facts(title: str, rows: Mapping[str, str]) -> None:
    """Names and values on stdout."""
    width = max((len(name) for name in rows), default=0)
    lines = [title, *(f"  {name.ljust(width)}  {value}" for name, value in rows.items())]
    write("\n".join(lines) + "\n")


def note(text: str) -> None:
    """One line for people, on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def error(problem: QmambaError) -> None:
    """``error: …``, then ``hint: …``, on stderr."""
    message = f"error: {problem.message}\n"
    if problem.hint:
        message += f"\nhint: {problem.hint}\n"
    sys.stderr.write(message)
    sys.stderr.flush()


def progress(*, quiet: bool) -> Progress:
    """Progress bars with the time left on stderr; none where stderr is no terminal or ``quiet``."""
    return silent if quiet or not sys.stderr.isatty() else _bar


@contextmanager
def _bar(description: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(description, total=total)
        yield lambda units: bars.advance(task, units)


def size(count: int) -> str:
    """Bytes for people, in decimal units.

    >>> size(999), size(4_305_236)
    ('999 B', '4.31 MB')
    """
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count} B"
