"""int8 products of many tokens on Hopper GPUs: linear_wide.cu has the kernel."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear.operands import ALIGNMENT, STAGE_ALIGNMENT, for_warp_groups, lane_tiles

SOURCE = "linear/linear_wide.cu"
# Rows of a tile, with the stages that fit, and with its time beside that of 256 rows, by the row, on an H200.
_TILE_ROWS = {256: 4, 160: 6, 128: 6}
_TIME = {256: 1.0, 160: 1.08, 128: 1.08}
# Tiles of other rows store int8 outputs one by one.
_CODE_ROWS = 64


def _entry(rows: int, lanes: bool) -> str:
    return f"linear_wide<{rows}, {'true' if lanes else 'false'}>"


ENTRIES: tuple[str, ...] = (
    *(_entry(rows, False) for rows in _TILE_ROWS),
    *(_entry(rows, True) for rows in _TILE_ROWS if rows % _CODE_ROWS == 0),
)

_TILE_TOKENS, _STEP_COLUMNS = 128, 128
_THREADS = 384
# Below these most of a tile is padding, or its epilogue is longer than its product.
_LEAST_TOKENS, _LEAST_ROWS, _LEAST_COLUMNS = 256, 1024, 512
# Share of the multiprocessors that one round of large tiles must keep busy.
_BUSY = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class WidePlan:
    """How a product is cut.

    Attributes:
        rows: of the weight in a tile.
        blocks: of the launch, at most one a multiprocessor.
    """

    rows: int
    blocks: int

    def entry(self, *, lanes: bool) -> str:
        """Name expression of the instance.

        Args:
            lanes: all outputs are int8, without a bias, and `lane_tiles` makes the weight's tiles.
        """
        return _entry(self.rows, lanes)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return _TILE_ROWS[self.rows] * (_TILE_TOKENS + self.rows) * _STEP_COLUMNS + STAGE_ALIGNMENT


@lru_cache(maxsize=1024)
def wide_plan(tokens: int, rows: int, processors: int, *, real: bool) -> WidePlan | None:
    """The tile whose rounds of all blocks take the least time, or None where smaller tiles do better.

    Args:
        tokens: rows of x.
        rows: of the weight.
        processors: multiprocessors.
        real: whether all outputs are float32.

    >>> wide_plan(8192, 10240, 132, real=False)
    WidePlan(rows=256, blocks=132)
    >>> wide_plan(1024, 10240, 132, real=False)
    WidePlan(rows=128, blocks=132)
    >>> wide_plan(1024, 2560, 132, real=True)
    WidePlan(rows=160, blocks=128)
    """

    def tiles(tile_rows: int) -> int:
        return -(-tokens // _TILE_TOKENS) * -(-rows // tile_rows)

    def cost(tile_rows: int) -> float:
        return -(-tiles(tile_rows) // processors) * tile_rows * _TIME[tile_rows]

    best = min((height for height in _TILE_ROWS if real or height % _CODE_ROWS == 0), key=cost)
    count = tiles(best)
    if best == max(_TILE_ROWS) and count < _BUSY * processors:
        return None
    return WidePlan(rows=best, blocks=min(processors, count))


def choose(x: torch.Tensor, weight: torch.Tensor, split: int) -> WidePlan | None:
    """How linear_wide cuts a product, or None where it is another kernel's.

    It takes a Hopper GPU, enough of everything, and aligned operands.

    Args:
        x: (tokens, k) int8, contiguous along k.
        weight: (rows, k) int8.
        split: outputs that are float32.
    """
    tokens, k = x.shape
    if tokens < _LEAST_TOKENS or weight.shape[0] < _LEAST_ROWS or k < _LEAST_COLUMNS:
        return None
    if k % ALIGNMENT or not for_warp_groups(x, weight):
        return None
    rows = weight.shape[0]
    return wide_plan(tokens, rows, _launch.sm_count(x.device), real=split == rows)


def wide_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    end_args: tuple[_launch.Arg, ...],
    plan: WidePlan,
    *,
    split: int,
) -> None:
    """Multiply int8 operands into the outputs that ``end_args`` names.

    Args:
        x: as for `choose`.
        weight: as for `choose`.
        end_args: `int8_cuda.Epilogue.args`.
        plan: the cut.
        split: outputs that are float32.
    """
    tokens, k = x.shape
    rows = weight.shape[0]
    vectors = [arg for arg in end_args if isinstance(arg, torch.Tensor)]
    even = rows % 16 == 0 and split % 16 == 0 and all(arg.data_ptr() % ALIGNMENT == 0 for arg in vectors)
    _, bias, *_ = end_args
    lanes = even and split == 0 and bias is None and plan.rows % _CODE_ROWS == 0
    _launch.launch(
        SOURCE,
        plan.entry(lanes=lanes),
        grid=(plan.blocks, 1, 1),
        block=(_THREADS, 1, 1),
        args=(
            _launch.byte_tiles(x, _TILE_TOKENS, _STEP_COLUMNS),
            lane_tiles(weight) if lanes else _launch.byte_tiles(weight, plan.rows, _STEP_COLUMNS),
            *end_args,
            np.int32(tokens),
            np.int32(rows),
            np.int32(split),
            np.int32(k),
            np.int32(even),
        ),
        device=x.device,
        shared_bytes=plan.shared_bytes,
    )
