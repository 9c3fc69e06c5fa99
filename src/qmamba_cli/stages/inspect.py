"""Looking at artifacts: what a manifest says, and whether the bytes agree with it.

Nothing here imports torch until a source checkpoint is opened.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from qmamba_cli.artifacts.calibration import MANIFEST, read_calibration, read_calibration_manifest
from qmamba_cli.artifacts.manifest import CalibrationManifest, QuantizedManifest
from qmamba_cli.artifacts.quantized import read_quantized, read_quantized_manifest
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.workdir import RECORD, Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, QmambaError, UsageError
from qmamba_cli.stages.parts import Part, bits_per_weight, parts_of


class Verdict(StrEnum):
    """Outcome of one check."""

    OK = "ok"
    FAILED = "failed"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of `verify`.

    Attributes:
        what: the thing that was checked.
        verdict: ok, failed, or absent where there was nothing to compare with.
        detail: a digest, or what is wrong.
    """

    what: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `inspect` shows.

    Attributes:
        path: the artifact.
        manifest: its manifest.
        parts: sizes by part of a quantized file; empty for a calibration.
        bits_per_weight: of a quantized file, else None.
    """

    path: Path
    manifest: CalibrationManifest | QuantizedManifest
    parts: tuple[Part, ...]
    bits_per_weight: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        sizes = [
            {"part": part.name, "bytes": part.bytes, "bits_per_weight": part.bits_per_weight}
            for part in self.parts
        ]
        return {
            "path": str(self.path),
            "parts": sizes,
            "bits_per_weight": self.bits_per_weight,
            "manifest": self.manifest.model_dump(mode="json"),
        }


def inspect(path: Path) -> Inspection:
    """Read the manifest of a quantized file or a calibration folder; the data is not read.

    Raises:
        QmambaError: there is nothing at ``path``.
        ArtifactError: it is no artifact, or its manifest is damaged.
    """
    if is_workdir(path):
        records = (Workdir(path).last_calibration(), Workdir(path).last_export())
        known = " or ".join(f"`qmamba inspect {record.path}`" for record in records if record is not None)
        raise UsageError(
            f"`{path}` is a work folder, expected a quantized file or a calibration folder", hint=known
        )
    if is_calibration(path):
        return Inspection(path=path, manifest=read_calibration_manifest(path), parts=(), bits_per_weight=None)
    manifest = read_quantized_manifest(path)
    sizes = {name: TensorInfo(record.dtype, record.shape).nbytes for name, record in manifest.tensors.items()}
    config = MambaConfig.from_dict(dict(manifest.model.config))
    return Inspection(
        path=path,
        manifest=manifest,
        parts=parts_of(sizes, config),
        bits_per_weight=bits_per_weight(sizes, config),
    )


def is_calibration(path: Path) -> bool:
    """Whether ``path`` is a folder that is not a work folder, so only a calibration can be meant."""
    return path.is_dir() and not is_workdir(path)


def is_workdir(path: Path) -> bool:
    """Whether ``path`` is a work folder."""
    return (path / RECORD).is_file() and not (path / MANIFEST).exists()


def verify(
    path: Path,
    *,
    calibration: Path | None = None,
    model: str | None = None,
    workdir: Path = Path("qmamba-artifacts"),
    offline: bool = False,
) -> list[Check]:
    """Check every digest of an artifact and its lineage back to the source checkpoint.

    Args:
        path: a quantized file, a calibration folder or a work folder (both of its artifacts).
        calibration: the calibration of a quantized file, or None for the one on record in ``workdir``.
        model: the source checkpoint, or None for the one the manifest names.
        workdir: the work folder.
        offline: use only the Hub's local cache.

    Returns:
        One check a line; a link whose other end is not here is absent, not failed.

    Raises:
        QmambaError: there is nothing at ``path``.
    """
    if is_workdir(path):
        records = Workdir(path)
        last_calibration, last_export = records.last_calibration(), records.last_export()
        checks = []
        if last_export is not None:
            checks += list(
                _quantized(last_export.path, last_calibration and last_calibration.path, model, offline)
            )
        elif last_calibration is not None:
            checks += list(_calibration(last_calibration.path, model, offline))
        return checks
    if is_calibration(path):
        return list(_calibration(path, model, offline))
    if calibration is None:
        record = Workdir(workdir).last_calibration()
        calibration = None if record is None or not record.path.exists() else record.path
    return list(_quantized(path, calibration, model, offline))


def _quantized(path: Path, calibration: Path | None, model: str | None, offline: bool) -> Iterator[Check]:
    what = f"quantized file {path}"
    try:
        manifest = read_quantized(path).manifest
    except ArtifactError as error:
        yield Check(what=what, verdict=Verdict.FAILED, detail=error.message)
        return
    tensors = f"{len(manifest.tensors)} tensors, digest {manifest.content_digest[:12]}"
    yield Check(what=what, verdict=Verdict.OK, detail=tensors)
    link = "its calibration"
    if calibration is None:
        detail = f"digest {manifest.calibration.digest[:12]}; name the folder with --calibration"
        yield Check(what=link, verdict=Verdict.ABSENT, detail=detail)
        yield _source(manifest.model.source, manifest.model.digest, model, offline)
        return
    checks = list(_calibration(calibration, model, offline))
    yield checks[0]
    if checks[0].verdict is Verdict.OK:
        found = read_calibration_manifest(calibration)
        same = found.content_digest == manifest.calibration.digest
        detail = f"{found.content_digest[:12]}, the file names {manifest.calibration.digest[:12]}"
        yield Check(what=link, verdict=Verdict.OK if same else Verdict.FAILED, detail=detail)
    yield _source(manifest.model.source, manifest.model.digest, model, offline)


def _calibration(path: Path, model: str | None, offline: bool) -> Iterator[Check]:
    what = f"calibration {path}"
    try:
        manifest = read_calibration(path).manifest
    except ArtifactError as error:
        yield Check(what=what, verdict=Verdict.FAILED, detail=error.message)
        return
    tensors = sum(len(records) for records in manifest.tensors.values())
    detail = f"{tensors} tensors, digest {manifest.content_digest[:12]}"
    yield Check(what=what, verdict=Verdict.OK, detail=detail)
    yield _source(manifest.model.source, manifest.model.digest, model, offline)


def _source(recorded: str, digest: str, model: str | None, offline: bool) -> Check:
    from qmamba_cli.artifacts.checkpoint import open_checkpoint

    source = model or recorded
    what = f"source checkpoint {source}"
    try:
        found = open_checkpoint(source, offline=offline).digest
    except QmambaError as error:
        if model is not None:
            raise
        return Check(what=what, verdict=Verdict.ABSENT, detail=f"{error.message}; name it with --model")
    verdict = Verdict.OK if found == digest else Verdict.FAILED
    return Check(what=what, verdict=verdict, detail=f"{found[:12]}, the artifact names {digest[:12]}")
