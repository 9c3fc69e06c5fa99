"""Looking at artifacts: what a manifest says, and the shape of what was observed.

Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmamba_cli.artifacts.calibration import read_calibration, read_calibration_manifest
from qmamba_cli.artifacts.manifest import CalibrationManifest, QuantizedManifest, TensorRecord
from qmamba_cli.artifacts.quantized import read_quantized_manifest
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import UsageError
from qmamba_cli.quant.bins import bin_of, octaves
from qmamba_cli.stages.kinds import Kind, kind_of
from qmamba_cli.stages.parts import Part, bits_per_weight, parts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteHistogram:
    """What was observed of |x| at one site, by powers of two.

    Attributes:
        exponent: of the first entry of ``counts``, which counts 2^exponent <= |x| < 2^(exponent + 1).
        counts: elements in each power of two, from the least one that has any to the largest.
        below: elements under 2^-32, taken as 0.
        observed: the largest |x|.
        absmax: the one that was chosen.
        clipped: share of the elements in bins above that of ``absmax``; a bin is 0.2 % wide.
    """

    exponent: int
    counts: tuple[int, ...]
    below: int
    observed: float
    absmax: float
    clipped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as the manifest records it.

    Attributes:
        name: in a calibration with its file before it.
        dtype: as safetensors names it.
        shape: dimensions, outermost first.
        bytes: size of the data.
        sha256: digest of the data.
        scheme: format of the module's weight in words, as in ``w4-g128``; empty where it has none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str
    scheme: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `inspect` shows.

    Attributes:
        path: the artifact.
        manifest: its manifest.
        parts: sizes by part of a quantized model; empty for a calibration.
        bits_per_weight: of a quantized model, else None.
        tensors: every stored tensor, sorted by name.
        histograms: site key → what was observed, of a calibration; empty for a quantized model.
    """

    path: Path
    manifest: CalibrationManifest | QuantizedManifest
    parts: tuple[Part, ...]
    bits_per_weight: float | None
    tensors: tuple[StoredTensor, ...]
    histograms: Mapping[str, SiteHistogram]

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
            "histograms": {key: asdict(histogram) for key, histogram in self.histograms.items()},
            "manifest": self.manifest.model_dump(mode="json"),
        }


def inspect(path: Path) -> Inspection:
    """Read what an artifact says of itself.

    Of a quantized model the manifest is read and no tensor, of a calibration the statistics as well.

    Raises:
        QmambaError: there is nothing at ``path``.
        UsageError: it is a work folder or results.
        ArtifactError: it is no artifact, or damaged.
    """
    match kind_of(path):
        case Kind.WORKDIR:
            records = (Workdir(path).last_calibration(), Workdir(path).last_export())
            known = " or ".join(f"`qmamba inspect {record.path}`" for record in records if record is not None)
            raise UsageError(
                f"`{path}` is a work folder, expected a quantized model or a calibration folder", hint=known
            )
        case Kind.RESULTS:
            raise UsageError(
                f"`{path}` holds results, expected a quantized model or a calibration folder",
                hint=f"`qmamba verify {path}` shows where they come from",
            )
        case Kind.CALIBRATION:
            return _calibration(path)
    manifest = read_quantized_manifest(path)
    sizes = {name: TensorInfo(record.dtype, record.shape).nbytes for name, record in manifest.tensors.items()}
    config = MambaConfig.from_dict(dict(manifest.model.config))
    return Inspection(
        path=path,
        manifest=manifest,
        parts=parts_of(sizes, config),
        bits_per_weight=bits_per_weight(sizes, config),
        tensors=_tensors(manifest.tensors, manifest.quantization.weights),
        histograms={},
    )


def _calibration(path: Path) -> Inspection:
    # Before the tensors, so that what is wrong with the manifest is said first.
    manifest = read_calibration_manifest(path)
    statistics = read_calibration(path, shards=True).statistics
    records = {
        f"{file}: {name}": record for file, rows in manifest.tensors.items() for name, record in rows.items()
    }
    return Inspection(
        path=path,
        manifest=manifest,
        parts=(),
        bits_per_weight=None,
        tensors=_tensors(records, {}),
        histograms={
            key: _histogram(statistics, key, site.absmax)
            for key, site in manifest.sites.items()
            if f"{key}.counts" in statistics
        },
    )


def _histogram(statistics: Mapping[str, npt.NDArray[Any]], key: str, absmax: float) -> SiteHistogram:
    counts, first_bin = statistics[f"{key}.counts"], int(statistics[f"{key}.first_bin"][0])
    below, exponent, by_octave = octaves(counts, first_bin)
    observed = float(statistics[f"{key}.absmax"][0])
    return SiteHistogram(
        exponent=exponent,
        counts=tuple(int(count) for count in by_octave),
        below=below,
        observed=observed,
        absmax=absmax,
        clipped=_clipped(counts, first_bin, absmax) if absmax < observed else 0.0,
    )


def _clipped(counts: npt.NDArray[np.int64], first_bin: int, absmax: float) -> float:
    total = int(counts.sum())
    above = int(counts[max(bin_of(absmax) + 1 - first_bin, 0) :].sum())
    return above / total if total else 0.0


def _tensors(records: Mapping[str, TensorRecord], schemes: Mapping[str, str]) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(
            name=name,
            dtype=record.dtype,
            shape=record.shape,
            bytes=TensorInfo(record.dtype, record.shape).nbytes,
            sha256=record.sha256,
            scheme=schemes.get(name.rpartition(".")[0], ""),
        )
        for name, record in sorted(records.items())
    )
