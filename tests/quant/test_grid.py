import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import QmambaError, ShapeError
from qmamba_cli.quant import grid

SCALES = st.floats(min_value=grid.MIN_SCALE, max_value=1e6).map(lambda value: float(np.float32(value)))
EPS = float(np.finfo(np.float32).eps)
ALL_CODES = torch.arange(-128, 128, dtype=torch.int8)


def values_around_the_grid(scale: float, seed: int) -> torch.Tensor:
    # From well inside one step to well outside the grid, in units of the scale.
    rng = torch.Generator().manual_seed(seed)
    steps = torch.randn(512, generator=rng) * torch.tensor([0.3, 20.0, 80.0, 400.0]).repeat_interleave(128)
    return steps * scale


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0**-20, 4.0], ids=str)
def test_every_tie_rounds_to_even(scale):
    # A power of two as scale keeps k + 0.5 exact.
    below = torch.arange(-128, 127)
    expected = [code if code % 2 == 0 else code + 1 for code in below.tolist()]
    assert grid.quantize((below + 0.5) * scale, scale).tolist() == expected


def test_worked_ties():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, -127.5])
    assert grid.quantize(x, 1.0).tolist() == [-2, -2, 0, 0, 2, 2, 126, -128]


def test_out_of_range_saturates_and_never_wraps():
    x = torch.tensor([127.5, 128.0, 255.0, 256.0, 1e30, -128.5, -129.0, -256.0, -1e30])
    assert grid.quantize(x, 1.0).tolist() == [127] * 5 + [-128] * 4


@settings(deadline=None, max_examples=60)
@given(scale=SCALES)
def test_requantizing_a_dequantized_code_gives_the_code(scale):
    assert torch.equal(grid.quantize(grid.dequantize(ALL_CODES, scale), scale), ALL_CODES)


@settings(deadline=None, max_examples=40)
@given(scale=SCALES, seed=st.integers(0, 2**32 - 1))
def test_fake_quantize_is_idempotent(scale, seed):
    once = grid.fake_quantize(values_around_the_grid(scale, seed), scale)
    assert torch.equal(grid.fake_quantize(once, scale), once)


@settings(deadline=None, max_examples=40)
@given(scale=SCALES, seed=st.integers(0, 2**32 - 1))
def test_quantize_is_monotone(scale, seed):
    ordered = values_around_the_grid(scale, seed).sort().values
    steps = grid.quantize(ordered, scale).to(torch.int32).diff()
    assert int(steps.min()) >= 0


@settings(deadline=None, max_examples=40)
@given(scale=SCALES, seed=st.integers(0, 2**32 - 1))
def test_error_is_at_most_half_a_step_within_the_range(scale, seed):
    x = values_around_the_grid(scale, seed)
    inside = x[(x / scale).abs() <= 127.0]
    error = (inside.double() - grid.fake_quantize(inside, scale).double()).abs().max().item()
    # Three float32 roundings of numbers of at most 128 steps: the reciprocal and the two products.
    assert error <= scale * (0.5 + 128 * 3 * EPS)


def test_quantize_leaves_its_argument_alone():
    x = torch.tensor([0.4, 300.0])
    grid.quantize(x, 1.0)
    assert x.tolist() == pytest.approx([0.4, 300.0])


@settings(deadline=None, max_examples=60)
@given(absmax=st.floats(min_value=2.0**-19, max_value=2.0**100, width=32))
def test_scale_just_holds_the_absmax(absmax):
    scale = grid.scale_from_absmax(absmax)
    assert grid.quantize(torch.tensor([absmax, -absmax]), scale).tolist() == [127, -127]


@pytest.mark.parametrize("absmax", [0.0, 1e-45, 1e-7])
def test_scale_has_a_floor(absmax):
    scale = grid.scale_from_absmax(absmax)
    assert scale == float(np.float32(grid.MIN_SCALE))
    assert grid.quantize(torch.zeros(2), scale).tolist() == [0, 0]


@pytest.mark.parametrize("absmax", [math.nan, math.inf, -math.inf, -1.0])
def test_scale_refuses_a_broken_absmax(absmax):
    with pytest.raises(QmambaError, match="an absmax must be finite and >= 0, got"):
        grid.scale_from_absmax(absmax)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_quantize_refuses_a_broken_scale(scale):
    with pytest.raises(ShapeError, match="a scale must be finite and > 0, got"):
        grid.quantize(torch.ones(1), scale)


def test_reciprocal_is_the_float32_one():
    for scale in (3.0, 0.1, 7e-5, 127.0):
        assert grid.reciprocal(scale) == float(np.float32(1) / np.float32(scale))


@pytest.mark.parametrize(("b", "d", "l"), [(1, 1, 1), (2, 31, 5), (1, 64, 65)], ids=str)
def test_per_token_equals_a_plain_loop(b, d, l, generator):
    x = torch.randn(b, d, l, generator=generator) * 3
    x[0, :, 0] = 0.0
    q, scale = grid.quantize_per_token(x)
    assert q.shape == (b, d, l) and q.dtype == torch.int8
    assert scale.shape == (b, l) and scale.dtype == torch.float32
    for i in range(b):
        for t in range(l):
            absmax = max(float(x[i, :, t].abs().max()), grid.MIN_TOKEN_ABSMAX)
            expected_scale = grid.scale_from_absmax(absmax)
            assert float(scale[i, t]) == expected_scale
            assert torch.equal(q[i, :, t], grid.quantize(x[i, :, t], expected_scale))


def test_a_later_token_does_not_change_an_earlier_one(generator):
    x = torch.randn(1, 8, 6, generator=generator)
    q, scale = grid.quantize_per_token(x)
    x[:, :, 4:] *= 100
    q_after, scale_after = grid.quantize_per_token(x)
    assert torch.equal(q[:, :, :4], q_after[:, :, :4])
    assert torch.equal(scale[:, :4], scale_after[:, :4])
