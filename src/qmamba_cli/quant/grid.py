"""The symmetric int8 grid: one rounding rule and one saturation rule for both languages.

A real value is ``scale * q``. Quantizing multiplies by the float32 reciprocal of the scale, rounds half to
even and saturates to [-128, 127]. The reciprocal is formed once, in float32, by `reciprocal`; CUDA gets the
same float32 number, so both backends place the boundaries between steps at the same reals.
"""

import math
from typing import TypeAlias

import numpy as np
import torch

from qmamba_cli.errors import QmambaError, ShapeError

QMIN = -128
QMAX = 127
# Smallest scale: keeps the reciprocal of an all-zero tensor's scale finite.
MIN_SCALE = 1e-8
# Bounds of a scale that is one of many of a tensor, within which kernels may round in their last fma.
CHANNEL_SCALES = (1e-6, 1e4)
# Smallest absmax of one token under dynamic quantization.
MIN_TOKEN_ABSMAX = 1e-5

# Real units a step: one number, or (c,) float32 with one for each channel of a tensor (b, c, ...).
Scale: TypeAlias = float | torch.Tensor


def scale_from_absmax(absmax: float) -> float:
    """Scale of a symmetric int8 grid that just holds ``absmax``: ``max(absmax / 127, 1e-8)`` in float32.

    >>> scale_from_absmax(127.0)
    1.0

    Raises:
        QmambaError: absmax is negative, NaN or infinite.
    """
    if not math.isfinite(absmax) or absmax < 0:
        raise QmambaError(f"an absmax must be finite and >= 0, got {absmax}")
    return float(np.maximum(np.float32(absmax) / np.float32(QMAX), np.float32(MIN_SCALE)))


def reciprocal(scale: float) -> float:
    """Float32 reciprocal of a float32 scale, the number that `quantize` multiplies by.

    Raises:
        ShapeError: the scale is not finite and > 0.
    """
    if not math.isfinite(scale) or scale <= 0:
        raise ShapeError(f"a scale must be finite and > 0, got {scale}")
    return float(np.float32(1.0) / np.float32(scale))


def quantize(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Float to int8: ``saturate(round_half_even(x * (1 / scale)))``.

    >>> quantize(torch.tensor([0.5, 1.5, -2.5, 300.0, -300.0]), 1.0).tolist()
    [0, 2, -2, 127, -128]
    >>> quantize(torch.tensor([[3.0, 3.0]]), torch.tensor([1.0, 2.0])).tolist()
    [[3, 2]]

    Args:
        x: any shape, float32, finite; (b, c, ...) where each channel has a scale.
        scale: real units a step, finite and > 0: one number, or (c,) float32.

    Returns:
        int8 of x's shape.

    Raises:
        ShapeError: the scale is not as above.
    """
    if isinstance(scale, torch.Tensor):
        return _round_saturate(x * along_channels(scale, x).reciprocal())
    return _round_saturate(x * reciprocal(scale))


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float to int8 with one scale a token: ``s[b, t] = max(absmax over channels, 1e-5) / 127``.

    One scale a token, not one a tensor: a later token must not change an earlier one, or prefill and decode
    would part.

    Args:
        x: (b, d, l) float32, finite.

    Returns:
        q (b, d, l) int8 and scale (b, l) float32, real units a step.
    """
    absmax = x.abs().amax(dim=1).clamp_min(MIN_TOKEN_ABSMAX)  # (b, l)
    # Divided by a tensor: by a number, CUDA would multiply by the reciprocal and round differently.
    scale = absmax / torch.full_like(absmax, QMAX)
    return _round_saturate(x * scale.reciprocal().unsqueeze(1)), scale


def dequantize(q: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Int8 to float32: ``scale * q``; scales as for `quantize`."""
    return q.to(torch.float32) * (along_channels(scale, q) if isinstance(scale, torch.Tensor) else scale)


def fake_quantize(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Float to the nearest float on the grid: ``dequantize(quantize(x))``, idempotent."""
    return dequantize(quantize(x, scale), scale)


def along_channels(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A scale a channel in a shape that broadcasts over x (b, c, ...).

    Raises:
        ShapeError: it is not (c,) float32.
    """
    if x.dim() < 2 or scale.shape != x.shape[1:2] or scale.dtype != torch.float32:
        raise ShapeError(
            f"a scale a channel of a tensor {tuple(x.shape)} must be float32, one each along axis 1, "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    return scale.view(-1, *(1 for _ in range(x.dim() - 2)))


def _round_saturate(steps: torch.Tensor) -> torch.Tensor:
    # torch.round rounds half to even.
    return steps.round_().clamp_(QMIN, QMAX).to(torch.int8)
