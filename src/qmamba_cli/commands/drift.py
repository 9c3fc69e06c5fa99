"""`qmamba drift`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.options import DEFAULT_WORKDIR, BackendName, Force, Json, Offline, Quiet, Workdir
from qmamba_cli.views.drift import drift_csv, show_drift


def drift(
    modes: Annotated[str, typer.Option(help="Modes with commas between them, or all.")] = "0,2-1,2-2,2-4,3",
    length: Annotated[int, typer.Option(help="Tokens a stream.")] = 1024,
    streams: Annotated[int, typer.Option(help="Pieces of the text that run side by side.")] = 8,
    prefill: Annotated[bool, typer.Option("--prefill", help="Only one pass to each length.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Only token by token with carried state.")] = False,
    task_data: Annotated[
        Path | None, typer.Option(help="Text, a .jsonl or a .txt file; the bundled passages if left out.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Field that holds the text of a .jsonl.")] = "text",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Quantized file; the work folder's last export if left out.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "--baseline", help="Float model; the one the file names if left out."),
    ] = None,
    backend: BackendName = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the JSON to this file.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the points to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")] = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Follow how each mode parts from the float model as the sequence grows, in prefill and in decode."""
    from qmamba_cli.evaluation.drift import DECODE, PATHS, PREFILL
    from qmamba_cli.evaluation.results import json_safe, to_json
    from qmamba_cli.html.drift import drift_page
    from qmamba_cli.stages.drift import DriftOptions
    from qmamba_cli.stages.drift import drift as stage
    from qmamba_cli.stages.reports import check_reports, save_reports

    check_reports((output, csv, html), force=force)
    only = {PREFILL: prefill, DECODE: decode}
    report = stage(
        DriftOptions(
            modes=tuple(name.strip() for name in modes.split(",")),
            workdir=workdir,
            checkpoint=checkpoint,
            model=model,
            data=task_data,
            text_column=text_column,
            length=length,
            streams=streams,
            paths=PATHS if prefill == decode else tuple(path for path in PATHS if only[path]),
            backend=backend,
            offline=offline,
        ),
        progress=console.progress(quiet=quiet or as_json),
    )
    texts: dict[Path, str] = {}
    if output is not None:
        texts[output] = to_json(report.record())
    if csv is not None:
        texts[csv] = drift_csv(report)
    if html is not None:
        texts[html] = drift_page(json_safe(report.record()))
    save_reports(texts, force=force)
    show_drift(report, written=list(texts), as_json=as_json)
