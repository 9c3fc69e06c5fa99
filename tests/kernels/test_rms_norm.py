import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.rms_norm.reference import add_rms_norm, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = (1, 31, 90, 256, 2560)
EPSILON = 1e-5


def oracle(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    rows = x.double().reshape(-1, x.shape[-1])
    out = torch.stack([row / (sum(row * row) / len(row) + eps) ** 0.5 for row in rows]).reshape(x.shape)
    return out if weight is None else out * weight.double()


@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "folded"])
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_oracle(backend, torch_rng, width, with_weight):
    x = torch.randn(2, 3, width, generator=torch_rng) * 3
    weight = torch.randn(width, generator=torch_rng) if with_weight else None
    exact = oracle(x, weight, EPSILON)
    got = oracles.call(backend, "rms_norm", x, weight, eps=EPSILON)
    assert_close("rms_norm", got, exact, tolerances.RMS_NORM.budget(exact.abs(), width + 6))


@pytest.mark.parametrize("width", [31, 256])
def test_quantized_output_is_the_grid_of_the_float_output(backend, torch_rng, width):
    x = torch.randn(40, 5, width, generator=torch_rng)
    exact = oracle(x, None, EPSILON)
    scale = float(exact.abs().max().float() / 127)
    got = oracles.call(backend, "rms_norm", x, None, eps=EPSILON, out_scale=scale)
    row = tolerances.GRID
    assert_grid("rms_norm", got, oracles.quantize(exact, scale), share=row.share, steps=row.steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_is_the_float_output_rounded_once(backend, torch_rng, dtype):
    x, weight = torch.randn(3, 5, 96, generator=torch_rng), torch.randn(96, generator=torch_rng)
    exact = oracle(x, weight, EPSILON)
    got = oracles.call(backend, "rms_norm", x, weight, eps=EPSILON, out_dtype=dtype)
    assert got.dtype == dtype
    info = torch.finfo(dtype)
    rounding = exact.abs() * info.eps + info.smallest_normal * info.eps
    assert_close("rms_norm", got, exact, tolerances.RMS_NORM.budget(exact.abs(), 96 + 6) + rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_with_the_addition_it_is_the_addition_and_the_norm(torch_rng, dtype):
    residual, delta = (torch.randn(2, 3, 31, generator=torch_rng) for _ in range(2))
    delta = delta.to(dtype)
    before = residual.clone()
    normed, added = add_rms_norm(residual, delta, None, eps=EPSILON, out_scale=0.03)
    assert_exact("residual", residual, before)
    assert_exact("sum", added, (residual.double() + delta.double()).float())
    assert_exact("norm", normed, rms_norm(added, None, eps=EPSILON, out_scale=0.03))


def test_out_of_range_saturates_and_never_wraps(backend):
    x = torch.tensor([[3.0, -3.0, 0.0, 0.0]])
    got = oracles.call(backend, "rms_norm", x, None, eps=0.0, out_scale=1e-3)
    assert got.tolist() == [[127, -128, 0, 0]]


def test_a_zero_row_stays_zero(backend):
    got = oracles.call(backend, "rms_norm", torch.zeros(2, 16), None, eps=EPSILON)
    assert_exact("rms_norm", got, torch.zeros(2, 16))


def test_the_scale_of_the_input_does_not_matter(torch_rng):
    x = torch.randn(3, 64, generator=torch_rng)
    # A power of two changes no mantissa.
    assert_exact("rms_norm", rms_norm(x * 2.0**20, None, eps=0.0), rms_norm(x, None, eps=0.0))


def test_the_argument_is_left_alone(torch_rng):
    x = torch.randn(3, 8, generator=torch_rng)
    before = x.clone()
    rms_norm(x, torch.ones(8), eps=EPSILON, out_scale=0.01)
    assert_exact("x", x, before)


def test_a_zero_scale_is_refused():
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        rms_norm(torch.ones(1, 4), None, eps=EPSILON, out_scale=0.0)
