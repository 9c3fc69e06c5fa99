"""Hadamard transform in torch: the definition that kernels are judged against."""

import math
from functools import cache

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for, sylvester_matrix
from qmamba_cli.quant.grid import quantize

# A Kronecker factor of 2^5 keeps each product small and still needs few passes over the data.
_FACTOR_EXPONENT = 5


def hadamard(x: torch.Tensor, *, out_scale: float | None = None) -> torch.Tensor:
    """Orthonormal Hadamard transform of the last axis, then the int8 grid if asked.

        y = x @ H_n.T / sqrt(n)                                   (x's dtype; halves in float32)
        out = saturate(round_half_even(y * (1 / out_scale)))      (int8, where out_scale is given)

    >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    >>> hadamard(torch.tensor([[3.0, 1.0]]), out_scale=2.0**-0.5).tolist()
    [[4, 2]]

    Args:
        x: (..., n) float32, float64, float16 or bfloat16; any width, see `plan_for` for those with no
            Hadamard matrix. Halves are computed in float32 and rounded once at the end.
        out_scale: real units a step of the int8 output, or None for a float result.

    Returns:
        (..., n) of x's dtype, or int8. Out-of-range values saturate.

    Raises:
        ShapeError: x is not floating, or has no last axis.

    Source: Ashkboos et al., "QuaRot" (2024), section 4: rotations that the weights absorb. The order of the
        Kronecker factors is ours (the non-power-of-two core varies slowest).
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ShapeError(
            f"hadamard: `x` must be floating with at least one axis, got {x.dtype} {tuple(x.shape)}"
        )
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = hadamard(x.to(torch.float32), out_scale=out_scale)
        return wide.to(x.dtype) if out_scale is None else wide
    plan = plan_for(x.shape[-1])
    y = x.reshape(-1, plan.order)
    for matrix, before, after in _factors(plan.order, plan.core, x.dtype, x.device):
        size = matrix.shape[0]
        if after == 1:
            y = (y.reshape(-1, size) @ matrix.T).reshape(-1, plan.order)
        else:
            y = torch.matmul(matrix, y.reshape(-1, size, after)).reshape(-1, before * size * after)
    y = y.reshape(x.shape)
    return y if out_scale is None else quantize(y, out_scale)


@cache
def _factors(
    order: int, core: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[torch.Tensor, int, int], ...]:
    """Kronecker factors, slowest first: (matrix, elements before, after); the first holds 1/sqrt(n)."""
    exponent = (order // core).bit_length() - 1
    matrices = [core_matrix(core)] if core > 1 else []
    while exponent > 0:
        step = min(exponent, _FACTOR_EXPONENT)
        matrices.append(sylvester_matrix(step))
        exponent -= step
    if not matrices:
        matrices = [core_matrix(1)]
    matrices[0] = matrices[0] / math.sqrt(order)
    factors, before = [], 1
    for matrix in matrices:
        size = matrix.shape[0]
        factors.append((matrix.to(device=device, dtype=dtype), before, order // (before * size)))
        before *= size
    return tuple(factors)
