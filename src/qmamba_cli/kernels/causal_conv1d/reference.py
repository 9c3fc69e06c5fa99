"""Causal depthwise convolution + SiLU in torch: the definition that kernels are judged against."""

from typing import NamedTuple

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.quant.grid import Scale, quantize

# Float inputs that are computed in float32 and rounded once at the end.
HALVES = (torch.float16, torch.bfloat16)


class ConvState(NamedTuple):
    """The last inputs of a call, which the next one continues from.

    Attributes:
        values: (b, d, w-1) of the input's dtype, oldest first.
        scale: (b, w-1) float32, real units a step of each token, or None where all tokens share one scale.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    x_scale: float | torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out_scale: Scale | None = None,
    state: ConvState | None = None,
) -> tuple[torch.Tensor, ConvState]:
    """Depthwise causal convolution, then SiLU.

        acc[b,c,t] = sum_k x[b, c, t-w+1+k] * weight[c, k]        (exact integers for int8 with one scale)
        a[b,c,t]   = acc * (x_scale * weight_scale[c]) + bias[c]  (float32)
        v[b,c,t]   = a * sigmoid(a)                               (float32)
        out        = saturate(round_half_even(v * (1/out_scale))) (int8, where out_scale is given)
        out        = v, rounded to x's dtype where that is a half (else)

    With one scale a token, ``acc = sum_k (x * x_scale[b, t]) * weight[c, k]`` in float32, oldest tap first.

    >>> x = torch.tensor([[[10, -20, 30]]], dtype=torch.int8)
    >>> taps = torch.tensor([[0, 0, 1, 2]], dtype=torch.int8)
    >>> scales = {"x_scale": 0.1, "weight_scale": torch.tensor([1.0]), "out_scale": 0.01}
    >>> out, state = causal_conv1d(x, taps, None, **scales)
    >>> out.tolist(), state.values.tolist()
    ([[[127, -14, 127]]], [[[10, -20, 30]]])

    Args:
        x: (b, d, l) int8 with ``x_scale``, or float32, float16 or bfloat16 without; l >= 1. Any strides.
        weight: (d, w) int8 with ``weight_scale``, else float32 or x's dtype; 2 <= w <= 4, newest tap last.
        bias: (d,) float32 in real units, or None.
        x_scale: real units a step: one number, or (b, l) float32 with one a token.
        weight_scale: (d,) float32, real units a step of each channel's taps.
        out_scale: real units a step of an int8 output, one number or (d,) float32 with one a channel, each in
            1e-6 ... 1e4; or None for v, unclipped: float32, or of x's dtype.
        state: the state the call before returned, or None for zeros.

    Returns:
        out (b, d, l) int8, float32 or x's half, and the new state.

    Raises:
        ShapeError: a shape or dtype is not as above.

    Source: Dao-AILab/causal-conv1d, ``causal_conv1d_ref`` (float); the int8 grids are ours, see
        docs/numerics.md.
    """
    b, d, l = check_operands(x, weight, x_scale, weight_scale, state)
    history = weight.shape[1] - 1
    per_token = x_scale if isinstance(x_scale, torch.Tensor) else None
    if state is None:
        ones = None if per_token is None else per_token.new_ones(b, history)
        state = ConvState(x.new_zeros(b, d, history), ones)

    # (b, history + l, d): channels contiguous, so that each tap is one vectorised multiply-add.
    padded = torch.cat([state.values, x], dim=2).transpose(1, 2)
    scales = None
    real = padded.to(torch.float32)
    if per_token is not None and state.scale is not None:
        scales = torch.cat([state.scale, per_token], dim=1)
        real = real * scales.unsqueeze(2)
    taps = weight.to(torch.float32)
    acc = real[:, :l] * taps[:, 0]
    for k in range(1, weight.shape[1]):
        acc.addcmul_(real[:, k : k + l], taps[:, k])
    if weight_scale is not None:
        acc.mul_(weight_scale if isinstance(x_scale, torch.Tensor) else weight_scale * float(x_scale or 0.0))
    if bias is not None:
        acc.add_(bias)
    v = torch.nn.functional.silu(acc, inplace=True).transpose(1, 2)
    if x.dtype in HALVES and out_scale is None:
        v = v.to(x.dtype)
    out = v if out_scale is None else quantize(v, out_scale)
    last = padded[:, l:].transpose(1, 2).contiguous()
    return out, ConvState(last, None if scales is None else scales[:, l:].contiguous())


def causal_conv1d_both(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    x_scale: float | torch.Tensor,
    weight_scale: torch.Tensor,
    out_scale: Scale,
    state: ConvState | None = None,
) -> tuple[torch.Tensor, torch.Tensor, ConvState]:
    """`causal_conv1d` of int8 inputs to v, and v on the int8 grid.

    >>> x = torch.tensor([[[10, -20, 30]]], dtype=torch.int8)
    >>> taps = torch.tensor([[0, 0, 1, 2]], dtype=torch.int8)
    >>> scales = {"x_scale": 0.1, "weight_scale": torch.tensor([1.0]), "out_scale": 0.01}
    >>> v, q, _ = causal_conv1d_both(x, taps, None, **scales)
    >>> [round(value, 3) for value in v[0, 0].tolist()], q.tolist()
    ([1.762, -0.142, 3.928], [[[127, -14, 127]]])

    Args:
        x: (b, d, l) int8; it and the rest as `causal_conv1d`.
        weight: (d, w) int8.
        bias: (d,) float32, or None.
        x_scale: one number, or (b, l) float32.
        weight_scale: (d,) float32.
        out_scale: real units a step of the codes, one number or (d,) float32.
        state: the state the call before returned, or None for zeros.

    Returns:
        v (b, d, l) float32, unclipped; its codes (b, d, l) int8, equal to ``quantize(v, out_scale)`` bit for
        bit; and the new state.

    Raises:
        ShapeError: a shape or dtype is not as above.

    Source: as `causal_conv1d`.
    """
    v, last = causal_conv1d(
        x, weight, bias, x_scale=x_scale, weight_scale=weight_scale, out_scale=None, state=state
    )
    return v, quantize(v, out_scale), last


def check_operands(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: float | torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    state: ConvState | None,
) -> tuple[int, int, int]:
    """Sizes (b, d, l) of operands that every backend accepts.

    Raises:
        ShapeError: a shape or dtype is not as `causal_conv1d` documents it.
    """
    if x.dim() != 3 or x.shape[2] < 1:
        raise ShapeError(f"causal_conv1d: `x` must be (b, d, l) with l >= 1, got {tuple(x.shape)}")
    b, d, l = x.shape
    if weight.dim() != 2 or weight.shape[0] != d or not 2 <= weight.shape[1] <= 4:
        raise ShapeError(
            f"causal_conv1d: `weight` must be ({d}, w) with 2 <= w <= 4, got {tuple(weight.shape)}"
        )
    if (x_scale is None) != (weight_scale is None):
        raise ShapeError("causal_conv1d: `x_scale` and `weight_scale` are given both or neither")
    wanted = torch.int8 if x_scale is not None else x.dtype if x.dtype in HALVES else torch.float32
    if x.dtype != wanted or weight.dtype not in (wanted, torch.float32 if x_scale is None else wanted):
        raise ShapeError(f"causal_conv1d: `x` is {x.dtype}, `weight` {weight.dtype}, expected both {wanted}")
    if isinstance(x_scale, torch.Tensor) and x_scale.shape != (b, l):
        raise ShapeError(f"causal_conv1d: `x_scale` must be ({b}, {l}), got {tuple(x_scale.shape)}")
    if state is not None:
        shape = (b, d, weight.shape[1] - 1)
        if state.values.shape != shape or state.values.dtype != wanted:
            raise ShapeError(
                f"causal_conv1d: `state` must be {shape} {wanted}, "
                f"got {tuple(state.values.shape)} {state.values.dtype}"
            )
        if isinstance(x_scale, torch.Tensor) != (state.scale is not None):
            raise ShapeError("causal_conv1d: `state.scale` belongs to inputs with one scale a token")
    return b, d, l
