"""The products that `gpu_linear` times, and the cuts of their kernels that it tries."""

from dataclasses import dataclass

from qmamba_cli.kernels.linear.plan import TilePlan


@dataclass(frozen=True, slots=True)
class Shape:
    """A projection: rows and columns of its weight, and whether it ends in int8, or in the residual."""

    name: str
    rows: int
    k: int
    int8: bool
    bits: tuple[int, ...]
    split: int = 0


SHAPES = (
    Shape("in_proj", 10240, 2560, True, (8, 4)),
    Shape("in_proj split", 10240, 2560, True, (8, 4), split=5120),
    Shape("out_proj", 2560, 5120, False, (8, 4)),
    Shape("x_proj", 192, 5120, True, (8,)),
    Shape("dt_proj", 5120, 160, True, (8,)),
)
TOKENS = (1, 8, 16, 32, 64, 1024, 2048, 8192)
HEAD = (50280, 2560)
HEAD_TOKENS = (1, 2, 4, 8, 16, 32, 64, 1024)
SKINNY = tuple((warps, row_warps) for warps in (4, 5, 8, 10) for row_warps in (1, 2))
TILES = (
    TilePlan(128, 128, 128, 4, 3),
    TilePlan(128, 128, 128, 8, 3),
    TilePlan(128, 256, 128, 8, 3),
    TilePlan(256, 128, 128, 8, 4),
    TilePlan(128, 64, 128, 4, 4),
    TilePlan(64, 128, 128, 4, 4),
    TilePlan(64, 64, 128, 4, 5),
    TilePlan(64, 64, 256, 4, 4),
    TilePlan(64, 32, 256, 4, 4),
    # Three programs a multiprocessor: 320 tiles of out_proj at 1024 tokens are then one wave.
    TilePlan(128, 64, 128, 4, 3),
    TilePlan(128, 64, 128, 4, 3, registers=168),
    TilePlan(64, 128, 128, 4, 3, registers=168),
    TilePlan(128, 64, 128, 8, 3),
    TilePlan(128, 64, 256, 8, 2),
)
FEW_TILES = (
    TilePlan(16, 32, 512, 4, 4),
    TilePlan(16, 64, 256, 4, 5),
    TilePlan(64, 32, 512, 4, 3),
    TilePlan(64, 32, 256, 4, 6),
    TilePlan(64, 64, 128, 4, 6),
    TilePlan(64, 128, 128, 4, 5),
    TilePlan(64, 16, 512, 4, 4),
)
NARROW_TILES = (
    TilePlan(32, 64, 256, 4, 4),
    TilePlan(64, 32, 128, 4, 6),
    TilePlan(64, 64, 128, 4, 5),
    TilePlan(128, 64, 128, 4, 4),
    TilePlan(64, 64, 32, 4, 5),
    TilePlan(128, 128, 32, 4, 5),
    TilePlan(128, 128, 32, 8, 5),
    TilePlan(128, 256, 32, 8, 5),
    TilePlan(128, 128, 64, 8, 3),
    TilePlan(128, 128, 256, 8, 1),
)
# Head: (tokens, rows, columns, warps, stages) by the tokens.
FEW_FLOAT_TILES = {
    16: (
        TilePlan(16, 64, 128, 4, 5),
        TilePlan(16, 64, 256, 4, 4),
        TilePlan(16, 128, 128, 4, 4),
        TilePlan(16, 128, 128, 8, 4),
        TilePlan(16, 64, 64, 4, 6),
    ),
    32: (TilePlan(32, 128, 64, 4, 5), TilePlan(32, 64, 128, 4, 4), TilePlan(32, 128, 64, 8, 5)),
    64: (
        TilePlan(64, 128, 64, 4, 4),
        TilePlan(64, 128, 64, 8, 4),
        TilePlan(64, 128, 32, 8, 6),
        TilePlan(64, 64, 64, 4, 5),
        TilePlan(64, 256, 64, 8, 3),
    ),
}
# Tokens at which a matrix packed for decoding is multiplied.
PACKED_TOKENS = (64, 1024, 2048, 8192)
