"""Linear layers in torch: the definition that kernels are judged against."""

from functools import cache

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.quant.grid import quantize

# The largest K for which every partial sum of int8 products stays below 2^24, where float32 is exact.
_EXACT_FLOAT_K = 1024


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: float | None = None,
    weight_scale: torch.Tensor | None = None,
    out_scale: float | None = None,
) -> torch.Tensor:
    """Matrix product of the last axis with the rows of a weight.

        acc[m] = sum_k x[k] * weight[m, k]                        (int32, exact, for int8 operands)
        y[m]   = acc[m] * (x_scale * weight_scale[m]) + bias[m]   (float32)
        out    = saturate(round_half_even(y * (1 / out_scale)))   (int8, where out_scale is given)

    A W4 weight is handed over expanded to int8 (code times group multiplier), so one path serves W4 and W8.

    >>> x, weight = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.tensor([[4, 5, 6]], dtype=torch.int8)
    >>> linear(x, weight, x_scale=0.5, weight_scale=torch.tensor([0.1]), out_scale=0.1).tolist()
    [[6]]

    Args:
        x: (..., k) int8 with ``x_scale``, or float32 without.
        weight: (m, k) int8 with ``weight_scale``, or float32 without.
        bias: (m,) float32 in real units, or None.
        x_scale: real units a step of x.
        weight_scale: (m,) float32, real units a step of each row.
        out_scale: real units a step of an int8 output, or None for float32.

    Returns:
        (..., m) float32 or int8.

    Raises:
        ShapeError: the last axes differ, or dtypes and scales do not belong together.
    """
    check_operands(x, weight, x_scale, weight_scale)
    if x_scale is None or weight_scale is None:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        acc = int8_matmul(x.reshape(-1, x.shape[-1]), weight)
        y = acc.to(torch.float32).mul_(weight_scale * x_scale).reshape(*x.shape[:-1], weight.shape[0])
        if bias is not None:
            y = y.add_(bias)
    return y if out_scale is None else quantize(y, out_scale)


def int8_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact int32 product ``x @ weight.T`` of int8 matrices.

    Args:
        x: (m, k) int8.
        weight: (rows, k) int8.

    Returns:
        (m, rows) int32. Exact while k < 2^17.
    """
    # torch 2.13 on the CPU returns uninitialized memory for k = 1 and a transposed weight.
    if x.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(x.contiguous(), weight.t())
    acc = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32)
    for start in range(0, x.shape[1], _EXACT_FLOAT_K):
        stop = start + _EXACT_FLOAT_K
        part = x[:, start:stop].to(torch.float32) @ weight[:, start:stop].to(torch.float32).t()
        acc += part.to(torch.int32)
    return acc


@cache
def _int_mm_is_exact() -> bool:
    """Whether this machine's int8 product keeps exact sums.

    On processors without VNNI some int8 libraries add pairs of products in saturating int16; such a machine
    gets the float32 path, which is exact up to K = 1024 terms at a time.
    """
    generator = torch.Generator().manual_seed(0)
    for x, weight in (
        (torch.full((5, 96), -128, dtype=torch.int8), torch.full((7, 96), -128, dtype=torch.int8)),
        (torch.full((5, 96), 127, dtype=torch.int8), torch.full((7, 96), -128, dtype=torch.int8)),
        (
            torch.randint(-128, 128, (33, 129), dtype=torch.int8, generator=generator),
            torch.randint(-128, 128, (17, 129), dtype=torch.int8, generator=generator),
        ),
    ):
        exact = x.to(torch.int64) @ weight.to(torch.int64).t()
        if not torch.equal(torch._int_mm(x, weight.t()).to(torch.int64), exact):
            return False
    return True


def check_operands(
    x: torch.Tensor, weight: torch.Tensor, x_scale: float | None, weight_scale: torch.Tensor | None
) -> None:
    """What every backend's `linear` refuses.

    Raises:
        ShapeError: the last axes differ, or dtypes and scales do not belong together.
    """
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: `x` has {x.shape[-1]} columns, expected those of `weight` {tuple(weight.shape)}"
        )
    quantized = x_scale is not None
    if quantized != (weight_scale is not None):
        raise ShapeError("linear: `x_scale` and `weight_scale` are given both or neither")
    wanted = torch.int8 if quantized else torch.float32
    if x.dtype != wanted or weight.dtype != wanted:
        raise ShapeError(f"linear: `x` is {x.dtype} and `weight` {weight.dtype}, expected both {wanted}")
