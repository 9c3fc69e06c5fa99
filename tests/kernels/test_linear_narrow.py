"""Products with few rows on a Hopper GPU; their bits are those of the reference."""

import pytest
import torch
from close import assert_exact
from group_products import assert_replay_reads_new_tokens, on_hopper, operands, products

from qmamba_cli.kernels.linear import narrow, reference

# x_proj of the published models; then ragged shapes, and fewer stages than blocks of a cluster.
MODELS = [(80, 1536), (96, 2048), (128, 3072), (160, 4096), (192, 5120)]
RAGGED = [(65, 16, 512), (200, 176, 592), (1, 112, 528), (1000, 144, 640)]
SHAPES = [*((1024, *shape) for shape in MODELS), *RAGGED]
OTHERS = [(511, 192, 5120), (8192, 208, 5120), (8192, 200, 5120), (8192, 192, 5128), (8192, 192, 256)]


@pytest.mark.parametrize("tokens", [512, 1024, 1025, 1536, 2048, 4096, 8192, 9000, 16384])
@pytest.mark.parametrize(("rows", "k"), MODELS)
def test_clusters_all_find_room_at_once(tokens, rows, k):
    plan = narrow.narrow_plan(tokens, rows, k, 132)
    assert plan.entry in narrow.ENTRIES
    assert 64 * plan.blocks >= rows
    # What a block of sm_90 may have.
    assert plan.shared_bytes <= 227 * 1024
    # Blocks that ran at once on an H200, by the size of their clusters.
    room = {1: 132, 2: 132, 3: 117, 4: 120, 6: 102}
    tiles = -(-tokens // 64)
    assert plan.parts == 1 or tiles * plan.parts <= room[plan.parts]
    larger = {2: (1, 2, 4), 3: (1, 2, 3, 6)}[plan.blocks]
    assert all(tiles * parts > room[parts] for parts in larger if parts > plan.parts)


@pytest.mark.parametrize(("tokens", "rows", "k"), OTHERS)
def test_other_shapes_are_left_to_other_kernels(tokens, rows, k):
    assert narrow.narrow_plan(tokens, rows, k, 132) is None


def every_plan(rows):
    blocks = max(2, -(-rows // 64))
    for parts in (1, 2, 4) if blocks == 2 else (1, 2, 3, 6):
        yield narrow.NarrowPlan(blocks=blocks, parts=parts)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "rows", "k"), SHAPES)
def test_same_bits_as_the_reference(torch_rng, tokens, rows, k):
    x, weight, scale = operands(tokens, rows, k, torch_rng)
    expected = reference.linear(x, weight, x_scale=0.02, weight_scale=scale, out_scale=0.11)
    if not on_hopper():
        assert narrow.choose(x.cuda(), weight.cuda()) is None
        return
    for entry, got in products(x, weight, scale, 0.11, every_plan(weight.shape[0])):
        assert_exact(entry, got, expected)


@pytest.mark.gpu
def test_the_largest_sums_are_exact():
    if not on_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")
    # Up to 5120 times 2^14, more than 24 bits: the sums of all blocks are added before they become floats.
    x = torch.full((70, 5120), -128, dtype=torch.int8)
    x[:, 0] = torch.arange(70, dtype=torch.int8)
    weight = (torch.arange(192) - 128).clamp(max=63).to(torch.int8)[:, None].repeat(1, 5120)
    scale = torch.full((192,), 2.0**-20)
    expected = reference.linear(x, weight, x_scale=0.02, weight_scale=scale, out_scale=0.02)
    assert expected.unique().numel() > 100
    for entry, got in products(x, weight, scale, 0.02, every_plan(weight.shape[0])):
        assert_exact(entry, got, expected)


@pytest.mark.gpu
@pytest.mark.graph
def test_a_graph_s_replay_reads_new_tokens(torch_rng):
    x, weight, scale = operands(1024, 192, 2048, torch_rng)
    assert_replay_reads_new_tokens("linear_narrow", narrow.choose, x, weight, scale, 0.11)
