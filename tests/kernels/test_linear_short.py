"""Products with few columns on a Hopper GPU; their bits are those of the reference."""

import pytest
import torch
from close import assert_exact
from group_products import assert_replay_reads_new_tokens, on_hopper, operands, products

from qmamba_cli.kernels.linear import cuda, reference, short

# dt_proj of the published models; then shares of unequal size, padded columns and ragged tokens.
MODELS = [(1024, 1536, 48), (1024, 2048, 64), (1024, 3072, 96), (2048, 4096, 128), (1024, 5120, 160)]
SHAPES = [*MODELS, (257, 640, 80), (300, 576, 16), (1000, 1152, 112), (8191, 512, 144)]


@pytest.mark.parametrize("tokens", [256, 1000, 1024, 2048, 8192, 65536])
@pytest.mark.parametrize(("rows", "k"), [(1536, 48), (2048, 64), (3072, 96), (5120, 160), (576, 32)])
def test_a_plan_keeps_the_processors_busy(tokens, rows, k):
    plan = short.short_plan(tokens, rows, k, 132)
    assert plan.entry in short.ENTRIES
    assert rows % plan.rows == 0 and 1 <= plan.parts <= rows // plan.rows
    assert 32 * plan.steps >= k
    # What a block of sm_90 may have.
    assert plan.shared_bytes <= 227 * 1024
    blocks = -(-tokens // plan.tokens) * plan.parts
    if tokens * rows >= 1024 * 5120:
        busiest = -(-blocks // 132) * plan.tokens * -(-(rows // plan.rows) // plan.parts) * plan.rows
        assert busiest <= 1.35 * tokens * rows / 132


@pytest.mark.parametrize(
    ("tokens", "rows", "k"),
    [(255, 5120, 160), (1024, 448, 160), (1024, 5120, 168), (1024, 5120, 176), (1024, 1000, 160)],
)
def test_other_shapes_are_left_to_other_kernels(tokens, rows, k):
    assert short.short_plan(tokens, rows, k, 132) is None


def every_plan(rows, k):
    for groups, stage in ((4, 128), (2, 64)):
        if rows % stage:
            continue
        for parts in (1, 3):
            yield short.ShortPlan(steps=max(2, -(-k // 32)), groups=groups, rows=stage, parts=parts)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "rows", "k"), SHAPES)
def test_same_bits_as_the_reference(torch_rng, tokens, rows, k):
    x, weight, scale = operands(tokens, rows, k, torch_rng)
    expected = reference.linear(x, weight, x_scale=0.02, weight_scale=scale, out_scale=0.013)
    if not on_hopper():
        assert short.choose(x.cuda(), weight.cuda()) is None
        return
    for entry, got in products(x, weight, scale, 0.013, every_plan(*weight.shape)):
        assert_exact(entry, got, expected)


@pytest.mark.gpu
def test_ends_of_the_grid_and_halves(torch_rng):
    if not on_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")
    # Sums of 160 times -128 * -128 saturate; steps of a half are rounded to even.
    x = torch.full((256, 160), -128, dtype=torch.int8)
    x[1::2] = 0
    x[1::2, 0] = torch.arange(128, dtype=torch.int8) - 64
    weight = torch.ones(512, 160, dtype=torch.int8)
    weight[::2] = -128
    scale = torch.full((512,), 0.5)
    expected = reference.linear(x, weight, x_scale=0.02, weight_scale=scale, out_scale=0.02)
    assert {-128, 127} <= set(expected.unique().tolist())
    for entry, got in products(x, weight, scale, 0.02, every_plan(*weight.shape)):
        assert_exact(entry, got, expected)


@pytest.mark.gpu
@pytest.mark.graph
def test_a_graph_s_replay_reads_new_tokens(torch_rng):
    x, weight, scale = operands(512, 1024, 96, torch_rng)
    assert_replay_reads_new_tokens("linear_short", short.choose, x, weight, scale, 0.013)


@pytest.mark.gpu
@pytest.mark.graph
def test_tokens_of_the_kernel_before_are_waited_for(torch_rng):
    # x_proj and dt_proj of 2.8b; the second product may start while the first one still runs.
    x = torch.randint(-128, 128, (1100, 5120), dtype=torch.int8, generator=torch_rng)
    first, scale = operands(1, 192, 5120, torch_rng)[1:]
    second, last_scale = operands(1, 5120, 160, torch_rng)[1:]
    moved = x.cuda()
    weights = [value.cuda() for value in (first, scale, second, last_scale)]

    def both(ops, x, first, scale, second, last_scale):
        low = ops.linear(x, first, x_scale=0.02, weight_scale=scale, out_scale=0.11)
        return ops.linear(low[:, :160], second, x_scale=0.11, weight_scale=last_scale, out_scale=0.07)

    both(cuda, moved, *weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both(cuda, moved, *weights)
    for turn in range(3):
        x = x.roll(7 * turn + 1, 0)
        moved.copy_(x)
        graph.replay()
        assert_exact(f"replay {turn}", got.cpu(), both(reference, x, first, scale, second, last_scale))
