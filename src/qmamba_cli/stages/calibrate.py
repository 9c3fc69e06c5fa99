"""Stage 1: float checkpoint and text to a calibration artifact."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.artifacts.calibration import ENTRIES, write_calibration
from qmamba_cli.artifacts.checkpoint import Checkpoint, open_checkpoint
from qmamba_cli.artifacts.files import check_output
from qmamba_cli.artifacts.manifest import (
    CalibrationManifest,
    DatasetRecord,
    SiteRecord,
    library_versions,
    tool_version,
)
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import UsageError
from qmamba_cli.kernels.backend import Backend, select_backend
from qmamba_cli.model.generate import sample_sequences
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.modes import MODES
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.histogram import check_alpha
from qmamba_cli.quant.observers import DEFAULT_ALPHA, ObserverSet, Reduction
from qmamba_cli.sites import SITES, ObserverKind
from qmamba_cli.stages.common import check_seed, model_record, within_gpu_memory
from qmamba_cli.text import SELF, Samples, choose_samples, open_documents, sample_from_model
from qmamba_cli.tokenizer import Tokenizer

DTYPES = ("auto", "fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What `calibrate` is asked; the defaults are the command line's.

    Attributes:
        model: a folder, a Hub id or ``demo``.
        workdir: the work folder; the artifact is its ``calibration/``.
        samples: token windows to observe.
        seqlen: tokens a window.
        batch_size: windows a forward pass.
        dataset: ``bundled``, ``self``, a file or a Hub name.
        text_column: field that holds the text.
        seed: of the choice of samples and of ``self``.
        shuffle: draw the samples in seeded order, else in the order of the source.
        alpha: quantile of the Percentile sites, in (0.5, 1].
        reduction: how samples are joined at the Percentile sites.
        device: auto, cpu or cuda.
        dtype: auto or fp32 on the CPU.
        tokenizer: a folder or Hub id to take the tokenizer from, or None for the model's own.
        force: replace an existing calibration.
        offline: use only the Hub's local cache.
    """

    model: str
    workdir: Path = Path("qmamba-artifacts")
    samples: int = 512
    seqlen: int = 512
    batch_size: int = 8
    dataset: str = "bundled"
    text_column: str = "text"
    seed: int = 0
    shuffle: bool = True
    alpha: float = DEFAULT_ALPHA
    reduction: Reduction = Reduction.GLOBAL
    device: str = "auto"
    dtype: str = "auto"
    tokenizer: str | None = None
    force: bool = False
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateReport:
    """What `calibrate` made, or would make.

    Attributes:
        path: the artifact.
        digest: its content digest; empty after a dry run.
        sites: number of observed sites.
        samples: token windows.
        tokens: tokens in all.
        skipped_short: rows of the text that were too short.
        widest_clip: (site key, chosen absmax, observed absmax) where their ratio is smallest; None where
            nothing clips or after a dry run.
        device: where the forward passes ran.
    """

    path: Path
    digest: str
    sites: int
    samples: int
    tokens: int
    skipped_short: int
    widest_clip: tuple[str, float, float] | None
    device: str


def calibrate(
    options: CalibrateOptions, *, progress: Progress = silent, dry_run: bool = False
) -> CalibrateReport:
    """Observe the rotated float model on text and write the calibration artifact.

    Reads the checkpoint and the text; writes ``WORKDIR/calibration`` as a whole or not at all, and records it
    in the work folder. Deterministic given the checkpoint, the text, the options and the libraries' versions.

    Raises:
        UsageError: an option is out of range.
        QmambaError: the model, the text or the output cannot be used; its subclass says which.
    """
    _check_options(options)
    backend = select_backend(options.device)
    workdir = Workdir(options.workdir)
    check_output(workdir.calibration_path, force=options.force, directory=True, known=ENTRIES)
    checkpoint = open_checkpoint(options.model, tokenizer=options.tokenizer, offline=options.offline)
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files)
    observers = ObserverSet(checkpoint.config.n_layer, alpha=options.alpha, reduction=options.reduction)
    if options.dataset == SELF and dry_run:
        samples = None
    elif options.dataset == SELF:
        model = _float_model(checkpoint, backend)
        samples = _sample_from_model(model, tokenizer, options, progress)
    else:
        documents = open_documents(options.dataset, text_column=options.text_column, offline=options.offline)
        samples = choose_samples(
            documents,
            tokenizer,
            samples=options.samples,
            seqlen=options.seqlen,
            seed=options.seed,
            shuffle=options.shuffle,
        )
    digest, widest = "", None
    if not dry_run and samples is not None:
        if options.dataset != SELF:
            model = _float_model(checkpoint, backend)
        _observe(model, samples.tokens, observers, options.batch_size, progress)
        widest = _widest_clip(observers)
        digest = _write(workdir, checkpoint, observers, samples, options, backend.name)
    return CalibrateReport(
        path=workdir.calibration_path,
        digest=digest,
        sites=len(observers),
        samples=options.samples,
        tokens=options.samples * options.seqlen,
        skipped_short=0 if samples is None else samples.skipped_short,
        widest_clip=widest,
        device=backend.name,
    )


def _check_options(options: CalibrateOptions) -> None:
    check_alpha(options.alpha)
    for name in ("samples", "seqlen", "batch_size"):
        value = getattr(options, name)
        if value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")
    check_seed(options.seed)
    if options.dtype not in DTYPES:
        raise UsageError(f"unknown dtype `{options.dtype}`, expected one of {', '.join(DTYPES)}")
    if options.dtype not in ("auto", "fp32"):
        raise UsageError(
            f"`--dtype {options.dtype}` needs a GPU, got the `cpu` backend, which computes in fp32",
            hint="leave `--dtype` out",
        )


def _float_model(checkpoint: Checkpoint, backend: Backend) -> Mamba:
    weights = float_model(checkpoint.config, checkpoint.load)
    return Mamba(weights, MODES["fp"], backend)


def _sample_from_model(
    model: Mamba, tokenizer: Tokenizer, options: CalibrateOptions, progress: Progress
) -> Samples:
    vocab_size = min(tokenizer.vocab_size, model.vocab_size)
    with progress("sampling text from the model", options.samples) as advance:

        def generate(start: NDArray[np.int64], *, length: int, seed: int) -> NDArray[np.int64]:
            batch = sample_sequences(model, start, length=length, seed=seed, vocab_size=vocab_size)
            advance(len(start))
            return batch

        return sample_from_model(
            generate,
            samples=options.samples,
            seqlen=options.seqlen,
            seed=options.seed,
            vocab_size=vocab_size,
            start_id=tokenizer.prefix_id,
        )


def _observe(
    model: Mamba, tokens: NDArray[np.int32], observers: ObserverSet, batch_size: int, progress: Progress
) -> None:
    """Forward passes, one batch in memory at a time. Windows are full, so nothing observed is padding."""
    with progress("calibrating", len(tokens)) as advance:
        for start in range(0, len(tokens), batch_size):
            batch = torch.from_numpy(tokens[start : start + batch_size].astype(np.int64))
            with within_gpu_memory(batch_size):
                model.forward(batch, hook=observers.observe)
            advance(len(batch))


def _widest_clip(observers: ObserverSet) -> tuple[str, float, float] | None:
    clips = [
        (key, observers[key].absmax(), observers[key].histogram.absmax)
        for key in observers
        if observers[key].kind is ObserverKind.PERCENTILE
    ]
    clipped = [clip for clip in clips if clip[1] < clip[2]]
    return min(clipped, key=lambda clip: clip[1] / clip[2], default=None)


def _write(
    workdir: Workdir,
    checkpoint: Checkpoint,
    observers: ObserverSet,
    samples: Samples,
    options: CalibrateOptions,
    device: str,
) -> str:
    manifest = CalibrationManifest(
        tool_version=tool_version(),
        model=model_record(checkpoint),
        dataset=DatasetRecord(
            dataset=samples.dataset,
            digest=samples.digest,
            text_column=None if samples.dataset in (SELF, "bundled") else options.text_column,
            sample_ids=samples.ids,
            shuffle=options.shuffle,
            seed=options.seed,
            samples=len(samples.ids),
            seqlen=options.seqlen,
            tokens=int(samples.tokens.size),
            batch_size=options.batch_size,
        ),
        alpha=options.alpha,
        reduction=options.reduction.value,
        dtype="fp32",
        device=device,
        sites=site_records(observers, options.alpha),
        created_by=library_versions(),
    )
    written = write_calibration(
        workdir.calibration_path,
        manifest=manifest,
        scales=observers.scales(),
        statistics=observers.arrays(),
        force=options.force,
    )
    workdir.record_calibration(workdir.calibration_path, written.content_digest)
    return written.content_digest


def site_records(observers: ObserverSet, alpha: float) -> dict[str, SiteRecord]:
    """Manifest records of every site at one alpha."""
    absmaxes = observers.absmaxes(alpha)
    return {
        key: SiteRecord(
            observer=SITES[key.rpartition(".")[2]].observer,
            alpha=alpha if observers[key].kind is ObserverKind.PERCENTILE else None,
            absmax=absmaxes[key],
            observations=observers[key].histogram.count,
        )
        for key in observers
    }
