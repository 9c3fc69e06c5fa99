import math

import pytest
import torch
from close import assert_close, assert_exact, assert_grid

ONES = torch.ones(2, 3)


def changed(index: tuple[int, int], value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.ones(2, 3)
    x[index] = value
    return x.to(dtype)


def test_close_names_op_index_values_and_share():
    with pytest.raises(
        AssertionError, match=r"scan: worst at \(1, 2\): got 1\.5, expected 1, .* 500% of budget"
    ):
        assert_close("scan", changed((1, 2), 1.5), ONES, 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_close_refuses_what_is_not_finite(value):
    with pytest.raises(AssertionError):
        assert_close("op", changed((0, 0), value), ONES, 1e9)


def test_close_judges_each_element_by_its_own_budget():
    budget = torch.full((2, 3), 1.0)
    budget[0, 1] = 1e-3
    assert assert_close("op", changed((1, 1), 1.5), ONES, budget) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match=r"\(0, 1\)"):
        assert_close("op", changed((0, 1), 1.5), ONES, budget)


def test_close_passes_equality_without_a_budget():
    assert assert_close("op", ONES, ONES, 0.0) == 0


def test_close_warns_when_the_budget_is_nearly_spent():
    with pytest.warns(UserWarning, match="90% of budget"):
        assert_close("op", changed((0, 0), 1.9), ONES, 1.0)


def test_close_refuses_other_shapes_and_empty_tensors():
    with pytest.raises(AssertionError, match="shape"):
        assert_close("op", ONES[0], ONES, 1.0)
    with pytest.raises(AssertionError, match="nothing"):
        assert_close("op", ONES[:0], ONES[:0], 1.0)


def test_exact_counts_and_names_the_first():
    with pytest.raises(AssertionError, match=r"1 of 6 elements differ.*\(0, 2\)"):
        assert_exact("op", changed((0, 2), 7), ONES)
    with pytest.raises(AssertionError, match="float64"):
        assert_exact("op", ONES.double(), ONES)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_exact("op", changed((0, 2), math.nan), changed((0, 2), math.nan))


def test_grid_bounds_both_steps_and_share():
    base = torch.zeros(4000, dtype=torch.int8)
    few, many, far = base.clone(), base.clone(), base.clone()
    few[:4], many[:5], far[0] = 1, -1, 2
    assert_grid("op", few, base, share=1e-3)
    with pytest.raises(AssertionError, match="5 of 4000"):
        assert_grid("op", many, base, share=1e-3)
    with pytest.raises(AssertionError, match=r"2 steps off at \(0,\)"):
        assert_grid("op", far, base, share=1e-3)
