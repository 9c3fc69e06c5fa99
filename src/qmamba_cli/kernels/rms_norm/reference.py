"""RMSNorm in torch, alone or with the residual's addition: the definition that kernels are judged against."""

import torch

from qmamba_cli.quant.grid import quantize


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    out_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Root-mean-square normalization of the last axis, then the int8 grid if asked.

        y = x * rsqrt(mean(x^2) + eps) * weight                   (float32)
        out = saturate(round_half_even(y * (1 / out_scale)))      (int8, where out_scale is given)

    >>> rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), None, eps=0.0, out_scale=0.1).tolist()
    [12, 16, 0, 0]

    Args:
        x: (..., d_model) float32, the residual stream.
        weight: (d_model,) float32, or None where it is folded into the next projection.
        eps: added to the mean square.
        out_scale: real units a step of the int8 output, or None for a float one.
        out_dtype: float32, float16 or bfloat16 of a float output, rounded once; None for x's dtype.

    Returns:
        (..., d_model) int8 or of ``out_dtype``.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if out_scale is not None:
        return quantize(y, out_scale)
    return y if out_dtype is None else y.to(out_dtype)


def add_rms_norm(
    residual: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    out_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block's output added to the residual stream, then the next block's `rms_norm`.

        x   = residual + delta                                    (float32)
        out = rms_norm(x, weight, eps, out_scale, out_dtype)

    >>> normed, x = add_rms_norm(torch.ones(2), torch.tensor([2.0, 0.0]), None, eps=4.0)
    >>> normed.tolist(), x.tolist()
    ([1.0, 0.3333333432674408], [3.0, 1.0])

    Args:
        residual: (..., d_model) float32; left alone.
        delta: of residual's shape, float32, float16 or bfloat16.
        weight: as for `rms_norm`, and so are the others.
        eps: added to the mean square.
        out_scale: real units a step of the int8 output, or None for a float one.
        out_dtype: of a float output; None for residual's dtype.

    Returns:
        The normalized rows, int8 or float, and x (..., d_model) float32, the new residual stream.
    """
    x = residual + delta.to(residual.dtype)
    return rms_norm(x, weight, eps=eps, out_scale=out_scale, out_dtype=out_dtype), x
