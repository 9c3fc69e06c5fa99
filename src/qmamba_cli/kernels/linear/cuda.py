"""Linear layers on CUDA: a dp4a kernel for few tokens, the tensor-core int8 product for many."""

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear.reference import check_operands
from qmamba_cli.quant.grid import reciprocal

SOURCE = "linear/linear.cu"
ENTRIES: tuple[str, ...] = (
    *(
        f"linear_i8<{tokens}, {vector}, {out_i8}>"
        for tokens in (1, 8)
        for vector in ("true", "false")
        for out_i8 in ("true", "false")
    ),
    "linear_epilogue<true>",
    "linear_epilogue<false>",
)

# Up to here one read of the weight serves all tokens and the tensor cores would idle.
_FEW_TOKENS = 32
_WARPS = 4
_EPILOGUE_THREADS = 256
_EPILOGUE_BLOCKS = 4096


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: float | None = None,
    weight_scale: torch.Tensor | None = None,
    out_scale: float | None = None,
) -> torch.Tensor:
    """`linear.reference.linear` on CUDA tensors: int8 operands give the same bits, int32 sums being exact.

    Float operands go to the vendor's library: real class, ``k * eps * sum |terms|``.
    """
    check_operands(x, weight, x_scale, weight_scale)
    if x_scale is None or weight_scale is None:
        y = torch.nn.functional.linear(x, weight, bias)
        if out_scale is None:
            return y
        from qmamba_cli.kernels.quantize.cuda import quantize

        return quantize(y, out_scale)
    rows, k = weight.shape
    flat = _launch.contiguous("x", x).reshape(-1, k)
    weight = _launch.contiguous("weight", weight)
    out = torch.empty(
        *x.shape[:-1], rows, device=x.device, dtype=torch.float32 if out_scale is None else torch.int8
    )
    scalars = (np.float32(x_scale), np.float32(0.0 if out_scale is None else reciprocal(out_scale)))
    tokens = flat.shape[0]
    if tokens > _FEW_TOKENS and k % 8 == 0 and rows % 8 == 0:
        _product_then_epilogue(flat, weight, weight_scale, bias, out, scalars)
    elif tokens:
        _few(flat, weight, weight_scale, bias, out, scalars)
    return out


def _few(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scalars: tuple[np.float32, np.float32],
) -> None:
    tokens, k = x.shape
    rows = weight.shape[0]
    vector = k % 16 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    tile = 1 if tokens == 1 else 8
    flags = ", ".join(str(flag).lower() for flag in (vector, out.dtype == torch.int8))
    _launch.launch(
        SOURCE,
        f"linear_i8<{tile}, {flags}>",
        grid=(-(-rows // _WARPS), -(-tokens // tile), 1),
        block=(32 * _WARPS, 1, 1),
        args=(
            x,
            weight,
            weight_scale,
            bias,
            out,
            *scalars,
            np.int32(tokens),
            np.int32(rows),
            np.int32(k),
        ),
        device=x.device,
    )


def _product_then_epilogue(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scalars: tuple[np.float32, np.float32],
) -> None:
    acc = torch._int_mm(x, weight.t())
    tokens, rows = acc.shape
    flag = "true" if out.dtype == torch.int8 else "false"
    _launch.launch(
        SOURCE,
        f"linear_epilogue<{flag}>",
        grid=(min(tokens, _EPILOGUE_BLOCKS), -(-rows // _EPILOGUE_THREADS), 1),
        block=(_EPILOGUE_THREADS, 1, 1),
        args=(
            acc,
            weight_scale,
            bias,
            out,
            *scalars,
            np.int64(tokens),
            np.int32(rows),
            np.int32(acc.stride(0)),
        ),
        device=x.device,
    )
