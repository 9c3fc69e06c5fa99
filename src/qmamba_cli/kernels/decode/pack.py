"""One block's weights as the decode kernels read them: by thread block, in the order of the copies.

Thread block j of 128 owns the channels ``j + 128 i`` for ``i < hk = d_inner / 128`` and the outputs
``j r ... j r + r - 1`` with ``r = ceil(d_model / 128)``. decode_weights.cuh draws the pieces of a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode.tensors import BLOCKS, BlockTensors, DecodeColumns, DecodeScales, check_tensors
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for, sylvester_matrix
from qmamba_cli.quant.grid import reciprocal
from qmamba_cli.quant.weights import GroupQuantized, RowQuantized

STATES = 16
_STEP = 32  # columns of one tensor-core product
_TILE = 16  # rows of one
_PIECE = 16  # bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """in_proj or out_proj.

    Attributes:
        bits: 4 or 8.
        weight: (128, bytes) uint8; of in_proj (tiles, units, up to 16 rows, 64 bytes), of out_proj
            (units, rows, 64 bytes).
        multipliers: (128, tiles, units, 1 or 4, 16) uint8, or None for W8.
        rows: of a thread block.
        units: of 64 (W8) or 128 (W4) columns.
        fine: whether groups are shorter than a unit, so that each step of 32 columns has its multiplier.
    """

    bits: int
    weight: torch.Tensor
    multipliers: torch.Tensor | None
    rows: int
    units: int
    fine: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBlock:
    """One block, on one device.

    Attributes:
        d_model: width of the residual.
        hk: channels of a thread block, ``d_inner / 128``.
        rank: columns of dt_proj.
        taps: width of the convolution.
        x_rows: rows of x_proj, padded to a multiple of 4.
        dt_pieces: 16-byte pieces of a row of dt_proj.
        columns: what the mode chooses.
        scales: activation scales.
        norm_eps: epsilon of the RMSNorm.
        in_proj: packed.
        out_proj: packed.
        in_constants: (128, 8, hk) int32 words: row scale and bias of x, z; taps; conv scale; conv bias; u's
            scale.
        out_constants: (128, 2, rows) float32: row scale, row bias.
        x_weight: (128, hk / 4, x_rows, 4) int8.
        x_factor: (x_rows,) float32, real units a step of x_proj's sums.
        dt_weight: (128, hk, 16 dt_pieces) int8.
        A_log2e: (128, hk, 16) float32.
        scan_constants: (128, 3, hk) float32: real units a step of dt_proj's sums, dt_bias, D.
        core: (hk,) int64, bit k of row i: entry (i, k) of H_hk is -1.
        rotation_factor: steps of out_proj's input a unit of the unnormalized transform.
    """

    d_model: int
    hk: int
    rank: int
    taps: int
    x_rows: int
    dt_pieces: int
    columns: DecodeColumns
    scales: DecodeScales
    norm_eps: float
    in_proj: PackedMatrix
    out_proj: PackedMatrix
    in_constants: torch.Tensor
    out_constants: torch.Tensor
    x_weight: torch.Tensor
    x_factor: torch.Tensor
    dt_weight: torch.Tensor
    A_log2e: torch.Tensor
    scan_constants: torch.Tensor
    core: torch.Tensor
    rotation_factor: float

    @property
    def d_inner(self) -> int:
        """Channels of the block."""
        return self.hk * BLOCKS

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.x_weight.device

    def nbytes(self) -> int:
        """Bytes of all tensors, each read once a token."""
        matrices = [t for m in (self.in_proj, self.out_proj) for t in (m.weight, m.multipliers)]
        others = [self.in_constants, self.out_constants, self.x_weight, self.x_factor, self.dt_weight]
        others += [self.A_log2e, self.scan_constants, self.core]
        return sum(t.nbytes for t in matrices + others if t is not None)


def pack_block(
    tensors: BlockTensors, scales: DecodeScales, columns: DecodeColumns, *, norm_eps: float
) -> PackedBlock:
    """Pack one block, on the tensors' device and with torch operations only.

    A W4 matrix keeps its 4-bit codes and its multipliers.

    Args:
        tensors: the block's weights.
        scales: its activation scales.
        columns: what the mode chooses.
        norm_eps: epsilon of the RMSNorm.

    Raises:
        ShapeError: a shape or dtype is not as documented, or `supported` refuses the sizes.
    """
    sizes = check_tensors(tensors)
    hk, rank = sizes.d_inner // BLOCKS, sizes.dt_rank
    x_rows = -(-tensors.x_proj.qweight.shape[0] // 4) * 4
    dt_pieces = -(-rank // _PIECE)
    rows_out = -(-sizes.d_model // BLOCKS)
    x_factor = _pad(tensors.x_proj.scale * scales.x_proj_codes, x_rows, dim=0, value=1.0)
    dt_factor = tensors.dt_proj.scale * scales.x_proj_output
    return PackedBlock(
        d_model=sizes.d_model,
        hk=hk,
        rank=rank,
        taps=sizes.d_conv,
        x_rows=x_rows,
        dt_pieces=dt_pieces,
        columns=columns,
        scales=scales,
        norm_eps=norm_eps,
        in_proj=_pack_matrix(tensors.in_proj, lambda t: _xz_rows(t, sizes.d_inner), tiled=True),
        out_proj=_pack_matrix(tensors.out_proj, lambda t: _out_rows(t, rows_out), tiled=False),
        in_constants=_in_constants(tensors, scales, columns, sizes.d_inner),
        out_constants=_out_constants(tensors, scales, rows_out),
        x_weight=_pack_x_proj(tensors.x_proj.qweight, x_rows),
        x_factor=x_factor.contiguous(),
        dt_weight=_channels(_pad(tensors.dt_proj.qweight, dt_pieces * _PIECE, dim=1)).contiguous(),
        A_log2e=_channels(tensors.A * math.log2(math.e)).contiguous(),
        scan_constants=torch.stack(
            [_channels(dt_factor), _channels(tensors.dt_bias), _channels(tensors.D)], dim=1
        ).contiguous(),
        core=_core_signs(sizes.d_inner).to(tensors.A.device),
        rotation_factor=reciprocal(scales.out_proj_input) / math.sqrt(sizes.d_inner),
    )


def _channels(x: torch.Tensor) -> torch.Tensor:
    """(d_inner, ...) to (128, hk, ...): thread block first."""
    return x.reshape(-1, BLOCKS, *x.shape[1:]).transpose(0, 1)


def _xz_rows(x: torch.Tensor, d_inner: int) -> torch.Tensor:
    """(2 d_inner, ...) to (128, 2 hk, ...): a thread block's rows of x, then of z."""
    return torch.cat([_channels(x[:d_inner]), _channels(x[d_inner:])], dim=1)


def _out_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(d_model, ...) to (128, rows, ...), zeros behind the last row."""
    return _pad(x, BLOCKS * rows, dim=0).reshape(BLOCKS, rows, *x.shape[1:])


def _pad(x: torch.Tensor, size: int, *, dim: int, value: float = 0) -> torch.Tensor:
    missing = list(x.shape)
    missing[dim] = size - x.shape[dim]
    return x if missing[dim] == 0 else torch.cat([x, x.new_full(missing, value)], dim=dim)


def _pack_matrix(
    matrix: RowQuantized | GroupQuantized, by_block: Callable[[torch.Tensor], torch.Tensor], *, tiled: bool
) -> PackedMatrix:
    """Rows to their thread blocks by ``by_block``, columns to pieces."""
    if isinstance(matrix, GroupQuantized):
        bits, unit, codes = 4, 4 * _STEP, matrix.codes
    else:
        bits, unit, codes = 8, 2 * _STEP, matrix.qweight
    units = -(-codes.shape[1] // unit)
    blocks = by_block(_pad(codes, units * unit, dim=1))
    rows = blocks.shape[1]
    heights = [min(_TILE, rows - start) for start in range(0, rows, _TILE)] if tiled else [rows]
    parts = [_pieces(part, units, bits).flatten(1) for part in torch.split_with_sizes(blocks, heights, dim=1)]
    multipliers, fine = None, False
    if isinstance(matrix, GroupQuantized):
        fine = matrix.group_size % unit != 0
        steps = torch.arange(units * (unit // _STEP), device=codes.device) * _STEP // matrix.group_size
        wide = matrix.multiplier[:, steps.clamp_max(matrix.multiplier.shape[1] - 1)]
        wide = wide.view(-1, units, unit // _STEP)
        tiles = -(-rows // _TILE)
        multipliers = _pad(by_block(wide if fine else wide[:, :, :1]), tiles * _TILE, dim=1)
        multipliers = multipliers.view(BLOCKS, tiles, _TILE, units, -1).permute(0, 1, 3, 4, 2).contiguous()
    return PackedMatrix(
        bits=bits,
        weight=torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous(),
        multipliers=multipliers,
        rows=rows,
        units=units,
        fine=fine,
    )


def _pieces(codes: torch.Tensor, units: int, bits: int) -> torch.Tensor:
    """(128, rows, columns) int8 to (128, units, rows, 4 lanes, 16 bytes) uint8."""
    blocks, rows, _ = codes.shape
    steps = 4 if bits == 4 else 2
    ordered = codes.reshape(blocks, rows, units, steps, 4, 8).permute(0, 2, 1, 4, 3, 5).contiguous()
    octets = ordered.view(torch.uint8)
    if bits == 4:
        octets = (octets[..., :4] & 0xF) | (octets[..., 4:] << 4)
    return octets.reshape(blocks, units, rows, 4, _PIECE)


def _in_constants(
    tensors: BlockTensors, scales: DecodeScales, columns: DecodeColumns, d_inner: int
) -> torch.Tensor:
    """(128, 8, hk) int32 words."""
    row_scale = tensors.in_proj.scale * scales.in_proj_input
    row_bias = torch.zeros_like(row_scale) if tensors.in_bias is None else tensors.in_bias
    conv_scale = tensors.conv.scale if columns.dynamic_input else tensors.conv.scale * scales.in_proj_output
    conv_bias = torch.zeros_like(conv_scale) if tensors.conv_bias is None else tensors.conv_bias
    taps = tensors.conv.qweight
    # Oldest first, zeros before them: four bytes whatever the width.
    missing = taps.new_zeros(d_inner, 4 - taps.shape[1])
    word = torch.cat([missing, taps], dim=1).contiguous().view(torch.int32).squeeze(1)
    floats = [row_scale[:d_inner], row_scale[d_inner:], row_bias[:d_inner], row_bias[d_inner:]]
    u_scale = scales.x_proj_input
    if not isinstance(u_scale, torch.Tensor):
        u_scale = torch.full_like(conv_scale, u_scale)
    if u_scale.shape != (d_inner,) or u_scale.dtype != torch.float32:
        raise ShapeError(
            f"decode: `x_proj_input` is {u_scale.dtype} {tuple(u_scale.shape)}, expected float32 ({d_inner},)"
        )
    bits = [part.contiguous().view(torch.int32) for part in [*floats, conv_scale, conv_bias, u_scale]]
    bits.insert(4, word)
    return torch.stack([_channels(part) for part in bits], dim=1).contiguous()


def _out_constants(tensors: BlockTensors, scales: DecodeScales, rows: int) -> torch.Tensor:
    row_scale = tensors.out_proj.scale * scales.out_proj_input
    row_bias = torch.zeros_like(row_scale) if tensors.out_bias is None else tensors.out_bias
    return torch.stack([_out_rows(row_scale, rows), _out_rows(row_bias, rows)], dim=1).contiguous()


def _pack_x_proj(weight: torch.Tensor, x_rows: int) -> torch.Tensor:
    """(rows, d_inner) int8 to (128, hk / 4, x_rows, 4): four channels of a row to a word."""
    by_block = _channels(_pad(weight, x_rows, dim=0).t())  # (128, hk, x_rows)
    return by_block.reshape(BLOCKS, -1, 4, x_rows).transpose(2, 3).contiguous()


def _core_signs(d_inner: int) -> torch.Tensor:
    """Rows of H_hk in ``H_n = H_hk (x) S_128`` as bit sets of their negative entries, (hk,) int64."""
    core = plan_for(d_inner).core
    exponent = (d_inner // core // BLOCKS).bit_length() - 1
    matrix = torch.kron(core_matrix(core), sylvester_matrix(exponent))
    rows = (sum(1 << k for k, entry in enumerate(row) if entry < 0) for row in matrix.tolist())
    # Bit 63 is the sign of a signed number.
    return torch.tensor([row - (1 << 64) if row >> 63 else row for row in rows], dtype=torch.int64)
