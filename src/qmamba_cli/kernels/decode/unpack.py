"""Packed weights back to row-major int8, for the matrix products of a prompt."""

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.decode.cuda import SOURCE
from qmamba_cli.kernels.decode.pack import PackedBlock, PackedMatrix
from qmamba_cli.kernels.decode.steps import Step, launch_steps
from qmamba_cli.kernels.decode.tensors import BLOCKS

_THREADS = 128
_TILE = 16


def unpack_block(packed: PackedBlock, in_proj: torch.Tensor, out_proj: torch.Tensor) -> None:
    """Write a block's int8 matrices; of W4 the products of multiplier and code.

    Launches on torch's current stream and touches only its arguments, so a CUDA graph can capture it. Exact.

    Args:
        packed: the block.
        in_proj: (2 d_inner, d_model) int8, written.
        out_proj: (d_model, d_inner) int8, written.

    Raises:
        ShapeError: a matrix is not as above.
    """
    for name, tensor in (("in_proj", in_proj), ("out_proj", out_proj)):
        _launch.require_cuda(name, tensor)
    launch_steps(SOURCE, unpack_steps(packed, in_proj, out_proj), in_proj.device)


def unpack_steps(packed: PackedBlock, in_proj: torch.Tensor, out_proj: torch.Tensor) -> tuple[Step, ...]:
    """The launches of `unpack_block`.

    Raises:
        ShapeError: a matrix is not as `unpack_block` documents it.
    """
    for name, tensor, shape in (
        ("in_proj", in_proj, (2 * packed.d_inner, packed.d_model)),
        ("out_proj", out_proj, (packed.d_model, packed.d_inner)),
    ):
        if tensor.shape != shape or tensor.dtype != torch.int8 or not tensor.is_contiguous():
            raise ShapeError(
                f"decode: `{name}` is {tensor.dtype} {tuple(tensor.shape)}, expected a contiguous "
                f"torch.int8 {shape}"
            )
        if tensor.data_ptr() % 8:
            raise ShapeError(f"decode: `{name}` must start at a multiple of 8 bytes")
    rows = packed.out_proj.rows
    return (
        _step(packed.in_proj, in_proj, _TILE, 1, BLOCKS, packed.hk, packed.d_inner),
        _step(packed.out_proj, out_proj, rows, rows, 1, rows, 0),
    )


def _step(matrix: PackedMatrix, to: torch.Tensor, tile_rows: int, *places: int) -> Step:
    """One matrix; ``places``: stride of a block, step of a row, rows before the second half, its start."""
    pieces = matrix.rows * matrix.units * 4
    sizes = (matrix.rows, tile_rows, matrix.units, matrix.fine, *to.shape, *places)
    return Step(
        entry=f"decode_unpack<{matrix.bits}>",
        grid=(BLOCKS, -(-pieces // _THREADS), 1),
        threads=_THREADS,
        args=(matrix.weight, matrix.multipliers, to, *(np.int32(size) for size in sizes)),
        shared_bytes=0,
    )
