import math

import oracles
import pytest
import scipy.linalg
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for, sylvester_matrix
from qmamba_cli.kernels.hadamard.reference import hadamard

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Of Paley's first kind (q + 1, q = 3 mod 4) and second kind (2(q + 1), q = 1 mod 4).
CORES = (1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 68, 72, 76, 80, 84, 104, 108, 124, 148)
# What published models and the demo have, and what nobody has.
FULL = {1: 1, 2: 1, 256: 1, 512: 1, 1024: 1, 96: 12, 192: 12, 768: 12, 1536: 12, 2560: 20, 5120: 20}
BLOCKED = {3: 1, 7: 1, 90: 2, 100: 4, 102: 2, 94: 2, 172: 4, 1416: 8}
# The last ones are cores by themselves, the first two of them not symmetric.
WIDTHS = (*FULL, *BLOCKED, 40, 12, 44, 36)


@pytest.mark.parametrize("order", CORES)
def test_cores_are_hadamard_matrices(order):
    matrix = core_matrix(order)
    assert matrix.abs().eq(1).all()
    assert_exact(f"H{order}", matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 50, 52, 92, 100])
def test_orders_without_a_construction_are_refused(order):
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
        core_matrix(order)


@pytest.mark.parametrize("exponent", range(8))
def test_sylvester_is_the_textbook_matrix(exponent):
    expected = torch.from_numpy(scipy.linalg.hadamard(2**exponent)).double()
    assert_exact("sylvester", sylvester_matrix(exponent), expected)


@given(width=st.integers(1, 6000))
@settings(deadline=None, max_examples=60)
def test_every_width_has_a_plan(width):
    plan = plan_for(width)
    assert plan.width == width and width % plan.order == 0 and plan.order % plan.core == 0
    exponent = plan.order // plan.core
    assert exponent & (exponent - 1) == 0
    if not plan.is_full:
        # The largest power of two that divides the width.
        assert plan.core == 1 and (width // plan.order) % 2 == 1


@pytest.mark.parametrize(("width", "core"), FULL.items(), ids=str)
def test_widths_of_published_models_get_one_full_matrix(width, core):
    assert plan_for(width).is_full
    assert plan_for(width).core == core


@pytest.mark.parametrize(("width", "order"), BLOCKED.items(), ids=str)
def test_other_widths_get_blocks_and_say_so(width, order):
    plan = plan_for(width)
    assert not plan.is_full and plan.order == order
    assert plan.describe() == f"{width // order} blocks of 2^{int(math.log2(order))}"


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_for(0)


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_dense_matrix(backend, torch_rng, width):
    x = torch.randn(2, 3, width, generator=torch_rng)
    dense = oracles.hadamard_matrix(width)
    got = oracles.call(backend, "hadamard", x)
    # At most 5 doublings a factor.
    plan = plan_for(width)
    exponent = round(math.log2(plan.order // plan.core))
    terms = plan.core + 32 * -(-exponent // 5) + 1
    magnitude = x.double().abs() @ dense.abs().T
    assert_close("hadamard", got, x.double() @ dense.T, tolerances.HADAMARD.budget(magnitude, terms))


@pytest.mark.parametrize("width", WIDTHS)
def test_is_orthonormal(torch_rng, width):
    x = torch.randn(4, width, generator=torch_rng, dtype=torch.float64)
    tolerance = 64 * width * torch.finfo(torch.float64).eps
    y = hadamard(x)
    assert_close("lengths and angles", y @ y.T, x @ x.T, tolerance)


@pytest.mark.parametrize("width", [width for width in WIDTHS if width < 1000])
def test_the_transpose_is_the_inverse(torch_rng, width):
    x = torch.randn(4, width, generator=torch_rng, dtype=torch.float64)
    eye = torch.eye(width, dtype=torch.float64)
    tolerance = 64 * width * torch.finfo(torch.float64).eps
    transposed = hadamard(eye)
    assert_close("F^T F x", hadamard(x) @ transposed.T, x, tolerance)
    assert_close("F F^T", hadamard(transposed.T), eye, tolerance)


@pytest.mark.parametrize("width", [1, 90, 96, 1536])
def test_quantized_output_is_the_grid_of_the_float_output(backend, torch_rng, width):
    x = torch.randn(64, width, generator=torch_rng)
    exact = x.double() @ oracles.hadamard_matrix(width).T
    scale = float(exact.abs().max().float() / 127)
    got = oracles.call(backend, "hadamard", x, out_scale=scale)
    row = tolerances.GRID
    assert_grid("hadamard", got, oracles.quantize(exact, scale), share=row.share, steps=row.steps)


@pytest.mark.parametrize("width", [90, 256, 1536])
def test_out_of_range_saturates_and_never_wraps(backend, width):
    # A constant row has all its energy in the first element of each block: far outside the grid.
    x = torch.tensor([1.0, -1.0]).unsqueeze(1).expand(2, width)
    order = plan_for(width).order
    got = oracles.call(backend, "hadamard", x, out_scale=math.sqrt(order) / 1000)
    expected = torch.zeros(2, width, dtype=torch.int8)
    expected[0, ::order], expected[1, ::order] = 127, -128
    assert_exact("hadamard", got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 90, 256, 1536])
def test_halves_are_computed_in_float32_and_rounded_once(backend, torch_rng, width, dtype):
    x = torch.randn(5, width, generator=torch_rng).to(dtype)
    dense = oracles.hadamard_matrix(width)
    exact = x.double() @ dense.T
    got = oracles.call(backend, "hadamard", x)
    info = torch.finfo(dtype)
    rounding = exact.abs() * info.eps + info.smallest_normal * info.eps
    magnitude = x.double().abs() @ dense.abs().T
    assert got.dtype == dtype
    assert_close("hadamard", got, exact, rounding + tolerances.HADAMARD.budget(magnitude, 100))
    q = oracles.call(backend, "hadamard", x, out_scale=0.03)
    row = tolerances.GRID
    assert_grid("hadamard", q, oracles.quantize(exact, 0.03), share=row.share, steps=row.steps)


def test_rows_are_independent_of_the_batch_and_of_strides(torch_rng):
    x = torch.randn(6, 5, 96, generator=torch_rng)
    whole = hadamard(x)
    strided = hadamard(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert_exact("strided", strided, whole)
    budget = tolerances.HADAMARD.budget(x.double().abs() @ oracles.hadamard_matrix(96).abs().T, 45)
    assert_close("one row", hadamard(x[2, 3]), whole[2, 3].double(), budget[2, 3])


def test_the_argument_is_left_alone(torch_rng):
    x = torch.randn(3, 8, generator=torch_rng)
    before = x.clone()
    hadamard(x, out_scale=0.1)
    assert_exact("x", x, before)


def test_two_runs_give_the_same_bits(backend, torch_rng):
    x = torch.randn(33, 1536, generator=torch_rng)
    assert_exact("hadamard", oracles.call(backend, "hadamard", x), oracles.call(backend, "hadamard", x))


def test_refusals():
    with pytest.raises(ShapeError, match="must be floating"):
        hadamard(torch.zeros(4, dtype=torch.int8))
    with pytest.raises(ShapeError, match="at least one axis"):
        hadamard(torch.tensor(1.0))
    with pytest.raises(ShapeError, match="scale must be finite and > 0, got 0"):
        hadamard(torch.ones(4), out_scale=0.0)
