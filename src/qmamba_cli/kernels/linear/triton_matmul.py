"""int8 products on tensor cores in Triton, with all after the sum fused; imported only where it runs."""

import torch
import triton
import triton.language as tl

from qmamba_cli.kernels.linear.interleaved import Interleaved
from qmamba_cli.kernels.linear.plan import TilePlan

# What a program does with its sums.
_INT8, _FLOAT, _RESIDUAL, _SPLIT, _PARTIAL = range(5)
# How the weight lies: rows, or the pieces of in_proj or out_proj packed for decoding.
_ROWS, _IN_PIECES, _OUT_PIECES = range(3)
# Tiles of x that are multiplied with one tile of the weight before the next: both then stay in the L2 cache.
GROUP_TILES = 8
# 1.5 * 2^23 rounds half to even; see numerics.cuh.
_MAGIC = 12582912.0

MAGIC = tl.constexpr(_MAGIC)
ROWS, IN_PIECES, OUT_PIECES = (tl.constexpr(layout) for layout in (_ROWS, _IN_PIECES, _OUT_PIECES))
INT8, FLOAT, RESIDUAL, SPLIT, PARTIAL = (
    tl.constexpr(kind) for kind in (_INT8, _FLOAT, _RESIDUAL, _SPLIT, _PARTIAL)
)


@triton.jit
def tile_of(tokens, rows, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Coordinates of a program's tile, `GROUP` tiles of x for each tile of the weight."""
    program = tl.program_id(0)
    down, across = tl.cdiv(tokens, BM), tl.cdiv(rows, BN)
    group = program // (GROUP * across)
    first = group * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def _quantize(y, inv_scale):
    steps = tl.minimum(tl.maximum(y * inv_scale, -128.0), 127.0)
    return ((steps + MAGIC) - MAGIC).to(tl.int8)


@triton.jit
def _place_of(rn, block_bytes, units, height, LAYOUT: tl.constexpr):
    """Byte where the first 64 columns of rows lie, and how far behind them the next 64.

    The distance is that of all rows ``rn ... rn + n`` of a tile whose size divides 128.
    """
    if LAYOUT == IN_PIECES:
        # Thread block j of 128 has the channels j + 128 i of x, then of z, in tiles of 16; `height` of each.
        channels = 128 * height
        channel = rn % channels
        row = rn // channels * height + channel // 128
        place = channel % 128 * block_bytes + row // 16 * 1024 * units + row % 16 * 64
        return place, tl.minimum(2 * height - row // 16 * 16, 16) * 64
    else:
        # Thread block j has `height` rows one after another.
        return rn // height * block_bytes + rn % height * 64, height * 64


@triton.jit(do_not_specialize=["tokens"])
def _product_kernel(
    x,
    weight,
    weight_scale,
    bias,
    residual,
    real,
    codes,
    x_scale,
    inv_out_scale,
    tokens,
    rows,
    k,
    x_stride,
    split,
    block_bytes,
    units,
    height,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One tile of ``x @ weight.T``; rows past the end repeat the last one and are not stored."""
    down, across = tile_of(tokens, rows, BM, BN, GROUP)
    rm = down * BM + tl.arange(0, BM)
    rn = across * BN + tl.arange(0, BN)
    steps = tl.cdiv(tl.cdiv(k, BK), PARTS)
    part = tl.program_id(1)
    rk = part * steps * BK + tl.arange(0, BK)
    xp = x + tl.minimum(rm, tokens - 1).to(tl.int64)[:, None] * x_stride + rk[None, :]
    rw = tl.minimum(rn, rows - 1)
    if LAYOUT == ROWS:
        wp = weight + rw.to(tl.int64)[:, None] * k + rk[None, :]
    else:
        # A unit of 64 columns is four pieces, each 8 columns of its first half and the same 8 of its second.
        place, _ = _place_of(rw, block_bytes, units, height, LAYOUT)
        _, stride = _place_of(across * BN, block_bytes, units, height, LAYOUT)
        rp = tl.arange(0, BK)
        columns = rp // 64 * stride + rp % 32 // 8 * 16 + rp % 64 // 32 * 8 + rp % 8
        offsets = place[:, None] + (part * steps * (BK // 64) * stride + columns)[None, :]
        wp = weight + tl.max_contiguous(tl.multiple_of(offsets, (1, 8)), (1, 8))
    acc = tl.zeros((BM, BN), tl.int32)
    for step in range(0, steps):
        if EVEN:
            a = tl.load(xp)
            b = tl.load(wp)
        else:
            inside = (rk + step * BK < k)[None, :]
            a = tl.load(xp, mask=inside, other=0)
            b = tl.load(wp, mask=inside, other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        xp += BK
        if LAYOUT == ROWS:
            wp += BK
        else:
            wp += stride * (BK // 64)

    mask = (rm < tokens)[:, None] & (rn < rows)[None, :]
    rm64 = rm.to(tl.int64)[:, None]
    if KIND == PARTIAL:
        at = (part * tokens + rm64) * rows + rn[None, :]
        tl.store(real + at, acc, mask=mask)
    else:
        scale = tl.load(weight_scale + rn, mask=rn < rows, other=0.0) * x_scale
        y = acc.to(tl.float32) * scale[None, :]
        if bias is not None:
            y = y + tl.load(bias + rn, mask=rn < rows, other=0.0)[None, :]
        if KIND == INT8:
            tl.store(codes + rm64 * rows + rn[None, :], _quantize(y, inv_out_scale), mask=mask)
        elif KIND == FLOAT:
            tl.store(real + rm64 * rows + rn[None, :], y, mask=mask)
        elif KIND == RESIDUAL:
            at = rm64 * rows + rn[None, :]
            tl.store(real + at, tl.load(residual + at, mask=mask) + y, mask=mask)
        else:
            # A tile lies on one side of the split.
            if across * BN < split:
                tl.store(real + rm64 * split + rn[None, :], y, mask=mask)
            else:
                at = rm64 * (rows - split) + (rn - split)[None, :]
                tl.store(codes + at, _quantize(y, inv_out_scale), mask=mask)


def product(
    x: torch.Tensor,
    weight: torch.Tensor | Interleaved,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    real: torch.Tensor | None,
    codes: torch.Tensor | None,
    *,
    x_scale: float,
    inv_out_scale: float,
    split: int,
    plan: TilePlan,
) -> torch.Tensor | None:
    """Multiply int8 operands into ``real`` and ``codes``, or return int32 sums of the plan's parts.

    Args:
        x: (tokens, k) int8, contiguous along k.
        weight: (rows, k) int8, contiguous; or 8-bit pieces, which take a plan whose columns times parts
            divide k.
        weight_scale: (rows,) float32.
        bias: (rows,) float32, or None.
        residual: (tokens, rows) float32 that is added to a float output, or None.
        real: (tokens, split) float32, or None where split is 0.
        codes: (tokens, rows - split) int8, or None where split is rows.
        x_scale: real units a step of x.
        inv_out_scale: steps a real unit of ``codes``.
        split: outputs that are float32; a multiple of the plan's rows where it is neither 0 nor all.
        plan: the cut.

    Returns:
        None, or (parts, tokens, rows) int32 whose epilogue is still to be run, where the plan has parts.
    """
    tokens, k = x.shape
    rows = weight.shape[0]
    sums = None
    if plan.parts > 1:
        kind = _PARTIAL
        sums = torch.empty(plan.parts, tokens, rows, dtype=torch.int32, device=x.device)
    elif split == 0:
        kind = _INT8
    elif split == rows:
        kind = _FLOAT if residual is None else _RESIDUAL
    else:
        kind = _SPLIT
    layout, sizes = _ROWS, (0, 0, 0)
    if isinstance(weight, Interleaved):
        matrix = weight.matrix
        wide = weight.name == "in_proj"
        layout = _IN_PIECES if wide else _OUT_PIECES
        sizes = (matrix.weight.shape[1], matrix.units, weight.block.hk if wide else matrix.rows)
        weight = matrix.weight.view(torch.int8)
    grid = (triton.cdiv(tokens, plan.tokens) * triton.cdiv(rows, plan.rows), plan.parts)
    _product_kernel[grid](
        x,
        weight,
        weight_scale,
        bias,
        residual,
        real if sums is None else sums,
        codes,
        x_scale,
        inv_out_scale,
        tokens,
        rows,
        k,
        x.stride(0),
        split,
        *sizes,
        BM=plan.tokens,
        BN=plan.rows,
        BK=plan.columns,
        GROUP=GROUP_TILES,
        PARTS=plan.parts,
        KIND=kind,
        EVEN=k % (plan.columns * plan.parts) == 0,
        LAYOUT=layout,
        num_warps=plan.warps,
        num_stages=plan.stages,
        maxnreg=plan.registers or None,
        # One rounding an operation, as in the CUDA kernels and the reference.
        enable_fp_fusion=False,
    )
    return sums
