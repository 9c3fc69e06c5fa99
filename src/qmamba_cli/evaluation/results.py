"""Results in the layout of lm-eval 0.4.13, and as strict JSON.

A metric that has no value (a standard error of one document) is the string ``N/A``, lm-eval's own word. JSON
has no infinities; where a broken model gives one, `to_json` writes the strings ``inf``, ``-inf`` and ``nan``,
which strict readers accept and Python's ``float`` understands.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qmamba_cli.evaluation import statistics
from qmamba_cli.evaluation.scoring import LastWordScore, PerplexityScore
from qmamba_cli.evaluation.tasks import Task
from qmamba_cli.progress import Progress, silent

NOT_AVAILABLE = "N/A"

Metrics = dict[str, float | str]


def last_word_metrics(
    scores: Sequence[LastWordScore],
    *,
    bootstrap_iters: int = statistics.BOOTSTRAP_ITERS,
    progress: Progress = silent,
) -> Metrics:
    """Metrics of a last-word task under lm-eval's keys.

    Args:
        scores: one a document, at least one.
        bootstrap_iters: resamples for the perplexity's standard error; 0 leaves both standard errors out, as
            in lm-eval.
        progress: told of each resample.

    Returns:
        perplexity (exp of minus the mean ll a document), acc and both standard errors.
    """
    lls = [score.ll for score in scores]
    hits = [int(score.greedy) for score in scores]
    with_stderr = bootstrap_iters > 0
    return {
        "perplexity,none": statistics.perplexity(lls),
        "perplexity_stderr,none": _or_missing(
            statistics.perplexity_stderr(lls, bootstrap_iters=bootstrap_iters, progress=progress)
            if with_stderr
            else None
        ),
        "acc,none": statistics.mean(hits),
        "acc_stderr,none": _or_missing(statistics.mean_stderr(hits) if with_stderr else None),
    }


def perplexity_metrics(score: PerplexityScore) -> Metrics:
    """Metrics of running text; kl (nats a token) and same_top1 only where there was a baseline."""
    values = {
        "perplexity": score.perplexity,
        "bits_per_token": score.bits_per_token,
        "top1_acc": score.top1_acc,
        "kl": score.kl_mean,
        "same_top1": score.same_top1,
    }
    metrics: Metrics = {f"{name},none": value for name, value in values.items() if value is not None}
    return {**metrics, "tokens": score.tokens}


def build_results(
    task: Task,
    metrics: Mapping[str, float | str],
    *,
    original: int,
    effective: int,
    config: Mapping[str, Any],
    qmamba: Mapping[str, Any],
    dataset: str | None = None,
) -> dict[str, Any]:
    """One task's results, as lm-eval would write them.

    Args:
        task: the task.
        metrics: from `last_word_metrics` or `perplexity_metrics`.
        original: documents (windows of running text) there were.
        effective: how many of them were scored.
        config: how the task was run, from `run_config`.
        qmamba: what only this program knows: mode row, backend, device, artifact digest, versions, seconds.
        dataset: the file that was read in place of the task's own texts, or None.

    Returns:
        The object of the results file.
    """
    higher_is_better = {name: up for name, up in task.higher_is_better.items() if f"{name},none" in metrics}
    return {
        "results": {
            task.name: {"name": task.name, "alias": task.name, "sample_len": effective, **metrics},
        },
        "group_subtasks": {},
        "configs": {task.name: task.config(dataset)},
        "versions": {task.name: task.version},
        "n-shot": {task.name: 0},
        "higher_is_better": {task.name: higher_is_better},
        "n-samples": {task.name: {"original": original, "effective": effective}},
        "config": dict(config),
        "qmamba": dict(qmamba),
    }


def run_config(
    *,
    model: str,
    model_args: Mapping[str, Any],
    batch_size: int,
    device: str,
    limit: int | None,
    bootstrap_iters: int | None,
) -> dict[str, Any]:
    """The ``config`` block of the results.

    lm-eval's seeds are null: scoring draws no numbers but the bootstrap's, whose seeds are fixed.
    """
    return {
        "model": model,
        "model_args": dict(model_args),
        "batch_size": batch_size,
        "batch_sizes": [],
        "device": device,
        "use_cache": None,
        "limit": limit,
        "bootstrap_iters": bootstrap_iters,
        "gen_kwargs": None,
        "random_seed": None,
        "numpy_seed": None,
        "torch_seed": None,
        "fewshot_seed": None,
    }


def sample_lines(scores: Iterable[LastWordScore]) -> Iterator[str]:
    """The lines of a JSONL log, one a document, each ending in a newline."""
    for score in scores:
        record = {"doc_id": score.doc_id, "target": score.target, "ll": score.ll, "greedy": score.greedy}
        yield json.dumps(json_safe(record), ensure_ascii=False, allow_nan=False) + "\n"


def to_json(results: Mapping[str, Any]) -> str:
    """Results as strict JSON, indented, ending in a newline."""
    return json.dumps(json_safe(results), ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def json_safe(value: Any) -> Any:
    """A copy in which floats that JSON cannot hold are strings.

    >>> json_safe({"ppl": float("inf"), "kl": [float("nan"), 0.5]})
    {'ppl': 'inf', 'kl': ['nan', 0.5]}
    """
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _or_missing(value: float | None) -> float | str:
    return NOT_AVAILABLE if value is None else value
