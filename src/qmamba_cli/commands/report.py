"""`qmamba report`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.options import Force


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="Calibrations, quantized models, work folders; JSON of run, compare, sensitivity, drift "
            "and bench.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "--output", help="The HTML file.")] = Path("report.html"),
    force: Force = False,
) -> None:
    """Join artifacts and outcomes into one self-contained HTML page: summary, lineage, tables, charts."""
    from qmamba_cli.stages.report import report as stage
    from qmamba_cli.stages.reports import check_reports, save_reports

    check_reports((out,), force=force)
    made = stage(results)
    save_reports({out: made.page}, force=force)
    columns = (console.Column("file"), console.Column("what it is"))
    console.table("report", columns, made.sources)
    console.note(f"report of {len(made.sources)} files written to {out}")
