"""One Mamba block, written once and driven by the columns of a mode.

Whether a tensor between two operators is int8 or float follows from its scale: a site without a scale (the
float model) stays float32, or 16 bits where the weights have them. The three things a mode chooses are each
decided in one place: `_conv_input`, the conv's output grid with path A and path B, and the scan.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from qmamba_cli import sites
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.model.weights import BlockWeights, LinearWeights
from qmamba_cli.modes import ConvInput, ConvOutput, Mode, ScanReads, ScanU, State

# Called as hook(site, tensor) with each observed tensor, samples along dim 0; looking changes nothing, and a
# hook that writes into the tensor changes what the float model computes from it.
Hook: TypeAlias = Callable[[str, torch.Tensor], None]


class BlockState(NamedTuple):
    """What a block carries from one call to the next.

    Attributes:
        conv: last w-1 inputs of the convolution.
        ssm: (b, d, n) scan state, int8 or float32 by the mode.
    """

    conv: ConvState
    ssm: torch.Tensor


def _no_hook(_site: str, _tensor: torch.Tensor) -> None:
    return None


def block_forward(
    weights: BlockWeights,
    mode: Mode,
    ops: Backend,
    residual: torch.Tensor,
    state: BlockState | None,
    *,
    norm_eps: float,
    hook: Hook = _no_hook,
) -> tuple[torch.Tensor, BlockState]:
    """Norm, in_proj, conv, x_proj, dt_proj, scan, Hadamard, out_proj, residual add.

    Args:
        weights: the block's weights and scales.
        mode: the row that says which grid each tensor lies on.
        ops: the backend's operators.
        residual: (b, l, d_model) float32.
        state: from the call before, or None at the start of a sequence.
        norm_eps: epsilon of the RMSNorm.
        hook: sees every observed tensor.

    Returns:
        The new residual (b, l, d_model) float32 and the new state.

    Source: Gu and Dao, "Mamba" (2023), figure 3; the grids are those of docs/numerics.md.
    """
    scales = weights.scales
    normed = ops.rms_norm(
        residual, weights.norm, eps=norm_eps, out_scale=scales.in_proj_input, out_dtype=weights.half
    )
    hook(sites.IN_PROJ_INPUT, normed)

    x, x_scale, z = _conv_input(weights, mode, ops, normed, hook)
    v, path_a, conv_state = _convolved(weights, mode, ops, x, x_scale, None if state is None else state.conv)
    hook(sites.X_PROJ_INPUT, v)
    x_dbl = _linear(ops, path_a.transpose(1, 2), weights.x_proj, scales.x_proj_codes, scales.x_proj_output)
    hook(sites.X_PROJ_OUTPUT, x_dbl)
    rank, n = weights.dt_proj.weight.shape[1], weights.A.shape[1]
    dt_low, B, C = torch.split_with_sizes(x_dbl, [rank, n, n], dim=-1)
    dt = _linear(ops, dt_low, weights.dt_proj, scales.x_proj_output, scales.dt_proj_output)
    hook(sites.DT_PROJ_OUTPUT, dt)

    # Path B: u as the scan is handed it.
    u_scale = scales.x_proj_input
    match mode.scan_u:
        case ScanU.INT8:
            u = path_a
        case ScanU.ON_GRID:
            u = path_a if u_scale is None else ops.dequantize(path_a, u_scale)
        case ScanU.TRUE:
            u = v
    scan = ops.selective_scan(
        u,
        dt.transpose(1, 2),
        weights.A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        weights.D,
        z,
        weights.dt_bias,
        order=mode.scan_order,
        u_scale=u_scale,
        requantize_u=mode.scan_reads is ScanReads.REQUANTIZED,
        dt_scale=scales.dt_proj_output,
        b_scale=scales.x_proj_output,
        c_scale=scales.x_proj_output,
        z_scale=scales.in_proj_output,
        state=None if state is None else state.ssm,
        state_scale=scales.ssm_state if mode.state is State.INT8 else None,
        return_chunk_states=hook is not _no_hook,
    )
    if scan.chunk_states is not None:
        hook(sites.SSM_STATE, scan.chunk_states)

    rotated = ops.hadamard(scan.y, out_scale=scales.out_proj_input) if weights.rotated else scan.y
    hook(sites.OUT_PROJ_INPUT, rotated)
    residual = _linear(ops, rotated, weights.out_proj, scales.out_proj_input, None, residual=residual)
    return residual, BlockState(conv_state, scan.state)


def _conv_input(
    weights: BlockWeights, mode: Mode, ops: Backend, normed: torch.Tensor, hook: Hook
) -> tuple[torch.Tensor, float | torch.Tensor | None, torch.Tensor]:
    """in_proj and its split: the conv's input with its scale, and z; all (b, d, l)."""
    scales = weights.scales
    d = weights.D.shape[0]
    match mode.conv_input:
        case ConvInput.STATIC | ConvInput.FP32:
            fused = mode.conv_input is ConvInput.STATIC
            out_scale = scales.in_proj_output if fused else None
            xz = _linear(ops, normed, weights.in_proj, scales.in_proj_input, out_scale)
            hook(sites.IN_PROJ_OUTPUT, xz)
            x, z = torch.split_with_sizes(xz.transpose(1, 2), [d, d], dim=1)
            return x, scales.in_proj_output, z
        case ConvInput.DYNAMIC:
            z_scale = scales.in_proj_output
            assert z_scale is not None, "a mode with a dynamic scale has quantized weights"
            in_proj = weights.in_proj
            x, z = ops.linear_split(
                normed,
                in_proj.weight,
                in_proj.bias,
                split=d,
                x_scale=scales.in_proj_input,
                weight_scale=in_proj.scale,
                out_scale=z_scale,
            )
            if hook is not _no_hook:
                hook(sites.IN_PROJ_OUTPUT, torch.cat([x, ops.dequantize(z, z_scale)], dim=-1))
            q, token_scale = ops.quantize_per_token(x.transpose(1, 2))
            return q, token_scale, z.transpose(1, 2)


def _convolved(
    weights: BlockWeights,
    mode: Mode,
    ops: Backend,
    x: torch.Tensor,
    x_scale: float | torch.Tensor | None,
    state: ConvState | None,
) -> tuple[torch.Tensor, torch.Tensor, ConvState]:
    """The convolution's output v, path A, which is what x_proj reads, and the new state."""
    operands = (x, weights.conv_weight, weights.conv_bias)
    options: dict[str, Any] = {"x_scale": x_scale, "weight_scale": weights.conv_scale, "state": state}
    u_scale = weights.scales.x_proj_input
    if mode.conv_output is ConvOutput.FP32 and u_scale is not None:
        return ops.causal_conv1d_both(*operands, out_scale=u_scale, **options)
    v, after = ops.causal_conv1d(*operands, out_scale=u_scale, **options)
    return v, v, after


def _linear(
    ops: Backend,
    x: torch.Tensor,
    weights: LinearWeights,
    x_scale: float | None,
    out_scale: float | None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return ops.linear(
        x,
        weights.weight,
        weights.bias,
        x_scale=x_scale,
        weight_scale=weights.scale,
        out_scale=out_scale,
        residual=residual,
    )
