"""`qmamba diff`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli.options import Json
from qmamba_cli.views.diff import show_difference


def diff(
    a: Annotated[Path, typer.Argument(help="Calibration, quantized model, results file or work folder.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same kind.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="End with 1 if they differ.")] = False,
    as_json: Json = False,
) -> None:
    """Say what differs between two calibrations, two exports or two results."""
    from qmamba_cli.stages.diff import diff as stage

    found = stage(a, b)
    show_difference(found, as_json=as_json)
    if exit_code and not found.same:
        raise typer.Exit(1)
