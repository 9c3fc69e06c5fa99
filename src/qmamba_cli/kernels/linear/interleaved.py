"""An int8 matrix whose only copy lies in the order in which the decode kernels read it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from qmamba_cli.kernels.decode.pack import PackedBlock, PackedMatrix
from qmamba_cli.kernels.decode.tensors import BLOCKS
from qmamba_cli.kernels.linear.packed import PackedInt4

_TILE = 16  # rows
_PIECE_COLUMNS = 8  # of a lane and step
_SIGN = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Interleaved:
    """in_proj or out_proj of a block that was packed for decoding; it stands for the int8 matrix.

    Attributes:
        block: the packed block.
        name: which of its matrices.
    """

    block: PackedBlock
    name: Literal["in_proj", "out_proj"]

    @property
    def matrix(self) -> PackedMatrix:
        """The packed matrix."""
        return self.block.in_proj if self.name == "in_proj" else self.block.out_proj

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k) of the matrix."""
        wide = 2 * self.block.d_inner, self.block.d_model
        return wide if self.name == "in_proj" else (self.block.d_model, self.block.d_inner)

    @property
    def device(self) -> torch.device:
        """Where the matrix lies."""
        return self.block.device

    @property
    def tile_rows(self) -> int:
        """Rows of a thread block whose pieces of one unit lie side by side."""
        return _TILE if self.name == "in_proj" else self.matrix.rows

    def expand(self) -> torch.Tensor:
        """The matrix itself, (m, k) int8; of W4 the products of multiplier and code."""
        matrix, (m, k) = self.matrix, self.shape
        heights = [
            min(self.tile_rows, matrix.rows - start) for start in range(0, matrix.rows, self.tile_rows)
        ]
        sizes = [64 * matrix.units * height for height in heights]
        tiles = [
            _codes(part, height, matrix)
            for part, height in zip(torch.split_with_sizes(matrix.weight, sizes, dim=1), heights, strict=True)
        ]
        rows = torch.cat(tiles, dim=1)
        if matrix.multipliers is not None:
            steps = matrix.multipliers.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, : matrix.rows].flatten(2)
            wide = steps.to(torch.int8).repeat_interleave(rows.shape[2] // steps.shape[2], dim=2)
            rows = rows * wide
        if self.name == "out_proj":
            return rows.reshape(-1, rows.shape[2])[:m, :k].contiguous()
        # Thread block j owns the channels j + 128 i of x, then of z.
        halves = rows.reshape(BLOCKS, 2, self.block.hk, -1).permute(1, 2, 0, 3)
        return halves.reshape(m, -1)[:, :k].contiguous()


def _codes(part: torch.Tensor, height: int, matrix: PackedMatrix) -> torch.Tensor:
    """(128, bytes) uint8 of one tile of rows to its codes, (128, rows, columns) int8."""
    if matrix.bits == 8:
        lanes = part.view(torch.int8).reshape(BLOCKS, matrix.units, height, 4, 2, _PIECE_COLUMNS)
    else:
        octets = part.reshape(BLOCKS, matrix.units, height, 4, 4, _PIECE_COLUMNS // 2)
        lanes = torch.cat((octets & 0xF, octets >> 4), dim=5).view(torch.int8).bitwise_xor(_SIGN).sub_(_SIGN)
    return lanes.permute(0, 2, 1, 4, 3, 5).reshape(BLOCKS, height, -1)


# An int8 matrix in any of its forms, or a float one.
Weight: TypeAlias = torch.Tensor | PackedInt4 | Interleaved


def expanded(weight: Weight) -> torch.Tensor:
    """The matrix that a weight stands for."""
    return weight if isinstance(weight, torch.Tensor) else weight.expand()
