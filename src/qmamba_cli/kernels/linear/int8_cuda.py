"""int8 products on CUDA: the choice of the kernel, and what becomes of the sums."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from qmamba_cli.kernels import _launch
from qmamba_cli.kernels.linear import narrow, short, wide
from qmamba_cli.kernels.linear import plan as plans
from qmamba_cli.kernels.linear.interleaved import Interleaved, Weight
from qmamba_cli.kernels.linear.narrow import NarrowPlan
from qmamba_cli.kernels.linear.operands import (
    ALIGNMENT,
    SOURCE,
    WARP,
    aligned,
    expand,
    rows_of,
    triton_kernels,
)
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.kernels.linear.plan import SkinnyPlan, TilePlan
from qmamba_cli.kernels.linear.short import ShortPlan
from qmamba_cli.kernels.linear.wide import WidePlan
from qmamba_cli.quant.grid import reciprocal

_Plan: TypeAlias = SkinnyPlan | TilePlan | WidePlan | ShortPlan | NarrowPlan
_BYTES_WARPS = 4
_BYTES_TOKENS = 8
_EPILOGUE_THREADS = 256
_EPILOGUE_BLOCKS = 4096


def skinny_entry(plan: SkinnyPlan, packed: bool) -> str:
    """Name expression of an instance of the skinny kernel."""
    return f"linear_skinny<{plan.row_tiles}, {plan.token_tiles}, {'true' if packed else 'false'}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What becomes of a sum; `kernels/linear_mma.cuh` has the rule.

    Attributes:
        weight_scale: (rows,) float32.
        bias: (rows,) float32, or None.
        residual: (tokens, rows) float32, or None.
        real: (tokens, split) float32, or None where split is 0.
        codes: (tokens, rows - split) int8, or None where split is rows.
        x_scale: real units a step of x.
        out_scale: real units a step of ``codes``, or None where there are none.
        split: outputs that are float32.
    """

    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    real: torch.Tensor | None
    codes: torch.Tensor | None
    x_scale: float
    out_scale: float | None
    split: int

    @property
    def inv_out_scale(self) -> float:
        """Steps a real unit of the int8 outputs."""
        return 0.0 if self.out_scale is None else reciprocal(self.out_scale)

    @property
    def plain_codes(self) -> torch.Tensor | None:
        """``codes`` where they are all outputs, without a bias, and vectors fit; else None."""
        if self.codes is None or self.split or self.bias is not None:
            return None
        fit = all(data.data_ptr() % ALIGNMENT == 0 for data in (self.codes, self.weight_scale))
        return self.codes if fit else None

    @property
    def args(self) -> tuple[_launch.Arg, ...]:
        """The parameters from weight_scale to inv_out_scale, in the kernels' order."""
        return (
            self.weight_scale,
            self.bias,
            self.residual,
            self.real,
            self.codes,
            np.float32(self.x_scale),
            np.float32(self.inv_out_scale),
        )


def int8_linear(
    x: torch.Tensor,
    weight: Weight,
    end: Epilogue,
    *,
    plan: _Plan | None = None,
    direct: bool = True,
) -> None:
    """Choose the kernel. `plan` replaces the choice, for benchmarks, and so does ``direct=False``.

    8-bit pieces are read where they lie; 4-bit ones are first expanded, as any packed weight is for many
    tokens.
    """
    flat = rows_of(x)
    tokens, k = flat.shape
    if tokens == 0 or weight.shape[0] == 0:
        return
    if isinstance(weight, Interleaved):
        tile = _piece_plan(tokens, weight, plan) if direct else None
        if tile is not None:
            _tiled(flat, weight, end, tile)
            return
        weight = expand(weight)
    packed = isinstance(weight, PackedInt4)
    group_size = weight.group_size if isinstance(weight, PackedInt4) else 0
    skinny = plans.is_skinny(tokens, weight.shape[0], k, packed=packed, group_size=group_size) and aligned(
        flat, weight
    )
    if isinstance(plan, SkinnyPlan) or (skinny and plan is None):
        _skinny(flat, weight, end, plan if isinstance(plan, SkinnyPlan) else None)
        return
    dense = expand(weight) if isinstance(weight, PackedInt4) else _launch.contiguous("weight", weight)
    if _by_warp_groups(flat, dense, end, plan, overlap=dense is weight):
        return
    if triton_kernels() is not None and tokens > 1:
        _tiled(flat, dense, end, plan if isinstance(plan, TilePlan) else None)
    elif k % 8 == 0 and dense.shape[0] % 8 == 0 and tokens > plans.MOST_SKINNY_TOKENS:
        _epilogue(torch._int_mm(flat.contiguous(), dense.t()).unsqueeze(0), end)
    elif plans.is_skinny(1, dense.shape[0], k, packed=False) and aligned(flat, dense):
        _skinny(flat, dense, end, None)
    else:
        _bytes(flat, dense, end)


def _by_warp_groups(
    x: torch.Tensor, weight: torch.Tensor, end: Epilogue, plan: _Plan | None, *, overlap: bool
) -> bool:
    """Run the kernel for Hopper that takes a product; False where none does.

    ``overlap``: no kernel before in the stream writes the weight.
    """
    cut = wide.choose(x, weight, end.split) if plan is None else plan
    if isinstance(cut, WidePlan):
        wide.wide_product(x, weight, end.args, cut, split=end.split)
        return True
    codes = end.plain_codes
    if codes is None:
        return False
    scales = {"x_scale": end.x_scale, "inv_out_scale": end.inv_out_scale}
    few = (short.choose(x, weight) or narrow.choose(x, weight)) if plan is None else plan
    if isinstance(few, ShortPlan):
        short.short_product(x, weight, end.weight_scale, codes, few, overlap=overlap, **scales)
    elif isinstance(few, NarrowPlan):
        narrow.narrow_product(x, weight, end.weight_scale, codes, few, **scales)
    else:
        return False
    return True


def _skinny(
    x: torch.Tensor, weight: torch.Tensor | PackedInt4, end: Epilogue, plan: SkinnyPlan | None
) -> None:
    tokens, k = x.shape
    packed = weight if isinstance(weight, PackedInt4) else None
    plan = plan or plans.skinny_plan(tokens, weight.shape[0], k, packed=packed is not None)
    rows = weight.shape[0]
    _launch.launch(
        SOURCE,
        skinny_entry(plan, packed is not None),
        grid=(-(-rows // plan.rows), -(-tokens // plan.tokens), 1),
        block=(WARP * plan.warps, plan.row_warps, 1),
        args=(
            x,
            weight if isinstance(weight, torch.Tensor) else weight.codes,
            None if packed is None else packed.multiplier,
            *end.args,
            np.int64(x.stride(0)),
            np.int32(tokens),
            np.int32(rows),
            np.int32(end.split),
            np.int32(k),
            np.int32(0 if packed is None else packed.multiplier.shape[1]),
            np.int32(1 if packed is None else packed.group_size // plans.CHUNK),
        ),
        device=x.device,
        shared_bytes=plan.shared_bytes,
    )


def _piece_plan(tokens: int, weight: Interleaved, plan: _Plan | None) -> TilePlan | None:
    """The cut of a product with pieces as they lie, or None where they must be expanded."""
    if weight.matrix.bits != 8 or tokens == 1 or triton_kernels() is None:
        return None
    rows, k = weight.shape
    if not isinstance(plan, TilePlan):
        plan = plans.tile_plan(tokens, rows, k, _launch.sm_count(weight.device))
    whole = plan.columns % plans.PIECE_COLUMNS == 0 and k % (plan.columns * plan.parts) == 0
    return plan if whole and plan.rows <= plans.PIECE_ROWS else None


def _tiled(x: torch.Tensor, weight: torch.Tensor | Interleaved, end: Epilogue, plan: TilePlan | None) -> None:
    from qmamba_cli.kernels.linear import triton_matmul as triton

    tokens, k = x.shape
    rows = weight.shape[0]
    plan = plan or plans.tile_plan(tokens, rows, k, _launch.sm_count(x.device))
    if 0 < end.split < rows and end.split % plan.rows:
        # A tile on both sides of the split would need both epilogues.
        plan = TilePlan(plan.tokens, plan.rows, plan.columns, plan.warps, plan.stages, max(2, plan.parts))
    with torch.cuda.device(x.device):
        sums = triton.product(
            x,
            weight,
            end.weight_scale,
            end.bias,
            end.residual,
            end.real,
            end.codes,
            x_scale=end.x_scale,
            inv_out_scale=end.inv_out_scale,
            split=end.split,
            plan=plan,
        )
    if sums is not None:
        _epilogue(sums, end)


def _epilogue(sums: torch.Tensor, end: Epilogue) -> None:
    """Add the parts of (parts, tokens, rows) int32 sums and finish them."""
    parts, tokens, rows = sums.shape
    pitch = sums.stride(1)
    if sums.stride(2) != 1 or (parts > 1 and sums.stride(0) != tokens * pitch):
        sums, pitch = sums.contiguous(), rows
    _launch.launch(
        SOURCE,
        "linear_epilogue",
        grid=(min(tokens, _EPILOGUE_BLOCKS), -(-rows // _EPILOGUE_THREADS), 1),
        block=(_EPILOGUE_THREADS, 1, 1),
        args=(
            sums,
            *end.args,
            np.int64(tokens),
            np.int32(rows),
            np.int32(end.split),
            np.int32(pitch),
            np.int32(parts),
        ),
        device=sums.device,
    )


def _bytes(x: torch.Tensor, weight: torch.Tensor, end: Epilogue) -> None:
    tokens, k = x.shape
    rows = weight.shape[0]
    _launch.launch(
        SOURCE,
        "linear_bytes",
        grid=(-(-rows // _BYTES_WARPS), -(-tokens // _BYTES_TOKENS), 1),
        block=(WARP * _BYTES_WARPS, 1, 1),
        args=(
            x,
            weight,
            *end.args,
            np.int64(x.stride(0)),
            np.int32(tokens),
            np.int32(rows),
            np.int32(end.split),
            np.int32(k),
        ),
        device=x.device,
    )
