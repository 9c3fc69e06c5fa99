"""`qmamba compare`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from qmamba_cli import console
from qmamba_cli.commands.gate_options import BaselineResults, Gates, Junit, split_baseline
from qmamba_cli.commands.interrupted import end_if_partial
from qmamba_cli.errors import UsageError
from qmamba_cli.options import DEFAULT_WORKDIR, BackendName, Force, Json, Offline, Quiet, Resume, Workdir
from qmamba_cli.views.compare import show_comparison
from qmamba_cli.views.gates import show_gates

if TYPE_CHECKING:
    from qmamba_cli.stages.compare import Comparison

N = TypeVar("N", int, float)


def compare(
    modes: Annotated[str, typer.Option(help="Modes, as 0,2-4; or all.")] = "all",
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="COLUMN=VALUE",
            help="Add every mode with this column (or two, joined by a comma) overridden; may be repeated.",
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Add variants with scales at these quantiles of the calibration."),
    ] = None,
    w_bits: Annotated[
        str | None, typer.Option(metavar="4,8", help="Add variants with the weights quantized to these bits.")
    ] = None,
    task: Annotated[str, typer.Option(help="lambada_openai, lastword (bundled) or perplexity.")] = "lastword",
    task_data: Annotated[Path | None, typer.Option(help="Text of the task: a .jsonl or a .txt file.")] = None,
    text_column: Annotated[str, typer.Option(help="Field that holds the text of a .jsonl.")] = "text",
    limit: Annotated[int | None, typer.Option(help="Documents (windows) to score; all if left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents a forward pass.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window of `perplexity`.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Quantized file; the work folder's last export if left out.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Float model; the one the quantized file names if left out.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration for `--alpha`; the work folder's last one if left out.")
    ] = None,
    backend: BackendName = "auto",
    gates: Gates = None,
    baseline_results: BaselineResults = None,
    junit: Junit = None,
    output: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")] = None,
    resume: Resume = False,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Score every mode and the float model on the same documents and say what separates them."""
    from qmamba_cli.evaluation.results import to_json
    from qmamba_cli.stages import compare as stage
    from qmamba_cli.stages.gates import GateOptions, hold_gates, open_gates, require_passed
    from qmamba_cli.stages.partial import Keeper

    baseline, baseline_results = split_baseline(baseline, baseline_results)
    keeper = Keeper(command="compare", output=output, resume=resume, force=force)
    options = stage.CompareOptions(
        modes=tuple(name.strip() for name in modes.split(",")),
        changes=tuple(assignments or ()),
        alphas=_numbers("--alpha", alpha, float),
        w_bits=_numbers("--w-bits", w_bits, int),
        task=task,
        data=task_data,
        text_column=text_column,
        limit=limit,
        batch_size=batch_size,
        seqlen=seqlen,
        seed=seed,
        baseline=baseline,
        checkpoint=checkpoint,
        calibration=calibration,
        workdir=workdir,
        backend=backend,
        offline=offline,
        keeper=keeper,
    )
    opened = open_gates(
        GateOptions(expressions=gates or (), baseline_results=baseline_results, junit=junit, force=force),
        task=task,
        modes=stage.names_of(options),
    )
    keeper.check(html)
    comparison = stage.compare(options, progress=console.progress(quiet=quiet or as_json))
    pages = {} if html is None else {html: _page(comparison)}
    keeper.write(to_json(comparison.results), pages, partial=comparison.partial)
    show_comparison(comparison, output=output, as_json=as_json)
    if html is not None:
        console.note(f"page written to {html}")
    end_if_partial(keeper, partial=comparison.partial)
    outcomes = hold_gates(
        opened, comparison.results, seconds=comparison.results["qmamba"]["seconds"], name="compare"
    )
    show_gates(outcomes)
    require_passed(outcomes)


def _page(comparison: "Comparison") -> str:
    from qmamba_cli.evaluation.compare import chart_data
    from qmamba_cli.evaluation.results import json_safe
    from qmamba_cli.html.compare import compare_page

    record = json_safe(comparison.results)
    return compare_page(record, chart_data(list(record["modes"]), comparison.table))


def _numbers(option: str, text: str | None, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return () if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`{option}`: got `{text}`, expected numbers with commas between them") from None
