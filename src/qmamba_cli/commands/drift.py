"""`qmamba drift`."""

from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.commands.interrupted import end_if_partial
from qmamba_cli.options import DEFAULT_WORKDIR, BackendName, Force, Json, Offline, Quiet, Resume, Workdir
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
    resume: Resume = False,
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
    from qmamba_cli.stages.partial import Keeper

    keeper = Keeper(command="drift", output=output, resume=resume, force=force)
    keeper.check(csv, html)
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
            keeper=keeper,
        ),
        progress=console.progress(quiet=quiet or as_json),
    )
    texts: dict[Path, str] = {}
    # A CSV has no place for the mark of a partial result.
    if csv is not None and not report.partial:
        texts[csv] = drift_csv(report)
    if html is not None:
        texts[html] = drift_page(json_safe(report.record()))
    written = keeper.write(to_json(report.record()), texts, partial=report.partial)
    show_drift(report, written=written, as_json=as_json)
    end_if_partial(keeper, partial=report.partial)
