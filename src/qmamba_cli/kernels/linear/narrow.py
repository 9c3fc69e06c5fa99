"""int8 products of many tokens with few rows on Hopper GPUs: linear_narrow.cu has the kernel."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear.operands import (
    ALIGNMENT,
    BLOCK_ROWS,
    GROUP_TOKENS,
    STAGE_ALIGNMENT,
    TILE_COLUMNS,
    for_warp_groups,
    lane_tiles,
)

SOURCE = "linear/linear_narrow.cu"
# Blocks of a cluster, by the blocks of 64 rows: each owns eight rows of a lane or a multiple of that.
_PARTS = {2: (1, 2, 4), 3: (1, 2, 3, 6)}
ENTRIES: tuple[str, ...] = tuple(
    f"linear_narrow<{blocks}, {parts}>" for blocks, sizes in _PARTS.items() for parts in sizes
)
# Share of the multiprocessors on which clusters of a size find room at once: seen on an H200, whose groups of
# multiprocessors have 16 or 18.
_ROOM = {1: 1.0, 2: 1.0, 3: 0.887, 4: 0.91, 6: 0.773}

_THREADS = 160
_SHARED_STAGES = {2: 7, 3: 5}
_MOST_STAGES = {2: 7, 3: 6}
_SUM_BYTES = 4
# Below, a tile of Triton's does as well.
_LEAST_TOKENS, _LEAST_COLUMNS = 512, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowPlan:
    """How a product is cut.

    Attributes:
        blocks: of 64 rows.
        parts: thread blocks that share the columns, with the same tokens.
    """

    blocks: int
    parts: int

    @property
    def entry(self) -> str:
        """Name expression of the instance."""
        return f"linear_narrow<{self.blocks}, {self.parts}>"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        rows = self.blocks * BLOCK_ROWS
        stage = (GROUP_TOKENS + rows) * TILE_COLUMNS
        if self.parts == 1:
            return _MOST_STAGES[self.blocks] * stage + STAGE_ALIGNMENT
        sums = GROUP_TOKENS * rows * _SUM_BYTES
        return _SHARED_STAGES[self.blocks] * stage + sums + STAGE_ALIGNMENT


@lru_cache(maxsize=1024)
def narrow_plan(tokens: int, rows: int, k: int, processors: int) -> NarrowPlan | None:
    """The largest clusters that all find room at once, or None where another kernel takes the product.

    Args:
        tokens: rows of x.
        rows: of the weight.
        k: columns.
        processors: multiprocessors.

    >>> narrow_plan(8192, 192, 5120, 132)
    NarrowPlan(blocks=3, parts=1)
    >>> narrow_plan(1024, 192, 5120, 132)
    NarrowPlan(blocks=3, parts=6)
    """
    blocks = max(min(_PARTS), -(-rows // BLOCK_ROWS))
    if tokens < _LEAST_TOKENS or k < _LEAST_COLUMNS or blocks not in _PARTS:
        return None
    if rows % ALIGNMENT or k % ALIGNMENT:
        return None
    tiles = -(-tokens // GROUP_TOKENS)
    fitting = [parts for parts in _PARTS[blocks] if tiles * parts <= int(_ROOM[parts] * processors)]
    return NarrowPlan(blocks=blocks, parts=max(fitting, default=1))


def choose(x: torch.Tensor, weight: torch.Tensor) -> NarrowPlan | None:
    """How linear_narrow cuts a product of int8 outputs, or None where it is another kernel's.

    Args:
        x: (tokens, k) int8, contiguous along k.
        weight: (rows, k) int8.
    """
    if not for_warp_groups(x, weight):
        return None
    (tokens, k), rows = x.shape, weight.shape[0]
    return narrow_plan(tokens, rows, k, _launch.sm_count(x.device))


def narrow_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    codes: torch.Tensor,
    plan: NarrowPlan,
    *,
    x_scale: float,
    inv_out_scale: float,
) -> None:
    """Multiply int8 operands into int8 outputs.

    Args:
        x: as for `choose`.
        weight: as for `choose`.
        weight_scale: (rows,) float32, on a 16-byte boundary.
        codes: (tokens, rows) int8, contiguous, on a 16-byte boundary.
        plan: the cut.
        x_scale: real units a step of x.
        inv_out_scale: steps a real unit of ``codes``.
    """
    (tokens, k), rows = x.shape, weight.shape[0]
    _launch.launch(
        SOURCE,
        plan.entry,
        grid=(-(-tokens // GROUP_TOKENS) * plan.parts, 1, 1),
        block=(_THREADS, 1, 1),
        args=(
            _launch.byte_tiles(x, GROUP_TOKENS, TILE_COLUMNS),
            lane_tiles(weight),
            weight_scale,
            codes,
            np.float32(x_scale),
            np.float32(inv_out_scale),
            np.int32(tokens),
            np.int32(rows),
            np.int32(-(-k // TILE_COLUMNS)),
        ),
        device=x.device,
        shared_bytes=plan.shared_bytes,
    )
