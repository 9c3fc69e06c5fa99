"""The outcome of `selftest`."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.errors import (
    QmambaError,
)

if TYPE_CHECKING:
    from qmamba_cli.stages.selftest import Compiled, Outcome

_CAPTION = "times include the launch from Python; a device copy runs at {:.0f} GB/s"


def show_selftest(outcomes: "Iterable[Outcome]", copy_gb_s: float | None, *, as_json: bool) -> None:
    """The outcome of `selftest`; ``copy_gb_s`` is None where nothing was timed.

    Raises:
        QmambaError: a kernel strayed from its reference.
    """
    rows = list(outcomes)
    failed = [row for row in rows if not row.passed]
    if as_json:
        from qmamba_cli.evaluation.results import json_safe

        values = [asdict(row) | {"passed": row.passed} for row in rows]
        console.write_json({"copy_gb_s": copy_gb_s, "passed": not failed, "kernels": json_safe(values)})
    else:
        headings = ["worst error", "of budget"]
        if copy_gb_s is not None:
            headings += ["ms", "GB/s", "of copy"]
        columns = (
            Column("operator"),
            Column("case"),
            Column("class"),
            *(Column(name, True) for name in headings),
        )
        cells = [
            (
                row.operator,
                row.variant,
                row.exactness.value,
                f"{row.worst:.2g}",
                f"{row.budget_used:.1%}",
                *_times(row, copy_gb_s),
            )
            for row in rows
        ]
        caption = "" if copy_gb_s is None else _CAPTION.format(copy_gb_s)
        console.table("every kernel against its reference", columns, cells, caption=caption)
    if failed:
        raise QmambaError(
            f"{len(failed)} of {len(rows)} kernels stray from their reference, first "
            f"{failed[0].operator} ({failed[0].variant}): {failed[0].budget_used:.3g} times its budget",
            hint="use `--backend cpu`, and report this with the output of `qmamba selftest --json`",
        )


def _times(row: "Outcome", copy_gb_s: float | None) -> tuple[str, ...]:
    if row.ms is None or row.gb_s is None or copy_gb_s is None:
        return ()
    return f"{row.ms:.4f}", f"{row.gb_s:.0f}", f"{row.gb_s / copy_gb_s:.0%}"


def show_compiled(compiled: "Iterable[Compiled]", *, as_json: bool) -> None:
    """The outcome of `selftest --compile-only`."""
    rows = list(compiled)
    if as_json:
        console.write_json({"compiled": [asdict(row) for row in rows]})
        return
    columns = (
        Column("operator"),
        Column("arch"),
        Column("instances", True),
        Column("machine code", True),
        Column("seconds", True),
    )
    cells = [
        (row.operator, row.arch, str(row.entries), console.size(row.bytes), f"{row.seconds:.2f}")
        for row in rows
    ]
    console.table("kernels compiled without a GPU", columns, cells)
