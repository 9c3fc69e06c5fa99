"""Products of one 16-bit token on a GPU, judged by float64."""

import pytest
import torch
from close import assert_close, assert_exact
from tolerances import LINEAR_FLOAT

from qmamba_cli.kernels.linear import cuda, float_cuda
from qmamba_cli.kernels.linear import plan as plans

# Rows and columns of in_proj, x_proj, dt_proj and out_proj of 2.8b and 130m; ragged rows, warps and pieces.
SHAPES = [(10240, 2560), (192, 5120), (5120, 160), (2560, 5120), (80, 1536), (1536, 48), (768, 1536)]
RAGGED = [(37, 264), (3, 8), (129, 5128), (70, 49152), (2113, 2048)]
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("processors", [16, 108, 132])
@pytest.mark.parametrize(("rows", "k"), SHAPES + RAGGED)
def test_a_plan_covers_the_rows_with_whole_groups_of_warps(rows, k, processors):
    plan = plans.half_plan(rows, k, processors)
    assert (plan.rows, plan.pieces, plan.split) in plans.HALF_TILES
    # As linear_half.cuh bounds a block.
    assert plan.warps % plan.split == 0 and 32 * plan.warps <= 768
    assert 1 <= plan.blocks <= processors
    units = -(-rows // plan.rows)
    # No block is without a row.
    assert (plan.blocks - 1) * (plan.warps // plan.split) < units


def operands(rows: int, k: int, dtype: torch.dtype, rng: torch.Generator):
    x = torch.randn(1, 1, k, generator=rng).to(dtype)
    weight = (torch.randn(rows, k, generator=rng) / k**0.5).to(dtype)
    return x, weight, torch.randn(rows, generator=rng), torch.randn(1, 1, rows, generator=rng)


@pytest.mark.gpu
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("rows", "k"), SHAPES + RAGGED)
def test_one_token_is_summed_in_float32_and_rounded_once(torch_rng, rows, k, dtype, with_bias):
    x, weight, bias, residual = operands(rows, k, dtype, torch_rng)
    bias = bias if with_bias else torch.zeros(rows)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    size = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    moved = x.cuda(), weight.cuda(), bias.cuda() if with_bias else None
    assert float_cuda.is_half_token(*moved[:2])
    got = cuda.linear(*moved)
    assert got.dtype == dtype
    budget = LINEAR_FLOAT.budget(size, terms=k + 1) + EPS[dtype] * exact.abs() + 2.0**-25
    assert_close("linear_halves", got.cpu(), exact, budget)
    # The sum is rounded before the residual is added to it.
    added = cuda.linear(*moved, residual=residual.cuda())
    assert_exact("linear_halves, residual", added.cpu(), residual + got.cpu().to(torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "k"), [(2560, 5120), (129, 5128), (37, 264)])
def test_a_row_s_bits_depend_on_its_columns_alone(torch_rng, rows, k):
    x, weight, *_ = (tensor.cuda() for tensor in operands(rows, k, torch.float16, torch_rng))
    expected = float_cuda.half_token(x, weight, None, None)
    for blocks in (1, 7, 264):
        plan = plans.half_plan(rows, k, 132)
        cut = plans.HalfPlan(plan.rows, plan.pieces, plan.split, 8, blocks)
        assert_exact("linear_halves", float_cuda.half_token(x, weight, None, None, cut), expected)


@pytest.mark.gpu
def test_other_operands_are_the_vendor_s(torch_rng):
    x, weight, *_ = (tensor.cuda() for tensor in operands(64, 264, torch.float16, torch_rng))
    shifted = torch.zeros(265, dtype=torch.float16, device="cuda")[1:]
    shifted.copy_(x.flatten())
    for token, rows in (
        (torch.cat([x, x]), weight),
        (x[..., :260], weight[:, :260].contiguous()),
        (x[..., :256], weight[:, :256]),
        (x.float(), weight.float()),
        (shifted, weight),
    ):
        assert not float_cuda.is_half_token(token, rows)
        expected = torch.nn.functional.linear(token, rows)
        assert_exact("linear", cuda.linear(token, rows), expected)
