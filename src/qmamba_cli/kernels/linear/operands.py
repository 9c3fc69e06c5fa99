"""What the CUDA kernels of `linear` ask of their operands, and 4-bit weights expanded to int8."""

from functools import cache
from types import ModuleType

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear.interleaved import Interleaved, Weight
from qmamba_cli.kernels.linear.packed import PackedInt4

SOURCE = "linear/linear.cu"
_DECODE_SOURCE = "decode/decode.cu"
WARP = 32
# Bytes of one vector load.
ALIGNMENT = 16
# Where there are warp-group products.
HOPPER = (9, 0)
# Of `lane_tiles`, as linear_sixteens.cuh has them.
BLOCK_ROWS, TILE_COLUMNS = 64, 128
LANE_ROWS = 16
# Tokens of a warp group.
GROUP_TOKENS = 64
# Of shared memory: where the rows of a swizzled tile begin.
STAGE_ALIGNMENT = 1024
_EXPAND_THREADS = 256
# Codes that one thread of `expand_int4` expands.
_EXPAND_COLUMNS = 32


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """(tokens, k) with contiguous columns; a slice of wider rows is not copied."""
    _launch.require_cuda("x", x)
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()


def aligned(x: torch.Tensor, weight: torch.Tensor | PackedInt4) -> bool:
    """Whether every row of both starts on the boundary of vector loads, and the weight is dense."""
    data = weight.codes if isinstance(weight, PackedInt4) else weight
    return (
        x.data_ptr() % ALIGNMENT == 0
        and x.stride(0) % ALIGNMENT == 0
        and data.data_ptr() % ALIGNMENT == 0
        and data.is_contiguous()
        and data.is_cuda
    )


@cache
def is_hopper(device_index: int) -> bool:
    """Whether a GPU has the instructions of the kernels for Hopper."""
    return torch.cuda.get_device_capability(device_index) == HOPPER


def for_warp_groups(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels for Hopper can take these operands, whatever their sizes."""
    return is_hopper(x.device.index or 0) and aligned(x, weight)


def lane_tiles(weight: torch.Tensor) -> bytes:
    """Tiles of 64 rows in the order of linear_sixteens.cuh, for the copy engine.

    Args:
        weight: (rows, k) int8, contiguous; rows and k multiples of 16.
    """
    rows, k = weight.shape
    pair = 2
    pairs = LANE_ROWS // pair
    return _launch.strided_tiles(
        weight,
        (k, pair, rows // LANE_ROWS, pairs),
        (k, LANE_ROWS * k, pair * k),
        (TILE_COLUMNS, pair, BLOCK_ROWS // LANE_ROWS, pairs),
    )


@cache
def triton_kernels() -> ModuleType | None:
    """The Triton kernels, or None where Triton is not installed."""
    try:
        from qmamba_cli.kernels.linear import triton_matmul
    except ImportError:
        return None
    return triton_matmul


def expand(weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """A packed weight's own `expand` at copy bandwidth.

    Args:
        weight: on a GPU; one that is a tensor is returned as it is.
        out: (m, k) int8, contiguous, where the matrix goes; new memory if left out.

    Returns:
        (m, k) int8.
    """
    if isinstance(weight, torch.Tensor):
        return weight
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    return _rows(weight, out) if isinstance(weight, Interleaved) else _expand_int4(weight, out)


def _rows(weight: Interleaved, out: torch.Tensor) -> torch.Tensor:
    from qmamba_cli.kernels.decode.steps import launch_steps
    from qmamba_cli.kernels.decode.unpack import unpack_steps

    block = weight.block
    # The other matrix is not written and needs no memory.
    rest = torch.empty(
        Interleaved(block=block, name="out_proj" if weight.name == "in_proj" else "in_proj").shape,
        dtype=torch.int8,
        device="meta",
    )
    in_proj = weight.name == "in_proj"
    steps = unpack_steps(block, out if in_proj else rest, rest if in_proj else out)
    launch_steps(_DECODE_SOURCE, [steps[0 if in_proj else 1]], out.device)
    return out


def _expand_int4(weight: PackedInt4, out: torch.Tensor) -> torch.Tensor:
    rows, k = weight.shape
    codes = _launch.contiguous("codes", weight.codes)
    multiplier = _launch.contiguous("multiplier", weight.multiplier)
    wide = k % _EXPAND_COLUMNS == 0 and weight.group_size % _EXPAND_COLUMNS == 0
    if wide and codes.data_ptr() % ALIGNMENT == 0:
        pieces = rows * k // _EXPAND_COLUMNS
        _launch.launch(
            SOURCE,
            "expand_int4",
            grid=(-(-pieces // _EXPAND_THREADS), 1, 1),
            block=(_EXPAND_THREADS, 1, 1),
            args=(
                codes,
                multiplier,
                out,
                np.int64(pieces),
                np.int32(k // _EXPAND_COLUMNS),
                np.int32(multiplier.shape[1]),
                np.int32(weight.group_size // _EXPAND_COLUMNS),
            ),
            device=out.device,
        )
    elif out.numel():
        _launch.launch(
            SOURCE,
            "expand_int4_bytes",
            grid=(-(-out.numel() // _EXPAND_THREADS), 1, 1),
            block=(_EXPAND_THREADS, 1, 1),
            args=(
                codes,
                multiplier,
                out,
                np.int64(out.numel()),
                np.int32(k),
                np.int32(multiplier.shape[1]),
                np.int32(weight.group_size),
            ),
            device=out.device,
        )
    return out
