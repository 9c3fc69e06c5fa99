"""Options of the commands whose results can be gated."""

from pathlib import Path
from typing import Annotated

import typer

Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="EXPR",
        help="Condition on a metric, as kl<0.02 or acc>=baseline-0.01; exit code 1 if not met. May repeat.",
    ),
]
BaselineResults = Annotated[
    Path | None,
    typer.Option(
        "--baseline-results", metavar="FILE", help="Earlier results that `baseline` in a gate stands for."
    ),
]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Report the gates as JUnit XML.")]


def split_baseline(baseline: str | None, results: Path | None) -> tuple[str | None, Path | None]:
    """`--baseline` as a float model or, where it names a .json file, as earlier results."""
    if baseline is not None and results is None and baseline.endswith(".json"):
        return None, Path(baseline)
    return baseline, results
