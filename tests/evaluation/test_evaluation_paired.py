"""Paired statistics against SciPy, by hand, and on data whose answer is planted."""

import math

import numpy as np
import pytest
from scipy import stats

from qmamba_cli.evaluation.paired import bootstrap_ratios, holm, mcnemar, resamples_for

NORMAL_95 = stats.norm.ppf(0.975)


def within_binomial(hits: int, trials: int, low: float, high: float) -> bool:
    """Whether a count is what some probability in [low, high] gives, but for one time in ten thousand."""
    return bool(stats.binom.ppf(0.5e-4, trials, low) <= hits <= stats.binom.ppf(1 - 0.5e-4, trials, high))


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        # By hand: 2 * (1 + 8) / 2**8.
        (7, 1, 18 / 256),
        (4, 4, 1.0),
        (9, 12, 0.6636),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    found = mcnemar(*answers(30, only_a, only_b, 11))
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(p, abs=5e-5)


def test_mcnemar_finds_one_point_of_accuracy_at_the_expected_rate(rng: np.random.Generator) -> None:
    n, only_a, only_b, trials = 2000, 0.025, 0.015, 300
    # Given m discordant answers, the test's power is a tail of the binomial; m is binomial itself.
    share = only_a / (only_a + only_b)
    m = np.arange(20, 161)
    rejected = [
        sum(
            stats.binom.pmf(k, size, share)
            for k in range(size + 1)
            if stats.binomtest(k, int(size), 0.5).pvalue <= 0.05
        )
        for size in m[::10]
    ]
    power = float(np.interp(m, m[::10], rejected) @ stats.binom.pmf(m, n, only_a + only_b))
    assert 0.5 < power < 0.9
    draws = rng.choice(3, size=(trials, n), p=[only_a, only_b, 1 - only_a - only_b])
    found = sum(mcnemar(row == 0, row == 1).p <= 0.05 for row in draws)
    # Power between the sizes is interpolated, hence the two hundredths.
    assert within_binomial(found, trials, power - 0.02, power + 0.02)


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_the_interval_is_that_of_scipy(rng: np.random.Generator, shape: str) -> None:
    n = 60
    sizes = rng.integers(20, 60, n)
    draws = rng.standard_normal(n) if shape == "normal" else rng.exponential(size=n) - 0.7
    sums = draws * sizes * 0.02
    ours = bootstrap_ratios(sums[:, None], sizes, resamples=99_999)
    theirs = stats.bootstrap(
        (sums, sizes),
        lambda x, y, axis: x.sum(axis=axis) / y.sum(axis=axis),
        paired=True,
        n_resamples=99_999,
        method="BCa",
        batch=10_000,
        rng=np.random.default_rng(1),
    )
    assert ours.estimate[0] == sums.sum() / sizes.sum()
    # Each end carries the error of 100 000 draws, about a hundredth of the standard error.
    room = 0.06 * theirs.standard_error
    assert ours.low[0] == pytest.approx(theirs.confidence_interval.low, abs=room)
    assert ours.high[0] == pytest.approx(theirs.confidence_interval.high, abs=room)


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_the_interval_covers_at_its_rate(rng: np.random.Generator, shape: str) -> None:
    """Clusters of unequal size around a known mean; 400 samples at once, one a column."""
    n, trials, true = 80, 400, 0.01
    sizes = rng.integers(5, 15, n)
    noise = rng.standard_normal((n, trials)) if shape == "normal" else rng.exponential(size=(n, trials)) - 1
    found = bootstrap_ratios((true + noise * 0.05) * sizes[:, None], sizes, resamples=1_999)
    covered = int(((found.low <= true) & (true <= found.high)).sum())
    # A bootstrap of 80 clusters is known to fall a point or two short of 95 %.
    assert within_binomial(covered, trials, 0.92, 0.955)


def test_a_planted_difference_of_one_percent_is_found_at_the_expected_rate(rng: np.random.Generator) -> None:
    """One of two models loses 1 % of 2 nats a token; the normal law says how often that is found."""
    n, trials, planted, spread = 64, 400, 0.02, 0.06
    power = float(stats.norm.sf(NORMAL_95 - planted * math.sqrt(n) / spread))
    assert 0.6 < power < 0.9
    found = bootstrap_ratios(
        rng.normal(planted, spread, (n, trials)), np.ones(n, dtype=np.int64), resamples=1_999
    )
    assert within_binomial(int((found.p_value <= 0.05).sum()), trials, power - 0.03, power + 0.05)
    # An interval that leaves 0 out and a p-value of at most 0.05 are the same statement.
    outside = (found.low > 0) | (found.high < 0)
    assert ((found.p_value <= 0.05) != outside).sum() <= 2


def test_no_difference_is_found_as_often_as_alpha(rng: np.random.Generator) -> None:
    n, trials = 64, 400
    found = bootstrap_ratios(rng.normal(0, 0.1, (n, trials)), np.ones(n, dtype=np.int64), resamples=1_999)
    assert within_binomial(int((found.p_value <= 0.05).sum()), trials, 0.045, 0.08)


def test_tokens_of_a_window_do_not_pass_for_independent(rng: np.random.Generator) -> None:
    """100 tokens that share one deviation say no more than one: the interval must be that of the windows."""
    deviation = rng.normal(0, 1, 50)
    alone = bootstrap_ratios(deviation[:, None], np.ones(50, dtype=np.int64), resamples=999)
    hundred = bootstrap_ratios(100 * deviation[:, None], np.full(50, 100), resamples=999)
    assert hundred.low[0] == pytest.approx(alone.low[0])
    assert hundred.high[0] == pytest.approx(alone.high[0])


def test_a_constant_difference_is_certain() -> None:
    found = bootstrap_ratios(np.full((30, 1), 0.5), np.full(30, 2), resamples=999)
    assert found.estimate[0] == found.low[0] == found.high[0] == 0.25
    assert found.p_value[0] == pytest.approx(2 / 1000)


def test_few_clusters_cannot_be_sure() -> None:
    """Five windows on one side happen by chance twice in 32, whatever the bootstrap says."""
    found = bootstrap_ratios(np.linspace(1, 2, 5)[:, None], np.ones(5, dtype=np.int64), resamples=999)
    assert found.low[0] > 0
    assert found.p_value[0] == 2 / 32
    one = bootstrap_ratios(np.ones((1, 1)), np.ones(1, dtype=np.int64), resamples=999)
    assert one.estimate[0] == 1 and np.isnan([one.low[0], one.high[0], one.p_value[0]]).all()


def test_a_broken_column_leaves_the_others_alone(rng: np.random.Generator) -> None:
    sums = rng.standard_normal((30, 3))
    whole = bootstrap_ratios(sums[:, ::2], np.ones(30, dtype=np.int64), resamples=999)
    sums[4, 1] = math.inf
    found = bootstrap_ratios(sums, np.ones(30, dtype=np.int64), resamples=999)
    assert np.isnan(found.low[1]) and np.isnan(found.p_value[1])
    assert np.allclose(found.low[::2], whole.low, rtol=1e-12)


def test_draws_depend_on_the_seed_alone(rng: np.random.Generator) -> None:
    sums, sizes = rng.standard_normal((25, 2)), np.full(25, 3)
    first, again, other = (bootstrap_ratios(sums, sizes, resamples=999, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first.low, again.low) and not np.array_equal(first.low, other.low)


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_missing_p_value_is_no_test() -> None:
    corrected = holm([math.nan, 0.02, 0.04])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.04, 0.04])


@pytest.mark.parametrize("tests", [1, 28, 500])
def test_there_are_enough_draws_for_the_correction(tests: int) -> None:
    assert tests * 2 / (resamples_for(tests) + 1) < 0.05
