"""A W4 matrix as it lies in GPU memory: two codes a byte, one multiplier a group."""

from dataclasses import dataclass

import torch

from qmamba_cli.errors import ShapeError

# (n ^ 8) - 8 extends the sign of the nibble n.
_SIGN = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedInt4:
    """An int8 matrix (m, k) whose element is ``multiplier[row, column // group_size] * code[row, column]``.

    Attributes:
        codes: (m, ceil(k / 2)) uint8, as `quant.packing.pack_int4` lays them: even columns in low nibbles.
        multiplier: (m, ceil(k / group_size)) uint8 in 1 ... 15, one byte each.
        group_size: consecutive columns that share a multiplier.
        columns: k.

    Raises:
        ShapeError: a shape or dtype is not as above.
    """

    codes: torch.Tensor
    multiplier: torch.Tensor
    group_size: int
    columns: int

    def __post_init__(self) -> None:
        rows = self.codes.shape[0]
        if self.group_size < 1 or self.columns < 1:
            raise ShapeError(
                f"a packed matrix needs at least 1 column and groups of at least 1, got {self.columns} "
                f"columns in groups of {self.group_size}"
            )
        for name, tensor, width in (
            ("codes", self.codes, -(-self.columns // 2)),
            ("multiplier", self.multiplier, -(-self.columns // self.group_size)),
        ):
            if tensor.dtype != torch.uint8 or tensor.shape != (rows, width):
                raise ShapeError(
                    f"a packed matrix of {self.columns} columns in groups of {self.group_size}: `{name}` "
                    f"must be uint8 ({rows}, {width}), got {tensor.dtype} {tuple(tensor.shape)}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, k) of the matrix."""
        return self.codes.shape[0], self.columns

    @property
    def device(self) -> torch.device:
        """Where the matrix lies."""
        return self.codes.device

    def expand(self) -> torch.Tensor:
        """The matrix itself, (m, k) int8, in -120 ... 105.

        >>> codes, multiplier = (torch.tensor([v], dtype=torch.uint8) for v in ([0x1F, 0x08], [2, 15]))
        >>> PackedInt4(codes=codes, multiplier=multiplier, group_size=2, columns=3).expand().tolist()
        [[-2, 2, -120]]
        """
        rows, k = self.shape
        pairs = torch.stack((self.codes & 0xF, self.codes >> 4), dim=2).view(torch.int8)
        codes = pairs.reshape(rows, -1)[:, :k].bitwise_xor(_SIGN).sub_(_SIGN)
        wide = self.multiplier.view(torch.int8).repeat_interleave(self.group_size, dim=1)[:, :k]
        return codes.mul_(wide)

    def rows(self, start: int, stop: int) -> "PackedInt4":
        """Some of the rows, without a copy."""
        return PackedInt4(
            codes=self.codes[start:stop],
            multiplier=self.multiplier[start:stop],
            group_size=self.group_size,
            columns=self.columns,
        )
