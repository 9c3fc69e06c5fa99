"""RMSNorm in torch: the definition that kernels are judged against."""

import torch

from qmamba_cli.quant.grid import quantize


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, *, eps: float, out_scale: float | None = None
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
        out_scale: real units a step of the int8 output, or None for float32.

    Returns:
        (..., d_model) float32 or int8.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return y if out_scale is None else quantize(y, out_scale)
