"""Linear layers in torch: the definition that kernels are judged against."""

from functools import cache

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.linear.interleaved import Weight, expanded
from qmamba_cli.quant.grid import quantize

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)

# The largest K for which every partial sum of int8 products stays below 2^24, where float32 is exact.
_EXACT_FLOAT_K = 1024


def linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    *,
    x_scale: float | None = None,
    weight_scale: torch.Tensor | None = None,
    out_scale: float | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Matrix product of the last axis with the rows of a weight.

        acc[m] = sum_k x[k] * weight[m, k]                        (int32, exact, for int8 operands)
        y[m]   = acc[m] * (x_scale * weight_scale[m]) + bias[m]   (float32)
        out    = saturate(round_half_even(y * (1 / out_scale)))   (int8, where out_scale is given)
        out    = residual[m] + y[m]                               (float32, where residual is given)

    A `PackedInt4` or `Interleaved` weight stands for the int8 matrix that it expands to. A float x with
    an int8 weight is multiplied in float32, and by ``weight_scale`` after the sum; one with a float weight
    has no scales.

    >>> x, weight = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.tensor([[4, 5, 6]], dtype=torch.int8)
    >>> linear(x, weight, x_scale=0.5, weight_scale=torch.tensor([0.1]), out_scale=0.1).tolist()
    [[6]]

    Args:
        x: (..., k) int8 with ``x_scale``, or float32, float16 or bfloat16 without.
        weight: (m, k) int8, `PackedInt4` or `Interleaved` with ``weight_scale``; or, without, of x's float
            dtype, or float16 or bfloat16 where x is float32.
        bias: (m,) float32 in real units, or None.
        x_scale: real units a step of x.
        weight_scale: (m,) float32, real units a step of each row.
        out_scale: real units a step of an int8 output, or None for a float one.
        residual: (..., m) float32 that the output is added to, or None; excludes out_scale.

    Returns:
        (..., m) int8 with out_scale; else float32, or x's dtype where that has 16 bits and there is no
        residual. A 16-bit result is summed in float32 and rounded once.

    Raises:
        ShapeError: shapes differ, or dtypes and scales do not belong together.
    """
    check_operands(x, weight, x_scale, weight_scale)
    check_residual(x, weight, residual, out_scale)
    y = _product(x, expanded(weight), bias, x_scale, weight_scale)
    if residual is not None:
        return residual + y
    return y if out_scale is None else quantize(y.to(torch.float32), out_scale)


def linear_split(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    *,
    split: int,
    x_scale: float,
    weight_scale: torch.Tensor,
    out_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` with int8 operands whose first outputs stay float32 and whose others go on the int8 grid.

    >>> x, weight = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.ones(2, 3, dtype=torch.int8)
    >>> scale = torch.tensor([0.5, 0.5])
    >>> first, rest = linear_split(x, weight, split=1, x_scale=0.5, weight_scale=scale, out_scale=0.25)
    >>> first.tolist(), rest.tolist()
    ([[0.5]], [[2]])

    Args:
        x: (..., k) int8.
        weight: (m, k) int8, `PackedInt4` or `Interleaved`.
        bias: (m,) float32 in real units, or None.
        split: outputs that stay float32, 0 ... m.
        x_scale: real units a step of x.
        weight_scale: (m,) float32, real units a step of each row.
        out_scale: real units a step of the int8 outputs.

    Returns:
        (..., split) float32 and (..., m - split) int8.

    Raises:
        ShapeError: as `linear`, or split is out of range.
    """
    check_split(weight, split)
    y = linear(x, weight, bias, x_scale=x_scale, weight_scale=weight_scale)
    return y[..., :split].contiguous(), quantize(y[..., split:], out_scale)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: float | None,
    weight_scale: torch.Tensor | None,
) -> torch.Tensor:
    if x_scale is not None and weight_scale is not None:
        acc = int8_matmul(x.reshape(-1, x.shape[-1]), weight)
        y = acc.to(torch.float32).mul_(weight_scale * x_scale).reshape(*x.shape[:-1], weight.shape[0])
    elif weight_scale is None and x.dtype == torch.float32 == weight.dtype:
        return torch.nn.functional.linear(x, weight, bias)
    else:
        y = torch.nn.functional.linear(x.to(torch.float32), weight.to(torch.float32))
        if weight_scale is not None:
            y = y.mul_(weight_scale)
    if bias is not None:
        y = y.add_(bias)
    return y.to(x.dtype) if x.is_floating_point() else y


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
    x: torch.Tensor,
    weight: Weight,
    x_scale: float | None,
    weight_scale: torch.Tensor | None,
) -> None:
    """What every backend's `linear` refuses.

    Raises:
        ShapeError: the last axes differ, or dtypes and scales do not belong together.
    """
    if len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: `x` has {x.shape[-1]} columns, expected those of `weight` {tuple(weight.shape)}"
        )
    if weight_scale is not None and weight_scale.shape != weight.shape[:1]:
        raise ShapeError(
            f"linear: `weight_scale` is {tuple(weight_scale.shape)}, expected ({weight.shape[0]},)"
        )
    have = weight.dtype if isinstance(weight, torch.Tensor) else torch.int8
    if x_scale is None and x.dtype in FLOAT_DTYPES:
        if have == torch.int8 and weight_scale is not None:
            return
        if weight_scale is None and (have == x.dtype or (x.dtype == torch.float32 and have in HALF_DTYPES)):
            return
    if (x_scale is None) != (weight_scale is None):
        raise ShapeError("linear: `x_scale` and `weight_scale` are given both or neither")
    wanted = torch.int8 if x_scale is not None else torch.float32
    if x.dtype != wanted or have != wanted:
        raise ShapeError(f"linear: `x` is {x.dtype} and `weight` {have}, expected both {wanted}")


def check_residual(
    x: torch.Tensor,
    weight: Weight,
    residual: torch.Tensor | None,
    out_scale: float | None,
) -> None:
    """What every backend's `linear` refuses of a residual.

    Raises:
        ShapeError: the residual is not float32 of the output's shape, or the output is int8.
    """
    if residual is None:
        return
    shape = (*x.shape[:-1], weight.shape[0])
    if residual.dtype != torch.float32 or residual.shape != shape:
        raise ShapeError(
            f"linear: `residual` is {residual.dtype} {tuple(residual.shape)}, expected torch.float32 {shape}"
        )
    if out_scale is not None:
        raise ShapeError("linear: `residual` is added to a float output, got `out_scale` too")


def check_split(weight: Weight, split: int) -> None:
    """What every backend's `linear_split` refuses.

    Raises:
        ShapeError: split is out of range.
    """
    if not 0 <= split <= weight.shape[0]:
        raise ShapeError(f"linear: `split` must lie in 0 ... {weight.shape[0]}, got {split}")
