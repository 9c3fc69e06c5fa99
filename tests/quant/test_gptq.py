import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import CheckpointError, ShapeError
from qmamba_cli.quant import gptq
from qmamba_cli.quant.gptq import DAMPING, least_squares_weight, quantize_groups_gptq, second_moments
from qmamba_cli.quant.weights import GroupQuantized, quantize_groups


def matrix(rows: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, k, generator=generator) * spread


def inputs(n: int, k: int, seed: int) -> torch.Tensor:
    # A few directions carry most of the energy, as in a residual stream.
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, max(1, k // 4), generator=generator) @ torch.randn(
        max(1, k // 4), k, generator=generator
    )
    return mixed + 0.3 * torch.randn(n, k, generator=generator)


def moments_of(x: torch.Tensor) -> torch.Tensor:
    return second_moments([(x, x)])[0]


def damped_loss(weight: torch.Tensor, quantized: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    hessian = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    difference = weight.double() - quantized.double()
    return torch.einsum("ri,ij,rj->r", difference, hessian, difference)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 5), k=st.integers(1, 40), group=st.integers(1, 16), seed=st.integers(0, 999))
def test_no_row_is_worse_than_rounding_by_itself(rows, k, group, seed):
    weight, moments = matrix(rows, k, seed), moments_of(inputs(60, k, seed + 1))
    fed, plain = quantize_groups_gptq(weight, moments, group), quantize_groups(weight, group)
    loss, limit = (damped_loss(weight, one.dequantize(), moments) for one in (fed, plain))
    assert bool((loss <= limit * (1 + 1e-9)).all())
    assert fed.codes.shape == weight.shape and fed.group_size == group


def test_feedback_halves_the_loss_of_correlated_inputs():
    weight, x = matrix(32, 128, 3), inputs(2000, 128, 4)
    moments = moments_of(x)
    fed, plain = quantize_groups_gptq(weight, moments, 32), quantize_groups(weight, 32)
    # On inputs that it was not fitted to.
    fresh = inputs(2000, 128, 4)[:500] + 0.1 * torch.randn(500, 128, generator=torch.manual_seed(5))
    ours, theirs = (float(((one.dequantize() - weight) @ fresh.t()).square().sum()) for one in (fed, plain))
    assert ours < 0.5 * theirs


def test_every_order_of_the_columns_and_every_round_over_the_groups_pays(monkeypatch):
    weight, moments = matrix(64, 96, 21), moments_of(inputs(500, 96, 22))
    every = gptq._orders

    def loss() -> float:
        fed = quantize_groups_gptq(weight, moments, 32)
        return float(damped_loss(weight, fed.dequantize(), moments).sum())

    with_all = loss()
    monkeypatch.setattr(gptq, "_orders", lambda diagonal: every(diagonal)[:1])
    with_one = loss()
    monkeypatch.setattr(gptq, "_ROUNDS", 0)
    without_rounds = loss()
    assert with_all < 0.99 * with_one < 0.98 * without_rounds


def test_an_order_rounds_the_same_columns():
    weight, moments = matrix(5, 24, 23).double(), moments_of(inputs(200, 24, 24))
    hessian, scale = gptq._damped(moments), torch.full((5,), 0.02, dtype=torch.float64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(25))
    found = gptq._fed(weight, hessian, order, scale, 8)
    turned = gptq._fed(weight[:, order], hessian[order][:, order], torch.arange(24), scale, 24)
    # One group of all columns has no place in the order.
    alone = gptq._fed(weight, hessian, order, scale, 24)
    assert torch.equal(alone.codes[:, order], turned.codes)
    assert torch.equal(alone.multiplier, turned.multiplier)
    assert found.multiplier.shape == (5, 3)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_uncorrelated_inputs_leave_nothing_to_feed_back(scale):
    weight = matrix(8, 24, 6)
    fed = quantize_groups_gptq(weight, scale * torch.eye(24, dtype=torch.float64), 8)
    plain = quantize_groups(weight, 8)
    error = [float((one.dequantize() - weight).square().sum()) for one in (fed, plain)]
    # Only the search of row scales and their refit remain.
    assert 0.6 * error[1] < error[0] <= error[1]


def test_a_matrix_on_the_grid_is_returned_exactly():
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(-7, 8, (6, 20), generator=generator, dtype=torch.int8)
    multiplier = torch.randint(1, 16, (6, 4), generator=generator).to(torch.uint8)
    # The row's largest value, which its scale is read from.
    codes[:, 0], multiplier[:, 0] = 7, 15
    matrix_on_grid = GroupQuantized(
        codes=codes, multiplier=multiplier, scale=torch.rand(6, generator=generator) + 0.1, group_size=5
    ).dequantize()
    fed = quantize_groups_gptq(matrix_on_grid, moments_of(inputs(100, 20, 8)), 5)
    assert torch.allclose(fed.dequantize(), matrix_on_grid, rtol=1e-6)


def test_two_runs_give_identical_bits():
    weight, moments = matrix(16, 64, 9), moments_of(inputs(300, 64, 10))
    first, second = (quantize_groups_gptq(weight, moments, 16) for _ in range(2))
    for name in ("codes", "multiplier", "scale"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_least_squares_takes_back_what_the_inputs_tell():
    weight, x = matrix(4, 12, 11), inputs(5000, 12, 12)
    # The inputs arrive mixed up; the products are those of the clean ones.
    arrived, wanted = x @ (torch.eye(12) + 0.2 * matrix(12, 12, 13)).t(), x @ weight.t()
    halves = [second_moments([(arrived[part::2], wanted[part::2])]) for part in (0, 1)]
    fitted = least_squares_weight(weight, halves)
    before, after = (float((arrived @ one.t() - wanted).square().sum()) for one in (weight, fitted))
    assert fitted.dtype == torch.float32 and after < 0.05 * before


def test_least_squares_leaves_a_weight_that_unseen_inputs_bear_out():
    # Fewer inputs than columns, and targets with noise that no fit can tell from them.
    weight, x = matrix(4, 40, 15), inputs(60, 40, 16)
    noisy = x @ weight.t() + 20 * torch.randn(60, 4, generator=torch.manual_seed(17))
    halves = [second_moments([(x[part::2], noisy[part::2])]) for part in (0, 1)]
    fitted = least_squares_weight(weight, halves)
    fresh = inputs(1000, 40, 16)
    moved = float((fresh @ (fitted - weight).t()).square().sum() / (fresh @ weight.t()).square().sum())
    assert moved < 0.2
    clean = [second_moments([(x[part::2], x[part::2] @ weight.t())]) for part in (0, 1)]
    assert torch.allclose(least_squares_weight(weight, clean), weight, atol=1e-4)


def test_unusable_moments_are_refused():
    weight = matrix(2, 6, 14)
    with pytest.raises(ShapeError, match=r"layers\.0\.in_proj"):
        quantize_groups_gptq(weight, torch.eye(5, dtype=torch.float64), 4, name="layers.0.in_proj")
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_groups_gptq(weight, torch.full((6, 6), torch.nan, dtype=torch.float64), 4)
    with pytest.raises(ShapeError, match="no inputs"):
        second_moments([])
