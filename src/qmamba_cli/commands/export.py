"""`qmamba export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.errors import UsageError
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


class Form(StrEnum):
    """What `export` writes."""

    FILE = "file"
    FOLDER = "folder"


def export(
    out: Annotated[Path, typer.Option("--out", help="File (or folder) to write.")],
    form: Annotated[
        Form, typer.Option("--format", help="One file, or a model folder for the Hub.")
    ] = Form.FILE,
    w_bits: Annotated[int, typer.Option(help="Bits of in_proj and out_proj: 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Input channels that share a W4 multiplier.")] = 128,
    embedding_bits: Annotated[int, typer.Option(help="Bits of the embedding and the head: 8 or 16.")] = 8,
    recipe_name: Annotated[
        str,
        typer.Option("--recipe", help="plain, or best: rounded for the least error of the outputs."),
    ] = "plain",
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
    max_shard_size: Annotated[
        str, typer.Option(help="Data of one file of a model folder, as in 500MB.")
    ] = "5GB",
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results of this model for the folder's card; may be repeated."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the float model, for the folder's card.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the folder to this Hub repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    device: Annotated[
        str, typer.Option(help="Where `--recipe best` runs the text: auto, cpu or cuda.")
    ] = "auto",
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Quantize: checkpoint + calibration -> one self-contained file."""
    sharded = form is Form.FOLDER
    if not sharded and (results or base_model is not None or push_to_hub is not None):
        raise UsageError(
            "`--results`, `--base-model` and `--push-to-hub` belong to `--format folder`, got `--format file`"
        )
    if private and push_to_hub is None:
        raise UsageError("`--private` belongs to `--push-to-hub`")

    from qmamba_cli.model.quantize import Recipe
    from qmamba_cli.stages.export import ExportOptions
    from qmamba_cli.stages.export import export as stage
    from qmamba_cli.stages.folder import FolderOptions, check_push, parse_size
    from qmamba_cli.stages.folder import push_to_hub as push

    if push_to_hub is not None:
        check_push(push_to_hub, offline=offline)
    folder = FolderOptions(
        max_shard_bytes=parse_size(max_shard_size), results=tuple(results or ()), base_model=base_model
    )
    recipe = Recipe(
        w_bits=w_bits,
        group_size=group_size,
        embedding_bits=embedding_bits,
        ignore=tuple(ignore or ()),
        method=recipe_name,
    )
    report = stage(
        ExportOptions(
            out=out,
            folder=folder if sharded else None,
            workdir=workdir,
            recipe=recipe,
            alpha=alpha,
            calibration=calibration,
            model=model,
            tokenizer=tokenizer,
            force=force,
            offline=offline,
            device=device,
        ),
        progress=console.progress(quiet=quiet or as_json),
        dry_run=dry_run,
    )
    pushed = None
    if push_to_hub is not None and not dry_run:
        pushed = push(out, push_to_hub, private=private, offline=offline)
    show_export(report, dry_run=dry_run, as_json=as_json, sharded=sharded, pushed=pushed)
