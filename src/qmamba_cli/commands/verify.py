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
from qmamba_cli.views.verify import show_checks


def verify(
    path: Annotated[
        Path, typer.Argument(help="Quantized file or model folder, calibration, results or work folder.")
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Quantized model of results; the one they name if left out.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration of a quantized model; the work folder's if left out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Source checkpoint; the one on record if left out.")
    ] = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    as_json: Json = False,
    offline: Offline = False,
) -> None:
    """Check every digest of an artifact and its lineage back to the source checkpoint."""
    from qmamba_cli.stages.verify import Others
    from qmamba_cli.stages.verify import verify as stage

    others = Others(
        checkpoint=checkpoint, calibration=calibration, model=model, workdir=workdir, offline=offline
    )
    show_checks(path, stage(path, others), as_json=as_json)
