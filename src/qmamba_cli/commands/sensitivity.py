"""`qmamba sensitivity`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.commands.interrupted import end_if_partial
from qmamba_cli.options import (
    DEFAULT_WORKDIR,
    BackendName,
    Force,
    Json,
    Offline,
    Quiet,
    Resume,
    TokenizerFrom,
    Workdir,
)
from qmamba_cli.views.sensitivity import sensitivity_csv, show_sensitivity


def sensitivity(
    task: Annotated[
        str, typer.Option(help="lambada_openai, lastword (bundled) or perplexity.")
    ] = "perplexity",
    task_data: Annotated[Path | None, typer.Option(help="Text of the task: a .jsonl or a .txt file.")] = None,
    text_column: Annotated[str, typer.Option(help="Field that holds the text of a .jsonl.")] = "text",
    limit: Annotated[int | None, typer.Option(help="Documents (windows) to score; all if left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents a forward pass.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window of `perplexity`.")] = 512,
    per: Annotated[str, typer.Option(help="site (all layers at once), layer or both.")] = "site",
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out/--no-leave-one-out", help="Also everything but one tensor.")
    ] = True,
    per_token: Annotated[
        bool,
        typer.Option("--per-token", help="Also everything quantized, one tensor with one scale a token."),
    ] = False,
    w_bits: Annotated[int, typer.Option(help="Bits of in_proj and out_proj: 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Input channels that share a W4 multiplier.")] = 128,
    alpha: Annotated[
        float | None,
        typer.Option(help="Quantile, from the stored histograms; the calibration's if left out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Float checkpoint; the one the calibration names if left out.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration folder; the work folder's last one if left out.")
    ] = None,
    tokenizer: TokenizerFrom = None,
    backend: BackendName = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the JSON to this file.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")] = None,
    resume: Resume = False,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Quantize one tensor at a time and rank what each costs; needs a calibration, no export."""
    from qmamba_cli.evaluation.results import json_safe, to_json
    from qmamba_cli.html.sensitivity import sensitivity_page
    from qmamba_cli.model.quantize import Recipe
    from qmamba_cli.stages.partial import Keeper
    from qmamba_cli.stages.sensitivity import SensitivityOptions
    from qmamba_cli.stages.sensitivity import sensitivity as stage

    keeper = Keeper(command="sensitivity", output=output, resume=resume, force=force)
    keeper.check(csv, html)
    report = stage(
        SensitivityOptions(
            model=model,
            workdir=workdir,
            calibration=calibration,
            task=task,
            data=task_data,
            text_column=text_column,
            limit=limit,
            batch_size=batch_size,
            seqlen=seqlen,
            per=per,
            recipe=Recipe(w_bits=w_bits, group_size=group_size),
            alpha=alpha,
            leave_one_out=leave_one_out,
            per_token=per_token,
            backend=backend,
            tokenizer=tokenizer,
            offline=offline,
            keeper=keeper,
        ),
        progress=console.progress(quiet=quiet or as_json),
    )
    texts: dict[Path, str] = {}
    # A CSV has no place for the mark of a partial result.
    if csv is not None and not report.partial:
        texts[csv] = sensitivity_csv(report)
    if html is not None:
        texts[html] = sensitivity_page(json_safe(report.record()))
    written = keeper.write(to_json(report.record()), texts, partial=report.partial)
    show_sensitivity(report, written=written, as_json=as_json)
    end_if_partial(keeper, partial=report.partial)
