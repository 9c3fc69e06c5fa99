"""One token of one block from the reference operators: what the decode kernels are judged against."""

import torch

from qmamba_cli.kernels.causal_conv1d.reference import causal_conv1d
from qmamba_cli.kernels.decode.tensors import (
    BlockTensors,
    DecodeColumns,
    DecodeScales,
    DecodeState,
    check_state,
    check_tensors,
)
from qmamba_cli.kernels.hadamard.reference import hadamard
from qmamba_cli.kernels.linear.reference import linear
from qmamba_cli.kernels.rms_norm.reference import rms_norm
from qmamba_cli.kernels.selective_scan.reference import selective_scan
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import quantize, quantize_per_token
from qmamba_cli.quant.weights import GroupQuantized, RowQuantized


def decode_block(
    tensors: BlockTensors,
    scales: DecodeScales,
    columns: DecodeColumns,
    residual: torch.Tensor,
    state: DecodeState,
    *,
    norm_eps: float,
) -> None:
    """Norm, in_proj, conv, x_proj, dt_proj, scan step, Hadamard, out_proj and residual add of one token.

    With x = z = 32 in every channel and no B, C: u = 32 * 0.5 = 16 and y = 16 * 32 = 512; the transform is
    sqrt(512) * 512 = 11585 in one place, 45 steps of 256, and out_proj adds 45 * 256 * 0.5.

    >>> from qmamba_cli.kernels.causal_conv1d.reference import ConvState
    >>> def rows(m, k, value=0):
    ...     codes = torch.full((m, k), value, dtype=torch.int8)
    ...     return RowQuantized(qweight=codes, scale=torch.full((m,), 0.5))
    >>> d, zeros = 512, torch.zeros(512)
    >>> tensors = BlockTensors(
    ...     in_proj=rows(2 * d, 64, 1), conv=rows(d, 4, 1), x_proj=rows(4 + 32, d), dt_proj=rows(d, 4),
    ...     out_proj=rows(64, d, 1), dt_bias=zeros, A=-torch.ones(d, 16), D=zeros + 1)
    >>> state = DecodeState(ConvState(torch.zeros(1, d, 3, dtype=torch.int8)), torch.zeros(1, d, 16))
    >>> residual = torch.ones(1, 64)
    >>> columns = DecodeColumns(dynamic_input=False, true_u=False, int8_state=False)
    >>> scales = DecodeScales(
    ...     in_proj_input=0.5, in_proj_output=0.5, x_proj_input=0.25, x_proj_output=1.0, dt_proj_output=1.0,
    ...     ssm_state=1.0, out_proj_input=256.0)
    >>> decode_block(tensors, scales, columns, residual, state, norm_eps=0.0)
    >>> state.conv.values[0, 0].tolist(), float(residual[0, 0])
    ([0, 0, 64], 5761.0)

    Args:
        tensors: the block's weights.
        scales: its activation scales.
        columns: what the mode chooses.
        residual: (b, d_model) float32, updated in place.
        state: updated in place.
        norm_eps: epsilon of the RMSNorm.

    Raises:
        ShapeError: a shape or dtype is not as above.

    Source: Gu and Dao, "Mamba" (2023), figure 3; the grids are those of docs/numerics.md.
    """
    sizes = check_tensors(tensors)
    check_state(sizes, columns, residual, state, most=None)
    d, rank, n = sizes.d_inner, sizes.dt_rank, sizes.d_state
    normed = rms_norm(residual.unsqueeze(1), None, eps=norm_eps, out_scale=scales.in_proj_input)
    xz = _project(
        normed,
        tensors.in_proj,
        tensors.in_bias,
        scales.in_proj_input,
        None if columns.dynamic_input else scales.in_proj_output,
    )
    x, z = torch.split_with_sizes(xz.transpose(1, 2), [d, d], dim=1)
    x_scale: float | torch.Tensor = scales.in_proj_output
    if columns.dynamic_input:
        x, x_scale = quantize_per_token(x)
        z = quantize(z, scales.in_proj_output)
    v, conv = causal_conv1d(
        x,
        tensors.conv.qweight,
        tensors.conv_bias,
        x_scale=x_scale,
        weight_scale=tensors.conv.scale,
        state=state.conv,
    )
    codes = quantize(v, scales.x_proj_input)
    x_dbl = _project(codes.transpose(1, 2), tensors.x_proj, None, scales.x_proj_codes, scales.x_proj_output)
    dt_low, B, C = torch.split_with_sizes(x_dbl, [rank, n, n], dim=-1)
    dt = _project(dt_low, tensors.dt_proj, None, scales.x_proj_output, scales.dt_proj_output)
    scan = selective_scan(
        v if columns.true_u else codes,
        dt.transpose(1, 2),
        tensors.A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        tensors.D,
        z,
        tensors.dt_bias,
        order=ScanOrder.SEQUENTIAL,
        u_scale=scales.x_proj_input,
        dt_scale=scales.dt_proj_output,
        b_scale=scales.x_proj_output,
        c_scale=scales.x_proj_output,
        z_scale=scales.in_proj_output,
        state=state.ssm,
        state_scale=scales.ssm_state if columns.int8_state else None,
    )
    rotated = hadamard(scan.y, out_scale=scales.out_proj_input)
    out = _project(rotated, tensors.out_proj, tensors.out_bias, scales.out_proj_input, None)
    residual.add_(out.squeeze(1))
    state.conv.values.copy_(conv.values)
    if state.conv.scale is not None and conv.scale is not None:
        state.conv.scale.copy_(conv.scale)
    state.ssm.copy_(scan.state)


def _project(
    x: torch.Tensor,
    matrix: RowQuantized | GroupQuantized,
    bias: torch.Tensor | None,
    x_scale: float,
    out_scale: float | None,
) -> torch.Tensor:
    weight = matrix.expand() if isinstance(matrix, GroupQuantized) else matrix.qweight
    return linear(x, weight, bias, x_scale=x_scale, weight_scale=matrix.scale, out_scale=out_scale)
