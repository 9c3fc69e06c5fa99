"""The calibration artifact: a folder with a manifest, the scales and the statistics they come from.

A shard of a calibration has the same form; its manifest says which part of the samples it observed. Only who
asks for shards is given one, since its scales stand for a part of the text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qmamba_cli.artifacts.files import atomic_directory, json_excess, reading, recover_directory, shown
from qmamba_cli.artifacts.manifest import (
    CalibrationManifest,
    check_digest,
    check_tensors,
    parse_manifest,
    tensor_records,
)
from qmamba_cli.artifacts.records import CalibrationFile
from qmamba_cli.artifacts.safetensors_header import MAX_HEADER_BYTES
from qmamba_cli.artifacts.safetensors_io import (
    SafetensorsFile,
    TensorSource,
    describe,
    open_safetensors,
    write_safetensors,
)
from qmamba_cli.errors import ArtifactError, QmambaError

MANIFEST = "manifest.json"
SCALES: Final = "scales.safetensors"
STATISTICS: Final = "statistics.safetensors"
COVERAGE: Final = "coverage.safetensors"
# Every entry of the folder; `files.check_output` takes it so that no other folder is ever replaced.
ENTRIES = (MANIFEST, SCALES, STATISTICS, COVERAGE)
# Format version → its tensor files.
_TENSOR_FILES: Mapping[int, tuple[CalibrationFile, ...]] = {
    1: (SCALES, STATISTICS),
    2: (SCALES, STATISTICS, COVERAGE),
}
_HINT_MISSING = "make one with `qmamba calibrate MODEL`, or name one with `--calibration DIR`"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationArtifact:
    """A calibration that was read whole.

    Attributes:
        manifest: what was observed, and with what.
        scales: site key → scale, real units a step, finite and > 0.
        statistics: name → array, the observers' state; writable copies.
        coverage: name → array, the state of `quant.coverage.Coverage`; empty in an artifact of version 1.
    """

    manifest: CalibrationManifest
    scales: Mapping[str, float]
    statistics: Mapping[str, npt.NDArray[Any]]
    coverage: Mapping[str, npt.NDArray[Any]]

    @property
    def digest(self) -> str:
        """Content digest, which stands for the whole folder."""
        return self.manifest.content_digest


def write_calibration(
    path: Path,
    *,
    manifest: CalibrationManifest,
    scales: Mapping[str, float],
    statistics: Mapping[str, npt.NDArray[Any]],
    coverage: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
    force: bool = False,
) -> CalibrationManifest:
    """Write the folder in the current version; equal input gives equal bytes in every file.

    Args:
        path: the folder; an existing one is replaced as a whole.
        manifest: its `tensors` and `content_digest` are filled in here.
        scales: site key → scale, for exactly the sites of the manifest; stored in float32.
        statistics: name → array of a dtype of `safetensors_header.DTYPES`.
        coverage: likewise.
        force: whether an existing calibration may be replaced.

    Returns:
        The manifest as written.

    Raises:
        QmambaError: the folder exists and ``force`` is false, or cannot be written.
        ValueError: the sites of scales and manifest differ, or a scale is not finite and > 0 in float32.
    """
    if scales.keys() != manifest.sites.keys():
        raise ValueError(f"scales and sites differ: {sorted(scales.keys() ^ manifest.sites.keys())}")
    rows = {name: np.array([scale], dtype=np.float32) for name, scale in scales.items()}
    for name, row in rows.items():
        if not _is_scale(float(row[0])):
            raise ValueError(f"the scale of `{name}` must be finite and > 0 in float32, got {scales[name]}")
    contents: dict[str, Mapping[str, TensorSource]] = {
        SCALES: rows,
        STATISTICS: dict(statistics),
        COVERAGE: dict(coverage),
    }
    with atomic_directory(path, force=force, known=ENTRIES) as folder:
        records = {}
        for name, tensors in contents.items():
            digests = write_safetensors(folder / name, tensors)
            infos = {key: describe(value) for key, value in tensors.items()}
            records[name] = tensor_records(infos, digests)
        written = manifest.sealed(format_version=manifest.VERSION, tensors=records)
        data = written.to_json().encode("ascii")
        if len(data) > MAX_HEADER_BYTES:
            raise ValueError(f"a manifest of {len(data)} bytes exceeds the limit of {MAX_HEADER_BYTES}")
        if excess := json_excess(data):
            raise ValueError(f"a manifest that no reader takes: {excess}")
        (folder / MANIFEST).write_bytes(data)
    return written


def read_calibration(path: Path, *, verify: bool = True, shards: bool = False) -> CalibrationArtifact:
    """Read the folder and check it in the order of docs/artifact-format.md.

    Args:
        path: the folder.
        verify: whether the digests of the data are compared as well.
        shards: whether it may be a shard.

    Raises:
        QmambaError: there is no such folder, or it cannot be read.
        ArtifactError: it is no calibration, of another version, a shard, or damaged.
    """
    manifest = _parse(path)
    if manifest.shard is not None and not shards:
        raise ArtifactError(
            f"`{path}` is shard {manifest.shard.number}/{manifest.shard.count} of a calibration, "
            "expected a whole one",
            hint="put the shards together: `qmamba merge DIR…`",
        )
    files = {name: _open(path, name) for name in _TENSOR_FILES[manifest.format_version]}
    for name, file in files.items():
        check_tensors(file, manifest.tensors[name], remedy=manifest.REMEDY, verify=verify)
    check_digest(manifest, str(path))
    # Copied, so that a folder replaced later takes nothing from under the caller.
    return CalibrationArtifact(
        manifest=manifest,
        scales=_scales(path, manifest, files[SCALES]),
        statistics=_arrays(files[STATISTICS]),
        coverage=_arrays(files[COVERAGE]) if COVERAGE in files else {},
    )


def read_calibration_manifest(path: Path) -> CalibrationManifest:
    """Read the manifest alone, checked against its own digest; the tensors are not looked at.

    Raises:
        QmambaError: there is no such folder, or it cannot be read.
        ArtifactError: it is no calibration, of another version, or its manifest is damaged.
    """
    manifest = _parse(path)
    check_digest(manifest, str(path))
    return manifest


def _parse(path: Path) -> CalibrationManifest:
    with reading(path):
        recover_directory(path)
        if not path.exists():
            raise QmambaError(f"calibration `{path}` does not exist", hint=_HINT_MISSING)
        if not path.is_dir():
            raise ArtifactError(f"`{path}` is a file, expected a calibration folder", hint=_HINT_MISSING)
        target = path / MANIFEST
        if not target.is_file():
            raise ArtifactError(
                f"`{path}` is not a calibration, got no `{MANIFEST}` in it", hint=_HINT_MISSING
            )
        with target.open("rb") as file:
            data = file.read(MAX_HEADER_BYTES + 1)
    if len(data) > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"the manifest of `{path}` is too large, expected at most {MAX_HEADER_BYTES} bytes",
            hint=CalibrationManifest.REMEDY,
        )
    manifest = parse_manifest(CalibrationManifest, data, str(path))
    for name in sorted(manifest.tensors.keys() ^ set(_TENSOR_FILES[manifest.format_version])):
        found = "an" if name in manifest.tensors else "no"
        raise ArtifactError(
            f"the manifest of `{path}` breaks the schema, got {found} entry `{name}` in `tensors`",
            hint=manifest.REMEDY,
        )
    return manifest


def _open(path: Path, name: CalibrationFile) -> SafetensorsFile:
    if not (path / name).is_file():
        raise ArtifactError(
            f"file `{name}` is missing from calibration `{path}`", hint=CalibrationManifest.REMEDY
        )
    file = open_safetensors(path / name)
    if file.metadata:
        raise ArtifactError(
            f"`{file.path}` has metadata, expected none in a calibration", hint=CalibrationManifest.REMEDY
        )
    return file


def _arrays(file: SafetensorsFile) -> dict[str, npt.NDArray[Any]]:
    return {name: file.numpy(name).copy() for name in file.names}


def _scales(path: Path, manifest: CalibrationManifest, file: SafetensorsFile) -> dict[str, float]:
    """The scales as numbers, for exactly the sites of the manifest."""
    for name in sorted(manifest.sites.keys() ^ set(file.names)):
        raise ArtifactError(
            f"the scales of `{path}` do not fit its sites, got `{shown(name)}` in only one of the two",
            hint=manifest.REMEDY,
        )
    scales = {}
    for name in manifest.sites:
        info = file.info(name)
        if info.dtype != "F32" or info.shape != (1,):
            raise ArtifactError(
                f"the scale of `{shown(name)}` in `{path}` is {info.dtype} {list(info.shape)}, "
                "expected F32 [1]",
                hint=manifest.REMEDY,
            )
        scales[name] = float(file.numpy(name)[0])
        if not _is_scale(scales[name]):
            raise ArtifactError(
                f"the scale of `{shown(name)}` in `{path}` must be finite and > 0, got {scales[name]}",
                hint=manifest.REMEDY,
            )
    return scales


def _is_scale(value: float) -> bool:
    return math.isfinite(value) and value > 0
