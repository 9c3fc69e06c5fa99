"""Which tensor's quantization costs how much: each alone, and everything but each."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.artifacts.calibration import CalibrationArtifact, read_calibration
from qmamba_cli.artifacts.checkpoint import Checkpoint, open_checkpoint
from qmamba_cli.artifacts.manifest import library_versions, tool_version
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.evaluation.batches import Batch, last_word_requests, request_batches, window_batches
from qmamba_cli.evaluation.divergence import CONFIDENCE, RESAMPLES, Outcome, compare_with_float
from qmamba_cli.evaluation.documents import (
    load_lambada_openai,
    load_lastword,
    perplexity_windows,
    read_text_documents,
)
from qmamba_cli.evaluation.scoring import require_vocabulary
from qmamba_cli.evaluation.sensitivity import (
    Row,
    Target,
    TensorError,
    alone,
    left_out,
    linear_histogram,
)
from qmamba_cli.evaluation.tasks import task_by_name
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.sites import SITES, site_key
from qmamba_cli.stages.common import within_gpu_memory
from qmamba_cli.stages.fake_quantized import (
    TABLES,
    FakeQuantizer,
    activation_targets,
    fake_quantizer,
    part_targets,
    weight_targets,
)
from qmamba_cli.tokenizer import Tokenizer

VIEWS = ("site", "layer", "both")
# Histograms on the page, and their bars.
_HISTOGRAMS = 6
_BARS = 72


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityOptions:
    """What `sensitivity` is asked; the defaults are the command line's.

    Attributes:
        model: the float checkpoint, or None for the one the calibration names.
        workdir: the work folder.
        calibration: the calibration folder, or None for the work folder's last one.
        task: name of a built-in task.
        data: a file in place of the task's own texts.
        text_column: field that holds the text of a .jsonl.
        limit: documents (windows) to score, or None for all.
        batch_size: documents a forward pass.
        seqlen: tokens a window of the perplexity task.
        per: site (all layers at once), layer (each layer's tensors one at a time) or both.
        recipe: formats of the weights.
        alpha: quantile of the Percentile sites, or None for the calibration's.
        leave_one_out: also measure everything quantized but one site.
        backend: auto, cpu or cuda.
        tokenizer: a folder or Hub id to take the tokenizer from, or None for the model's own.
        offline: use only the Hub's local cache.
    """

    model: str | None = None
    workdir: Path = Path("qmamba-artifacts")
    calibration: Path | None = None
    task: str = "perplexity"
    data: Path | None = None
    text_column: str = "text"
    limit: int | None = None
    batch_size: int = 16
    seqlen: int = 512
    per: str = "site"
    recipe: Recipe = field(default_factory=Recipe)
    alpha: float | None = None
    leave_one_out: bool = True
    backend: str = "auto"
    tokenizer: str | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityReport:
    """What `sensitivity` found.

    Attributes:
        rows: tensors quantized one at a time, the most expensive first.
        parts: the tensors that share a site's scale, likewise.
        left_out: everything quantized but one site, the one that helps most first; empty where not asked.
        everything: all tensors quantized.
        histograms: calibration statistics of the worst activations.
        documents: scored documents (windows).
        original: documents (windows) there were.
        tokens: scored tokens.
        context: how it was made: model, calibration, task, weights, alpha, versions, seconds.
    """

    rows: Sequence[Row]
    parts: Sequence[Row]
    left_out: Sequence[Row]
    everything: Outcome
    histograms: Sequence[Mapping[str, Any]]
    documents: int
    original: int
    tokens: int
    context: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """The report as one JSON object; the HTML page is made of it alone."""
        interval = self.everything.kl_interval
        return {
            "sites": [row.record() for row in self.rows],
            "parts": [row.record() for row in self.parts],
            "leave_one_out": [row.record() for row in self.left_out],
            "everything": {
                "kl": self.everything.kl_mean,
                "kl_ci": None if interval is None else list(interval),
                "delta_ll": self.everything.delta_ll_mean,
            },
            "histograms": list(self.histograms),
            "n": {"documents": self.documents, "original": self.original, "tokens": self.tokens},
            "interval": f"{CONFIDENCE:.0%}, percentiles of {RESAMPLES} bootstrap resamples of documents",
            "qmamba": dict(self.context),
        }


def sensitivity(options: SensitivityOptions, *, progress: Progress = silent) -> SensitivityReport:
    """Measure what quantizing each tensor costs.

    Reads the calibration, its checkpoint and the task's texts; writes nothing. Deterministic given these, the
    options and the machine.

    Raises:
        UsageError: an option is out of range or does not belong to the task.
        ArtifactError: the calibration is damaged or belongs to another checkpoint.
        QmambaError: the model or the texts cannot be used.
    """
    _check_options(options)
    started = time.perf_counter()
    backend = select_backend(options.backend)
    path = options.calibration or Workdir(options.workdir).resolve_calibration().path
    calibration = read_calibration(path)
    observers = ObserverSet.from_arrays(
        calibration.statistics,
        MambaConfig.from_dict(dict(calibration.manifest.model.config)).n_layer,
        alpha=calibration.manifest.alpha,
        reduction=Reduction(calibration.manifest.reduction),
    )
    alpha = calibration.manifest.alpha if options.alpha is None else options.alpha
    scales = observers.scales(alpha)
    checkpoint = _matching_checkpoint(options, calibration, path)
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files)
    batches, original = task_batches(options, tokenizer)
    with progress("quantizing layers", checkpoint.config.n_layer) as step:
        quantizer = fake_quantizer(
            checkpoint.config, checkpoint.load, options.recipe, scales, backend, on_layer=lambda: step(1)
        )
    require_vocabulary(quantizer.float_model(), batches)
    with within_gpu_memory(options.batch_size):
        errors = _own_errors(quantizer, batches, progress)
        rows, parts, without, everything = _measure(quantizer, batches, errors, options, progress)
    return SensitivityReport(
        rows=rows,
        parts=parts,
        left_out=without,
        everything=everything,
        histograms=_histograms(rows, errors, observers, alpha),
        documents=len(everything.tokens),
        original=original,
        tokens=int(everything.tokens.sum()),
        context={
            **_context(options),
            "model": {"source": checkpoint.source, "digest": checkpoint.digest},
            "calibration": {"path": str(path), "digest": calibration.digest},
            "alpha": alpha,
            "layers": checkpoint.config.n_layer,
            "backend": backend.name,
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def _context(options: SensitivityOptions) -> dict[str, Any]:
    """What the options and this installation alone say."""
    return {
        "command": "sensitivity",
        "task": options.task,
        "data": None if options.data is None else str(options.data),
        "seqlen": None if task_by_name(options.task).is_last_word else options.seqlen,
        "batch_size": options.batch_size,
        "weights": f"W{options.recipe.w_bits}A8",
        "group_size": options.recipe.group_size,
        "tool_version": tool_version(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
    }


def _check_options(options: SensitivityOptions) -> None:
    for name in ("limit", "batch_size", "seqlen"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")
    if options.per not in VIEWS:
        raise UsageError(f"unknown `--per {options.per}`, expected one of {', '.join(VIEWS)}")
    task = task_by_name(options.task)
    if not task.is_last_word and options.data is None:
        raise UsageError(
            f"`--task {task.name}` needs a text", hint="add `--task-data FILE`, a .txt or a .jsonl"
        )


def task_batches(options: SensitivityOptions, tokenizer: Tokenizer) -> tuple[list[Batch], int]:
    """The batches of the task that is asked for, and how many documents (windows) it has in all.

    Raises:
        DatasetError: the texts are missing or malformed.
    """
    task = task_by_name(options.task)
    if not task.is_last_word:
        assert options.data is not None
        texts = read_text_documents(options.data, column=options.text_column)
        windows = perplexity_windows(tokenizer, texts, options.seqlen)
        return window_batches(windows[: options.limit], batch_size=options.batch_size), len(windows)
    if options.data is not None:
        documents = read_text_documents(options.data, column=options.text_column)
    elif task.name == "lastword":
        documents = load_lastword()
    else:
        documents = load_lambada_openai(offline=options.offline)
    requests = last_word_requests(tokenizer, documents[: options.limit])
    return request_batches(requests, batch_size=options.batch_size), len(documents)


def _matching_checkpoint(
    options: SensitivityOptions, calibration: CalibrationArtifact, path: Path
) -> Checkpoint:
    record = calibration.manifest.model
    source = options.model or record.source
    checkpoint = open_checkpoint(source, tokenizer=options.tokenizer, offline=options.offline)
    if checkpoint.digest != record.digest:
        raise ArtifactError(
            f"calibration `{path}` was made for another checkpoint: the weights of `{source}` differ from "
            f"those of `{record.source}`, which it names",
            hint=f"calibrate this one (`qmamba calibrate {source} --force`), or name the other",
        )
    return checkpoint


def _own_errors(
    quantizer: FakeQuantizer, batches: Sequence[Batch], progress: Progress
) -> dict[Target, TensorError]:
    """Errors of every tensor's own grid, activations as the float model makes them."""
    errors, observe = quantizer.observe_errors()
    model = quantizer.float_model()
    with progress("observing the float model", len(batches)) as advance:
        for batch in batches:
            model.forward(batch.ids, hook=observe)
            advance(1)
    return errors | quantizer.errors


def _measure(
    quantizer: FakeQuantizer,
    batches: Sequence[Batch],
    errors: Mapping[Target, TensorError],
    options: SensitivityOptions,
    progress: Progress,
) -> tuple[list[Row], list[Row], list[Row], Outcome]:
    """Rows of single tensors, of parts of tensors and of what is left out, and everything quantized."""
    layers = quantizer.config.n_layer
    tables = Target(site=TABLES)
    everything = frozenset([*activation_targets(), *weight_targets()])
    by_site = sorted(everything, key=lambda target: target.label) if options.per != "layer" else []
    by_layer = [
        target
        for layer in range(layers if options.per != "site" else 0)
        for target in (*activation_targets(layer), *weight_targets(layer))
    ]
    if by_layer:
        by_layer.append(tables)
    parts = part_targets()
    without = sorted(everything, key=lambda target: target.label) if options.leave_one_out else []
    # Each combination once, whichever views show it.
    chosen = list(
        dict.fromkeys(
            [
                *(frozenset([target]) for target in (*by_site, *by_layer, *parts)),
                *(everything - {target} for target in without),
                everything,
            ]
        )
    )
    models = [quantizer.model(targets) for targets in chosen]
    with progress("measuring tensors", len(models) * len(batches)) as advance:
        measured = compare_with_float(quantizer.float_model(), models, batches, advance=advance)
    outcome = dict(zip(chosen, measured, strict=True))

    def rank(targets: Sequence[Target]) -> list[Row]:
        return alone({target: outcome[frozenset([target])] for target in targets}, errors, layers)

    rows = {row.target: row for row in (*rank(by_layer), *rank(by_site))}
    return (
        sorted(rows.values(), key=lambda row: row.cost, reverse=True),
        rank(parts),
        left_out(
            {target: outcome[everything - {target}] for target in without},
            outcome[everything],
            errors,
            layers,
        ),
        outcome[everything],
    )


def _histograms(
    rows: Sequence[Row], errors: Mapping[Target, TensorError], observers: ObserverSet, alpha: float
) -> list[dict[str, Any]]:
    """What calibration saw at the worst activations, with the absmax that was chosen.

    A row that is all layers at once shows the layer whose grid loses most.
    """
    worst: list[Target] = []
    absmaxes = observers.absmaxes(alpha)
    layered = any(row.target.layer is not None for row in rows)
    for row in rows:
        target = row.target
        if target.site not in SITES or (target.layer is None and layered):
            continue
        if target.layer is None:
            candidates = [other for other in errors if other.site == target.site and other.part is None]
            target = min(candidates, key=lambda one: errors[one].sqnr_db or math.inf)
        worst.append(target)
    histograms = []
    for target in worst[:_HISTOGRAMS]:
        key = site_key(target.site, target.layer)
        edges, counts = linear_histogram(observers[key].histogram, _BARS)
        histograms.append(
            {
                "site": target.site,
                "layer": target.layer,
                "edges": edges,
                "counts": counts,
                "clip": absmaxes[key],
                "absmax": observers[key].histogram.absmax,
                "sqnr_db": errors[target].sqnr_db,
            }
        )
    return histograms
