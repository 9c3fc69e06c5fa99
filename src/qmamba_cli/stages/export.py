"""Stage 2: checkpoint and calibration to one self-contained quantized file, or to a folder for the Hub."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.artifacts.calibration import CalibrationArtifact, read_calibration
from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.artifacts.checkpoint_tokenizer import TOKENIZER_FILES
from qmamba_cli.artifacts.entries import FILES_PREFIX
from qmamba_cli.artifacts.files import check_output
from qmamba_cli.artifacts.folder import known_entries, write_folder
from qmamba_cli.artifacts.manifest import (
    CalibrationReference,
    QuantizationRecord,
    QuantizedManifest,
    SiteRecord,
    library_versions,
    tool_version,
)
from qmamba_cli.artifacts.quantized import write_quantized
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.safetensors_io import TensorSource
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import UsageError
from qmamba_cli.model.quantize import Recipe, planned_tensors, quantized_tensors, weight_schemes
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.grid import Scale
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.sites import SITES, X_PROJ_INPUT, site_key
from qmamba_cli.stages.calibrate import site_records
from qmamba_cli.stages.common import matching_checkpoint
from qmamba_cli.stages.estimate import export_seconds
from qmamba_cli.stages.folder import FolderOptions, card_results, model_card
from qmamba_cli.stages.parts import Part, bits_per_weight, export_memory, parts_of
from qmamba_cli.stages.recipes import SAMPLES, best_scales, fitted_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What `export` is asked; the defaults are the command line's.

    Attributes:
        out: the file to write, or the folder.
        folder: write a model folder, with these options; None for one file.
        workdir: the work folder.
        recipe: formats of the weights.
        alpha: quantile of the Percentile sites, or None for the calibration's.
        calibration: the calibration folder, or None for the work folder's last one.
        model: the float checkpoint, or None for the one the calibration names.
        tokenizer: a folder or Hub id to take the tokenizer from, or None for the model's own.
        force: replace an existing file.
        offline: use only the Hub's local cache.
        device: where the best recipe runs the calibration's text: auto, cpu or cuda.
    """

    out: Path
    folder: FolderOptions | None = None
    workdir: Path = Path("qmamba-artifacts")
    recipe: Recipe = field(default_factory=Recipe)
    alpha: float | None = None
    calibration: Path | None = None
    model: str | None = None
    tokenizer: str | None = None
    force: bool = False
    offline: bool = False
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What `export` made, or would make.

    Attributes:
        path: the file or folder.
        digest: its content digest, the same for both; empty after a dry run.
        bytes: size of the file, or of the files in the folder; after a dry run, of the data in it.
        bits_per_weight: over the whole model, scales included, tokenizer not.
        parts: sizes, largest first.
        sizes: tensor → bytes, the tokenizer's files included.
        files: number of files.
        memory_bytes: memory that the work takes beside the program itself, about.
        seconds: after a dry run, a guess of what the work takes within a factor of about two; else 0.
        config: sizes of the model.
        notes: what the recipe could not do, in sentences.
    """

    path: Path
    digest: str
    bytes: int
    bits_per_weight: float
    parts: tuple[Part, ...]
    sizes: Mapping[str, int]
    files: int
    memory_bytes: int
    config: MambaConfig
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def export(options: ExportOptions, *, progress: Progress = silent, dry_run: bool = False) -> ExportReport:
    """Quantize the weights, join them with the activation scales and write one file or one folder.

    Reads the calibration artifact and the checkpoint it was made for; writes ``options.out`` as a whole or
    not at all, and records it in the work folder. Identical inputs give identical bytes. One layer is in
    memory at a time: what is quantized waits on the disk of ``options.out``, in a file of the same size.

    Raises:
        UsageError: an option is out of range.
        ArtifactError: the calibration is damaged or belongs to another checkpoint.
        QmambaError: the model or the output cannot be used.
    """
    _check_output(options)
    workdir = Workdir(options.workdir)
    calibration_path = options.calibration or workdir.resolve_calibration().path
    calibration = read_calibration(calibration_path)
    results = () if options.folder is None else card_results(options.folder, calibration.manifest)
    observers = ObserverSet.from_arrays(
        calibration.statistics,
        MambaConfig.from_dict(dict(calibration.manifest.model.config)).n_layer,
        alpha=calibration.manifest.alpha,
        reduction=Reduction(calibration.manifest.reduction),
    )
    alpha = calibration.manifest.alpha if options.alpha is None else options.alpha
    best = options.recipe.method == "best"
    if best and options.alpha is not None:
        raise UsageError(
            f"`--alpha` belongs to `--recipe plain`, got {options.alpha} with `--recipe best`",
            hint="leave `--alpha` out: the best recipe chooses every clip from the histograms",
        )
    scales: dict[str, Scale] = dict(observers.scales(alpha))
    records = site_records(observers, alpha)
    if best:
        scales, records = best_scales(observers, calibration.coverage)
    checkpoint = matching_checkpoint(
        calibration.manifest.model,
        str(calibration_path),
        model=options.model,
        tokenizer=options.tokenizer,
        offline=options.offline,
    )
    files = checkpoint.tokenizer_files
    if dry_run:
        sizes = planned_tensors(checkpoint.config, options.recipe, _log_dtype(checkpoint))
        sizes |= {name: row.nbytes for name, row in scale_tensors(scales, checkpoint.config.n_layer).items()}
        text = calibration.manifest.dataset
        fitted = min(text.samples, SAMPLES) * text.seqlen if best and options.recipe.w_bits == 4 else 0
        return replace(
            _report(options, "", sizes, files, checkpoint.config, scales),
            memory_bytes=export_memory(checkpoint.config, fitted),
            seconds=export_seconds(checkpoint, options.recipe, fitted),
        )

    def tensors(advance: Callable[[int], None]) -> Iterator[tuple[str, TensorSource]]:
        yield from quantized_tensors(
            checkpoint.config,
            checkpoint.load,
            options.recipe,
            scales=scales,
            blocks=blocks,
            on_layer=lambda: advance(1),
        )
        yield from scale_tensors(scales, checkpoint.config.n_layer).items()

    manifest = _manifest(options, calibration, records, checkpoint, alpha)
    blocks = fitted_blocks(options, checkpoint, calibration.manifest, scales, progress) if best else None
    with progress("quantizing layers", checkpoint.config.n_layer) as advance:
        if options.folder is None:
            written = write_quantized(
                options.out, tensors=tensors(advance), files=files, manifest=manifest, force=options.force
            )
        else:
            base_model = options.folder.base_model
            written = write_folder(
                options.out,
                tensors=tensors(advance),
                files=files,
                manifest=manifest,
                card=lambda sealed: model_card(sealed, results, base_model),
                max_shard_bytes=options.folder.max_shard_bytes,
                force=options.force,
            )
    workdir.record_export(options.out, written.content_digest)
    sizes = {
        name: TensorInfo(record.dtype, record.shape).nbytes
        for name, record in written.tensors.items()
        if not name.startswith(FILES_PREFIX)
    }
    return _report(options, written.content_digest, sizes, files, checkpoint.config, scales)


def _check_output(options: ExportOptions) -> None:
    if options.folder is None:
        check_output(options.out, force=options.force)
    else:
        # The tokenizer's names are not known yet; the writer looks again, with them.
        known = known_entries(options.out, TOKENIZER_FILES)
        check_output(options.out, force=options.force, directory=True, known=known)


def scale_tensors(scales: Mapping[str, Scale], n_layer: int) -> dict[str, NDArray[np.float32]]:
    """One float32 tensor a site, ``scales.<site>``: (n_layer,), or (1,) for a site of the whole model.

    Where each channel has a scale it is (n_layer, channels).
    """
    layers: dict[bool, Sequence[int | None]] = {True: range(n_layer), False: (None,)}
    return {
        f"scales.{site.name}": np.array(
            [np.asarray(scales[site_key(site.name, layer)]) for layer in layers[site.per_layer]],
            dtype=np.float32,
        )
        for site in SITES.values()
    }


def _manifest(
    options: ExportOptions,
    calibration: CalibrationArtifact,
    sites: dict[str, SiteRecord],
    checkpoint: Checkpoint,
    alpha: float,
) -> QuantizedManifest:
    recipe = options.recipe
    schemes = weight_schemes(checkpoint.config, recipe)
    return QuantizedManifest(
        tool_version=tool_version(),
        model=calibration.manifest.model,
        calibration=CalibrationReference(
            digest=calibration.digest,
            dataset=calibration.manifest.dataset,
            alpha=calibration.manifest.alpha,
            reduction=calibration.manifest.reduction,
        ),
        quantization=QuantizationRecord(
            recipe="best" if recipe.method == "best" else "plain",
            w_bits=4 if recipe.w_bits == 4 else 8,
            group_size=recipe.group_size if any(name.startswith("w4") for name in schemes.values()) else None,
            embedding_bits=8 if recipe.table_bits("embeddings") == 8 else 16,
            alpha=alpha,
            ignore=list(recipe.ignore),
            weights=schemes,
        ),
        sites=sites,
        created_by=library_versions(),
    )


def _report(
    options: ExportOptions,
    digest: str,
    tensors: Mapping[str, int],
    files: Mapping[str, bytes],
    config: MambaConfig,
    scales: Mapping[str, Scale],
) -> ExportReport:
    sizes = {**tensors, **{f"{FILES_PREFIX}{name}": len(data) for name, data in files.items()}}
    stored = [options.out] if options.out.is_file() else list(options.out.glob("*"))
    return ExportReport(
        path=options.out,
        digest=digest,
        bytes=sum(path.stat().st_size for path in stored) if digest else sum(sizes.values()),
        bits_per_weight=bits_per_weight(sizes, config),
        parts=parts_of(sizes, config),
        sizes=sizes,
        files=len(stored) if digest else 1,
        memory_bytes=export_memory(config),
        config=config,
        notes=_notes(options.recipe, scales),
    )


def _notes(recipe: Recipe, scales: Mapping[str, Scale]) -> tuple[str, ...]:
    if recipe.method != "best" or isinstance(scales[site_key(X_PROJ_INPUT, 0)], torch.Tensor):
        return ()
    return (
        "the calibration is of version 1 and knows no channels: u has one scale, not one a channel; "
        "`qmamba calibrate` anew for a smaller error",
    )


def _log_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.load("backbone.layers.0.mixer.A_log").dtype
