"""Products of float tokens on CUDA: weights of their dtype, or int8 and 16-bit rows for float32 tokens."""

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear import plan as plans
from qmamba_cli.kernels.linear.interleaved import Weight
from qmamba_cli.kernels.linear.operands import ALIGNMENT, SOURCE, WARP, expand, rows_of, triton_kernels
from qmamba_cli.kernels.linear.plan import HalfPlan, TilePlan
from qmamba_cli.kernels.linear.reference import HALF_DTYPES

ROW_TYPES = {torch.int8: "signed char", torch.float16: "Half", torch.bfloat16: "Brain"}
_ROWS_WARPS = 16
_ROWS_A_WARP = 4
_ROWS_BLOCKS_PER_SM = 2
# Shared memory that every GPU from compute capability 8.0 on lends to one block.
_MAX_SHARED_BYTES = 99 * 1024
# Columns of a 16-bit token that fit into it, a float a warp beside them.
_MOST_HALF_COLUMNS = 48 * 1024
# Rows of a weight that are widened to float32 at a time.
_WIDENED_ROWS = 8192
# Tokens up to which, without Triton, passes over the weight beat widening it.
_FEW_WITHOUT_TRITON = 32


def half_entry(name: str, tile: tuple[int, int, int]) -> str:
    """Name expression of an instance of `linear_halves`, from one of ``plan.HALF_TILES``."""
    return f"linear_halves<{name}, {', '.join(map(str, tile))}>"


def float_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear.reference.linear` of a float x, without an output on the int8 grid."""
    dense = weight if isinstance(weight, torch.Tensor) else expand(weight)
    if is_half_token(x, dense):
        held = None if residual is None else _launch.contiguous("residual", residual)
        return half_token(x, dense, bias, held)
    y = _product(x, dense, bias, weight_scale)
    return y if residual is None else residual + y


def _product(
    x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None
) -> torch.Tensor:
    if dense.dtype == x.dtype:
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    if x.dtype in HALF_DTYPES:
        return _product(x.to(torch.float32), dense, bias, weight_scale).to(x.dtype)
    flat, dense = rows_of(x), _launch.contiguous("weight", dense)
    out = torch.empty(*x.shape[:-1], dense.shape[0], device=x.device, dtype=torch.float32)
    tokens, k = flat.shape
    aligned = k * dense.element_size() % ALIGNMENT == 0 and dense.data_ptr() % ALIGNMENT == 0
    triton = triton_kernels() is not None
    if out.numel() == 0:
        return out
    if aligned and (tokens <= plans.FEW_FLOAT_TOKENS or (not triton and tokens <= _FEW_WITHOUT_TRITON)):
        _float_rows(flat, dense, weight_scale, bias, out)
    elif triton:
        float_tiles(flat, dense, weight_scale, bias, out)
    else:
        _widened(flat, dense, weight_scale, bias, out.view(tokens, -1))
    return out


def is_half_token(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `half_token` takes the operands: one 16-bit token, aligned rows of its dtype."""
    k = x.shape[-1]
    return (
        weight.dtype == x.dtype
        and x.dtype in HALF_DTYPES
        and 0 < x.numel() == k <= _MOST_HALF_COLUMNS
        and k % plans.HALF_COLUMNS == 0
        and x.stride(-1) == 1
        and weight.shape[0] > 0
        and weight.is_contiguous()
        and x.data_ptr() % ALIGNMENT == 0 == weight.data_ptr() % ALIGNMENT
    )


def half_token(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    plan: HalfPlan | None = None,
) -> torch.Tensor:
    """The product of one token that `is_half_token` takes. `plan` replaces the choice, for benchmarks.

    The next kernel of the stream may start early, and this one does: its first rows do not depend on x.
    """
    rows, k = weight.shape
    plan = plan or plans.half_plan(rows, k, _launch.sm_count(x.device))
    dtype = x.dtype if residual is None else torch.float32
    out = torch.empty(*x.shape[:-1], rows, device=x.device, dtype=dtype)
    _launch.launch(
        SOURCE,
        half_entry(ROW_TYPES[x.dtype], (plan.rows, plan.pieces, plan.split)),
        grid=(plan.blocks, 1, 1),
        block=(WARP * plan.warps, 1, 1),
        args=(
            x,
            weight,
            bias,
            residual,
            *((out, None) if residual is None else (None, out)),
            np.int32(rows),
            np.int32(k),
        ),
        device=x.device,
        shared_bytes=2 * k + 4 * plan.warps,
        overlap=True,
    )
    return out


def float_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: TilePlan | None = None,
) -> None:
    """Float32 tokens on tensor cores. `plan` replaces the choice, for benchmarks."""
    from qmamba_cli.kernels.linear import triton_float

    tokens = x.shape[0]
    few = tokens <= plans.MOST_FEW_TOKENS and weight.dtype != torch.bfloat16
    product = triton_float.few_tokens_product if few else triton_float.float_product
    plan = plan or (
        plans.few_float_plan(tokens, weight.element_size()) if few else plans.float_tile_plan(tokens)
    )
    with torch.cuda.device(x.device):
        product(x, weight, weight_scale, bias, out, plan=plan)


def _float_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Few float32 tokens, `plans.ROW_TOKENS` a pass over the weight."""
    tokens, k = x.shape
    rows = weight.shape[0]
    span = WARP * (ALIGNMENT // weight.element_size())
    held = 4 * -(-k // span) * span
    take = next((most for most in plans.ROW_TOKENS if most >= tokens), plans.ROW_TOKENS[-1])
    if take * held > _MAX_SHARED_BYTES:
        take = 1
    if held > _MAX_SHARED_BYTES:
        _widened(x, weight, weight_scale, bias, out.view(tokens, -1))
        return
    blocks = min(-(-rows // (_ROWS_WARPS * _ROWS_A_WARP)), _launch.sm_count(x.device) * _ROWS_BLOCKS_PER_SM)
    _launch.launch(
        SOURCE,
        f"linear_rows<{ROW_TYPES[weight.dtype]}, {take}>",
        grid=(blocks, -(-tokens // take), 1),
        block=(WARP * _ROWS_WARPS, 1, 1),
        args=(
            x,
            weight,
            None if weight_scale is None else _launch.contiguous("weight_scale", weight_scale),
            bias,
            out,
            np.int64(x.stride(0)),
            np.int32(tokens),
            np.int32(rows),
            np.int32(k),
        ),
        device=x.device,
        shared_bytes=take * held,
    )


def _widened(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Any shape, by the vendor's float32 product on some rows of the weight at a time."""
    for start in range(0, weight.shape[0], _WIDENED_ROWS):
        rows = slice(start, start + _WIDENED_ROWS)
        y = torch.nn.functional.linear(x, weight[rows].to(torch.float32))
        if weight_scale is not None:
            y = y.mul_(weight_scale[rows])
        out[:, rows] = y if bias is None else y.add_(bias[rows])
