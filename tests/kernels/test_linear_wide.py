"""Products of many tokens on a Hopper GPU; their sums and bits are those of the reference."""

import pytest
import torch
from close import assert_exact

from qmamba_cli.kernels.linear import cuda, reference, wide
from qmamba_cli.kernels.linear.int8_cuda import Epilogue, int8_linear
from qmamba_cli.kernels.linear.operands import HOPPER

TILE_ROWS = (128, 160, 256)
# Whole tiles; ragged tokens, rows and columns; rows that no vector store takes; several tiles a block.
SHAPES = [(512, 1024, 512), (257, 1040, 528), (300, 1030, 592), (1000, 2560, 1024), (640, 5120, 2560)]


def assert_taken(x: torch.Tensor, weight: torch.Tensor, split: int) -> None:
    """The kernel takes the operands on Hopper and nowhere else."""
    hopper = torch.cuda.get_device_capability() == HOPPER
    assert (wide.choose(x, weight, split) is not None) == hopper


def operands(tokens: int, rows: int, k: int, rng: torch.Generator):
    x = torch.randint(-128, 128, (tokens, k), dtype=torch.int8, generator=rng)
    weight = torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=rng)
    scale = torch.rand(rows, generator=rng) * 1e-3 + 1e-4
    return x, weight, scale, torch.randn(rows, generator=rng), torch.randn(tokens, rows, generator=rng)


@pytest.mark.parametrize("tokens", [256, 512, 1024, 2048, 8192])
@pytest.mark.parametrize("rows", [1024, 2560, 10240])
@pytest.mark.parametrize("real", [False, True])
def test_the_plan_s_rounds_are_few(tokens, rows, real):
    plan = wide.wide_plan(tokens, rows, 132, real=real)
    if plan is None:
        assert -(-tokens // 128) * -(-rows // 256) < 132
        return
    assert plan.entry(lanes=False) in wide.ENTRIES
    assert real or plan.entry(lanes=True) in wide.ENTRIES
    heights = TILE_ROWS if real else (128, 256)
    tiles = {height: -(-tokens // 128) * -(-rows // height) for height in heights}
    assert plan.blocks == min(132, tiles[plan.rows])
    # No other tile gives a block a tenth less to do.
    work = {height: -(-count // 132) * height for height, count in tiles.items()}
    assert work[plan.rows] <= 1.1 * min(work.values())
    # What a block of sm_90 may have.
    assert plan.shared_bytes <= 227 * 1024


@pytest.mark.parametrize(("tokens", "rows", "k"), [(255, 4096, 4096), (4096, 1023, 4096), (4096, 4096, 511)])
def test_small_products_are_left_to_other_kernels(tokens, rows, k):
    x = torch.empty(tokens, k, dtype=torch.int8, device="meta")
    assert wide.choose(x, torch.empty(rows, k, dtype=torch.int8, device="meta"), rows) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["i8", "f32", "residual", "bias"])
@pytest.mark.parametrize(("tokens", "rows", "k"), SHAPES)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_same_bits_as_the_reference(torch_rng, tile_rows, tokens, rows, k, kind):
    x, weight, scale, bias, residual = operands(tokens, rows, k, torch_rng)
    out_scale = 0.37 if kind in ("i8", "bias") else None
    options = {
        "bias": bias if kind == "bias" else None,
        "residual": residual if kind == "residual" else None,
    }
    expected = reference.linear(x, weight, x_scale=0.02, weight_scale=scale, out_scale=out_scale, **options)
    moved = {name: None if value is None else value.cuda() for name, value in options.items()}
    # Poisoned, so that an output that is never written shows.
    real = torch.full((tokens, rows), torch.nan, device="cuda") if out_scale is None else None
    codes = torch.full((tokens, rows), 77, dtype=torch.int8, device="cuda") if out_scale else None
    split = rows if out_scale is None else 0
    end = Epilogue(
        weight_scale=scale.cuda(),
        **moved,
        real=real,
        codes=codes,
        x_scale=0.02,
        out_scale=out_scale,
        split=split,
    )
    if torch.cuda.get_device_capability() != HOPPER:
        assert wide.choose(x.cuda(), weight.cuda(), split) is None
        return
    for blocks in (5, 132):
        plan = wide.WidePlan(rows=tile_rows, blocks=blocks)
        int8_linear(x.cuda(), weight.cuda(), end, plan=plan)
        assert_exact("linear_wide", (codes if real is None else real).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [512, 1000])
def test_a_split_inside_and_between_tiles(torch_rng, split):
    x, weight, scale, bias, _ = operands(384, 1536, 640, torch_rng)
    given = {"split": split, "x_scale": 0.02, "out_scale": 0.37}
    expected = reference.linear_split(x, weight, bias, weight_scale=scale, **given)
    assert_taken(x.cuda(), weight.cuda(), split)
    got = cuda.linear_split(x.cuda(), weight.cuda(), bias.cuda(), weight_scale=scale.cuda(), **given)
    for name, a, b in zip(("real", "codes"), got, expected, strict=True):
        assert_exact(f"linear_split {name}", a.cpu(), b)


@pytest.mark.gpu
@pytest.mark.graph
def test_rows_of_a_wider_matrix_and_a_graph_s_replay(torch_rng):
    x, weight, scale, *_ = operands(512, 1024, 768, torch_rng)
    wider = torch.zeros(512, 1024, dtype=torch.int8, device="cuda")
    part, moved, moved_scale = wider[:, 64:832], weight.cuda(), scale.cuda()
    part.copy_(x)
    assert_taken(part, moved, 1024)
    cuda.linear(part, moved, x_scale=0.02, weight_scale=moved_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cuda.linear(part, moved, x_scale=0.02, weight_scale=moved_scale)
    part.copy_(-x.clamp(min=-127))
    graph.replay()
    expected = reference.linear(-x.clamp(min=-127), weight, x_scale=0.02, weight_scale=scale)
    assert_exact("linear_wide", got.cpu(), expected)
