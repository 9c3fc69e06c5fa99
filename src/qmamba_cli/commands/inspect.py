"""`qmamba inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli.options import (
    Json,
)
from qmamba_cli.views.inspect import show_inspection


def inspect(
    path: Annotated[Path, typer.Argument(help="Quantized file, model folder or calibration folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every stored tensor as well.")] = False,
    as_json: Json = False,
) -> None:
    """Show what an artifact holds and where it comes from."""
    from qmamba_cli.stages.inspect import inspect as stage

    show_inspection(stage(path), as_json=as_json, tensors=tensors)
