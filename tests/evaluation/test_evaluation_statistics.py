"""Means and standard errors against lm-eval's own functions, and where those would stop."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api import metrics as theirs

from qmamba_cli.evaluation import statistics

FINITE = st.floats(-1e12, 1e12)


def log_likelihoods(count: int) -> list[float]:
    """Values as a float32 model gives them."""
    draw = random.Random(count)
    return [float(np.float32(-draw.expovariate(0.3))) for _ in range(count)]


@pytest.fixture(autouse=True)
def no_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.mark.parametrize(
    ("count", "iters"), [(2, 300), (3, 2000), (37, 2500), (1000, 30), (17_000, 3), (200, 999), (40, 3000)]
)
def test_bootstrap_equals_lm_eval(count: int, iters: int) -> None:
    values = log_likelihoods(count)
    expected = theirs.bootstrap_stderr(theirs.perplexity, values, iters)
    assert statistics.perplexity_stderr(values, bootstrap_iters=iters) == expected


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.floats(-700, 0), min_size=2, max_size=50))
def test_closed_forms_equal_lm_eval(values: list[float]) -> None:
    assert statistics.mean(values) == theirs.mean(values)
    assert statistics.perplexity(values) == theirs.perplexity(values)
    assert statistics.mean_stderr(values) == theirs.mean_stderr(values)


def test_accuracy_equals_lm_eval_on_counts() -> None:
    hits = [1, 0, 0, 1, 1, 0, 1]
    assert statistics.mean(hits) == theirs.mean(hits) == 4 / 7
    assert statistics.mean_stderr(hits) == theirs.mean_stderr(hits)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 30).flatmap(lambda n: st.lists(st.lists(FINITE, min_size=n, max_size=n), min_size=1))
)
def test_row_sums_equal_the_builtin_sum(rows: list[list[float]]) -> None:
    assert statistics.row_sums(np.array(rows)).tolist() == [sum(row) for row in rows]


def neumaier(values: Sequence[float]) -> float:
    """The sum of Python 3.12, as its source describes it."""
    total, correction = 0.0, 0.0
    for value in values:
        after = total + value
        correction += (total - after) + value if abs(total) >= abs(value) else (value - after) + total
        total = after
    return total + correction


@settings(deadline=None, max_examples=60)
@given(row=st.lists(FINITE, min_size=1, max_size=30))
def test_both_kinds_of_sum_are_followed(row: list[float]) -> None:
    plain = 0.0
    for value in row:
        plain += value
    array = np.array([row])
    assert statistics.row_sums(array, compensated=False).tolist() == [plain]
    assert statistics.row_sums(array, compensated=True).tolist() == [neumaier(row)]


def test_the_kinds_of_sum_differ_where_they_should() -> None:
    rows = np.array([[1e16, 1.0, 1.0, -1e16], [-math.inf, 1.0, 2.0, 3.0]])
    assert statistics.row_sums(rows, compensated=False).tolist() == [0.0, -math.inf]
    assert statistics.row_sums(rows, compensated=True).tolist() == [2.0, -math.inf]


def test_overflow_is_infinite() -> None:
    for values in ([-1e6, -2e6], [-math.inf, -1.0], [-709.0, -1e300]):
        assert statistics.perplexity(values) == math.inf
        assert statistics.perplexity_stderr(values, bootstrap_iters=50) == math.inf
    # The squares overflow, the values do not.
    assert statistics.mean_stderr([1e200, -1e200]) == math.inf


def test_nan_stays_nan() -> None:
    values = [-1.0, math.nan, -math.inf]
    assert math.isnan(statistics.perplexity(values))
    assert math.isnan(statistics.perplexity_stderr(values, bootstrap_iters=20) or 0.0)
    assert math.isnan(statistics.mean_stderr(values) or 0.0)


def test_too_little_has_no_standard_error() -> None:
    assert statistics.mean_stderr([1.0]) is None
    assert statistics.perplexity_stderr([-1.0]) is None
    assert statistics.perplexity_stderr([-1.0, -2.0], bootstrap_iters=0) is None
    assert statistics.perplexity_stderr([-1.0, -2.0], bootstrap_iters=1) is None
