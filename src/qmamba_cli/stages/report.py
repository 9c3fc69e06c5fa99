"""One page of several files: read each, say what it is, and join them by their digests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmamba_cli.artifacts.files import reading, sha256_bytes, strict_json
from qmamba_cli.artifacts.quantized import is_model_folder
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.html.report import Kind, Source, kind_of_record, report_page, source_sections
from qmamba_cli.stages.inspect import inspect
from qmamba_cli.stages.kinds import is_workdir
from qmamba_cli.stages.results_file import require_exists

# Results with every pair of some dozens of variants stay far below it.
_MAX_BYTES = 1 << 26
_LENGTH_BYTES = 8
_EXPECTED = (
    "a calibration, a quantized model, a work folder, or the JSON of `run`, `compare`, `sensitivity`, "
    "`drift` or `bench`"
)
_HINT = "write JSON with `--output FILE`; `qmamba bench --json > FILE`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A page and what it was made of.

    Attributes:
        page: the HTML document.
        sources: name and kind of every file, in the order of the arguments.
    """

    page: str
    sources: tuple[tuple[str, str], ...]


def report(paths: Sequence[Path]) -> Report:
    """Read files and make one page of them; writes nothing.

    Args:
        paths: calibrations, quantized models, work folders (for what they last made) and outcomes as JSON;
            one that is named twice counts once.

    Raises:
        UsageError: no path is given, or one is none of these.
        ArtifactError: a file is damaged.
        QmambaError: there is nothing at a path, or it cannot be read.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for member in _members(path):
            found.setdefault(member.resolve(), member)
    if not found:
        raise UsageError("no file is named, expected at least one", hint=f"name {_EXPECTED}")
    names = _names(list(found.values()))
    sources = [_read(path, name) for path, name in zip(found.values(), names, strict=True)]
    page = report_page(sources)
    return Report(page=page, sources=tuple((source.name, source.what) for source in sources))


def _members(path: Path) -> list[Path]:
    """The path, or what a work folder last made."""
    require_exists(path)
    if not path.is_dir() or is_model_folder(path) or not is_workdir(path):
        return [path]
    records = (Workdir(path).last_calibration(), Workdir(path).last_export())
    members = [record.path for record in records if record is not None and record.path.exists()]
    if not members:
        raise UsageError(
            f"the work folder `{path}` names nothing that is still there, expected {_EXPECTED}",
            hint="make a calibration with `qmamba calibrate MODEL`",
        )
    return members


def _names(paths: Sequence[Path]) -> list[str]:
    """The files' own names, with their folders where two are the same."""
    short = [path.name or str(path) for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _read(path: Path, name: str) -> Source:
    source = _artifact(path, name) if _is_artifact(path) else _outcome(path, name)
    try:
        source_sections(source)
    # Whatever a file lacks that its kind must have: an older version wrote it, or a person changed it.
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(
            f"`{path}` looks like {source.kind.value} but breaks its layout, got {what}",
            hint="make it again with this version",
        ) from None
    return source


def _is_artifact(path: Path) -> bool:
    """Whether a path can only be a folder of artifacts or a file of tensors."""
    if path.is_dir():
        return True
    with reading(path), path.open("rb") as file:
        head = file.read(_LENGTH_BYTES + 1)
    # Such a file begins with a length, whose high bytes are zeros, and a JSON object.
    return head[_LENGTH_BYTES:] == b"{" and b"\0" in head[:_LENGTH_BYTES]


def _artifact(path: Path, name: str) -> Source:
    record = inspect(path).to_dict()
    manifest: dict[str, Any] = record["manifest"]
    kind = Kind.CALIBRATION if manifest["format"] == "qmamba-calibration" else Kind.QUANTIZED
    return Source(name=name, kind=kind, digest=manifest["content_digest"], record=record)


def _outcome(path: Path, name: str) -> Source:
    with reading(path), path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ArtifactError(f"`{path}` is too large, expected at most {_MAX_BYTES} bytes", hint=_HINT)
    if data.lstrip()[:1] not in (b"{", b"["):
        raise UsageError(f"`{path}` is nothing that a report can show, expected {_EXPECTED}", hint=_HINT)
    try:
        record = strict_json(data)
    except ValueError as error:
        raise ArtifactError(f"`{path}` is not valid JSON, got: {error}", hint=_HINT) from None
    kind = kind_of_record(record)
    if kind is None:
        raise UsageError(f"`{path}` is nothing that a report can show, expected {_EXPECTED}", hint=_HINT)
    return Source(name=name, kind=kind, digest=sha256_bytes(data), record=record)
