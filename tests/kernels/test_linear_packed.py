"""Packed 4-bit weights, fused residuals and splits, and float tokens on int8 or 16-bit rows."""

from dataclasses import replace

import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.kernels.linear.reference import linear, linear_split
from qmamba_cli.quant.packing import pack_int4
from qmamba_cli.quant.weights import GroupQuantized

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (rows, columns, group size): whole groups, a ragged last one, odd widths, one group.
PACKED = [(48, 256, 128), (33, 160, 128), (10, 37, 5), (7, 96, 20), (16, 64, 1024)]


def codes(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=rng)


def random_groups(rows: int, columns: int, group_size: int, rng: torch.Generator) -> GroupQuantized:
    return GroupQuantized(
        codes=torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=rng),
        multiplier=torch.randint(1, 16, (rows, -(-columns // group_size)), dtype=torch.uint8, generator=rng),
        scale=torch.rand(rows, generator=rng) * 1e-2 + 1e-4,
        group_size=group_size,
    )


def pack(groups: GroupQuantized) -> PackedInt4:
    return PackedInt4(
        codes=pack_int4(groups.codes),
        multiplier=groups.multiplier,
        group_size=groups.group_size,
        columns=groups.codes.shape[1],
    )


def moved(weight: PackedInt4, device: torch.device) -> PackedInt4:
    return replace(weight, codes=weight.codes.to(device), multiplier=weight.multiplier.to(device))


@pytest.mark.parametrize(("rows", "columns", "group_size"), PACKED)
def test_a_packed_matrix_expands_to_codes_times_multipliers(torch_rng, rows, columns, group_size):
    groups = random_groups(rows, columns, group_size, torch_rng)
    packed = pack(groups)
    assert packed.shape == (rows, columns)
    assert_exact("expand", packed.expand(), groups.expand())
    assert_exact("rows", packed.rows(2, 5).expand(), groups.expand()[2:5])


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("rows", "columns", "group_size"), PACKED)
def test_a_packed_product_is_that_of_the_expanded_matrix(
    backend, torch_rng, tokens, rows, columns, group_size
):
    groups = random_groups(rows, columns, group_size, torch_rng)
    x = codes(tokens, columns, rng=torch_rng)
    expected = linear(x, groups.expand(), x_scale=0.02, weight_scale=groups.scale)
    got = backend.linear(
        x.to(backend.device),
        moved(pack(groups), backend.device),
        x_scale=0.02,
        weight_scale=groups.scale.to(backend.device),
    )
    assert_exact("linear", got.cpu(), expected)


@pytest.mark.parametrize("tokens", [1, 70])
def test_a_residual_is_added_last_in_float32(backend, torch_rng, tokens):
    x, weight = codes(tokens, 96, rng=torch_rng), codes(40, 96, rng=torch_rng)
    scale, bias = torch.rand(40, generator=torch_rng), torch.randn(40, generator=torch_rng)
    residual = torch.randn(tokens, 40, generator=torch_rng) * 100
    before = residual.clone()
    y = linear(x, weight, bias, x_scale=0.02, weight_scale=scale)
    got = oracles.call(
        backend, "linear", x, weight, bias, x_scale=0.02, weight_scale=scale, residual=residual
    )
    assert_exact("linear", got, before + y)
    assert_exact("residual", residual, before)


@pytest.mark.parametrize("split", [0, 24, 40, 96])
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_split_product_is_two_products(backend, torch_rng, tokens, split):
    x, weight = codes(2, tokens, 64, rng=torch_rng), codes(96, 64, rng=torch_rng)
    scale, bias = torch.rand(96, generator=torch_rng) * 1e-2, torch.randn(96, generator=torch_rng)
    options = {"x_scale": 0.03, "weight_scale": scale}
    real, q = oracles.call(backend, "linear_split", x, weight, bias, split=split, out_scale=0.11, **options)
    for got, expected in (
        (real, linear(x, weight, bias, **options)[..., :split]),
        (q, linear(x, weight, bias, out_scale=0.11, **options)[..., split:]),
    ):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("tokens", [1, 4, 5, 19, 70])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [48, 768, 1000])
def test_float_tokens_on_narrow_rows(backend, torch_rng, tokens, dtype, k):
    x = torch.randn(tokens, k, generator=torch_rng)
    if dtype == torch.int8:
        weight, scale = codes(31, k, rng=torch_rng), torch.rand(31, generator=torch_rng)
    else:
        weight, scale = torch.randn(31, k, generator=torch_rng).to(dtype), None
    bias = torch.randn(31, generator=torch_rng)
    got = oracles.call(backend, "linear", x, weight, bias, weight_scale=scale)
    factor = 1.0 if scale is None else scale.double()
    exact = (x.double() @ weight.double().T) * factor + bias.double()
    magnitude = (x.double().abs() @ weight.double().abs().T) * factor + bias.double().abs()
    assert got.dtype == torch.float32
    assert_close("linear", got, exact, tolerances.LINEAR_FLOAT.budget(magnitude, k + 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_half_operands_are_summed_in_float32(backend, torch_rng, dtype, with_residual):
    x, weight = (torch.randn(n, 160, generator=torch_rng).to(dtype) for n in (9, 32))
    residual = torch.randn(9, 32, generator=torch_rng) if with_residual else None
    got = oracles.call(backend, "linear", x, weight, residual=residual)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    # One rounding to 16 bits on top of the float32 sum.
    bound = tolerances.LINEAR_FLOAT.budget(magnitude, 161) + exact.abs() * torch.finfo(dtype).eps
    if residual is None:
        assert got.dtype == dtype
        assert_close("linear", got.float(), exact, bound)
    else:
        assert got.dtype == torch.float32
        assert_close("linear", got, exact + residual, bound + 1e-6)


def test_refusals(torch_rng):
    q, real, scale = torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 4), torch.ones(2)
    quantized = {"x_scale": 1.0, "weight_scale": scale}
    with pytest.raises(ShapeError, match=r"`residual` is .* expected torch.float32 \(2, 2\)"):
        linear(q, q, **quantized, residual=torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"`residual` is torch.float64"):
        linear(q, q, **quantized, residual=torch.ones(2, 2).double())
    with pytest.raises(ShapeError, match="got `out_scale` too"):
        linear(q, q, **quantized, residual=torch.ones(2, 2), out_scale=1.0)
    for split in (-1, 3):
        with pytest.raises(ShapeError, match=rf"must lie in 0 ... 2, got {split}"):
            linear_split(q, q, split=split, **quantized, out_scale=1.0)
    with pytest.raises(ShapeError, match=r"`weight_scale` is \(3,\), expected \(2,\)"):
        linear(q, q, x_scale=1.0, weight_scale=torch.ones(3))
    with pytest.raises(ShapeError, match="both or neither"):
        linear(real, real, weight_scale=scale)
    with pytest.raises(ShapeError, match="expected both torch"):
        linear(real, q)
    packed = pack(random_groups(4, 10, 5, torch_rng))
    with pytest.raises(ShapeError, match=r"expected those of `weight` \(4, 10\)"):
        linear(q, packed, **quantized)
    for change in (
        {"columns": 12},
        {"columns": 0},
        {"group_size": 2},
        {"group_size": 0},
        {"codes": packed.codes.view(torch.int8)},
        {"multiplier": packed.multiplier[:2]},
    ):
        with pytest.raises(ShapeError, match="packed matrix"):
            replace(packed, **change)
