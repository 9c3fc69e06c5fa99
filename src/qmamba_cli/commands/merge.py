"""`qmamba merge`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.options import DEFAULT_WORKDIR, Force, Json, Quiet, Workdir
from qmamba_cli.views.calibration import show_calibration


def merge(
    shards: Annotated[list[Path], typer.Argument(help="Folders of `calibrate --shard`.", metavar="DIR…")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; WORKDIR/calibration if left out.")
    ] = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put the shards of a calibration together: shards -> calibration artifact."""
    from qmamba_cli.stages.merge import MergeOptions
    from qmamba_cli.stages.merge import merge as stage

    report = stage(
        MergeOptions(shards=tuple(shards), workdir=workdir, out=out, force=force),
        progress=console.progress(quiet=quiet or as_json),
    )
    show_calibration(report, as_json=as_json)
