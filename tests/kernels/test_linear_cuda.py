import inspect

import pytest
import torch
from close import assert_exact

from qmamba_cli.kernels.linear import cuda, reference

SHAPES = [
    (tokens, k, rows)
    for tokens in (1, 2, 3, 7, 8, 9, 32, 33, 64, 1025)
    for k, rows in ((16, 48), (31, 64), (96, 8), (160, 5120), (1536, 80), (5120, 257))
]


def test_signatures_are_equal():
    assert inspect.signature(cuda.linear) == inspect.signature(reference.linear)


def operands(tokens: int, k: int, rows: int, rng: torch.Generator):
    x = torch.randint(-128, 128, (tokens, k), dtype=torch.int8, generator=rng)
    weight = torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=rng)
    scale = torch.rand(rows, generator=rng) * 0.01 + 1e-4
    return x, weight, scale, torch.randn(rows, generator=rng)


@pytest.mark.gpu
@pytest.mark.parametrize("out_scale", [None, 0.37], ids=["f32", "i8"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("tokens", "k", "rows"), SHAPES)
def test_same_bits_as_the_reference(torch_rng, tokens, k, rows, with_bias, out_scale):
    x, weight, scale, bias = operands(tokens, k, rows, torch_rng)
    bias = bias if with_bias else None
    expected = reference.linear(x, weight, bias, x_scale=0.02, weight_scale=scale, out_scale=out_scale)
    got = cuda.linear(
        x.cuda(),
        weight.cuda(),
        None if bias is None else bias.cuda(),
        x_scale=0.02,
        weight_scale=scale.cuda(),
        out_scale=out_scale,
    )
    assert_exact("linear", got.cpu(), expected)


@pytest.mark.gpu
def test_strided_operands_are_not_misread(torch_rng):
    x, weight, scale, _ = operands(40, 192, 64, torch_rng)
    x, weight = x[::2, 3:131], weight[:, 5:133]
    expected = reference.linear(x, weight, x_scale=0.1, weight_scale=scale)
    got = cuda.linear(x.cuda(), weight.cuda(), x_scale=0.1, weight_scale=scale.cuda())
    assert_exact("linear", got.cpu(), expected)


@pytest.mark.gpu
def test_misaligned_pointers_take_the_byte_path(torch_rng):
    x, weight, scale, _ = operands(3, 64, 24, torch_rng)
    buffer = torch.zeros(1 + weight.numel(), dtype=torch.int8, device="cuda")
    buffer[1:] = weight.flatten().cuda()
    got = cuda.linear(x.cuda(), buffer[1:].view(24, 64), x_scale=0.1, weight_scale=scale.cuda())
    assert_exact("linear", got.cpu(), reference.linear(x, weight, x_scale=0.1, weight_scale=scale))


@pytest.mark.gpu
def test_sums_are_exact_at_the_ends_of_the_grid():
    x = torch.full((2, 5120), -128, dtype=torch.int8)
    weight = torch.full((8, 5120), -128, dtype=torch.int8)
    scale = torch.ones(8)
    expected = reference.linear(x, weight, x_scale=1.0, weight_scale=scale)
    for tokens in (2, 64):
        many = x[:1].expand(tokens, -1).contiguous()
        got = cuda.linear(many.cuda(), weight.cuda(), x_scale=1.0, weight_scale=scale.cuda())
        assert_exact("linear", got.cpu(), expected[:1].expand(tokens, -1))
