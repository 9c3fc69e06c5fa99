"""The lineage as one chain of digests: source checkpoint, calibration, quantized model, results."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from qmamba_cli.artifacts.calibration import read_calibration, read_calibration_manifest
from qmamba_cli.artifacts.checkpoint_config import read_config
from qmamba_cli.artifacts.folder import SUMS, check_sums
from qmamba_cli.artifacts.manifest import QuantizedManifest
from qmamba_cli.artifacts.quantized import is_model_folder, read_quantized
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, CheckpointError, QmambaError
from qmamba_cli.stages.kinds import Kind, kind_of
from qmamba_cli.stages.results_file import ResultsFile, read_results

# Characters of a digest that people are shown.
_SHOWN = 12


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
        stage: ``source``, ``calibration``, ``export`` or ``results`` where this is a part of the chain; empty
            where it is a link between two.
        digest: of that part, in full; empty where it could not be had.
    """

    what: str
    verdict: Verdict
    detail: str
    stage: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """Where the other ends of the links are, as far as the user says so.

    Attributes:
        checkpoint: the quantized model of results, or None for the one they name.
        calibration: the calibration, or None for the one on record in ``workdir``.
        model: the source checkpoint, or None for the one the manifest names.
        workdir: the work folder.
        offline: use only the Hub's local cache.
    """

    checkpoint: Path | None = None
    calibration: Path | None = None
    model: str | None = None
    workdir: Path = Path("qmamba-artifacts")
    offline: bool = False


def verify(path: Path, others: Others) -> list[Check]:
    """Check every digest of an artifact or of results, and the lineage back to the source checkpoint.

    Args:
        path: results, a quantized model, a calibration folder or a work folder (both of its artifacts).
        others: where the other ends are.

    Returns:
        One check a line; a link whose other end is not here is absent, not failed.

    Raises:
        QmambaError: there is nothing at ``path``.
    """
    match kind_of(path):
        case Kind.WORKDIR:
            records = Workdir(path)
            export, calibration = records.last_export(), records.last_calibration()
            if export is not None:
                return list(_quantized(export.path, calibration and calibration.path, others))
            return [] if calibration is None else list(_calibration(calibration.path, others))
        case Kind.CALIBRATION:
            return list(_calibration(path, others))
        case Kind.RESULTS:
            return list(_results(path, others))
        case Kind.QUANTIZED:
            return list(_quantized(path, _calibration_path(others), others))


def _calibration_path(others: Others) -> Path | None:
    if others.calibration is not None:
        return others.calibration
    record = Workdir(others.workdir).last_calibration()
    return None if record is None or not record.path.exists() else record.path


def _results(path: Path, others: Others) -> Iterator[Check]:
    what = f"results {path}"
    try:
        results = read_results(path)
    except ArtifactError as error:
        yield Check(what=what, verdict=Verdict.FAILED, detail=error.message, stage="results")
        return
    detail = f"{', '.join(results.tasks)}, mode {results.mode}, sha256 {results.digest[:_SHOWN]}"
    yield Check(what=what, verdict=Verdict.OK, detail=detail, stage="results", digest=results.digest)
    named = results.named("artifact")
    if named is None:
        # The float model: its checkpoint is all there is.
        yield from _source_of(results, others)
        return
    link = "its quantized model"
    found = _artifact_path(results, others)
    if found is None:
        detail = f"digest {named[:_SHOWN]}; name the file or folder with --checkpoint"
        yield Check(what=link, verdict=Verdict.ABSENT, detail=detail)
        yield from _source_of(results, others)
        return
    checks = list(_quantized(found, _calibration_path(others), others))
    digest = checks[0].digest
    if digest:
        yield _link(link, digest, named, "results name")
        manifest = read_quantized(found, verify=False).manifest
        for name, stored in (("calibration", manifest.calibration.digest), ("model", manifest.model.digest)):
            if digest == named and results.named(name) != stored:
                detail = f"{stored[:_SHOWN]}, the results name {(results.named(name) or 'none')[:_SHOWN]}"
                yield Check(what=f"the {name} they name", verdict=Verdict.FAILED, detail=detail)
    yield from checks


def _artifact_path(results: ResultsFile, others: Others) -> Path | None:
    """The quantized model that results belong to, if it is here."""
    if others.checkpoint is not None:
        return others.checkpoint
    recorded = results.located("artifact")
    # As from the folder where they were measured, or from beside the results.
    for path in () if recorded is None else (Path(recorded), results.path.parent / recorded):
        if path.exists():
            return path
    export = Workdir(others.workdir).last_export()
    return export.path if export is not None and export.path.exists() else None


def _source_of(results: ResultsFile, others: Others) -> Iterator[Check]:
    source, digest = results.located("model"), results.named("model")
    if source is not None and digest is not None:
        yield _source(source, digest, others)


def _quantized(path: Path, calibration: Path | None, others: Others) -> Iterator[Check]:
    folder = is_model_folder(path)
    what = f"{'model folder' if folder else 'quantized file'} {path}"
    try:
        manifest = read_quantized(path).manifest
    except ArtifactError as error:
        yield Check(what=what, verdict=Verdict.FAILED, detail=error.message, stage="export")
        return
    digest = manifest.content_digest
    detail = f"{len(manifest.tensors)} tensors, digest {digest[:_SHOWN]}"
    yield Check(what=what, verdict=Verdict.OK, detail=detail, stage="export", digest=digest)
    if folder:
        yield _config(path, manifest)
        yield _sums(path, manifest)
    link = "its calibration"
    if calibration is None:
        detail = f"digest {manifest.calibration.digest[:_SHOWN]}; name the folder with --calibration"
        yield Check(what=link, verdict=Verdict.ABSENT, detail=detail)
        yield _source(manifest.model.source, manifest.model.digest, others)
        return
    checks = list(_calibration(calibration, others))
    yield checks[0]
    if checks[0].verdict is Verdict.OK:
        found = read_calibration_manifest(calibration).content_digest
        yield _link(link, found, manifest.calibration.digest, "file names")
    yield _source(manifest.model.source, manifest.model.digest, others)


def _config(path: Path, manifest: QuantizedManifest) -> Check:
    """Whether config.json, which other programs read, says what the manifest says."""
    what = "its config.json"
    try:
        found = read_config(path, str(path), quantized=True)
    except CheckpointError as error:
        return Check(what=what, verdict=Verdict.FAILED, detail=error.message)
    expected = MambaConfig.from_dict(dict(manifest.model.config))
    if found == expected:
        return Check(what=what, verdict=Verdict.OK, detail="the architecture of the manifest")
    mine, theirs = expected.to_dict(), found.to_dict()
    name = next(key for key in mine if mine[key] != theirs[key])
    detail = f"{name} is {theirs[name]}, the manifest says {mine[name]}"
    return Check(what=what, verdict=Verdict.FAILED, detail=detail)


def _sums(path: Path, manifest: QuantizedManifest) -> Check:
    """Whether config.json and the card are as they were written."""
    what = "its config.json and README.md"
    try:
        summed = check_sums(path, manifest)
    except QmambaError as error:
        return Check(what=what, verdict=Verdict.FAILED, detail=error.message)
    if not summed:
        return Check(what=what, verdict=Verdict.ABSENT, detail=f"the folder is older than its {SUMS}")
    return Check(what=what, verdict=Verdict.OK, detail=f"the digests in {SUMS}")


def _calibration(path: Path, others: Others) -> Iterator[Check]:
    what = f"calibration {path}"
    try:
        manifest = read_calibration(path, shards=True).manifest
    except ArtifactError as error:
        yield Check(what=what, verdict=Verdict.FAILED, detail=error.message, stage="calibration")
        return
    tensors = sum(len(records) for records in manifest.tensors.values())
    digest = manifest.content_digest
    detail = f"{tensors} tensors, digest {digest[:_SHOWN]}"
    yield Check(what=what, verdict=Verdict.OK, detail=detail, stage="calibration", digest=digest)
    yield _source(manifest.model.source, manifest.model.digest, others)


def _link(what: str, found: str, named: str, by: str) -> Check:
    verdict = Verdict.OK if found == named else Verdict.FAILED
    return Check(what=what, verdict=verdict, detail=f"{found[:_SHOWN]}, the {by} {named[:_SHOWN]}")


def _source(recorded: str, digest: str, others: Others) -> Check:
    from qmamba_cli.artifacts.checkpoint import open_checkpoint

    source = others.model or recorded
    what = f"source checkpoint {source}"
    try:
        found = open_checkpoint(source, offline=others.offline).digest
    except QmambaError as error:
        if others.model is not None:
            raise
        detail = f"{error.message}; name it with --model"
        return Check(what=what, verdict=Verdict.ABSENT, detail=detail, stage="source", digest=digest)
    verdict = Verdict.OK if found == digest else Verdict.FAILED
    detail = f"{found[:_SHOWN]}, the artifact names {digest[:_SHOWN]}"
    return Check(what=what, verdict=verdict, detail=detail, stage="source", digest=found)
