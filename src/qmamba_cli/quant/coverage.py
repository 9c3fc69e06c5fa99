"""Coverage: whether the text of a calibration was enough, and where the activations have outliers.

Beside each site's histogram it keeps the maximum of every sample, in order, so that it can be told which
sample made a maximum grow; and at three sites the maximum of every channel.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.quant.histogram import Histogram
from qmamba_cli.quant.observers import Observer, ObserverSet
from qmamba_cli.sites import IN_PROJ_INPUT, OUT_PROJ_INPUT, X_PROJ_INPUT, ObserverKind, site_keys

# Site → the axis of its channels in the tensor the block hands to its hook, samples along axis 0.
CHANNEL_AXES: Mapping[str, int] = MappingProxyType({IN_PROJ_INPUT: -1, X_PROJ_INPUT: 1, OUT_PROJ_INPUT: -1})
# A channel is an outlier where its maximum is this many times the median channel's.
OUTLIER_RATIO = 6.0
# The end of the samples in which a maximum should no longer grow.
LAST_SHARE = 0.1
# Growth that is worth a word: less moves no int8 scale by a tenth of a step in 127.
LEAST_GROWTH = 0.001
_SAMPLES = "sample_absmax"
_CHANNELS = "channel_absmax"


class Coverage:
    """The maximum of every sample at every site, and of every channel at the sites of `CHANNEL_AXES`.

    Attributes:
        samples: site key → max(|x|) of each sample, float32 values, in the order of the samples.
        channels: site key → (c,) float32, max(|x|) of each channel; empty before the first sample.
    """

    def __init__(self, n_layer: int) -> None:
        keys = site_keys(n_layer)
        self.samples: dict[str, list[float]] = {key: [] for key in keys}
        self.channels: dict[str, NDArray[np.float32]] = {
            key: np.zeros(0, dtype=np.float32) for key in keys if _site(key) in CHANNEL_AXES
        }

    def observe(self, key: str, x: torch.Tensor) -> None:
        """Look at a batch.

        Args:
            key: the site.
            x: (b, ...) floating, finite, one sample a row; any device.
        """
        magnitude = x.detach().abs().to(torch.float32)
        if key in self.channels:
            # (b, c): both maxima come from one pass over the tensor.
            by_channel = magnitude.movedim(CHANNEL_AXES[_site(key)], 1).flatten(2).amax(dim=2)
            found = by_channel.amax(dim=0).cpu().numpy()
            known = self.channels[key]
            self.channels[key] = np.maximum(known, found) if known.size else found
            magnitude = by_channel
        self.samples[key] += magnitude.flatten(1).amax(dim=1).tolist()

    def merge(self, other: "Coverage") -> None:
        """Add what ``other`` saw after this one: the same bits as one pass over both.

        Raises:
            UsageError: the two belong to models of different size.
        """
        mine = {key: array.shape for key, array in self.channels.items() if array.size}
        theirs = {key: array.shape for key, array in other.channels.items() if array.size}
        if self.samples.keys() != other.samples.keys() or (mine and theirs and mine != theirs):
            raise UsageError(
                f"calibrations do not merge, got {len(other.samples)} sites, expected {len(self.samples)} "
                "of equal widths",
                hint="merge calibrations of one model only",
            )
        for key, absmaxes in other.samples.items():
            self.samples[key] += absmaxes
        for key, found in other.channels.items():
            known = self.channels[key]
            if found.size:
                self.channels[key] = np.maximum(known, found) if known.size else found.copy()

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What to store: ``<site key>.sample_absmax`` (s,) and ``.channel_absmax`` (c,), float32."""
        arrays: dict[str, NDArray[np.generic]] = {
            f"{key}.{_SAMPLES}": np.array(absmaxes, dtype=np.float32)
            for key, absmaxes in self.samples.items()
        }
        arrays |= {f"{key}.{_CHANNELS}": array for key, array in self.channels.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]], n_layer: int) -> "Coverage":
        """Inverse of `arrays`, bit for bit.

        Raises:
            ArtifactError: an array is missing, unknown or malformed; the message names it.
        """
        restored = cls(n_layer)
        expected = restored.arrays().keys()
        for name in sorted(expected ^ arrays.keys()):
            found = "an unknown" if name in arrays else "no"
            raise ArtifactError(f"coverage: got {found} array `{name}`, expected those of {n_layer} layers")
        for name, array in arrays.items():
            values = array.astype(np.float32) if array.dtype == np.float32 else None
            if values is None or values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
                raise ArtifactError(
                    f"coverage: wrong `{name}`, got {array.dtype} of shape {array.shape}, "
                    "expected float32 (n,), finite and >= 0"
                )
            key, _, what = name.rpartition(".")
            if what == _SAMPLES:
                restored.samples[key] = values.tolist()
            else:
                restored.channels[key] = values
        return restored


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCoverage:
    """What a calibration saw of one site.

    Attributes:
        site: its key.
        observations: elements.
        absmax: chosen absmax, real units.
        observed: largest |x| that was observed.
        clipped: share of the elements beyond the chosen absmax, within a bin of the histogram (0.2 %).
        last_growth: position of the first sample that reached ``observed``; None where it is not on record.
        growth: how much the last tenth of the samples raised the maximum, as a share of the maximum before
            it; None where it is not on record or there are fewer than ten samples.
        outliers: channels whose maximum is at least `OUTLIER_RATIO` times the median channel's, largest
            first; None where channels are not on record.
    """

    site: str
    observations: int
    absmax: float
    observed: float
    clipped: float
    last_growth: int | None
    growth: float | None
    outliers: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageReport:
    """What a calibration saw, and whether it was enough.

    Attributes:
        sites: one row a site, in the order of `site_keys`.
        samples: token windows on record; 0 where they are not.
    """

    sites: Sequence[SiteCoverage]
    samples: int

    @property
    def growing(self) -> tuple[SiteCoverage, ...]:
        """Sites whose maximum still grew in the last tenth of the samples, the largest growth first."""
        rows = [(row.growth, row) for row in self.sites if row.growth is not None]
        found = sorted((-growth, row.site, row) for growth, row in rows if growth >= LEAST_GROWTH)
        return tuple(row for _, _, row in found)

    @property
    def wants_more_samples(self) -> bool:
        """Whether more sites than chance explains still grew.

        Of samples in random order, the largest lies in the last tenth in one site of ten; twice that share
        says that the text is not yet covered.
        """
        return len(self.growing) > 2 * LAST_SHARE * len(self.sites)


def coverage_report(
    observers: ObserverSet, coverage: Coverage | None, absmaxes: Mapping[str, float]
) -> CoverageReport:
    """Say what a calibration saw.

    Args:
        observers: the state of its observers.
        coverage: what was kept beside them, or None where the artifact is too old to have it.
        absmaxes: site key → the chosen absmax.
    """
    counts = [] if coverage is None else [len(absmaxes) for absmaxes in coverage.samples.values()]
    return CoverageReport(
        sites=tuple(_row(key, observers[key], absmaxes[key], coverage) for key in observers),
        samples=max(counts, default=0),
    )


def _row(key: str, observer: Observer, absmax: float, coverage: Coverage | None) -> SiteCoverage:
    samples = [] if coverage is None else coverage.samples[key]
    channels = None if coverage is None else coverage.channels.get(key)
    return SiteCoverage(
        site=key,
        observations=observer.histogram.count,
        absmax=absmax,
        observed=observer.histogram.absmax,
        clipped=0.0 if observer.kind is ObserverKind.MINMAX else _share_above(observer.histogram, absmax),
        last_growth=samples.index(max(samples)) if samples else None,
        growth=_growth(samples),
        outliers=None if channels is None or channels.size == 0 else _outliers(channels),
    )


def _share_above(histogram: Histogram, absmax: float) -> float:
    """Share of the elements in bins above that of ``absmax``."""
    if histogram.count == 0 or absmax >= histogram.absmax:
        return 0.0
    limit = Histogram()
    limit.update(torch.tensor([absmax]))
    first_bin, _ = limit.span()
    return float(histogram.counts[first_bin + 1 :].sum() / histogram.count)


def _growth(samples: Sequence[float]) -> float | None:
    tail = int(len(samples) * LAST_SHARE)
    if tail == 0:
        return None
    before, after = max(samples[:-tail]), max(samples[-tail:])
    if before == 0.0:
        return 1.0 if after > 0.0 else 0.0
    return max(after / before - 1.0, 0.0)


def _outliers(channels: NDArray[np.float32]) -> tuple[int, ...]:
    found: Iterable[int] = np.flatnonzero(channels >= OUTLIER_RATIO * max(float(np.median(channels)), 1e-30))
    return tuple(sorted((int(index) for index in found), key=lambda index: (-channels[index], index)))


def _site(key: str) -> str:
    return key.rpartition(".")[2]
