"""Means, perplexities and standard errors, equal to lm-eval's digit for digit.

lm-eval adds with Python's ``sum`` and draws with ``random.Random``; both are followed here to the last bit,
in NumPy. Where lm-eval would stop with an overflow, as after a quantization that broke the model, these
functions return ``inf``; where a log-likelihood is NaN they return NaN.

Source: lm-eval 0.4.13, ``lm_eval/api/metrics.py``.
"""

import math
import random
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qmamba_cli.progress import Progress, silent

BOOTSTRAP_ITERS = 100_000

# One seed for each thousand resamples, as lm-eval hands them to its workers.
_CHUNK = 1000
# Draws held at once: 128 kB of float64, which stays in the cache.
_BLOCK = 1 << 14
# Python 3.12 made `sum` compensate for rounding, so that lm-eval's own results depend on the interpreter.
_COMPENSATED_SUM = sys.version_info >= (3, 12)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value, added from left to right by the built-in ``sum``."""
    return sum(values) / len(values)


def sample_stddev(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1) of at least two values; inf where one is infinite and none is NaN."""
    if not all(map(math.isfinite, values)):
        return math.nan if any(map(math.isnan, values)) else math.inf
    mu = mean(values)
    try:
        return math.sqrt(sum([(x - mu) ** 2 for x in values]) / (len(values) - 1))
    except OverflowError:
        return math.inf


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean, sample standard deviation / sqrt(n); None for fewer than two values."""
    return sample_stddev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def perplexity(lls: Sequence[float]) -> float:
    """exp(-mean) of log-likelihoods in nats; inf where that overflows."""
    return _exp(-mean(lls))


def perplexity_stderr(
    lls: Sequence[float], *, bootstrap_iters: int = BOOTSTRAP_ITERS, progress: Progress = silent
) -> float | None:
    """Bootstrap standard error of `perplexity`.

    The resamples come in chunks of ``min(1000, bootstrap_iters)``; chunk i draws from ``random.Random(i)``.
    A last partial chunk is left out, as lm-eval does.

    Args:
        lls: log-likelihoods in nats.
        bootstrap_iters: number of resamples.
        progress: told of each resample.

    Returns:
        The sample standard deviation of the resampled perplexities, or None where there are fewer than two
        values or two resamples.
    """
    if len(lls) < 2 or bootstrap_iters < 2:
        return None
    values = np.asarray(lls, dtype=np.float64)
    draws = min(_CHUNK, bootstrap_iters)
    resampled: list[float] = []
    with progress("bootstrap", bootstrap_iters) as advance:
        for seed in range(bootstrap_iters // draws):
            resampled.extend(_exp(-value) for value in _resampled_means(values, seed, draws))
            advance(draws)
    return sample_stddev(resampled)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _resampled_means(values: NDArray[np.float64], seed: int, draws: int) -> list[float]:
    """Means of ``draws`` resamples, each the ``random.Random(seed).choices(values, k=n)`` that comes next."""
    # Both libraries run the same Mersenne Twister and make the same 53-bit fractions of its output.
    _version, state, _gauss = random.Random(seed).getstate()
    twister = np.random.RandomState()
    twister.set_state(("MT19937", np.array(state[:-1], dtype=np.uint32), state[-1], 0, 0.0))
    size = values.size
    rows = max(1, _BLOCK // size)
    means: list[float] = []
    for start in range(0, draws, rows):
        fractions = twister.random_sample((min(rows, draws - start), size))
        fractions *= float(size)
        sums = row_sums(values[fractions.astype(np.intp)])
        means.extend((sums / size).tolist())
    return means


def row_sums(rows: NDArray[np.float64], *, compensated: bool = _COMPENSATED_SUM) -> NDArray[np.float64]:
    """Sum of each row, to the last bit what the built-in ``sum`` gives.

    Args:
        rows: (r, n) float64, n >= 1.
        compensated: with the correction term of Python 3.12 and later.

    Returns:
        (r,) float64.

    Source: Neumaier, "Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen", 1974.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        prefix = np.add.accumulate(rows, axis=1)
        total = prefix[:, -1]
        if not compensated or rows.shape[1] == 1:
            return total
        before, added, after = prefix[:, :-1], rows[:, 1:], prefix[:, 1:]
        # What each addition lost, counted from the larger of its two operands.
        lost = np.where(np.abs(before) >= np.abs(added), (before - after) + added, (added - after) + before)
        correction = np.add.accumulate(lost, axis=1)[:, -1]
        return np.where(np.isfinite(correction), total + correction, total)
