"""Paired statistics of models that scored the same documents.

Tokens of one document (window) depend on each other, documents do not: intervals resample whole documents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qmamba_cli.progress import Progress, silent

CONFIDENCE = 0.95
"""Of every interval; a difference counts where its corrected p-value is at most 1 - this."""

FEW_CLUSTERS = 20
"""Below it the bootstrap knows too little of the spread: its intervals are too narrow."""

_MIN_RESAMPLES = 9_999
# Keeps the smallest bootstrap p-value, 2 / (resamples + 1), below what Holm asks of the first of all tests.
_RESAMPLES_A_TEST = 80
# Weights of resamples held at once: 32 MB of float64.
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Two models' right and wrong answers on the same questions.

    Attributes:
        only_a: answers that only the first has right.
        only_b: answers that only the second has right.
        p: exact two-sided p-value that the two counts are equal but for chance; 1 where both are 0.
    """

    only_a: int
    only_b: int
    p: float


def mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> McNemar:
    """Exact McNemar test: a binomial test of the discordant answers.

    Args:
        a: (n,) whether the first model is right.
        b: (n,) whether the second is.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or
        percentages", 1947; the exact form is the sign test.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_a + only_b
    p = float(binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(only_a=only_a, only_b=only_b, p=p)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intervals:
    """Estimates with their intervals; entries are NaN where there are fewer than two clusters.

    Attributes:
        estimate: (p,) float64, sum over the clusters / sum of their sizes.
        low: (p,) float64, lower end of the interval.
        high: (p,) float64, upper end.
        p_value: (p,) float64, two-sided: the smallest alpha whose (1 - alpha) interval leaves 0 out, but at
            least 2 / (resamples + 1) and 2**(1 - n), which is the surest that n clusters of one sign can be.
    """

    estimate: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p_value: NDArray[np.float64]


def resamples_for(tests: int) -> int:
    """Resamples that are enough for Holm's correction over so many tests."""
    return max(_MIN_RESAMPLES, _RESAMPLES_A_TEST * tests)


def bootstrap_ratios(
    sums: NDArray[np.float64],
    sizes: NDArray[np.int64],
    *,
    resamples: int,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    progress: Progress = silent,
) -> Intervals:
    """Cluster bootstrap of means a unit, with BCa intervals.

    Whole clusters are drawn with replacement, and every column from the same draws:

        estimate = sum(sums) / sum(sizes)

    Args:
        sums: (n, p) float64, one column a quantity: its sum over the units of each cluster.
        sizes: (n,) int64, units (tokens) of each cluster, each at least 1.
        resamples: number of draws.
        seed: of the draws.
        confidence: of the intervals.
        progress: told of each draw.

    Returns:
        One entry a column. A column with an infinity or NaN has a NaN interval.

    Source: Efron, "Better bootstrap confidence intervals", 1987; `scipy.stats.bootstrap` with
        ``paired=True, method="BCa"`` is the same but for its draws.
    """
    n, columns = sums.shape
    weights = sizes.astype(np.float64)
    with np.errstate(invalid="ignore"):
        estimate = sums.sum(axis=0) / weights.sum()
    missing = np.full(columns, math.nan)
    if n < 2:
        return Intervals(estimate=estimate, low=missing, high=missing.copy(), p_value=missing.copy())
    usable = np.isfinite(sums).all(axis=0)
    low, high, p_value = missing, missing.copy(), missing.copy()
    if usable.any():
        kept = sums[:, usable]
        drawn = _drawn_ratios(kept, weights, resamples, seed, progress)
        low[usable], high[usable], p_value[usable] = _bca(
            drawn, estimate[usable], _acceleration(kept, weights), confidence
        )
        p_value = np.maximum(p_value, 2.0 ** (1 - n))
    return Intervals(estimate=estimate, low=low, high=high, p_value=p_value)


def _drawn_ratios(
    sums: NDArray[np.float64],
    weights: NDArray[np.float64],
    resamples: int,
    seed: int,
    progress: Progress,
) -> NDArray[np.float64]:
    """(resamples, p): the ratio of each draw of n clusters."""
    rng = np.random.default_rng(seed)
    n = len(weights)
    rows = max(1, _BLOCK // n)
    drawn = np.empty((resamples, sums.shape[1]))
    with progress("resampling", resamples) as advance:
        for start in range(0, resamples, rows):
            count = min(rows, resamples - start)
            chosen = rng.integers(n, size=(count, n))
            chosen += np.arange(count)[:, None] * n
            times = np.bincount(chosen.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)
            drawn[start : start + count] = times @ sums / (times @ weights)[:, None]
            advance(count)
    return drawn


def _acceleration(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(p,): BCa's acceleration from the jackknife, 0 where all left-out estimates are equal."""
    left_out = (sums.sum(axis=0) - sums) / (weights.sum() - weights)[:, None]
    deviation = left_out.mean(axis=0) - left_out
    spread = (deviation**2).sum(axis=0)
    cubes = (deviation**3).sum(axis=0)
    acceleration: NDArray[np.float64] = np.zeros_like(cubes)
    np.divide(cubes, 6 * spread**1.5, out=acceleration, where=spread > 0)
    return acceleration


def _bca(
    drawn: NDArray[np.float64],
    estimate: NDArray[np.float64],
    acceleration: NDArray[np.float64],
    confidence: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends and p-values of each column of ``drawn``, which it sorts."""
    from scipy.special import ndtr, ndtri

    resamples, columns = drawn.shape
    drawn.sort(axis=0)
    smallest = 1 / (resamples + 1)

    def share_below(values: NDArray[np.float64]) -> NDArray[np.float64]:
        # A tie counts half, so that a constant has no bias.
        below = np.array(
            [
                (np.searchsorted(drawn[:, c], values[c]) + np.searchsorted(drawn[:, c], values[c], "right"))
                for c in range(columns)
            ]
        )
        share: NDArray[np.float64] = np.clip(below / (2 * resamples), smallest, 1 - smallest)
        return share

    bias = ndtri(share_below(estimate))
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + ndtri(tail)
        quantile = ndtr(bias + shifted / (1 - acceleration * shifted))
        ends.append(np.array([np.quantile(drawn[:, c], quantile[c]) for c in range(columns)]))
    # The same map backwards: the tail at which an end of the interval is 0.
    outer = ndtri(share_below(np.zeros(columns))) - bias
    stretch = np.maximum(1 + acceleration * outer, smallest)
    tail = ndtr(outer / stretch - bias)
    p_value = np.clip(2 * np.minimum(tail, 1 - tail), 2 * smallest, 1)
    return ends[0], ends[1], p_value


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; a NaN stays NaN and counts as no test.

    >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
