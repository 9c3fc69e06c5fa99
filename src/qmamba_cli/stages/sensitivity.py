"""Which tensor's quantization costs how much: each alone, and everything but each."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.artifacts.calibration import read_calibration
from qmamba_cli.artifacts.manifest import library_versions, tool_version
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import UsageError
from qmamba_cli.evaluation.divergence import CONFIDENCE, RESAMPLES
from qmamba_cli.evaluation.scoring import require_vocabulary
from qmamba_cli.evaluation.sensitivity import Row, Target, TensorError, linear_histogram
from qmamba_cli.evaluation.tasks import task_by_name
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.sites import SITES, site_key
from qmamba_cli.stages.common import matching_checkpoint, within_gpu_memory
from qmamba_cli.stages.fake_quantized import fake_quantizer
from qmamba_cli.stages.partial import Keeper, fingerprint_of, tensors_of
from qmamba_cli.stages.sensitivity_rows import Plan, Rows, Views, measured_rows, own_errors
from qmamba_cli.stages.task_batches import require_text, task_batches
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
        leave_one_out: also measure everything quantized but one tensor.
        per_token: also measure everything quantized, one tensor with one scale a token.
        backend: auto, cpu or cuda.
        tokenizer: a folder or Hub id to take the tokenizer from, or None for the model's own.
        offline: use only the Hub's local cache.
        keeper: where an interrupted measurement keeps what it has; with None an interrupt is raised.
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
    per_token: bool = False
    backend: str = "auto"
    tokenizer: str | None = None
    offline: bool = False
    keeper: Keeper | None = None

    @property
    def views(self) -> Views:
        """Which tables are asked for."""
        return Views(
            sites=self.per != "layer",
            layers=self.per != "site",
            leave_one_out=self.leave_one_out,
            per_token=self.per_token,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityReport:
    """What `sensitivity` found.

    Attributes:
        rows: the tables.
        histograms: calibration statistics of the worst activations.
        original: documents (windows) there were.
        context: how it was made: model, calibration, task, weights, alpha, versions, seconds.
    """

    rows: Rows
    histograms: Sequence[Mapping[str, Any]]
    original: int
    context: Mapping[str, Any]

    @property
    def partial(self) -> bool:
        """Whether it was interrupted."""
        return self.rows.partial

    def record(self) -> dict[str, Any]:
        """The report as one JSON object; the HTML page is made of it alone."""
        rows, everything = self.rows, self.rows.everything
        interval = everything.kl_interval
        return {
            "sites": [row.record() for row in rows.alone],
            "parts": [row.record() for row in rows.parts],
            "leave_one_out": [row.record() for row in rows.left_out],
            "per_token": [row.record() for row in rows.per_token],
            "everything": {
                "kl": everything.kl_mean,
                "kl_ci": None if interval is None else list(interval),
                "delta_ll": everything.delta_ll_mean,
            },
            "histograms": list(self.histograms),
            "n": {
                "documents": len(everything.tokens),
                "original": self.original,
                "tokens": int(everything.tokens.sum()),
            },
            "interval": f"{CONFIDENCE:.0%}, percentiles of {RESAMPLES} bootstrap resamples of documents",
            **({"partial": True} if rows.partial else {}),
            "qmamba": dict(self.context),
        }


def sensitivity(options: SensitivityOptions, *, progress: Progress = silent) -> SensitivityReport:
    """Measure what quantizing each tensor costs.

    Reads the calibration, its checkpoint and the task's texts; writes nothing but, when it is interrupted and
    an output is named, the measurements so far. Deterministic given these, the options and the machine.

    Raises:
        KeyboardInterrupt: it was interrupted before there was anything to show, or has no keeper.
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
    checkpoint = matching_checkpoint(
        calibration.manifest.model,
        str(path),
        model=options.model,
        tokenizer=options.tokenizer,
        offline=options.offline,
    )
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files)
    found = task_batches(
        task_by_name(options.task),
        tokenizer,
        data=options.data,
        text_column=options.text_column,
        limit=options.limit,
        batch_size=options.batch_size,
        seqlen=options.seqlen,
        offline=options.offline,
    )
    batches = found.batches
    with progress("quantizing layers", checkpoint.config.n_layer) as step:
        quantizer = fake_quantizer(
            checkpoint.config, checkpoint.load, options.recipe, scales, backend, on_layer=lambda: step(1)
        )
    require_vocabulary(quantizer.float_model(), batches)
    plan = Plan(options.views, checkpoint.config.n_layer)
    context = {
        **_context(options),
        "model": {"source": checkpoint.source, "digest": checkpoint.digest},
        "calibration": {"path": str(path), "digest": calibration.digest},
        "alpha": alpha,
        "layers": checkpoint.config.n_layer,
        "backend": backend.name,
    }
    record = {
        **context,
        # Paths may change, digests not.
        "data": None,
        "calibration": calibration.digest,
        "models": plan.record(),
        "recipe": repr(options.recipe),
    }
    with within_gpu_memory(options.batch_size):
        errors = own_errors(quantizer, batches, progress)
        rows = measured_rows(
            quantizer,
            plan,
            batches,
            errors,
            keeper=options.keeper,
            fingerprint=fingerprint_of(record, tensors_of(batches)),
            progress=progress,
        )
    return SensitivityReport(
        rows=rows,
        histograms=_histograms(rows.alone, errors, observers, alpha),
        original=found.original,
        context={**context, "seconds": round(time.perf_counter() - started, 3)},
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
    require_text(task_by_name(options.task), options.data)


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
