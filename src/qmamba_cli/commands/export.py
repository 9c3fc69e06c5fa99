"""`qmamba export`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.options import (
    DEFAULT_WORKDIR,
    DryRun,
    Force,
    Json,
    Offline,
    Quiet,
    TokenizerFrom,
    Workdir,
)
from qmamba_cli.views.export import show_export


def export(
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    w_bits: Annotated[int, typer.Option(help="Bits of in_proj and out_proj: 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Input channels that share a W4 multiplier.")] = 128,
    embedding_bits: Annotated[int, typer.Option(help="Bits of the embedding and the head: 8 or 16.")] = 8,
    alpha: Annotated[
        float | None,
        typer.Option(help="Quantile, from the stored histograms; the calibration's if left out."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Regular expression of modules that keep the finer format; may be repeated."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration folder; the work folder's last one if left out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Float checkpoint; the one the calibration names if left out.")
    ] = None,
    tokenizer: TokenizerFrom = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Quantize: checkpoint + calibration -> one self-contained file."""
    from qmamba_cli.model.quantize import Recipe
    from qmamba_cli.stages.export import ExportOptions
    from qmamba_cli.stages.export import export as stage

    recipe = Recipe(
        w_bits=w_bits, group_size=group_size, embedding_bits=embedding_bits, ignore=tuple(ignore or ())
    )
    report = stage(
        ExportOptions(
            out=out,
            workdir=workdir,
            recipe=recipe,
            alpha=alpha,
            calibration=calibration,
            model=model,
            tokenizer=tokenizer,
            force=force,
            offline=offline,
        ),
        progress=console.progress(quiet=quiet or as_json),
        dry_run=dry_run,
    )
    show_export(report, dry_run=dry_run, as_json=as_json)
