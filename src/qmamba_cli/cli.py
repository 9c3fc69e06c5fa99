"""The command line: parse, call a stage, print, map errors to exit codes.

Nothing heavy is imported before a command needs it: ``--help``, ``modes`` and ``inspect`` load neither torch
nor CuPy. This is the one module that reads the environment.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qmamba_cli import __version__, console, tools
from qmamba_cli.errors import QmambaError, UsageError
from qmamba_cli.modes import COLUMNS, DEFAULT_MODE, MODES, VARIABLES, Mode, mode_by_name, mode_from_variables
from qmamba_cli.options import (
    DEFAULT_WORKDIR,
    BackendName,
    DryRun,
    Force,
    Json,
    Offline,
    Quiet,
    TokenizerFrom,
    Workdir,
)
from qmamba_cli.report import problem_of, show_calibration, show_export, show_results

EXIT_INTERRUPTED = 130
_EXIT_CODES = (
    "Exit codes: 0 done, 1 cannot be done or a gate said no, 2 wrong usage, 3 an artifact is corrupt, stale "
    "or of another lineage, 4 a device or a dependency is missing, 130 interrupted."
)
# The base of every complaint about the command line. Typer carries its own copy of Click in some versions and
# depends on Click in others; this finds the class in both.
_CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

app = typer.Typer(
    name="qmamba",
    help="Calibrate, export and run quantized Mamba language models.",
    epilog=_EXIT_CODES,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.write(f"qmamba {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 (its callback does the work)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command; without a command, the help page."""
    if context.invoked_subcommand is None:
        console.note(context.get_help())
        raise typer.Exit(UsageError.exit_code)


@app.command()
def calibrate(
    model: Annotated[
        str, typer.Argument(help="Folder, Hub id (org/name) or `demo`, the bundled model.", metavar="MODEL")
    ],
    samples: Annotated[int, typer.Option(help="Token windows to observe.")] = 512,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.")] = 8,
    dataset: Annotated[
        str,
        typer.Option(
            help="bundled, self (text from the model), a .jsonl/.txt/.parquet file or name[:config[:split]]."
        ),
    ] = "bundled",
    text_column: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Draw the samples in seeded order.")] = True,
    alpha: Annotated[float, typer.Option(help="Quantile of the Percentile sites, in (0.5, 1].")] = 0.9995,
    reduction: Annotated[str, typer.Option(help="How samples are joined: global, mean or ema.")] = "global",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16; the CPU computes in fp32.")] = "auto",
    tokenizer: TokenizerFrom = None,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Observe a float model on text: checkpoint + text -> calibration artifact."""
    from qmamba_cli.quant.observers import Reduction
    from qmamba_cli.stages.calibrate import CalibrateOptions
    from qmamba_cli.stages.calibrate import calibrate as stage

    if reduction not in {str(member) for member in Reduction}:
        raise UsageError(f"unknown reduction `{reduction}`, expected one of {', '.join(Reduction)}")
    report = stage(
        CalibrateOptions(
            model=model,
            workdir=workdir,
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            dataset=dataset,
            text_column=text_column,
            seed=seed,
            shuffle=shuffle,
            alpha=alpha,
            reduction=Reduction(reduction),
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            force=force,
            offline=offline,
        ),
        progress=console.progress(quiet=quiet or as_json),
        dry_run=dry_run,
    )
    show_calibration(report, dry_run=dry_run, as_json=as_json)


@app.command()
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


@app.command()
def run(
    mode: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(MODES)}; {DEFAULT_MODE} unless environment variables choose."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="COLUMN=VALUE", help="Override a column of the mode's row; may be repeated."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="lambada_openai, lastword (bundled) or perplexity.")
    ] = None,
    task_data: Annotated[Path | None, typer.Option(help="Text of the task: a .jsonl or a .txt file.")] = None,
    text_column: Annotated[str, typer.Option(help="Field that holds the text of a .jsonl.")] = "text",
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Quantized file; the work folder's last export if left out.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Float model of mode fp.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Float model that `perplexity` compares with.")] = None,
    tokenizer: TokenizerFrom = None,
    backend: BackendName = "auto",
    limit: Annotated[int | None, typer.Option(help="Documents (windows) to score; all if left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents a forward pass.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window of `perplexity`.")] = 512,
    output: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write one line a document beside --output.")
    ] = False,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Run a model in one numeric mode on a task or a prompt."""
    row = _chosen_mode(mode, assignments or [])
    if (task is None) == (prompt is None):
        got = "both" if task is not None else "neither"
        raise UsageError(
            f"expected one of `--task` and `--prompt`, got {got}",
            hint="`qmamba run --mode 2-4 --task lastword`, or `qmamba run --prompt TEXT`",
        )
    if prompt is not None and (output is not None or log_samples):
        raise UsageError("`--output` and `--log-samples` belong to `--task`, got `--prompt`")
    if log_samples and output is None:
        raise UsageError("`--log-samples` needs `--output FILE`", hint="the log is written beside that file")

    from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task
    from qmamba_cli.stages.save import check_outputs, save_results

    check_outputs(output, log_samples=log_samples, force=force)
    loaded = load_model(
        ModelOptions(
            mode=row,
            workdir=workdir,
            checkpoint=checkpoint,
            model=model,
            backend=backend,
            tokenizer=tokenizer,
            offline=offline,
        )
    )
    if prompt is not None:
        _generate(loaded, prompt, max_new_tokens, temperature, seed, as_json)
        return
    options = TaskOptions(
        task=task or "",
        data=task_data,
        text_column=text_column,
        limit=limit,
        batch_size=batch_size,
        seqlen=seqlen,
        baseline=baseline,
    )
    results, lines = run_task(
        loaded, options, offline=offline, progress=console.progress(quiet=quiet or as_json)
    )
    if output is not None:
        save_results(output, results, lines if log_samples else None, force=force)
    show_results(results, output=output, as_json=as_json)


def _generate(
    loaded: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int, as_json: bool
) -> None:
    from qmamba_cli.stages.run import run_prompt

    pieces = run_prompt(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if as_json:
        text = "".join(pieces)
        console.write_json({"prompt": prompt, "text": text, "mode": loaded.model.mode.name})
        return
    for piece in pieces:
        console.write(piece)
    console.write("\n")


def _chosen_mode(name: str | None, assignments: list[str]) -> Mode:
    """The row that --mode, else the environment, else the default names, with --set applied."""
    if name is None:
        row = mode_from_variables(os.environ) or mode_by_name(DEFAULT_MODE)
    else:
        row = mode_by_name(name)
        ignored = [key for key in VARIABLES if os.environ.get(key, "").strip().lower() == "true"]
        if ignored:
            console.note(f"note: `--mode {name}` wins over the environment's {', '.join(ignored)}")
    changes = {}
    for assignment in assignments:
        column, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(
                f"`--set` takes COLUMN=VALUE, got `{assignment}`", hint=f"columns: {', '.join(COLUMNS)}"
            )
        changes[column] = value
    return row.with_columns(changes)


for _command in tools.COMMANDS:
    app.command()(_command)


def main() -> NoReturn:
    """Run the command line and exit; the only place that catches errors."""
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        # Some versions of the parser answer an interrupt with this code themselves, others raise.
        code = int(app(prog_name="qmamba", standalone_mode=False) or 0)
    except (QmambaError, MemoryError, _CommandLineError) as error:
        problem = problem_of(error, sys.argv[1:])
        console.error(problem)
        return problem.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    except console.ReaderGoneError:
        return 0
    if code == EXIT_INTERRUPTED:
        console.note("interrupted")
    return code
