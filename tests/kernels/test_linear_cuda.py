import inspect
from dataclasses import replace

import pytest
import torch
from close import assert_exact

from qmamba_cli.kernels.linear import cuda, reference
from qmamba_cli.kernels.linear.int8_cuda import Epilogue, int8_linear
from qmamba_cli.kernels.linear.operands import expand, rows_of
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.kernels.linear.plan import SKINNY_TILES, SkinnyPlan, TilePlan
from qmamba_cli.model.weights import LinearWeights, on_device

SHAPES = [
    (tokens, k, rows)
    for tokens in (1, 8, 9, 17, 33, 64, 65, 1025)
    for k, rows in ((16, 48), (31, 64), (96, 8), (160, 5120), (1000, 130), (5120, 192), (5120, 257))
]


@pytest.mark.parametrize("name", ["linear", "linear_split"])
def test_signatures_are_equal(name):
    assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(reference, name))


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


def random_packed(rows: int, k: int, group_size: int, rng: torch.Generator) -> PackedInt4:
    return PackedInt4(
        codes=torch.randint(0, 256, (rows, -(-k // 2)), dtype=torch.uint8, generator=rng),
        multiplier=torch.randint(1, 16, (rows, -(-k // group_size)), dtype=torch.uint8, generator=rng),
        group_size=group_size,
        columns=k,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [128, 256, 64, 20])
@pytest.mark.parametrize("k", [160, 768, 2560, 37])
@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 33, 64, 65, 300])
def test_packed_weights_give_the_bits_of_expanded_ones(torch_rng, tokens, k, group_size):
    packed = random_packed(100, k, group_size, torch_rng)
    x = torch.randint(-128, 128, (tokens, k), dtype=torch.int8, generator=torch_rng)
    scale, residual = torch.rand(100, generator=torch_rng), torch.randn(tokens, 100, generator=torch_rng)
    options = {"x_scale": 0.02, "weight_scale": scale, "residual": residual}
    expected = reference.linear(x, packed, **options)
    on_gpu = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    moved = replace(packed, codes=packed.codes.cuda(), multiplier=packed.multiplier.cuda())
    assert_exact("linear", cuda.linear(x.cuda(), moved, **on_gpu).cpu(), expected)
    assert_exact("expand", expand(moved).cpu(), packed.expand())


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
@pytest.mark.parametrize("tokens", [1, 33, 200])
def test_every_cut_gives_the_same_bits(torch_rng, tokens, packed):
    rows, k = 96, 1280
    int4 = random_packed(rows, k, 128, torch_rng)
    weight = int4 if packed else int4.expand()
    x = torch.randint(-128, 128, (tokens, k), dtype=torch.int8, generator=torch_rng).cuda()
    scale = torch.rand(rows, generator=torch_rng)
    expected = reference.linear(x.cpu(), weight, x_scale=0.5, weight_scale=scale)
    moved = on_device(LinearWeights(weight), x.device).weight
    cuts = [
        SkinnyPlan(*tiles, warps, row_warps)
        for tiles in SKINNY_TILES
        for warps, row_warps in ((1, 1), (3, 2), (8, 1), (2, 4))
    ]
    cuts += [TilePlan(64, 32, 128, 4, 4, parts) for parts in (1, 2, 3, 8)]
    cuts += [TilePlan(128, 128, 64, 4, 3), TilePlan(16, 64, 256, 4, 3)]
    for cut in cuts:
        out = torch.full((tokens, rows), float("nan"), device="cuda")
        end = Epilogue(
            weight_scale=scale.cuda(),
            bias=None,
            residual=None,
            real=out,
            codes=None,
            x_scale=0.5,
            out_scale=None,
            split=rows,
        )
        int8_linear(x, moved, end, plan=cut)
        assert torch.equal(out.cpu(), expected), cut


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 40, 200])
def test_without_triton_the_bits_are_the_same(torch_rng, monkeypatch, tokens):
    x, weight, scale, bias = operands(tokens, 320, 96, torch_rng)
    table = {"x_scale": 0.02, "weight_scale": scale.cuda(), "out_scale": 0.3}
    got = cuda.linear(x.cuda(), weight.cuda(), bias.cuda(), **table)
    monkeypatch.setattr("qmamba_cli.kernels.linear.int8_cuda.triton_kernels", lambda: None)
    assert_exact("linear", cuda.linear(x.cuda(), weight.cuda(), bias.cuda(), **table), got)


@pytest.mark.gpu
def test_a_slice_of_wider_rows_is_read_in_place(torch_rng):
    # dt_low, as x_proj's output holds it.
    wide = torch.randint(-128, 128, (2, 5, 192), dtype=torch.int8, generator=torch_rng)
    _, weight, scale, _ = operands(1, 160, 320, torch_rng)
    low = wide.cuda()[..., :160]
    got = cuda.linear(low, weight.cuda(), x_scale=0.1, weight_scale=scale.cuda())
    assert_exact(
        "linear", got.cpu(), reference.linear(wide[..., :160], weight, x_scale=0.1, weight_scale=scale)
    )
    assert rows_of(low).data_ptr() == low.data_ptr()


@pytest.mark.gpu
def test_two_runs_of_float_tokens_give_the_same_bits(torch_rng):
    weight = torch.randint(-128, 128, (5000, 768), dtype=torch.int8, generator=torch_rng).cuda()
    scale = torch.rand(5000, generator=torch_rng).cuda()
    for tokens in (1, 4, 20, 300):
        x = torch.randn(tokens, 768, generator=torch_rng).cuda()
        first, second = (cuda.linear(x, weight, weight_scale=scale) for _ in range(2))
        assert torch.equal(first, second)
