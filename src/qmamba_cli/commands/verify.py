"""`qmamba verify`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli.options import (
    DEFAULT_WORKDIR,
    Json,
    Offline,
    Workdir,
)
from qmamba_cli.views.inspect import show_checks


def verify(
    path: Annotated[Path, typer.Argument(help="Quantized file, calibration folder or work folder.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration of a quantized file; the work folder's if left out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Source checkpoint; the one on record if left out.")
    ] = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    as_json: Json = False,
    offline: Offline = False,
) -> None:
    """Check every digest of an artifact and its lineage back to the source checkpoint."""
    from qmamba_cli.stages.inspect import verify as stage

    checks = stage(path, calibration=calibration, model=model, workdir=workdir, offline=offline)
    show_checks(path, checks, as_json=as_json)
