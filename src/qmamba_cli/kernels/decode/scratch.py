"""What the kernels of a decode step hand to each other."""

from dataclasses import dataclass

import torch

from qmamba_cli.kernels.decode.pack import PackedBlock
from qmamba_cli.kernels.decode.plan import DecodePlan
from qmamba_cli.kernels.decode.tensors import BLOCKS

# Counters of finished blocks: two sets, taken in turn by the blocks of a model; one a kernel, a line apart.
SETS = 2
COUNTERS = ("decode_in", "decode_conv", "decode_scan", "decode_rotate", "decode_out")
COUNTER_STRIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class DecodeScratch:
    """What the kernels hand to each other; one for all blocks of a model, in one stream.

    Attributes:
        x_sums: (copies, b, x_rows) int32, zero between steps.
        u_gate: (b, 128, 2, hk) float32.
        y: (b, hk, 128) float32.
        codes: (b, d_inner) int8, or None where decode_out turns y itself.
        x: (b, 128, hk) float32, or None but for decode_conv.
        x_absmax: (b, 128) float32, or None for a static conv input; where thread blocks meet, the bits of -1
            between steps.
        squares: (b, 128) float32, the blocks' shares of the residual's sum of squares, or None where every
            block of decode_in takes the whole sum.
        out_sums: (d_model,) int32, out_proj's sums that wait for the next block of a model, zero between
            steps; or None where no block takes out_proj by columns.
        counters: (2, 5, 32) int32, blocks that have finished.
    """

    x_sums: torch.Tensor
    u_gate: torch.Tensor
    y: torch.Tensor
    codes: torch.Tensor | None
    x: torch.Tensor | None
    x_absmax: torch.Tensor | None
    squares: torch.Tensor | None
    out_sums: torch.Tensor | None
    counters: torch.Tensor


def new_scratch(packed: PackedBlock, batch: int, plan: DecodePlan) -> DecodeScratch:
    """Buffers for every block of the sizes and columns of ``packed``, on its device."""
    hk, device = packed.hk, packed.device
    dynamic = packed.columns.dynamic_input
    return DecodeScratch(
        x_sums=torch.zeros(plan.copies, batch, packed.x_rows, dtype=torch.int32, device=device),
        u_gate=torch.empty(batch, BLOCKS, 2, hk, device=device),
        y=torch.empty(batch, hk, BLOCKS, device=device),
        codes=None
        if plan.rotate_in_out
        else torch.empty(batch, packed.d_inner, dtype=torch.int8, device=device),
        x=torch.empty(batch, BLOCKS, hk, device=device) if dynamic and not plan.meet else None,
        x_absmax=torch.full((batch, BLOCKS), -1, dtype=torch.int32, device=device).view(torch.float32)
        if dynamic
        else None,
        squares=torch.empty(batch, BLOCKS, device=device) if plan.shared_squares else None,
        out_sums=torch.zeros(packed.d_model, dtype=torch.int32, device=device) if plan.columns else None,
        counters=torch.zeros(SETS, len(COUNTERS), COUNTER_STRIDE, dtype=torch.int32, device=device),
    )


def counter_of(scratch: DecodeScratch, layer: int, kernel: str) -> torch.Tensor:
    """(32,) int32, whose first word counts the finished blocks of a kernel of a layer."""
    return scratch.counters[layer % SETS, COUNTERS.index(kernel)]
