"""Linear layers on CUDA: int8 and packed 4-bit weights with a fused epilogue, and float tokens."""

import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear import plan as plans
from qmamba_cli.kernels.linear.float_cuda import (
    ROW_TYPES,
    float_linear,
    half_entry,
)
from qmamba_cli.kernels.linear.int8_cuda import Epilogue, int8_linear, skinny_entry
from qmamba_cli.kernels.linear.interleaved import Weight
from qmamba_cli.kernels.linear.operands import SOURCE as SOURCE
from qmamba_cli.kernels.linear.plan import SkinnyPlan
from qmamba_cli.kernels.linear.reference import check_operands, check_residual, check_split

ENTRIES: tuple[str, ...] = (
    *(
        skinny_entry(SkinnyPlan(*tiles, 1, 1), packed)
        for tiles in plans.SKINNY_TILES
        for packed in (False, True)
    ),
    *(f"linear_rows<{name}, {tokens}>" for name in ROW_TYPES.values() for tokens in plans.ROW_TOKENS),
    *(
        half_entry(name, tile)
        for dtype, name in ROW_TYPES.items()
        if dtype.is_floating_point
        for tile in plans.HALF_TILES
    ),
    "linear_bytes",
    "linear_epilogue",
    "expand_int4",
    "expand_int4_bytes",
)


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
    """`linear.reference.linear` on CUDA tensors: int8 operands give the same bits, int32 sums being exact.

    Float operands are of class real, ``(k + 1) * eps * sum |terms|``, or of their own dtype's eps where that
    has 16 bits. A float32 token of an int8 or float16 weight must stay below 2^23.
    """
    check_operands(x, weight, x_scale, weight_scale)
    check_residual(x, weight, residual, out_scale)
    if x_scale is None or weight_scale is None:
        y = float_linear(x, weight, bias, weight_scale, residual)
        if out_scale is None:
            return y
        from qmamba_cli.kernels.quantize.cuda import quantize

        return quantize(y.to(torch.float32), out_scale)
    rows = weight.shape[0]
    dtype = torch.float32 if out_scale is None else torch.int8
    out = torch.empty(*x.shape[:-1], rows, device=x.device, dtype=dtype)
    int8_linear(
        x,
        weight,
        Epilogue(
            weight_scale=_launch.contiguous("weight_scale", weight_scale),
            bias=bias,
            residual=None if residual is None else _launch.contiguous("residual", residual),
            real=out if out_scale is None else None,
            codes=None if out_scale is None else out,
            x_scale=x_scale,
            out_scale=out_scale,
            split=rows if out_scale is None else 0,
        ),
    )
    return out


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
    """`linear.reference.linear_split` on CUDA tensors: one product with two epilogues, the same bits."""
    check_operands(x, weight, x_scale, weight_scale)
    check_split(weight, split)
    shape, rows = x.shape[:-1], weight.shape[0]
    real = torch.empty(*shape, split, device=x.device, dtype=torch.float32)
    codes = torch.empty(*shape, rows - split, device=x.device, dtype=torch.int8)
    int8_linear(
        x,
        weight,
        Epilogue(
            weight_scale=_launch.contiguous("weight_scale", weight_scale),
            bias=bias,
            residual=None,
            real=real,
            codes=codes,
            x_scale=x_scale,
            out_scale=out_scale,
            split=split,
        ),
    )
    return real, codes
