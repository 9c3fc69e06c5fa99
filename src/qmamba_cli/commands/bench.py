"""`qmamba bench`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qmamba_cli import console
from qmamba_cli.commands.interrupted import INTERRUPTED
from qmamba_cli.errors import UsageError
from qmamba_cli.modes import mode_by_name
from qmamba_cli.options import DEFAULT_WORKDIR, BackendName, Force, Json, Quiet, Workdir
from qmamba_cli.views.bench import show_bench

_DEFAULT_BITS = "4,8"


def bench(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Quantized file; the work folder's last export if left out.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="130m, 370m, 790m, 1.4b or 2.8b: random weights of that size in place of a file."),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Mode to time; may be repeated. 0, 2-4 and 3 if left out.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Rows at once; may be repeated. 1 if left out.")
    ] = None,
    prompt_length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; may be repeated. 512 if left out.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="One-token steps to time.")] = 64,
    w_bits: Annotated[
        str | None, typer.Option(help=f"Bits of the weights of --shape; {_DEFAULT_BITS} if left out.")
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--float/--no-float",
            help="Also time the float model: fp16 on a GPU, fp32 on a CPU; its weights are random.",
        ),
    ] = True,
    repeat: Annotated[int, typer.Option(help="Prompts to time.")] = 10,
    warmup: Annotated[int, typer.Option(help="Prompts and steps before those that are timed.")] = 3,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Also time each operator by itself.")
    ] = False,
    chart: Annotated[Path | None, typer.Option(help="Write a chart to this HTML file.")] = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    backend: BackendName = "auto",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the first token and each token after it, every mode beside the float model."""
    if w_bits is not None and shape is None:
        raise UsageError(
            "`--w-bits` belongs to `--shape`, got it alone",
            hint="a quantized file has the bits it was exported with",
        )
    if chart is not None and chart.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"`--chart` writes HTML, got `{chart}`, expected a name that ends in `.html`")
    modes = {name: mode_by_name(name) for name in mode} if mode else None
    bits = _bits(w_bits or _DEFAULT_BITS)

    from qmamba_cli.artifacts.files import check_output
    from qmamba_cli.stages.bench import BenchOptions
    from qmamba_cli.stages.bench import bench as stage

    if chart is not None:
        check_output(chart, force=force)
    defaults = BenchOptions()
    options = BenchOptions(
        modes=defaults.modes if modes is None else tuple(modes.values()),
        checkpoint=checkpoint,
        shape=shape,
        w_bits=bits,
        workdir=workdir,
        backend=backend,
        batch_sizes=tuple(batch_size or defaults.batch_sizes),
        prompt_lengths=tuple(prompt_length or defaults.prompt_lengths),
        new_tokens=new_tokens,
        repeat=repeat,
        warmup=warmup,
        baseline=baseline,
        breakdown=breakdown,
    )
    report = stage(options, progress=console.progress(quiet=quiet or as_json))
    command = shlex.join(["qmamba", *sys.argv[1:]])
    show_bench(report, command=command, chart=chart, force=force, as_json=as_json)
    if report.partial:
        console.note("the times are partial: rows are missing; run it again for all of them")
        raise typer.Exit(INTERRUPTED)


def _bits(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`--w-bits` must be 4, 8 or `4,8`, got `{text}`") from None
