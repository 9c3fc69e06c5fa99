"""The cuts of the linear kernels: inside the hardware's limits, and every column in exactly one place."""

import pytest

from qmamba_cli.kernels._launch import round_up
from qmamba_cli.kernels.linear import plan

# What every GPU from compute capability 8.0 on lends to one block.
MAX_SHARED_BYTES = 99 * 1024
SHAPES = [
    (1536, 768),
    (768, 1536),
    (80, 1536),
    (1536, 48),
    (10240, 2560),
    (2560, 5120),
    (192, 5120),
    (5120, 160),
]


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64, 65, 500])
@pytest.mark.parametrize("k", [16, 32, 48, 160, 256, 768, 1000, 2560, 5120, 8192])
@pytest.mark.parametrize("rows", [16, 2560, 10240])
@pytest.mark.parametrize("packed", [False, True])
def test_skinny_blocks_fit(tokens, k, rows, packed):
    cut = plan.skinny_plan(tokens, rows, k, packed=packed)
    assert (cut.row_tiles, cut.token_tiles) in plan.SKINNY_TILES
    assert 1 <= cut.warps <= plan.most_warps(cut.token_tiles)
    # The kernel's launch bounds.
    assert 32 * cut.warps * cut.row_warps <= (320 if cut.token_tiles < 4 else 256)
    assert cut.shared_bytes <= MAX_SHARED_BYTES
    assert cut.tokens >= min(tokens, 64)
    # No warp of a block is without work where another has two rounds.
    rounds = -(-(k // 2 if packed else k) // 128)
    assert cut.warps <= rounds


def test_the_skinny_kernel_takes_what_it_can_read():
    assert plan.is_skinny(1, 48, 160, packed=False)
    assert not plan.is_skinny(1, 48, 168, packed=False)
    assert plan.is_skinny(32, 48, 160, packed=True, group_size=128)
    assert not plan.is_skinny(33, 48, 160, packed=True, group_size=128)
    assert not plan.is_skinny(1, 48, 176, packed=True, group_size=128)
    # A lane's codes would lie in several groups.
    assert not plan.is_skinny(1, 48, 160, packed=True, group_size=32)
    assert plan.is_skinny(1, 48, 1024, packed=True, group_size=256)


@pytest.mark.parametrize("processors", [16, 108, 132])
@pytest.mark.parametrize("tokens", [17, 33, 64, 65, 128, 1000, 1024, 8192])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_tiles_fit(tokens, rows, k, processors):
    cut = plan.tile_plan(tokens, rows, k, processors)
    for size in (cut.tokens, cut.rows, cut.columns):
        assert size & (size - 1) == 0
    # What the tensor core's instructions take.
    assert cut.columns >= 32 and cut.tokens >= 16 and cut.rows >= 8
    # int8 tiles of every stage; Triton's limit is that of the device.
    assert cut.stages * cut.columns * (cut.tokens + cut.rows) <= 160 * 1024
    assert cut.parts == 1 or -(-k // cut.columns) >= 2 * cut.parts
    # Masks are for ragged columns, and for few of them, where they save steps.
    if k % 32 == 0 and not (k < 512 and cut.columns == 64):
        assert round_up(k, cut.columns) == k
    cut = plan.float_tile_plan(tokens)
    # float32 tokens and rows of up to 16 bits.
    assert cut.stages * cut.columns * (4 * cut.tokens + 2 * cut.rows) <= 160 * 1024


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("tokens", [2, 16, 17, 32, 33, 64])
def test_tiles_of_few_float_tokens_fit(tokens, itemsize):
    cut = plan.few_float_plan(tokens, itemsize)
    assert cut.tokens >= tokens
    # Two float16 parts of each token.
    assert cut.stages * cut.columns * (4 * cut.tokens + itemsize * cut.rows) <= MAX_SHARED_BYTES


def test_large_products_take_large_tiles_and_small_ones_fill_the_device():
    assert plan.tile_plan(8192, 10240, 2560, 132).rows == 128
    small = plan.tile_plan(128, 768, 1536, 132)
    assert small.tokens * small.rows < 128 * 128
    assert plan.tile_plan(1024, 192, 5120, 132).parts > 1
    assert plan.tile_plan(8192, 192, 5120, 132).parts == 1
