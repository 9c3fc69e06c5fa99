"""`qmamba demo`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.options import (
    BackendName,
    Json,
    Quiet,
)
from qmamba_cli.views.demo import show_demo


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's artifacts go.")] = Path("demo-out"),
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    limit: Annotated[int | None, typer.Option(help="Last-word documents; all if left out.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens for perplexity and KL.")] = 16,
    w_bits: Annotated[int, typer.Option(help="Bits of in_proj and out_proj: 4 or 8.")] = 4,
    backend: BackendName = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on the bundled model: calibrate, export, every mode, one table."""
    from qmamba_cli.stages.demo import DemoOptions

    options = DemoOptions(
        folder=folder, samples=samples, limit=limit, windows=windows, w_bits=w_bits, backend=backend
    )
    show_demo(options, progress=console.progress(quiet=quiet or as_json), as_json=as_json)
