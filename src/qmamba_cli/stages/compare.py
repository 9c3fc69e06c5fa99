"""All modes on the same documents at one batch size, and what separates them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.artifacts.manifest import library_versions, tool_version
from qmamba_cli.artifacts.quantized import QuantizedArtifact, read_quantized
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import CheckpointError
from qmamba_cli.evaluation.batches import Batch, require_positive
from qmamba_cli.evaluation.compare import compare_scores
from qmamba_cli.evaluation.paired import FEW_CLUSTERS
from qmamba_cli.evaluation.score_table import ScoreTable
from qmamba_cli.evaluation.tasks import Task, task_by_name
from qmamba_cli.kernels.backend import Backend, select_backend
from qmamba_cli.progress import Progress, silent
from qmamba_cli.stages.common import check_seed, within_gpu_memory
from qmamba_cli.stages.lineup import (
    ALL,
    Entry,
    Plan,
    build_models,
    float_entry,
    open_baseline,
    plan_entries,
    without_repeats,
)
from qmamba_cli.stages.load import quantized_provenance
from qmamba_cli.stages.partial import Keeper, fingerprint_of, tensors_of
from qmamba_cli.stages.score_tables import score_table
from qmamba_cli.stages.task_batches import require_text, task_batches
from qmamba_cli.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What is compared, and on what.

    Attributes:
        modes: names of modes, or ``all``.
        changes: each ``COLUMN=VALUE[,COLUMN=VALUE]...`` adds a variant of every mode.
        alphas: each adds variants with scales from the calibration's histograms at that quantile.
        w_bits: each adds variants with in_proj and out_proj quantized anew to that many bits.
        task: name of a built-in task.
        data: a file in place of the task's own texts.
        text_column: field that holds the text of a .jsonl.
        limit: documents (windows) to score, or None for all.
        batch_size: documents a forward pass; it changes the last bits of the scores.
        seqlen: tokens a window of the perplexity task.
        seed: of the bootstrap.
        baseline: the float model, or None for the one the quantized file names, if it can be opened.
        checkpoint: the quantized file, or None for the work folder's last export.
        calibration: the calibration folder, or None for the work folder's last one.
        workdir: the work folder.
        backend: auto, cpu or cuda.
        offline: use only the Hub's local cache.
        keeper: where an interrupted comparison keeps its scores; with None an interrupt is raised.
    """

    modes: Sequence[str] = (ALL,)
    changes: Sequence[str] = ()
    alphas: Sequence[float] = ()
    w_bits: Sequence[int] = ()
    task: str = "lastword"
    data: Path | None = None
    text_column: str = "text"
    limit: int | None = None
    batch_size: int = 16
    seqlen: int = 512
    seed: int = 0
    baseline: str | None = None
    checkpoint: Path | None = None
    calibration: Path | None = None
    workdir: Path = Path("qmamba-artifacts")
    backend: str = "auto"
    offline: bool = False
    keeper: Keeper | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        results: the object of the results file.
        table: the scores behind it, one row a mode in the order of ``results["modes"]``.
        partial: whether it was interrupted, so that only the first documents are in it.
        notes: what a person should know beside the results.
    """

    results: dict[str, Any]
    table: ScoreTable
    partial: bool
    notes: tuple[str, ...] = ()


def compare(options: CompareOptions, *, progress: Progress = silent) -> Comparison:
    """Score every mode and the float model on the same batches, then test every pair.

    Reads the quantized file, the float checkpoint and the texts. Writes nothing but, when it is interrupted
    and an output is named, the scores so far. Deterministic given these, the options and the machine.

    Raises:
        KeyboardInterrupt: it was interrupted before there was anything to show.
        UsageError: an option is out of range or does not belong to the task.
        ArtifactError: an artifact is damaged or of another lineage.
        QmambaError: an input or the backend is missing.
    """
    started = time.perf_counter()
    task = task_by_name(options.task)
    _check_options(task, options)
    plan = plan_entries(options.modes, options.changes, options.alphas, options.w_bits)
    backend = select_backend(options.backend)
    artifact = read_quantized(options.checkpoint or Workdir(options.workdir).resolve_export().path)
    found = task_batches(
        task,
        Tokenizer.from_files(artifact.files),
        data=options.data,
        text_column=options.text_column,
        limit=options.limit,
        batch_size=options.batch_size,
        seqlen=options.seqlen,
        offline=options.offline,
    )
    batches = found.batches
    checkpoint, missing = open_baseline(options.baseline, artifact, offline=options.offline)
    if plan.wants_float and checkpoint is None:
        raise CheckpointError(
            f"the float model cannot be compared, got: {missing}", hint="name it with `--baseline MODEL`"
        )
    entries = without_repeats(plan.entries, artifact)
    if checkpoint is not None:
        entries = [float_entry(), *entries]
    reference = None if checkpoint is None else 0
    fingerprint = _fingerprint(entries, batches, artifact, checkpoint, backend)
    with within_gpu_memory(options.batch_size):
        models = build_models(
            entries, artifact, checkpoint, backend, calibration=options.calibration, workdir=options.workdir
        )
        scored = score_table(
            models,
            batches,
            reference=reference,
            keeper=options.keeper,
            fingerprint=fingerprint,
            description=f"scoring in {len(models)} modes",
            progress=progress,
        )
    names, table = [entry.name for entry in entries], scored.table
    with scored.kept():
        results = compare_scores(
            names,
            table,
            last_word=task.is_last_word,
            reference=None if reference is None else names[reference],
            seed=options.seed,
            progress=progress,
        )
    results |= {"partial": True} if scored.partial else {}
    results["qmamba"] = {
        "task": task.config(None if options.data is None else str(options.data)),
        "documents": {"original": found.original, "effective": len(table.documents)},
        "tokens": int(table.tokens.sum()),
        "scored": "tokens of the last word" if task.is_last_word else "tokens of a window but the first",
        "batch_size": options.batch_size,
        "seqlen": None if task.is_last_word else options.seqlen,
        "statistics": results.pop("statistics"),
        **_provenance(artifact, checkpoint, backend),
        "rows": {entry.name: entry.record() for entry in entries},
        "skipped": list(plan.skipped),
        "seconds": round(time.perf_counter() - started, 3),
    }
    notes = _notes(plan, missing, len(table.documents), task)
    return Comparison(results=results, table=table, partial=scored.partial, notes=notes)


def _notes(plan: Plan, missing: str, documents: int, task: Task) -> tuple[str, ...]:
    notes = [f"left out: {reason}" for reason in plan.skipped]
    if missing:
        notes.append(f"no float model to compare with: {missing}; name one with `--baseline MODEL`")
    if documents < FEW_CLUSTERS:
        what = "documents" if task.is_last_word else "windows"
        notes.append(
            f"{documents} {what} are few: bootstrap intervals of fewer than {FEW_CLUSTERS} are too narrow"
        )
    return tuple(notes)


def names_of(options: CompareOptions) -> list[str]:
    """Names of the modes that a comparison may have, the float model first.

    Raises:
        UsageError: an option is out of range.
    """
    plan = plan_entries(options.modes, options.changes, options.alphas, options.w_bits)
    return [float_entry().name, *(entry.name for entry in plan.entries)]


def _check_options(task: Task, options: CompareOptions) -> None:
    require_positive(batch_size=options.batch_size)
    if options.limit is not None:
        require_positive(limit=options.limit)
    check_seed(options.seed)
    require_text(task, options.data)


def _fingerprint(
    entries: Sequence[Entry],
    batches: Sequence[Batch],
    artifact: QuantizedArtifact,
    checkpoint: Checkpoint | None,
    backend: Backend,
) -> str:
    rows = [[entry.name, entry.record()] for entry in entries]
    # The file's path may change, its digest not.
    record = {**_provenance(artifact, checkpoint, backend), "artifact": artifact.digest, "rows": rows}
    return fingerprint_of(record, tensors_of(batches))


def _provenance(
    artifact: QuantizedArtifact, checkpoint: Checkpoint | None, backend: Backend
) -> Mapping[str, Any]:
    return {
        **quantized_provenance(artifact),
        "baseline": None
        if checkpoint is None
        else {"source": checkpoint.source, "digest": checkpoint.digest},
        "alpha": artifact.manifest.quantization.alpha,
        "backend": backend.name,
        "device": str(backend.device),
        "tool_version": tool_version(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
    }
