"""The commands beside the stages; `COMMANDS` lists them in the order of the help page."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.errors import UsageError
from qmamba_cli.options import DEFAULT_WORKDIR, BackendName, Json, Offline, Quiet, Workdir
from qmamba_cli.report import (
    show_checks,
    show_compiled,
    show_demo,
    show_inspection,
    show_modes,
    show_selftest,
)


def modes(as_json: Json = False) -> None:
    """Show the table of numeric modes."""
    show_modes(as_json=as_json)


def inspect(
    path: Annotated[Path, typer.Argument(help="Quantized file or calibration folder.")],
    as_json: Json = False,
) -> None:
    """Show what an artifact holds and where it comes from."""
    from qmamba_cli.stages.inspect import inspect as stage

    show_inspection(stage(path), as_json=as_json)


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


def selftest(
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile every kernel; needs no GPU.")
    ] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="Architecture to compile for, as sm_90; may be repeated. All if left out."),
    ] = None,
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
    outcomes, copy_gb_s = stage.selftest(progress=progress)
    show_selftest(outcomes, copy_gb_s, as_json=as_json)


COMMANDS = (modes, inspect, verify, demo, selftest)
