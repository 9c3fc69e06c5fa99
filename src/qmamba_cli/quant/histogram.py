"""Histogram of |x| on a fixed logarithmic grid: merges exactly, in any order, and yields any quantile.

The bin of a value is read from its float32 pattern: sign dropped, exponent and the first 9 mantissa bits
kept. A bin is 2^-9 of its lower edge wide, so its midpoint lies within 2^-10 (< 0.1 %) of everything in it.
The grid never adapts to the data, which is what makes merging exact.

    bin 0             |x| < 2^-32, taken as 0
    bin 1 ... 32768   512 bins for each power of two from 2^-32 up to 2^32
    bin 32769         |x| >= 2^32, taken as the absmax
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli.errors import ArtifactError, QmambaError, ShapeError, UsageError
from qmamba_cli.quant.bins import N_BINS, OFFSET, OVERFLOW, SHIFT, bin_of

# Elements counted at a time: bounds the temporaries.
_SLICE = 1 << 20


def check_alpha(alpha: float) -> float:
    """Return ``alpha`` if it can be a clipping quantile.

    Raises:
        UsageError: alpha lies outside (0.5, 1].
    """
    # Written so that NaN is refused too.
    if not 0.5 < alpha <= 1.0:
        raise UsageError(
            f"alpha out of range, got {alpha}, expected a number in (0.5, 1]",
            hint="0.9995 clips 1 value in 2000; 1 clips nothing",
        )
    return float(alpha)


class Histogram:
    """Counts of |x| in the bins of the module's grid, with the exact maximum.

    Attributes:
        counts: (N_BINS,) int64, elements a bin.
        count: elements in all.
        absmax: exact max(|x|), a float32 value; 0 while nothing was counted.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(N_BINS, dtype=np.int64)
        self.count: int = 0
        self.absmax: float = 0.0

    def update(self, x: torch.Tensor, *, name: str = "tensor") -> None:
        """Count every element of ``x``; on error nothing is counted.

        Args:
            x: any shape, device and floating dtype; taken as float32.
            name: what the tensor is called in an error.

        Raises:
            ShapeError: x is not of a floating dtype.
            QmambaError: x holds NaN or infinity.
        """
        if not x.is_floating_point():
            raise ShapeError(f"`{name}`: wrong dtype, got {x.dtype}, expected a floating dtype")
        if x.numel() == 0:
            return
        flat = x.detach().reshape(-1)
        absmax = torch.zeros((), dtype=torch.float32, device=x.device)
        counts = torch.zeros(N_BINS, dtype=torch.int64, device=x.device)
        for part in torch.split(flat, _SLICE):
            magnitude = part.to(torch.float32).abs()
            # maximum and amax pass NaN on, so one look at the end finds every kind of broken value; the
            # clamp keeps the bins of such values legal until then.
            absmax = torch.maximum(absmax, magnitude.amax())
            bins = magnitude.view(torch.int32).bitwise_right_shift_(SHIFT).sub_(OFFSET)
            counts += torch.bincount(bins.clamp_(0, OVERFLOW), minlength=N_BINS)
        largest = float(absmax)
        if not math.isfinite(largest):
            raise _not_finite(flat, name)
        self.counts += counts.cpu().numpy()
        self.count += x.numel()
        self.absmax = max(self.absmax, largest)

    def merge(self, other: "Histogram") -> None:
        """Add the counts of ``other``: the same bits as one pass over both, in any order."""
        self.counts += other.counts
        self.count += other.count
        self.absmax = max(self.absmax, other.absmax)

    def quantile(self, alpha: float) -> float:
        """The alpha-quantile of |x|, within 2^-10 relative: the ``ceil(alpha * count)``-th smallest value.

        Alpha is the decimal number as it is written, so 0.9995 of 2000 elements is the 1999th, exactly.
        Values below 2^-32 read as 0, values from 2^32 up as the absmax.

        >>> histogram = Histogram()
        >>> histogram.update(torch.tensor([1.0, -2.0, 3.0, -100.0]))
        >>> histogram.quantile(1.0), histogram.quantile(0.75)
        (100.0, 3.001953125)

        Returns:
            A float32 value, never above the absmax; at alpha = 1 exactly the absmax.

        Raises:
            UsageError: alpha lies outside (0.5, 1].
            QmambaError: nothing was counted.
        """
        share = Fraction(repr(check_alpha(alpha)))
        if self.count == 0:
            raise QmambaError("a quantile needs observations, got 0, expected at least 1")
        rank = math.ceil(share * self.count)
        if rank == self.count:
            return self.absmax
        bin_index = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(self._midpoint(bin_index), self.absmax)

    def _midpoint(self, bin_index: int) -> float:
        if bin_index == 0:
            return 0.0
        if bin_index == OVERFLOW:
            return self.absmax
        pattern = ((bin_index + OFFSET) << SHIFT) + (1 << (SHIFT - 1))
        return float(np.array(pattern, dtype=np.int32).view(np.float32))

    def span(self) -> tuple[int, NDArray[np.int64]]:
        """First non-empty bin, and the counts (int64) from it to the last non-empty one; (0, []) if none."""
        filled = np.flatnonzero(self.counts)
        if filled.size == 0:
            return 0, np.zeros(0, dtype=np.int64)
        first, last = int(filled[0]), int(filled[-1])
        return first, self.counts[first : last + 1].copy()

    @classmethod
    def from_span(cls, first_bin: int, counts: NDArray[np.int64], absmax: float) -> "Histogram":
        """Inverse of `span`.

        Args:
            first_bin: bin of ``counts[0]``.
            counts: (m,) int64, each >= 0.
            absmax: exact maximum of what was counted, in the last non-empty bin.

        Raises:
            ArtifactError: the three do not make a histogram.
        """
        if counts.dtype != np.int64 or counts.ndim != 1:
            raise ArtifactError(
                f"histogram: wrong counts, got {counts.dtype} of shape {counts.shape}, expected int64 (m,)"
            )
        if first_bin < 0 or first_bin + counts.size > N_BINS or bool((counts < 0).any()):
            raise ArtifactError(
                f"histogram: counts off the grid, got {counts.size} bins from bin {first_bin}, "
                f"expected counts >= 0 in bins 0 to {N_BINS - 1}"
            )
        histogram = cls()
        histogram.counts[first_bin : first_bin + counts.size] = counts
        histogram.count = int(counts.sum())
        filled = np.flatnonzero(histogram.counts)
        last = int(filled[-1]) if filled.size else 0
        if not math.isfinite(absmax) or absmax < 0 or bin_of(absmax) != last:
            raise ArtifactError(
                f"histogram: absmax contradicts the counts, got {absmax}, expected a value of bin {last}"
            )
        histogram.absmax = float(absmax)
        return histogram

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What to store: ``counts`` (m,) int64, ``first_bin`` (1,) int64 and ``absmax`` (1,) float32."""
        first, counts = self.span()
        return {
            "counts": counts,
            "first_bin": np.array([first], dtype=np.int64),
            "absmax": np.array([self.absmax], dtype=np.float32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Histogram":
        """Inverse of `to_arrays`; other names in ``arrays`` are left alone.

        Raises:
            ArtifactError: an array is missing or they do not make a histogram.
        """
        for name in ("counts", "first_bin", "absmax"):
            if name not in arrays:
                raise ArtifactError(f"histogram: array missing, expected `{name}`, got {sorted(arrays)}")
        for name, dtype in (("first_bin", np.int64), ("absmax", np.float32)):
            array = arrays[name]
            if array.dtype != dtype or array.shape != (1,):
                raise ArtifactError(
                    f"histogram: wrong `{name}`, got {array.dtype} of shape {array.shape}, "
                    f"expected {np.dtype(dtype)} (1,)"
                )
        counts: NDArray[np.int64] = arrays["counts"]  # type: ignore[assignment]  # from_span checks the dtype
        return cls.from_span(int(arrays["first_bin"].item()), counts, float(arrays["absmax"].item()))


def _not_finite(flat: torch.Tensor, name: str) -> QmambaError:
    # Counted in float32, where a large float64 value is an infinity.
    values = flat.to(torch.float32)
    nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
    return QmambaError(
        f"`{name}`: values are not finite, got {nans} NaN and {infinities} infinite of {values.numel()}, "
        "expected none",
        hint="the float model breaks down on this input; check the checkpoint's weights",
    )
