"""`qmamba run`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qmamba_cli import console
from qmamba_cli.commands.gate_options import BaselineResults, Gates, Junit, split_baseline
from qmamba_cli.commands.interrupted import end_if_partial
from qmamba_cli.errors import UsageError
from qmamba_cli.modes import COLUMNS, DEFAULT_MODE, MODES, VARIABLES, Mode, mode_by_name, mode_from_variables
from qmamba_cli.options import (
    DEFAULT_WORKDIR,
    BackendName,
    DryRun,
    Force,
    Json,
    Offline,
    Quiet,
    Resume,
    TokenizerFrom,
    Workdir,
)
from qmamba_cli.views.gates import show_gates
from qmamba_cli.views.plan import show_run_plan
from qmamba_cli.views.results import show_results


def run(
    context: typer.Context,
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
        str | None,
        typer.Option(help="lambada_openai, lastword (bundled), perplexity, or any task of lm-eval."),
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
    dtype: Annotated[str, typer.Option(help="Of mode fp: fp32, or on a GPU fp16 or bf16.")] = "fp32",
    baseline: Annotated[str | None, typer.Option(help="Float model that `perplexity` compares with.")] = None,
    tokenizer: TokenizerFrom = None,
    backend: BackendName = "auto",
    limit: Annotated[int | None, typer.Option(help="Documents (windows) to score; all if left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents a forward pass.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens a window of `perplexity`.")] = 512,
    gates: Gates = None,
    baseline_results: BaselineResults = None,
    junit: Junit = None,
    output: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write one line a document beside --output.")
    ] = False,
    resume: Resume = False,
    workdir: Workdir = DEFAULT_WORKDIR,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Run a model in one numeric mode on a task or a prompt."""
    row = chosen_mode(mode, assignments or [], context.obj)
    if (task is None) == (prompt is None):
        got = "both" if task is not None else "neither"
        raise UsageError(
            f"expected one of `--task` and `--prompt`, got {got}",
            hint="`qmamba run --mode 2-4 --task lastword`, or `qmamba run --prompt TEXT`",
        )
    baseline, baseline_results = split_baseline(baseline, baseline_results)
    if prompt is not None and (gates or baseline_results is not None or junit is not None):
        raise UsageError("`--gate`, `--baseline-results` and `--junit` belong to `--task`, got `--prompt`")
    if prompt is not None and (output is not None or log_samples or resume):
        raise UsageError("`--output`, `--log-samples` and `--resume` belong to `--task`, got `--prompt`")
    if log_samples and output is None:
        raise UsageError("`--log-samples` needs `--output FILE`", hint="the log is written beside that file")

    from qmamba_cli.evaluation.results import to_json
    from qmamba_cli.stages.distributed import joined, world_of
    from qmamba_cli.stages.gates import GateOptions, hold_gates, open_gates, require_passed
    from qmamba_cli.stages.harness import is_harness_task, run_harness_task
    from qmamba_cli.stages.partial import Keeper
    from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task, samples_path

    world = world_of(context.obj or {})
    if world.size > 1 and (prompt is not None or is_harness_task(task or "")):
        raise UsageError(
            f"several processes share built-in tasks only, got {'a prompt' if prompt else f'`{task}`'}",
            hint="run it without `torchrun`, or name one of the built-in tasks",
        )
    if resume and (world.size > 1 or is_harness_task(task or "")):
        raise UsageError(
            f"`--resume` belongs to the built-in tasks on one process, got {world.size} and `{task}`",
            hint="run it from the start",
        )
    keeper = Keeper(command="run", output=output, resume=resume, force=force)
    log = samples_path(output) if log_samples and output is not None else None
    keeper.check(log)
    opened = open_gates(
        GateOptions(expressions=gates or (), baseline_results=baseline_results, junit=junit, force=force),
        task=task or "",
    )
    asked = ModelOptions(
        mode=row,
        workdir=workdir,
        checkpoint=checkpoint,
        model=model,
        backend=backend,
        dtype=dtype,
        tokenizer=tokenizer,
        offline=offline,
    )
    if dry_run:
        from qmamba_cli.stages.plan import plan_run

        sequences = batch_size if prompt is None else 1
        show_run_plan(plan_run(asked, batch_size=sequences, seqlen=seqlen), as_json=as_json)
        return
    with joined(world, backend) as group:
        loaded = load_model(asked)
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
            keeper=keeper,
        )
        if is_harness_task(options.task):
            results, lines = run_harness_task(loaded, options, log_samples=log_samples)
        else:
            bar = console.progress(quiet=quiet or as_json or not group.leads)
            results, lines = run_task(loaded, options, group=group, offline=offline, progress=bar)
    if not group.leads:
        return
    partial = bool(results.get("partial"))
    keeper.write(to_json(results), {} if log is None else {log: "".join(lines)}, partial=partial)
    show_results(results, output=output, as_json=as_json)
    end_if_partial(keeper, partial=partial)
    outcomes = hold_gates(opened, results, seconds=results["qmamba"]["seconds"], name="run")
    show_gates(outcomes)
    require_passed(outcomes)


def _generate(
    loaded: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int, as_json: bool
) -> None:
    from qmamba_cli.model.generate import GenerationTimes
    from qmamba_cli.stages.run import run_prompt

    times = GenerationTimes()
    pieces = run_prompt(
        loaded,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        times=times,
    )
    if as_json:
        text = "".join(pieces)
        console.write_json(
            {
                "prompt": prompt,
                "text": text,
                "mode": loaded.model.mode.name,
                "first_token_s": times.first_token_s,
                "tokens_per_s": times.tokens_per_s,
            }
        )
        return
    for piece in pieces:
        console.write(piece)
    console.write("\n")


def chosen_mode(name: str | None, assignments: list[str], environment: Mapping[str, str]) -> Mode:
    """The row that --mode, else the environment, else the default names, with --set applied."""
    if name is None:
        row = mode_from_variables(environment) or mode_by_name(DEFAULT_MODE)
    else:
        row = mode_by_name(name)
        ignored = [key for key in VARIABLES if environment.get(key, "").strip().lower() == "true"]
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
