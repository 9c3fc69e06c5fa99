import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.linear import reference
from qmamba_cli.kernels.linear.reference import int8_matmul, linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Multiples of 8 and not; 1024 is the float path's longest exact sum, 16 the rank of a small dt_proj.
DEPTHS = (1, 5, 16, 31, 160, 1023, 1024, 1025, 3072, 5121)
EXTREMES = {"min-min": (-128, -128), "min-max": (-128, 127), "max-min": (127, -128), "max-max": (127, 127)}


@pytest.fixture(params=["int_mm", "float32"])
def matmul_path(request, monkeypatch):
    """Both ways to an exact product, whichever this machine would take."""
    fallback = request.param == "float32"
    if not fallback and not reference._int_mm_is_exact():
        pytest.skip("this processor's int8 product saturates its pair sums; the float32 path replaces it")
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: not fallback)
    return request.param


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int64) @ weight.to(torch.int64).T


def codes(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=rng)


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("rows", [1, 3, 17, 70])
def test_int8_product_is_exact(matmul_path, torch_rng, k, rows):
    x, weight = codes(rows, k, rng=torch_rng), codes(23, k, rng=torch_rng)
    assert_exact("int8_matmul", int8_matmul(x, weight), exact_product(x, weight).to(torch.int32))


@pytest.mark.parametrize("k", [1, 96, 1025, 2049, 3071, 3072, 5121])
@pytest.mark.parametrize(("left", "right"), EXTREMES.values(), ids=EXTREMES)
def test_int8_product_is_exact_at_the_ends_of_the_grid(matmul_path, k, left, right):
    # Past float32's exact integers, inside int32; 2049 * 127 * 127 is odd, so no float32 holds it.
    x = torch.full((5, k), left, dtype=torch.int8)
    weight = torch.full((7, k), right, dtype=torch.int8)
    assert_exact(
        "int8_matmul", int8_matmul(x, weight), torch.full((5, 7), k * left * right, dtype=torch.int32)
    )


def test_int8_product_of_strided_operands(matmul_path, torch_rng):
    x, weight = codes(96, 9, rng=torch_rng).T, codes(13, 192, rng=torch_rng)[:, ::2]
    assert not x.is_contiguous() and not weight.is_contiguous()
    assert_exact("int8_matmul", int8_matmul(x, weight), exact_product(x, weight).to(torch.int32))


def test_the_probe_sees_a_saturating_product(monkeypatch):
    def saturating(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        pairs = x.to(torch.int32).unsqueeze(2) * weight.to(torch.int32).unsqueeze(0)
        padded = torch.nn.functional.pad(pairs, (0, 0, 0, pairs.shape[1] % 2))
        return (padded[:, ::2] + padded[:, 1::2]).clamp(-(2**15), 2**15 - 1).sum(1).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not reference._int_mm_is_exact.__wrapped__()


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("k", [16, 160, 3072])
def test_quantized_equals_the_oracle(backend, torch_rng, k, with_bias):
    x, weight = codes(2, 9, k, rng=torch_rng), codes(31, k, rng=torch_rng)
    scale = torch.rand(31, generator=torch_rng) * 1e-2 + 1e-4
    bias = torch.randn(31, generator=torch_rng) if with_bias else None
    got = oracles.call(backend, "linear", x, weight, bias, x_scale=0.03, weight_scale=scale)
    x_scale = torch.tensor(0.03).double()
    exact = exact_product(x, weight).double() * (x_scale * scale.double())
    magnitude = exact.abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert_close("linear", got, exact, tolerances.LINEAR_INT8.budget(magnitude, 3))

    step = float(exact.abs().max().float() / 127)
    q = oracles.call(backend, "linear", x, weight, bias, x_scale=0.03, weight_scale=scale, out_scale=step)
    row = tolerances.GRID
    assert_grid("linear", q, oracles.quantize(exact, step), share=row.share, steps=row.steps)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("k", [1, 160, 3072])
def test_float_equals_the_oracle(backend, torch_rng, k, with_bias):
    x, weight = torch.randn(2, 9, k, generator=torch_rng), torch.randn(31, k, generator=torch_rng)
    bias = torch.randn(31, generator=torch_rng) if with_bias else torch.zeros(31)
    got = oracles.call(backend, "linear", x, weight, bias if with_bias else None)
    exact = x.double() @ weight.double().T + bias.double()
    magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert_close("linear", got, exact, tolerances.LINEAR_FLOAT.budget(magnitude, k + 1))


def test_out_of_range_saturates_and_never_wraps(backend):
    x = torch.tensor([[127], [-128]], dtype=torch.int8)
    weight = torch.tensor([[127], [-128], [0]], dtype=torch.int8)
    got = oracles.call(
        backend, "linear", x, weight, None, x_scale=1.0, weight_scale=torch.ones(3), out_scale=1.0
    )
    assert got.tolist() == [[127, -128, 0], [-128, 127, 0]]


def test_one_column(backend, torch_rng):
    # torch._int_mm returns uninitialized memory for these shapes: a dt_proj of rank 1.
    x, weight = codes(6, 1, rng=torch_rng), codes(40, 1, rng=torch_rng)
    got = oracles.call(backend, "linear", x, weight, x_scale=1.0, weight_scale=torch.ones(40))
    assert_exact("linear", got, exact_product(x, weight).to(torch.float32))


def test_one_scale_a_row(backend):
    x = torch.tensor([[2, 3]], dtype=torch.int8)
    weight = torch.ones(3, 2, dtype=torch.int8)
    scale = torch.tensor([1.0, 0.5, 0.25])
    got = oracles.call(backend, "linear", x, weight, None, x_scale=2.0, weight_scale=scale)
    assert got.tolist() == [[10.0, 5.0, 2.5]]


def test_two_runs_give_the_same_bits(backend, torch_rng):
    x, weight = codes(65, 512, rng=torch_rng), codes(96, 512, rng=torch_rng)
    scale = torch.rand(96, generator=torch_rng)
    first, second = (
        oracles.call(backend, "linear", x, weight, x_scale=0.1, weight_scale=scale) for _ in range(2)
    )
    assert_exact("linear", first, second)


def test_refusals():
    q, real = torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 4)
    scale = torch.ones(2)
    with pytest.raises(ShapeError, match="4 columns"):
        linear(real, torch.ones(2, 5))
    with pytest.raises(ShapeError, match="4 columns"):
        linear(real, torch.ones(4))
    with pytest.raises(ShapeError, match="both or neither"):
        linear(q, q, x_scale=1.0)
    with pytest.raises(ShapeError, match="both or neither"):
        linear(q, q, weight_scale=scale)
    with pytest.raises(ShapeError, match="expected both torch"):
        linear(real, q, x_scale=1.0, weight_scale=scale)
    with pytest.raises(ShapeError, match="expected both torch"):
        linear(q, real)
    with pytest.raises(ShapeError, match="expected both torch"):
        linear(real.double(), real.double())
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        linear(real, real, out_scale=0.0)
