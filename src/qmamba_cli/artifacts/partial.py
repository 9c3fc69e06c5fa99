"""What an unfinished calibration has observed so far: one safetensors file beside the artifact to be.

It goes when the calibration is done. The manifest in it says what was to be observed, in the artifact's own
records, so that nothing can be continued with another checkpoint, text, option or library.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy.typing as npt

from qmamba_cli.artifacts.files import atomic_file, canonical_json, sha256_bytes
from qmamba_cli.artifacts.manifest import (
    CalibrationManifest,
    Manifest,
    check_digest,
    parse_manifest,
)
from qmamba_cli.artifacts.records import (
    Alpha,
    Count,
    DatasetRecord,
    Reduction,
    Sha256,
    ShardRecord,
)
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.safetensors_io import TensorSource, describe, open_safetensors, write_safetensors
from qmamba_cli.errors import ArtifactError, QmambaError

_METADATA_KEY: Final = "qmamba"
_STATISTICS: Final = "statistics/"
_COVERAGE: Final = "coverage/"
# What the manifest of an artifact and that of its unfinished state have in common.
_PLAN = ("tool_version", "model", "dataset", "alpha", "reduction", "dtype", "device", "shard", "created_by")


class PartialManifest(Manifest):
    """The manifest of an unfinished calibration; `sites` is empty."""

    KIND: ClassVar[str] = "unfinished calibration"
    REMEDY: ClassVar[str] = "start anew: `qmamba calibrate MODEL --force`"
    FORMAT: ClassVar[str] = "qmamba-unfinished-calibration"
    VERSION: ClassVar[int] = 1

    format_version: Literal[1] = 1
    """Version of the format; a reader refuses a newer one."""
    format: Literal["qmamba-unfinished-calibration"] = "qmamba-unfinished-calibration"
    """Kind of file."""
    dataset: DatasetRecord
    """The text that is observed."""
    alpha: Alpha
    """Quantile of the percentile sites."""
    reduction: Reduction
    """How the quantiles of samples are joined."""
    dtype: str
    """Element type of the forward passes."""
    device: str
    """Kind of device of the forward passes."""
    shard: ShardRecord | None
    """The part of the samples that the artifact will have observed; null where it is all of them."""
    first: Count
    """Position of the first sample that this file counts."""
    next: Count
    """Position behind the last sample that it counts."""
    end: Count
    """Position behind the last sample that it is to count."""
    contents: Sha256 = ""
    """sha256 of the canonical JSON of name → [dtype, shape, sha256 of the data], over all tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The state of an unfinished calibration.

    Attributes:
        first: position of the first sample.
        next: position behind the last sample observed.
        end: position behind the last sample to observe.
        statistics: as in `CalibrationArtifact`.
        coverage: as in `CalibrationArtifact`.
    """

    first: int
    next: int
    end: int
    statistics: Mapping[str, npt.NDArray[Any]]
    coverage: Mapping[str, npt.NDArray[Any]]


def write_progress(path: Path, plan: CalibrationManifest, progress: Progress) -> None:
    """Replace the file in one step.

    Args:
        path: the file.
        plan: manifest of the artifact to be; its sites are not looked at.
        progress: what was observed so far.

    Raises:
        QmambaError: the file cannot be written.
    """
    tensors: dict[str, TensorSource] = {
        f"{prefix}{name}": array
        for prefix, arrays in ((_STATISTICS, progress.statistics), (_COVERAGE, progress.coverage))
        for name, array in arrays.items()
    }
    infos = {name: describe(value) for name, value in tensors.items()}
    manifest = PartialManifest(
        **{name: getattr(plan, name) for name in _PLAN},
        sites={},
        first=progress.first,
        next=progress.next,
        end=progress.end,
    )

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        return {_METADATA_KEY: manifest.sealed(contents=_contents(infos, digests)).to_json()}

    with atomic_file(path, force=True) as temporary:
        write_safetensors(temporary, tensors, metadata)


def read_progress(path: Path, plan: CalibrationManifest, *, first: int, end: int) -> Progress:
    """Read the file, which must belong to the same calibration.

    Args:
        path: the file.
        plan: manifest of the artifact to be.
        first: position of the first sample it must count.
        end: position behind the last sample it must be meant to count.

    Raises:
        QmambaError: the file cannot be read.
        ArtifactError: it is damaged, or belongs to a calibration of something else, which the message names.
    """
    file = open_safetensors(path)
    text = file.metadata.get(_METADATA_KEY)
    if text is None:
        raise ArtifactError(
            f"`{path}` is no unfinished calibration, got no `{_METADATA_KEY}` in its metadata",
            hint=PartialManifest.REMEDY,
        )
    manifest = parse_manifest(PartialManifest, text.encode("utf-8"), str(path))
    check_digest(manifest, str(path))
    infos = {name: file.info(name) for name in file.names}
    digests = {name: sha256_bytes(file.bytes(name)) for name in file.names}
    if not file.header.canonical or _contents(infos, digests) != manifest.contents:
        raise ArtifactError(f"the data of `{path}` is damaged", hint=manifest.REMEDY)
    differences = plan_differences(manifest, plan)
    if (manifest.first, manifest.end) != (first, end):
        differences.append(
            f"the samples are {manifest.first} to {manifest.end - 1}, expected {first} to {end - 1}"
        )
    if differences:
        raise ArtifactError(
            f"the unfinished calibration `{path}` is of something else: {differences[0]}",
            hint="continue with the command that began it, or pass `--force` to start anew",
        )
    if not manifest.first <= manifest.next <= manifest.end:
        raise ArtifactError(
            f"`{path}` counts samples {manifest.first} to {manifest.next - 1}, expected at most "
            f"{manifest.end - 1}",
            hint=manifest.REMEDY,
        )

    def arrays(prefix: str) -> dict[str, npt.NDArray[Any]]:
        return {
            name.removeprefix(prefix): file.numpy(name).copy()
            for name in file.names
            if name.startswith(prefix)
        }

    return Progress(
        first=manifest.first,
        next=manifest.next,
        end=manifest.end,
        statistics=arrays(_STATISTICS),
        coverage=arrays(_COVERAGE),
    )


def _contents(infos: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    rows = {name: [infos[name].dtype, list(infos[name].shape), digest] for name, digest in digests.items()}
    return sha256_bytes(canonical_json(rows).encode("ascii"))


def plan_differences(
    found: CalibrationManifest | PartialManifest, expected: CalibrationManifest | PartialManifest
) -> list[str]:
    """What keeps two calibrations, or two parts of one, from being of the same thing; in words.

    The names of the checkpoint and of the text may differ where their digests do not, and so may the shard.
    """
    rows: list[tuple[str, object, object]] = []

    def compare(what: str, mine: object, theirs: object) -> None:
        if mine != theirs:
            rows.append((what, mine, theirs))

    compare("the checkpoint's digest", found.model.digest, expected.model.digest)
    compare("the list of the checkpoint's files", found.model.weight_files, expected.model.weight_files)
    compare("the configuration", found.model.config, expected.model.config)
    compare("the tokenizer", found.model.tokenizer_files, expected.model.tokenizer_files)
    compare("the text's digest", found.dataset.digest, expected.dataset.digest)
    mine, theirs = found.dataset.model_dump(), expected.dataset.model_dump()
    for name in ("text_column", "samples", "seqlen", "batch_size", "shuffle", "seed"):
        compare(f"`--{name.replace('_', '-')}`", mine[name], theirs[name])
    compare("the choice of samples", mine["sample_ids"], theirs["sample_ids"])
    for name in ("alpha", "reduction", "device", "dtype"):
        compare(f"`--{name}`", getattr(found, name), getattr(expected, name))
    for name in sorted(found.created_by.keys() | expected.created_by.keys()):
        compare(f"the version of {name}", found.created_by.get(name), expected.created_by.get(name))
    compare("the version of this program", found.tool_version, expected.tool_version)
    return [
        f"{what} differs" if isinstance(theirs, dict | list) else f"{what} is {mine}, expected {theirs}"
        for what, mine, theirs in rows
    ]


@contextmanager
def sole_run(target: Path) -> Iterator[None]:
    """Keep every other calibration of ``target`` out for as long as this one lasts.

    A writer's lock lasts as long as the writing; two calibrations that run for hours side by side would each
    replace the other's unfinished state.

    Raises:
        QmambaError: another process calibrates into ``target``, or the folder cannot be written.
    """
    lock = target.with_name(f".{target.name}.qmamba-run")
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise _not_writable(target, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.samestat(os.fstat(descriptor), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            current = False
        except OSError as error:
            raise _not_writable(target, error) from error
        if not current:
            raise QmambaError(
                f"another process is calibrating into `{target}`",
                hint="wait for it to end, or choose another `--workdir`",
            )
        try:
            yield
        finally:
            # Unlinked while it is held, so that nobody can hold a lock whose name is gone.
            with contextlib.suppress(OSError):
                lock.unlink()
                # Folders made here for a calibration that came to nothing; one with something in it stays.
                for folder in missing:
                    folder.rmdir()
    finally:
        os.close(descriptor)


def _not_writable(target: Path, error: OSError) -> QmambaError:
    return QmambaError(
        f"cannot write `{target}`, got `{error.strerror or error}`",
        hint="choose a `--workdir` that can be written, on a file system with locks",
    )
