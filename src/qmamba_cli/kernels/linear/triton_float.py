"""Products of float32 tokens with int8 or 16-bit rows on tensor cores in Triton; imported only where it runs.

A token is split into 16-bit parts whose products are exact and are summed in float32. For few tokens the
parts are made once, by a kernel of their own, and the weight is the left operand, through registers.
"""

import torch
import triton
import triton.language as tl

from qmamba_cli.kernels.linear.plan import TilePlan
from qmamba_cli.kernels.linear.triton_matmul import GROUP_TILES, tile_of

# A token times 2^-8 stays in float16's range up to 2^23; what float16 leaves of it is kept times 2^11.
SHRINK, GROW, FINE = tl.constexpr(2.0**-8), tl.constexpr(2.0**8), tl.constexpr(2.0**11)
# Elements of a token that one program splits.
_SPLIT_ELEMENTS = 1024
# Four int8 as float16, exactly: with its sign bit turned a byte is q + 128, and behind 0x64 it is the float16
# number 1152 + q.
WIDEN = tl.constexpr("""{
.reg .b32 biased, offset;
mov.b32 offset, 0x64806480;
xor.b32 biased, $2, 0x80808080;
prmt.b32 $0, biased, 0x64646464, 0x4140;
prmt.b32 $1, biased, 0x64646464, 0x4342;
sub.rn.f16x2 $0, $0, offset;
sub.rn.f16x2 $1, $1, offset;
}""")


@triton.jit(do_not_specialize=["tokens"])
def _float_kernel(
    x,
    weight,
    weight_scale,
    bias,
    out,
    tokens,
    rows,
    k,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile of float32 x with an int8, float16 or bfloat16 weight."""
    down, across = tile_of(tokens, rows, BM, BN, GROUP)
    rm = down * BM + tl.arange(0, BM)
    rn = across * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    xp = x + tl.minimum(rm, tokens - 1).to(tl.int64)[:, None] * x_stride + rk[None, :]
    wp = weight + tl.minimum(rn, rows - 1).to(tl.int64)[:, None] * k + rk[None, :]
    coarse = tl.zeros((BM, BN), tl.float32)
    fine = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(k, BK)):
        if EVEN:
            a = tl.load(xp)
            b = tl.load(wp)
        else:
            inside = (rk + step * BK < k)[None, :]
            a = tl.load(xp, mask=inside, other=0.0)
            b = tl.load(wp, mask=inside, other=0.0)
        if weight.dtype.element_ty == tl.bfloat16:
            # bfloat16 has float32's range and a third of its digits.
            bt = tl.trans(b)
            first = a.to(tl.bfloat16)
            rest = a - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            coarse = tl.dot(first, bt, coarse)
            fine = tl.dot(second, bt, fine)
            fine = tl.dot(third, bt, fine)
        else:
            bt = tl.trans(b.to(tl.float16))
            small = a * SHRINK
            first_half = small.to(tl.float16)
            second_half = ((small - first_half.to(tl.float32)) * FINE).to(tl.float16)
            coarse = tl.dot(first_half, bt, coarse)
            fine = tl.dot(second_half, bt, fine)
        xp += BK
        wp += BK
    if weight.dtype.element_ty != tl.bfloat16:
        coarse *= GROW
        fine *= GROW / FINE
    y = coarse + fine
    mask = (rm < tokens)[:, None] & (rn < rows)[None, :]
    if weight_scale is not None:
        y = y * tl.load(weight_scale + rn, mask=rn < rows, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + rn, mask=rn < rows, other=0.0)[None, :]
    tl.store(out + rm.to(tl.int64)[:, None] * rows + rn[None, :], y, mask=mask)


@triton.jit
def _split_kernel(x, parts, tokens, k, x_stride, BLOCK: tl.constexpr):
    """The float16 parts of a token: (2, tokens, k), coarse then fine."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < k
    small = tl.load(x + token * x_stride + column, mask=inside, other=0.0) * SHRINK
    coarse = small.to(tl.float16)
    fine = ((small - coarse.to(tl.float32)) * FINE).to(tl.float16)
    tl.store(parts + token * k + column, coarse, mask=inside)
    tl.store(parts + (tokens + token) * k + column, fine, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _few_kernel(
    parts,
    weight,
    weight_scale,
    bias,
    out,
    tokens,
    rows,
    k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One tile of rows with all tokens, whose float16 parts are given."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.arange(0, BM)
    rk = tl.arange(0, BK)
    wp = weight + tl.minimum(rn, rows - 1).to(tl.int64)[:, None] * k + rk[None, :]
    pp = parts + tl.minimum(rm, tokens - 1)[:, None] * k + rk[None, :]
    coarse = tl.zeros((BN, BM), tl.float32)
    fine = tl.zeros((BN, BM), tl.float32)
    for step in range(0, tl.cdiv(k, BK)):
        if EVEN:
            b = tl.load(wp)
            first = tl.load(pp)
            second = tl.load(pp + tokens * k)
        else:
            inside = (rk + step * BK < k)[None, :]
            b = tl.load(wp, mask=inside, other=0.0)
            first = tl.load(pp, mask=inside, other=0.0)
            second = tl.load(pp + tokens * k, mask=inside, other=0.0)
        if NATIVE and weight.dtype.element_ty == tl.int8:
            wide = tl.inline_asm_elementwise(WIDEN, "=r,=r,r", [b], dtype=tl.float16, is_pure=True, pack=4)
        else:
            wide = b.to(tl.float16)
        coarse = tl.dot(wide, tl.trans(first), coarse)
        fine = tl.dot(wide, tl.trans(second), fine)
        wp += BK
        pp += BK
    y = coarse * GROW + fine * (GROW / FINE)
    if weight_scale is not None:
        y = y * tl.load(weight_scale + rn, mask=rn < rows, other=0.0)[:, None]
    if bias is not None:
        y = y + tl.load(bias + rn, mask=rn < rows, other=0.0)[:, None]
    mask = (rn < rows)[:, None] & (rm < tokens)[None, :]
    tl.store(out + rm.to(tl.int64)[None, :] * rows + rn[:, None], y, mask=mask)


def float_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    plan: TilePlan,
) -> None:
    """Multiply float32 tokens with int8, float16 or bfloat16 rows.

    Args:
        x: (tokens, k) float32, contiguous along k; below 2^23 where the weight is not bfloat16.
        weight: (rows, k), contiguous.
        weight_scale: (rows,) float32, or None.
        bias: (rows,) float32, or None.
        out: (tokens, rows) float32.
        plan: the cut.
    """
    tokens, k = x.shape
    rows = weight.shape[0]
    _float_kernel[(triton.cdiv(tokens, plan.tokens) * triton.cdiv(rows, plan.rows),)](
        x,
        weight,
        weight_scale,
        bias,
        out,
        tokens,
        rows,
        k,
        x.stride(0),
        BM=plan.tokens,
        BN=plan.rows,
        BK=plan.columns,
        GROUP=GROUP_TILES,
        EVEN=k % plan.columns == 0,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )


def few_tokens_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    plan: TilePlan,
) -> None:
    """Multiply few float32 tokens with int8 or float16 rows.

    Args:
        x: (tokens, k) float32, contiguous along k, below 2^23; at most ``plan.tokens``.
        weight: (rows, k), contiguous.
        weight_scale: (rows,) float32, or None.
        bias: (rows,) float32, or None.
        out: (tokens, rows) float32.
        plan: the cut.
    """
    tokens, k = x.shape
    rows = weight.shape[0]
    parts = torch.empty(2, tokens, k, dtype=torch.float16, device=x.device)
    _split_kernel[(tokens, triton.cdiv(k, _SPLIT_ELEMENTS))](
        x, parts, tokens, k, x.stride(0), BLOCK=_SPLIT_ELEMENTS, enable_fp_fusion=False
    )
    _few_kernel[(triton.cdiv(rows, plan.rows),)](
        parts,
        weight,
        weight_scale,
        bias,
        out,
        tokens,
        rows,
        k,
        BM=plan.tokens,
        BN=plan.rows,
        BK=plan.columns,
        EVEN=k % plan.columns == 0,
        NATIVE=x.is_cuda,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
