"""`qmamba selftest`."""

from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.errors import UsageError
from qmamba_cli.options import (
    Json,
    Quiet,
)
from qmamba_cli.views.selftest import show_compiled, show_selftest


def selftest(
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile every kernel; needs no GPU.")
    ] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="Architecture to compile for, as sm_90; may be repeated. All if left out."),
    ] = None,
    timing: Annotated[
        bool,
        typer.Option("--timing/--no-timing", help="Time every kernel, too; --no-timing runs each once."),
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every CUDA kernel against its reference on this machine's GPU."""
    from qmamba_cli.stages import selftest as stage

    progress = console.progress(quiet=quiet or as_json)
    if compile_only:
        show_compiled(stage.compile_kernels(arch, progress=progress), as_json=as_json)
        return
    if arch:
        raise UsageError("`--arch` belongs to `--compile-only`, got it alone")
    outcomes, copy_gb_s = stage.selftest(timing=timing, progress=progress)
    show_selftest(outcomes, copy_gb_s, as_json=as_json)
