"""Stage 2: checkpoint and calibration to one self-contained quantized file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from qmamba_cli.artifacts.calibration import CalibrationArtifact, read_calibration
from qmamba_cli.artifacts.checkpoint import Checkpoint, open_checkpoint
from qmamba_cli.artifacts.files import check_output
from qmamba_cli.artifacts.manifest import (
    CalibrationReference,
    QuantizationRecord,
    QuantizedManifest,
    library_versions,
    tool_version,
)
from qmamba_cli.artifacts.quantized import write_quantized
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, CheckpointError
from qmamba_cli.model.quantize import Recipe, planned_tensors, quantized_tensors, weight_schemes
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.sites import SITES, site_key
from qmamba_cli.stages.calibrate import site_records
from qmamba_cli.stages.common import model_record
from qmamba_cli.stages.parts import Part, bits_per_weight, parts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What `export` is asked; the defaults are the command line's.

    Attributes:
        out: the file to write.
        workdir: the work folder.
        recipe: formats of the weights.
        alpha: quantile of the Percentile sites, or None for the calibration's.
        calibration: the calibration folder, or None for the work folder's last one.
        model: the float checkpoint, or None for the one the calibration names.
        tokenizer: a folder or Hub id to take the tokenizer from, or None for the model's own.
        force: replace an existing file.
        offline: use only the Hub's local cache.
    """

    out: Path
    workdir: Path = Path("qmamba-artifacts")
    recipe: Recipe = field(default_factory=Recipe)
    alpha: float | None = None
    calibration: Path | None = None
    model: str | None = None
    tokenizer: str | None = None
    force: bool = False
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What `export` made, or would make.

    Attributes:
        path: the file.
        digest: its content digest; empty after a dry run.
        bytes: size of the file; after a dry run, of the data in it.
        bits_per_weight: over the whole model, scales included, tokenizer not.
        parts: sizes, largest first.
    """

    path: Path
    digest: str
    bytes: int
    bits_per_weight: float
    parts: tuple[Part, ...]


def export(options: ExportOptions, *, progress: Progress = silent, dry_run: bool = False) -> ExportReport:
    """Quantize the weights, join them with the activation scales and write one file.

    Reads the calibration artifact and the checkpoint it was made for; writes ``options.out`` as a whole or
    not at all, and records it in the work folder. Identical inputs give an identical file.

    Raises:
        UsageError: an option is out of range.
        ArtifactError: the calibration is damaged or belongs to another checkpoint.
        QmambaError: the model or the output cannot be used.
    """
    check_output(options.out, force=options.force)
    workdir = Workdir(options.workdir)
    calibration_path = options.calibration or workdir.resolve_calibration().path
    calibration = read_calibration(calibration_path)
    observers = ObserverSet.from_arrays(
        calibration.statistics,
        MambaConfig.from_dict(dict(calibration.manifest.model.config)).n_layer,
        alpha=calibration.manifest.alpha,
        reduction=Reduction(calibration.manifest.reduction),
    )
    alpha = calibration.manifest.alpha if options.alpha is None else options.alpha
    scales = observers.scales(alpha)
    checkpoint = _matching_checkpoint(options, calibration, calibration_path)
    files = checkpoint.tokenizer_files
    if dry_run:
        sizes = planned_tensors(checkpoint.config, options.recipe, _log_dtype(checkpoint))
        sizes |= {name: row.nbytes for name, row in scale_tensors(scales, checkpoint.config.n_layer).items()}
        sizes |= {f"files/{name}": len(data) for name, data in files.items()}
        return _report(options.out, "", sum(sizes.values()), sizes, checkpoint.config)

    tensors: dict[str, torch.Tensor | np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
    with progress("quantizing layers", checkpoint.config.n_layer) as advance:
        for name, tensor in quantized_tensors(
            checkpoint.config, checkpoint.load, options.recipe, on_layer=lambda: advance(1)
        ):
            tensors[name] = tensor
    tensors |= scale_tensors(scales, checkpoint.config.n_layer)
    manifest = _manifest(options, calibration, observers, checkpoint, alpha)
    written = write_quantized(
        options.out, tensors=tensors, files=files, manifest=manifest, force=options.force
    )
    workdir.record_export(options.out, written.content_digest)
    sizes = {name: int(tensor.nbytes) for name, tensor in tensors.items()}
    sizes |= {f"files/{name}": len(data) for name, data in files.items()}
    return _report(options.out, written.content_digest, options.out.stat().st_size, sizes, checkpoint.config)


def scale_tensors(
    scales: Mapping[str, float], n_layer: int
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """One float32 tensor a site, ``scales.<site>``: (n_layer,), or (1,) for a site of the whole model."""
    return {
        f"scales.{site.name}": np.array(
            [scales[site_key(site.name, layer)] for layer in range(n_layer)]
            if site.per_layer
            else [scales[site_key(site.name, None)]],
            dtype=np.float32,
        )
        for site in SITES.values()
    }


def _matching_checkpoint(
    options: ExportOptions, calibration: CalibrationArtifact, calibration_path: Path
) -> Checkpoint:
    record = calibration.manifest.model
    source = options.model or record.source
    try:
        checkpoint = open_checkpoint(source, tokenizer=options.tokenizer, offline=options.offline)
    except CheckpointError as error:
        if options.model is None:
            error.hint = f"the calibration names it; pass `--model` if it is elsewhere. {error.hint}"
        raise
    found = model_record(checkpoint)
    for what, got, expected in (
        ("weights", found.digest, record.digest),
        ("tokenizer", sorted(found.tokenizer_files.items()), sorted(record.tokenizer_files.items())),
    ):
        if got != expected:
            raise ArtifactError(
                f"calibration `{calibration_path}` was made for another checkpoint: the {what} of `{source}` "
                "differ from those it names",
                hint=f"calibrate this one (`qmamba calibrate {source} --force`), or name the other",
            )
    return checkpoint


def _manifest(
    options: ExportOptions,
    calibration: CalibrationArtifact,
    observers: ObserverSet,
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
            w_bits=4 if recipe.w_bits == 4 else 8,
            group_size=recipe.group_size if any(name.startswith("w4") for name in schemes.values()) else None,
            embedding_bits=8 if recipe.table_bits("embeddings") == 8 else 16,
            alpha=alpha,
            ignore=list(recipe.ignore),
            weights=schemes,
        ),
        sites=site_records(observers, alpha),
        created_by=library_versions(),
    )


def _report(
    path: Path, digest: str, size: int, sizes: Mapping[str, int], config: MambaConfig
) -> ExportReport:
    return ExportReport(
        path=path,
        digest=digest,
        bytes=size,
        bits_per_weight=bits_per_weight(sizes, config),
        parts=parts_of(sizes, config),
    )


def _log_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.load("backbone.layers.0.mixer.A_log").dtype
