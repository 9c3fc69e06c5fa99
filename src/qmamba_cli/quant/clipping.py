"""An absmax from a histogram alone: the clip whose expected error on the int8 grid is smallest.

A clip trades two errors: what lies beyond it saturates, and what lies below is rounded to a step that grows
with it. Both are sums over the bins of `Histogram`, so no forward pass is needed.
"""

import numpy as np

from qmamba_cli.errors import QmambaError, UsageError
from qmamba_cli.quant.bins import N_BINS, OFFSET, SHIFT
from qmamba_cli.quant.grid import QMAX
from qmamba_cli.quant.histogram import Histogram

# Clips that are tried: as many a power of two, over as many powers of two below the maximum.
_STEPS = 16
_POWERS = 6


def least_error_absmax(histogram: Histogram, *, power: float = 2.0) -> float:
    """The absmax with the smallest expected ``|x - fake_quantize(x)|^power``, the largest of equals.

    With power 2 it is the squared error, which an output that is linear in x inherits. A smaller power gives
    a tighter clip: it weighs the many small values more and the few that saturate less, which suits a tensor
    whose damage a single value cannot exceed.

    >>> import torch
    >>> values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    >>> histogram = Histogram()
    >>> histogram.update(values)
    >>> round(least_error_absmax(histogram), 1), round(histogram.absmax, 1)
    (4.0, 4.6)

    Args:
        histogram: of the observed |x|.
        power: > 0.

    Returns:
        A value in (0, histogram.absmax]; 0 where nothing but zeros was seen.

    Raises:
        QmambaError: nothing was counted.
        UsageError: power is not above 0.
    """
    if not power > 0:
        raise UsageError(f"power of the error out of range, got {power}, expected a number > 0")
    if histogram.count == 0:
        raise QmambaError("a clip needs observations, got 0, expected at least 1")
    if histogram.absmax == 0:
        return 0.0
    filled = np.flatnonzero(histogram.counts)
    values = np.minimum(_midpoints(filled), histogram.absmax)
    counts = histogram.counts[filled].astype(np.float64)
    best, least = histogram.absmax, np.inf
    for number in range(_STEPS * _POWERS + 1):
        absmax = float(np.float32(histogram.absmax * 2.0 ** (-number / _STEPS)))
        step = absmax / QMAX
        # Negative values reach one step further: half a step on average.
        real = np.minimum(np.rint(values / step), QMAX + 0.5) * step
        error = float(np.dot(counts, np.abs(values - real) ** power))
        if error < least:
            best, least = absmax, error
    return best


def _midpoints(
    bins: np.ndarray[tuple[int], np.dtype[np.intp]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Midpoints of the bins, float64; 0 for bin 0, the lower edge for the last."""
    inner = np.clip(bins, 1, N_BINS - 1)
    half = np.where(inner == N_BINS - 1, 0, 1 << (SHIFT - 1))
    patterns = ((inner + OFFSET) << SHIFT) + half
    return np.where(bins == 0, 0.0, patterns.astype(np.int32).view(np.float32).astype(np.float64))
