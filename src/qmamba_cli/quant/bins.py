"""The fixed logarithmic grid of the histograms, without torch, for those who only look at them.

bin 0             |x| < 2^-32, taken as 0
bin 1 ... 32768   512 bins for each power of two from 2^-32 up to 2^32
bin 32769         |x| >= 2^32
"""

import numpy as np
from numpy.typing import NDArray

MANTISSA_BITS = 9
SHIFT = 23 - MANTISSA_BITS
_EXPONENT_BIAS = 127
# A site whose largest value is below 2^-32 gets the smallest scale anyway: 127 * MIN_SCALE = 1.3e-6.
MIN_EXPONENT, MAX_EXPONENT = -32, 32
# Shifted float32 pattern of the lower edge of bin 1, less 1: subtracting it gives the bin.
OFFSET = ((_EXPONENT_BIAS + MIN_EXPONENT) << MANTISSA_BITS) - 1
N_BINS = ((MAX_EXPONENT - MIN_EXPONENT) << MANTISSA_BITS) + 2
OVERFLOW = N_BINS - 1


def bin_of(magnitude: float) -> int:
    """The bin of a magnitude >= 0, taken as float32.

    >>> bin_of(0.0), bin_of(2.0**-32), bin_of(1.0), bin_of(2.0**32)
    (0, 1, 16385, 32769)
    """
    pattern = int(np.array(magnitude, dtype=np.float32).view(np.int32))
    return min(max((pattern >> SHIFT) - OFFSET, 0), OVERFLOW)


def octaves(counts: NDArray[np.int64], first_bin: int) -> tuple[int, int, list[int]]:
    """Counts by powers of two.

    >>> octaves(np.array([3, 1, 2]), 16384)
    (0, -1, [3, 3])

    Args:
        counts: (m,) int64, elements a bin.
        first_bin: bin of ``counts[0]``.

    Returns:
        Elements of bin 0; the exponent of the first power of two that has any; the elements of each power
        from there to the last one that has any (from 2^32 up: of one more). Exponent 0 and [] where there are
        none.
    """
    bins = np.arange(first_bin, first_bin + counts.size)
    below = int(counts[bins == 0].sum())
    powers = np.zeros(MAX_EXPONENT - MIN_EXPONENT + 1, dtype=np.int64)
    np.add.at(powers, (bins[bins > 0] - 1) >> MANTISSA_BITS, counts[bins > 0])
    filled = np.flatnonzero(powers)
    if filled.size == 0:
        return below, 0, []
    first, last = int(filled[0]), int(filled[-1])
    return below, first + MIN_EXPONENT, powers[first : last + 1].tolist()
