"""Observers: what passed a site during calibration, and the absmax chosen from it.

Every observer keeps the histogram of |x| over all it saw, so another alpha needs no forward pass and shards
of a calibration merge. ``mean`` and ``ema`` reduce one quantile a sample instead; those are kept too.
"""

import math
from collections.abc import Iterator, Mapping
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.errors import ArtifactError, QmambaError, ShapeError, UsageError
from qmamba_cli.quant.grid import scale_from_absmax
from qmamba_cli.quant.histogram import Histogram, check_alpha
from qmamba_cli.sites import SITES, ObserverKind, site_keys

DEFAULT_ALPHA = 0.9995
# Weight of the newest sample in the exponential moving average.
EMA_WEIGHT = 0.01
_QUANTILES = "sample_quantiles"


class Reduction(StrEnum):
    """How a Percentile site's samples become one absmax; MinMax sites always take the maximum."""

    GLOBAL = "global"
    MEAN = "mean"
    EMA = "ema"


class Observer:
    """Watches one site.

    Attributes:
        kind: MinMax or Percentile.
        name: the site's key, for messages.
        alpha: quantile a Percentile site clips at, in (0.5, 1].
        reduction: global (one quantile over all elements), mean (of one quantile a sample) or ema
            (``m ← m + 0.01 (p - m)`` over the samples' quantiles p in order, from the first p).
        histogram: |x| over all elements seen.
        sample_quantiles: one quantile a sample, in order; filled for Percentile sites under mean and ema.

    Raises:
        UsageError: alpha lies outside (0.5, 1].
    """

    def __init__(
        self,
        kind: ObserverKind,
        *,
        name: str,
        alpha: float = DEFAULT_ALPHA,
        reduction: Reduction = Reduction.GLOBAL,
    ) -> None:
        self.kind = kind
        self.name = name
        self.alpha = check_alpha(alpha)
        self.reduction = reduction
        self.histogram = Histogram()
        self.sample_quantiles: list[float] = []

    @property
    def keeps_quantiles(self) -> bool:
        """Whether the absmax comes from one quantile a sample."""
        return self.kind is ObserverKind.PERCENTILE and self.reduction is not Reduction.GLOBAL

    def update(self, x: torch.Tensor) -> None:
        """Observe a batch; on error nothing is observed.

        Args:
            x: (b, ...) floating, finite, one sample a row, padding removed; any device.

        Raises:
            ShapeError: x has no dimension of samples or is not floating.
            QmambaError: x holds NaN or infinity; the message names the site.
        """
        if x.ndim == 0:
            raise ShapeError(f"`{self.name}`: wrong shape, got a scalar, expected (b, ...)")
        if not self.keeps_quantiles:
            self.histogram.update(x, name=self.name)
            return
        batch = Histogram()
        quantiles = []
        for sample in x:
            one = Histogram()
            one.update(sample, name=self.name)
            if one.count:
                quantiles.append(one.quantile(self.alpha))
                batch.merge(one)
        self.histogram.merge(batch)
        self.sample_quantiles.extend(quantiles)

    def absmax(self) -> float:
        """The chosen absmax, in real units.

        Raises:
            QmambaError: nothing was observed.
        """
        if self.histogram.count == 0:
            raise QmambaError(
                f"`{self.name}`: no scale without observations, got 0 elements, expected at least 1",
                hint="calibrate with at least one sample that reaches this site",
            )
        if self.kind is ObserverKind.MINMAX:
            return self.histogram.absmax
        match self.reduction:
            case Reduction.GLOBAL:
                return self.histogram.quantile(self.alpha)
            case Reduction.MEAN:
                # fsum rounds once, so the mean does not depend on the order of the samples.
                return math.fsum(self.sample_quantiles) / len(self.sample_quantiles)
            case Reduction.EMA:
                average = self.sample_quantiles[0]
                for quantile in self.sample_quantiles[1:]:
                    average += EMA_WEIGHT * (quantile - average)
                return average

    def absmax_at(self, alpha: float) -> float:
        """The absmax another alpha would have given, from the histogram; a MinMax site's has no alpha.

        Raises:
            UsageError: alpha lies outside (0.5, 1], or the site kept quantiles of single samples, which
                another alpha cannot be read from.
            QmambaError: nothing was observed.
        """
        check_alpha(alpha)
        if self.kind is ObserverKind.MINMAX or alpha == self.alpha:
            return self.absmax()
        if self.keeps_quantiles:
            raise UsageError(
                f"`{self.name}`: alpha is fixed by reduction={self.reduction}, got {alpha}, "
                f"expected {self.alpha}",
                hint="calibrate again with the new alpha, or with the global reduction, which keeps it open",
            )
        if self.histogram.count == 0:
            return self.absmax()
        return self.histogram.quantile(alpha)

    def scale(self) -> float:
        """Scale of the site's int8 grid, real units a step.

        Raises:
            QmambaError: nothing was observed.
        """
        return scale_from_absmax(self.absmax())

    def merge(self, other: "Observer") -> None:
        """Add what ``other`` observed after this one: the same bits as one pass over both.

        Only ema depends on which comes first.

        Raises:
            UsageError: the two watch different sites or choose their absmax differently.
        """
        mine, theirs = self._settings(), other._settings()
        if mine != theirs:
            raise UsageError(
                f"`{self.name}`: observers do not merge, got {theirs}, expected {mine}",
                hint="merge calibrations made with the same alpha and reduction only",
            )
        self.histogram.merge(other.histogram)
        self.sample_quantiles.extend(other.sample_quantiles)

    def _settings(self) -> str:
        return f"{self.name} {self.kind} alpha={self.alpha} reduction={self.reduction}"

    def state_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What to store: `Histogram.to_arrays`, and ``sample_quantiles`` (s,) float32 where they are kept."""
        arrays = self.histogram.to_arrays()
        if self.keeps_quantiles:
            arrays[_QUANTILES] = np.array(self.sample_quantiles, dtype=np.float32)
        return arrays

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[np.generic]],
        kind: ObserverKind,
        *,
        name: str,
        alpha: float = DEFAULT_ALPHA,
        reduction: Reduction = Reduction.GLOBAL,
    ) -> "Observer":
        """Inverse of `state_arrays`, bit for bit.

        Raises:
            ArtifactError: an array is missing, unknown or malformed; the message names the site.
            UsageError: alpha lies outside (0.5, 1].
        """
        observer = cls(kind, name=name, alpha=alpha, reduction=reduction)
        expected = set(observer.state_arrays())
        if set(arrays) != expected:
            raise ArtifactError(
                f"`{name}`: wrong statistics, got {sorted(arrays)}, expected {sorted(expected)}"
            )
        try:
            observer.histogram = Histogram.from_arrays(arrays)
        except ArtifactError as error:
            raise ArtifactError(f"`{name}`: {error.message}", hint=error.hint) from None
        if observer.keeps_quantiles:
            quantiles = arrays[_QUANTILES]
            sane = quantiles.dtype == np.float32 and quantiles.ndim == 1
            if not sane or not all(0 <= value <= observer.histogram.absmax for value in quantiles.tolist()):
                raise ArtifactError(
                    f"`{name}`: wrong `{_QUANTILES}`, got {quantiles.dtype} of shape {quantiles.shape}, "
                    f"expected float32 (s,) in [0, {observer.histogram.absmax}]"
                )
            if (quantiles.size == 0) != (observer.histogram.count == 0):
                raise ArtifactError(
                    f"`{name}`: wrong `{_QUANTILES}`, got {quantiles.size} for "
                    f"{observer.histogram.count} elements, expected one a sample"
                )
            observer.sample_quantiles = quantiles.tolist()
        return observer


class ObserverSet:
    """One `Observer` for each site of a model, in the order of `site_keys`.

    Attributes:
        observers: site key → observer.

    Raises:
        UsageError: alpha lies outside (0.5, 1].
    """

    def __init__(
        self, n_layer: int, *, alpha: float = DEFAULT_ALPHA, reduction: Reduction = Reduction.GLOBAL
    ) -> None:
        self.observers: dict[str, Observer] = {
            key: Observer(_kind(key), name=key, alpha=alpha, reduction=reduction)
            for key in site_keys(n_layer)
        }

    def __getitem__(self, key: str) -> Observer:
        return self.observers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.observers)

    def __len__(self) -> int:
        return len(self.observers)

    def observe(self, key: str, x: torch.Tensor) -> None:
        """Hand ``x`` (b, ...) to the observer of the site ``key``; raises as `Observer.update` does."""
        self.observers[key].update(x)

    def absmaxes(self, alpha: float | None = None) -> dict[str, float]:
        """Site key → absmax, at the calibration's alpha or at another one; raises as `Observer` does."""
        return {
            key: observer.absmax() if alpha is None else observer.absmax_at(alpha)
            for key, observer in self.observers.items()
        }

    def scales(self, alpha: float | None = None) -> dict[str, float]:
        """Site key → scale, at the calibration's alpha or at another one; raises as `Observer` does."""
        return {key: scale_from_absmax(absmax) for key, absmax in self.absmaxes(alpha).items()}

    def merge(self, other: "ObserverSet") -> None:
        """Add what ``other`` observed after this one; raises as `Observer.merge` does.

        Raises:
            UsageError: the two belong to models of different depth, or were made differently.
        """
        if set(self.observers) != set(other.observers):
            raise UsageError(
                f"calibrations do not merge, got {len(other)} sites, expected {len(self)}",
                hint="merge calibrations of one model only",
            )
        for key, observer in self.observers.items():
            observer.merge(other[key])

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """What to store: ``<site key>.<array>`` for every array of every observer."""
        return {
            f"{key}.{name}": array
            for key, observer in self.observers.items()
            for name, array in observer.state_arrays().items()
        }

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[np.generic]],
        n_layer: int,
        *,
        alpha: float = DEFAULT_ALPHA,
        reduction: Reduction = Reduction.GLOBAL,
    ) -> "ObserverSet":
        """Inverse of `arrays`, bit for bit.

        Raises:
            ArtifactError: an array is missing, unknown or malformed; the message names it.
            UsageError: alpha lies outside (0.5, 1].
        """
        restored = cls(n_layer, alpha=alpha, reduction=reduction)
        by_key: dict[str, dict[str, NDArray[np.generic]]] = {key: {} for key in restored}
        for full_name, array in arrays.items():
            key, _, name = full_name.rpartition(".")
            if key not in by_key:
                raise ArtifactError(
                    f"statistics: unknown array, got `{full_name}`, expected sites of {n_layer} layers"
                )
            by_key[key][name] = array
        for key, state in by_key.items():
            restored.observers[key] = Observer.from_arrays(
                state, _kind(key), name=key, alpha=alpha, reduction=reduction
            )
        return restored


def _kind(key: str) -> ObserverKind:
    return SITES[key.rpartition(".")[2]].observer
