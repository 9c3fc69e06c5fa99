"""Stage 1: float checkpoint and text to a calibration artifact."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from qmamba_cli.artifacts.calibration import ENTRIES, write_calibration
from qmamba_cli.artifacts.checkpoint import Checkpoint, open_checkpoint
from qmamba_cli.artifacts.files import check_output
from qmamba_cli.artifacts.manifest import (
    CalibrationManifest,
    DatasetRecord,
    ShardRecord,
    SiteRecord,
    library_versions,
    tool_version,
)
from qmamba_cli.artifacts.partial import sole_run
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import UsageError
from qmamba_cli.evaluation.overlap import Overlap
from qmamba_cli.kernels.backend import Backend, select_backend
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.streaming import Observable, ResidentMamba, StreamedMamba, is_streamed
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.coverage import CoverageReport, coverage_report
from qmamba_cli.quant.histogram import check_alpha
from qmamba_cli.quant.observers import DEFAULT_ALPHA, ObserverSet, Reduction
from qmamba_cli.sites import SITES, ObserverKind, site_keys
from qmamba_cli.stages.calibration_text import all_samples, overlap_with
from qmamba_cli.stages.common import check_seed, model_record
from qmamba_cli.stages.distributed import SINGLE, World, joined, share_of
from qmamba_cli.stages.estimate import Estimate, Windows, estimate_calibration
from qmamba_cli.stages.observe import Observed, Part, Run, Stop, claimed_path, progress_path, together
from qmamba_cli.stages.spooled import float_model_on, is_spooled, spooled_model
from qmamba_cli.text import SELF, Samples
from qmamba_cli.tokenizer import Tokenizer

DTYPES = ("auto", "fp32", "fp16", "bf16")
# Their ids are in the manifest, whose size is bounded, see `files.json_excess`.
MAX_SAMPLES = 200_000


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
        force: replace an existing calibration, and start anew where one was interrupted.
        offline: use only the Hub's local cache.
        shard: (K, N) to observe only the K-th of N parts of the samples, from 1; None for all of them.
        resume: continue an interrupted calibration from its last save, if there is one.
        save_every: seconds between two saves of the progress; 0 saves after every batch.
        check_overlap: an evaluation file whose passages are looked for in the calibration text, or None.
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
    shard: tuple[int, int] | None = None
    resume: bool = False
    save_every: float = 30.0
    check_overlap: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateReport:
    """What `calibrate` made, or would make.

    Attributes:
        path: the artifact.
        digest: its content digest; empty after a dry run, where it was stopped, and beside rank 0.
        sites: number of observed sites.
        samples: token windows in the artifact: of a shard, its own.
        tokens: tokens in all.
        skipped_short: rows of the text that were too short.
        widest_clip: (site key, chosen absmax, observed absmax) where their ratio is smallest; None where
            nothing clips or after a dry run.
        device: where the forward passes ran.
        resumed_at: position of the sample it was continued from, or None.
        stopped_at: position of the sample it stopped before, or None where it reached the end.
        coverage: what was observed of every site; None without an artifact.
        overlap: passages shared with an evaluation file; None where none was named.
        estimate: after a dry run, what the calibration will need.
    """

    path: Path
    digest: str
    sites: int
    samples: int
    tokens: int
    skipped_short: int
    widest_clip: tuple[str, float, float] | None
    device: str
    resumed_at: int | None = None
    stopped_at: int | None = None
    coverage: CoverageReport | None = None
    overlap: Overlap | None = None
    estimate: Estimate | None = None


def never() -> bool:
    """A `Stop` that never does."""
    return False


def calibrate(
    options: CalibrateOptions,
    *,
    world: World = SINGLE,
    stop: Stop = never,
    progress: Progress = silent,
    dry_run: bool = False,
) -> CalibrateReport:
    """Observe the rotated float model on text and write the calibration artifact.

    Reads the checkpoint and the text; writes ``WORKDIR/calibration`` (a shard: ``calibration-K-of-N``) as a
    whole or not at all, and records it in the work folder. Deterministic given the checkpoint, the text, the
    options and the libraries' versions: a calibration that was stopped and continued, one of several
    processes and the merge of shards have the bytes of the plain one.

    Args:
        options: what is asked.
        world: the processes that share the work; each calls this with its own rank, and rank 0 writes.
        stop: asked after every batch; when it says so the progress is saved and the report says where.
        progress: told of every batch of this process.
        dry_run: check everything, observe and write nothing.

    Raises:
        UsageError: an option is out of range.
        ArtifactError: ``resume`` finds the progress of something else.
        QmambaError: the model, the text or the output cannot be used; its subclass says which.
    """
    _check_options(options)
    with joined(world, options.device) as group:
        job = _prepare(options, progress, dry_run=dry_run)
        if job.samples is None or dry_run:
            windows = Windows(
                samples=-(-job.report.samples // world.size),
                seqlen=options.seqlen,
                batch_size=options.batch_size,
                written=options.samples if options.dataset == SELF else 0,
            )
            return replace(job.report, estimate=estimate_calibration(job.checkpoint, job.backend, windows))
        plan = _plan(options, job, job.samples)
        with sole_run(progress_path(job.report.path, world)):
            path = claimed_path(job.report.path, world, resume=options.resume, force=options.force)
            first, end = share_of(job.first, job.end, options.batch_size, world.rank, world.size)
            part = Part(first=first, end=end, path=path, save_every=options.save_every)
            run = Run(plan, part, resume=options.resume)
            report = replace(job.report, resumed_at=run.next if run.next > first else None)
            model = _observable(job)
            if not run.advance(model, job.samples.tokens, group=group, stop=stop, progress=progress):
                return replace(report, stopped_at=run.next)
            observed = together(run.observed, plan, group, part)
            if observed is not None:
                workdir = Workdir(options.workdir)
                report = write_artifact(workdir, plan, observed, report, force=options.force)
            # The progress stays until the artifact is there.
            group.meet()
            path.unlink(missing_ok=True)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is known before anything is observed."""

    checkpoint: Checkpoint
    backend: Backend
    model: Mamba | None
    samples: Samples | None
    first: int
    end: int
    report: CalibrateReport


def _prepare(options: CalibrateOptions, progress: Progress, *, dry_run: bool) -> _Job:
    backend = select_backend(options.device)
    target = _target(Workdir(options.workdir), options.shard)
    check_output(target, force=options.force, directory=True, known=ENTRIES)
    checkpoint = open_checkpoint(options.model, tokenizer=options.tokenizer, offline=options.offline)
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files)
    # Before the text is read, which may take long.
    first, end = _bounds(options)
    # The text of `self` comes from the model; any other is read before the model is loaded.
    model: Mamba | None = None
    writer: AbstractContextManager[Mamba] | None = None
    if options.dataset == SELF and not dry_run:
        if is_spooled(checkpoint.config, backend):
            writer = spooled_model(checkpoint, backend, options.workdir)
        else:
            model = float_model_on(checkpoint, backend)
            writer = nullcontext(model)
    samples = all_samples(options, tokenizer, writer, progress)
    overlap = None
    if options.check_overlap is not None and samples is not None:
        observed = samples.tokens[first:end]
        overlap = overlap_with(options.check_overlap, options.text_column, tokenizer, observed)
    report = CalibrateReport(
        path=target,
        digest="",
        sites=len(site_keys(checkpoint.config.n_layer)),
        samples=end - first,
        tokens=(end - first) * options.seqlen,
        skipped_short=0 if samples is None else samples.skipped_short,
        widest_clip=None,
        device=backend.name,
        overlap=overlap,
    )
    return _Job(
        checkpoint=checkpoint,
        backend=backend,
        model=model,
        samples=samples,
        first=first,
        end=end,
        report=report,
    )


def _target(workdir: Workdir, shard: tuple[int, int] | None) -> Path:
    path = workdir.calibration_path
    return path if shard is None else path.with_name(f"{path.name}-{shard[0]}-of-{shard[1]}")


def _bounds(options: CalibrateOptions) -> tuple[int, int]:
    """First sample of this artifact, and the one behind its last."""
    if options.shard is None:
        return 0, options.samples
    number, count = options.shard
    first, end = share_of(0, options.samples, options.batch_size, number - 1, count)
    if first == end:
        batches = -(-options.samples // options.batch_size)
        raise UsageError(
            f"`--shard {number}/{count}` has nothing to do, got {batches} batches of {options.batch_size} "
            f"samples, expected at least {count}",
            hint=f"take at most {batches} shards, or a smaller `--batch-size` in all of them",
        )
    return first, end


def _check_options(options: CalibrateOptions) -> None:
    check_alpha(options.alpha)
    for name in ("samples", "seqlen", "batch_size"):
        value = getattr(options, name)
        if value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")
    if options.samples > MAX_SAMPLES:
        raise UsageError(
            f"`--samples` must be at most {MAX_SAMPLES}, got {options.samples}",
            hint="take a larger `--seqlen`; a calibration gains little beyond some thousand samples",
        )
    check_seed(options.seed)
    if options.shard is not None and not 1 <= options.shard[0] <= options.shard[1]:
        number, count = options.shard
        raise UsageError(f"`--shard` out of range, got {number}/{count}, expected K/N with 1 <= K <= N")
    if not options.save_every >= 0:
        raise UsageError(f"`--save-every` must be at least 0 seconds, got {options.save_every}")
    if options.dtype not in DTYPES:
        raise UsageError(f"unknown dtype `{options.dtype}`, expected one of {', '.join(DTYPES)}")
    if options.dtype not in ("auto", "fp32"):
        raise UsageError(
            f"`--dtype {options.dtype}` needs a GPU, got the `cpu` backend, which computes in fp32",
            hint="leave `--dtype` out",
        )


def _observable(job: _Job) -> Observable:
    """The model to watch: whole where it is in memory already or small enough, else block by block."""
    checkpoint = job.checkpoint
    if job.model is None and is_streamed(checkpoint.config):
        return StreamedMamba(checkpoint.config, checkpoint.load, job.backend)
    return ResidentMamba(job.model or float_model_on(checkpoint, job.backend))


def _widest_clip(observers: ObserverSet) -> tuple[str, float, float] | None:
    clips = [
        (key, observers[key].absmax(), observers[key].histogram.absmax)
        for key in observers
        if observers[key].kind is ObserverKind.PERCENTILE
    ]
    clipped = [clip for clip in clips if clip[1] < clip[2]]
    return min(clipped, key=lambda clip: clip[1] / clip[2], default=None)


def _plan(options: CalibrateOptions, job: _Job, samples: Samples) -> CalibrationManifest:
    """The manifest of the artifact to be, without what is observed."""
    shard = None
    if options.shard is not None:
        number, count = options.shard
        shard = ShardRecord(number=number, count=count, first=job.first, samples=job.end - job.first)
    return CalibrationManifest(
        tool_version=tool_version(),
        model=model_record(job.checkpoint),
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
        device=job.backend.name,
        shard=shard,
        sites={},
        created_by=library_versions(),
    )


def write_artifact(
    workdir: Workdir, plan: CalibrationManifest, observed: Observed, report: CalibrateReport, *, force: bool
) -> CalibrateReport:
    """Write what was observed to ``report.path``; a whole calibration is recorded in the work folder.

    Args:
        workdir: the work folder.
        plan: the manifest, without sites.
        observed: the state of the observers.
        report: what is known so far.
        force: replace an existing artifact.

    Returns:
        The report with its digest, its widest clip and its coverage.

    Raises:
        QmambaError: it cannot be written.
    """
    observers = observed.observers
    written = write_calibration(
        report.path,
        manifest=plan.model_copy(update={"sites": site_records(observers, plan.alpha)}),
        scales=observers.scales(),
        statistics=observers.arrays(),
        coverage=observed.coverage.arrays(),
        force=force,
    )
    if plan.shard is None:
        workdir.record_calibration(report.path, written.content_digest)
    return replace(
        report,
        digest=written.content_digest,
        widest_clip=_widest_clip(observers),
        coverage=coverage_report(observers, observed.coverage, observers.absmaxes()),
    )


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
