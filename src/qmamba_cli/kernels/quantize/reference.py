"""The int8 grid of `quant.grid`, for halves too: the definition that kernels are judged against."""

import torch

from qmamba_cli.quant import grid
from qmamba_cli.quant.grid import Scale, dequantize

__all__ = ["dequantize", "quantize", "quantize_per_token"]


def quantize(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Float to int8: ``saturate(round_half_even(x * (1 / scale)))``, in float32 whatever x's width.

    >>> quantize(torch.tensor([0.5, 1.5, 300.0], dtype=torch.float16), 1.0).tolist()
    [0, 2, 127]

    Args:
        x: any shape, float32, float16 or bfloat16, finite.
        scale: real units a step, finite and > 0: one number, or (c,) float32 with one for each channel of an
            x (b, c, ...).

    Returns:
        int8 of x's shape.
    """
    return grid.quantize(_wide(x), scale)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float to int8 with one scale a token; `quant.grid.quantize_per_token` in float32 whatever x's width.

    >>> q, scale = quantize_per_token(torch.tensor([[[1.0], [-0.5]]], dtype=torch.bfloat16))
    >>> q.tolist(), scale.dtype
    ([[[127], [-64]]], torch.float32)

    Args:
        x: (b, d, l) float32, float16 or bfloat16, finite.

    Returns:
        q (b, d, l) int8 and scale (b, l) float32, real units a step.
    """
    return grid.quantize_per_token(_wide(x))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
