"""int8 products of many tokens with few columns on Hopper GPUs: linear_short.cu has the kernel."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear.operands import (
    ALIGNMENT,
    GROUP_TOKENS,
    STAGE_ALIGNMENT,
    TILE_COLUMNS,
    for_warp_groups,
    lane_tiles,
)

SOURCE = "linear/linear_short.cu"
# Steps of 32 columns, which are registers of a lane.
_STEP_COLUMNS = 32
_STEPS = (2, 3, 4, 5)
# Groups of 64 tokens a block, and rows of a stage.
_TILES = ((4, 128), (2, 64))
ENTRIES: tuple[str, ...] = tuple(
    f"linear_short<{steps}, {groups}, {rows}>" for steps in _STEPS for groups, rows in _TILES
)

_THREADS = 640
_STAGES = 6
_SCALE_BYTES = 4
_LEAST_TOKENS, _LEAST_ROWS = 256, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortPlan:
    """How a product is cut.

    Attributes:
        steps: of 32 columns.
        groups: of 64 tokens in a block.
        rows: of the weight in a stage.
        parts: blocks that share the rows, with the same tokens.
    """

    steps: int
    groups: int
    rows: int
    parts: int

    @property
    def entry(self) -> str:
        """Name expression of the instance."""
        return f"linear_short<{self.steps}, {self.groups}, {self.rows}>"

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return GROUP_TOKENS * self.groups

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        columns = _launch.round_up(self.steps * _STEP_COLUMNS, TILE_COLUMNS)
        return _STAGES * self.rows * (columns + _SCALE_BYTES) + STAGE_ALIGNMENT


@lru_cache(maxsize=1024)
def short_plan(tokens: int, rows: int, k: int, processors: int) -> ShortPlan | None:
    """The cut whose busiest multiprocessor has the fewest outputs, or None where the kernel takes none.

    Args:
        tokens: rows of x.
        rows: of the weight.
        k: columns.
        processors: multiprocessors.

    >>> short_plan(8192, 5120, 160, 132)
    ShortPlan(steps=5, groups=4, rows=128, parts=4)
    >>> short_plan(1024, 5120, 160, 132)
    ShortPlan(steps=5, groups=2, rows=64, parts=16)
    """
    steps = max(_STEPS[0], -(-k // _STEP_COLUMNS))
    if tokens < _LEAST_TOKENS or rows < _LEAST_ROWS or steps > _STEPS[-1] or k % ALIGNMENT:
        return None
    best: tuple[int, ShortPlan] | None = None
    for groups, stage in _TILES:
        if rows % stage:
            continue
        down = -(-tokens // (GROUP_TOKENS * groups))
        parts = max(1, min(processors // down, rows // stage))
        plan = ShortPlan(steps=steps, groups=groups, rows=stage, parts=parts)
        rounds = -(-down * parts // processors)
        cost = rounds * plan.tokens * -(-(rows // stage) // parts) * stage
        if best is None or cost < best[0]:
            best = cost, plan
    return None if best is None else best[1]


def choose(x: torch.Tensor, weight: torch.Tensor) -> ShortPlan | None:
    """How linear_short cuts a product of int8 outputs, or None where it is another kernel's.

    Args:
        x: (tokens, k) int8, contiguous along k.
        weight: (rows, k) int8.
    """
    if not for_warp_groups(x, weight):
        return None
    (tokens, k), rows = x.shape, weight.shape[0]
    return short_plan(tokens, rows, k, _launch.sm_count(x.device))


def short_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    codes: torch.Tensor,
    plan: ShortPlan,
    *,
    x_scale: float,
    inv_out_scale: float,
    overlap: bool,
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
        overlap: the kernel before in the stream may still run while the weight is asked for; it must have
            written neither the weight nor its scales.
    """
    (tokens, k), rows = x.shape, weight.shape[0]
    _launch.launch(
        SOURCE,
        plan.entry,
        grid=(-(-tokens // plan.tokens) * plan.parts, 1, 1),
        block=(_THREADS, 1, 1),
        args=(
            lane_tiles(weight),
            x,
            weight_scale,
            codes,
            np.float32(x_scale),
            np.float32(inv_out_scale),
            np.int64(x.stride(0)),
            np.int32(tokens),
            np.int32(rows),
            np.int32(k),
            np.int32(plan.parts),
        ),
        device=x.device,
        shared_bytes=plan.shared_bytes,
        overlap=overlap,
    )
