"""Stage 3: a model in one numeric mode, on a task or a prompt, to results."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.artifacts.manifest import library_versions, tool_version
from qmamba_cli.errors import UsageError
from qmamba_cli.evaluation.batches import Batch
from qmamba_cli.evaluation.results import (
    build_results,
    last_word_metrics,
    perplexity_metrics,
    run_config,
    sample_lines,
)
from qmamba_cli.evaluation.score_table import ScoreTable
from qmamba_cli.evaluation.statistics import BOOTSTRAP_ITERS
from qmamba_cli.evaluation.tasks import Task, task_by_name
from qmamba_cli.model.generate import GenerationTimes, generate
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.progress import Progress, silent
from qmamba_cli.stages.common import check_seed, within_gpu_memory
from qmamba_cli.stages.distributed import ALONE, Group
from qmamba_cli.stages.load import DTYPES as DTYPES
from qmamba_cli.stages.load import LoadedModel as LoadedModel
from qmamba_cli.stages.load import ModelOptions as ModelOptions
from qmamba_cli.stages.load import assemble as assemble
from qmamba_cli.stages.load import load_baseline
from qmamba_cli.stages.load import load_model as load_model
from qmamba_cli.stages.partial import Keeper, fingerprint_of, tensors_of
from qmamba_cli.stages.score_tables import Scored, score_table
from qmamba_cli.stages.shared_scoring import shared_table
from qmamba_cli.stages.task_batches import require_text, task_batches

# Below it, logits divided by the temperature leave float32's range.
MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What is asked of the model.

    Attributes:
        task: name of a built-in task.
        data: a file in place of the task's own texts.
        text_column: field that holds the text of a .jsonl.
        limit: documents (windows) to score, or None for all.
        batch_size: documents a forward pass; it changes the last bits of the scores.
        seqlen: tokens a window of the perplexity task.
        baseline: float model that the perplexity task compares with, or None.
        keeper: where an interrupted scoring keeps its scores; with None, or where several processes share
            the work, an interrupt is raised.
    """

    task: str
    data: Path | None = None
    text_column: str = "text"
    limit: int | None = None
    batch_size: int = 16
    seqlen: int = 512
    baseline: str | None = None
    keeper: Keeper | None = None


def samples_path(output: Path) -> Path:
    """Where the sample log of a results file goes.

    >>> samples_path(Path("out/results.json")).as_posix()
    'out/results.samples.jsonl'
    """
    return output.with_name(f"{output.stem}.samples.jsonl")


def run_task(
    loaded: LoadedModel,
    options: TaskOptions,
    *,
    group: Group = ALONE,
    offline: bool = False,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[str]]:
    """Score a task.

    Reads the task's texts; writes nothing but, when it is interrupted and an output is named, the scores so
    far. Deterministic given the model, the texts, the options and the machine. Where several processes share
    the work each gets the scores of a single one.

    Args:
        loaded: the model.
        options: what is asked of it.
        group: the processes that score the same task; several are named in the results.
        offline: use only the Hub's local cache.
        progress: told of what this process finished.

    Returns:
        The results in lm-eval's layout with a ``qmamba`` block, and the lines of the sample log (none for
        running text). Interrupted, they are those of the first batches, and ``partial`` is true.

    Raises:
        KeyboardInterrupt: it was interrupted before there was anything to show, or has no keeper.
        UsageError: an option is out of range or does not belong to the task.
        DatasetError: the texts are missing or malformed.
    """
    task = task_by_name(options.task)
    _check_task_options(task, options)
    started = time.perf_counter()
    found = task_batches(
        task,
        loaded.tokenizer,
        data=options.data,
        text_column=options.text_column,
        limit=options.limit,
        batch_size=options.batch_size,
        seqlen=options.seqlen,
        offline=offline,
    )
    with within_gpu_memory(options.batch_size):
        scored = _scored(loaded, task, options, found.batches, group, offline, progress)
    with scored.kept():
        metrics, lines = _metrics(task, scored.table, found.texts, progress)
    model = loaded.model
    results = build_results(
        task,
        metrics,
        original=found.original,
        effective=len(scored.table.documents),
        config=run_config(
            model="qmamba",
            model_args={"name": loaded.name, "mode": model.mode.name},
            batch_size=options.batch_size,
            device=model.backend.name,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ITERS if task.is_last_word else None,
        ),
        qmamba={
            "mode": {"name": model.mode.name, **model.mode.columns()},
            **_circumstances(model),
            **loaded.provenance,
            **({"processes": group.world.size} if group.world.size > 1 else {}),
            "seconds": round(time.perf_counter() - started, 3),
        },
        dataset=None if options.data is None else str(options.data),
    )
    return results | ({"partial": True} if scored.partial else {}), lines


def _check_task_options(task: Task, options: TaskOptions) -> None:
    for name in ("limit", "batch_size", "seqlen"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")
    if task.is_last_word and options.baseline is not None:
        raise UsageError(
            f"`--baseline` belongs to the perplexity task, got `--task {task.name}`",
            hint="`qmamba run --task perplexity --task-data FILE --baseline MODEL`",
        )
    require_text(task, options.data)


def _scored(
    loaded: LoadedModel,
    task: Task,
    options: TaskOptions,
    batches: Sequence[Batch],
    group: Group,
    offline: bool,
    progress: Progress,
) -> Scored:
    """The scores of the model, in the last row of the table, behind those of the baseline if there is one."""
    model = loaded.model
    models, reference = [model], None
    if options.baseline is not None:
        models, reference = [load_baseline(options.baseline, loaded, offline), model], 0
    description = "scoring last words" if task.is_last_word else "scoring windows"
    if group.world.size > 1:
        table = shared_table(
            group, models, batches, reference=reference, description=description, progress=progress
        )
        return Scored(table=table, partial=False, done=len(batches), keeper=None, fingerprint="")
    record = {
        **loaded.provenance,
        # The file's path may change, its digest not.
        "artifact": (loaded.provenance["artifact"] or {}).get("digest"),
        "mode": model.mode.columns(),
        "baseline": options.baseline,
        **_circumstances(model),
    }
    return score_table(
        models,
        batches,
        reference=reference,
        keeper=options.keeper,
        fingerprint=fingerprint_of(record, tensors_of(batches)),
        description=description,
        progress=progress,
    )


def _circumstances(model: Mamba) -> dict[str, Any]:
    """What the last bits of a score depend on beside the model and the text."""
    return {
        "backend": model.backend.name,
        "device": str(model.backend.device),
        "tool_version": tool_version(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
    }


def _metrics(
    task: Task, table: ScoreTable, texts: Sequence[str], progress: Progress
) -> tuple[dict[str, float | str], list[str]]:
    """The metrics of the last model of the table, and the lines of the sample log."""
    if not task.is_last_word:
        return perplexity_metrics(table.running_text(-1)), []
    scores = table.last_words(-1, texts)
    return last_word_metrics(scores, progress=progress), list(sample_lines(scores))


def run_prompt(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    times: GenerationTimes | None = None,
) -> Iterator[str]:
    """Continue a prompt, in pieces of text as they become certain.

    Args:
        loaded: the model.
        prompt: text.
        max_new_tokens: how many tokens to make at most.
        temperature: 0 takes the most likely token; above it, logits are divided by it and sampled.
        seed: of the sampling.
        times: filled in as tokens are made, if given.

    Raises:
        UsageError: the prompt has no tokens, or an option is out of range.
    """
    check_seed(seed)
    if temperature != 0 and not (temperature >= MIN_TEMPERATURE and math.isfinite(temperature)):
        raise UsageError(
            f"`--temperature` must be 0 or a finite number of at least {MIN_TEMPERATURE}, got {temperature}",
            hint="0 takes the most likely token; 1 samples from the model as it is",
        )
    tokenizer = loaded.tokenizer
    decoder = tokenizer.stream_decoder()
    for token in generate(
        loaded.model,
        tokenizer.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        eos_id=tokenizer.eos_id,
        vocab_size=min(tokenizer.vocab_size, loaded.model.vocab_size),
        times=times,
    ):
        piece = decoder.push(token)
        if piece:
            yield piece
    rest = decoder.flush()
    if rest:
        yield rest
