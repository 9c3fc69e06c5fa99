"""The launches of one decode step, in order: instances, sizes and parameters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._launch import Arg, launch
from qmamba_cli.kernels.decode import plan as planning
from qmamba_cli.kernels.decode.pack import STATES, PackedBlock, PackedMatrix
from qmamba_cli.kernels.decode.plan import ROTATE_WIDTH, DecodePlan, InputKind
from qmamba_cli.kernels.decode.tensors import BLOCKS, DecodeState, Sizes, check_state
from qmamba_cli.quant.grid import reciprocal

_CONV_THREADS = 256
_ALIGNMENT = 16
# Counters of finished blocks: two sets, taken in turn by the blocks of a model; one a kernel, a line apart.
_SETS = 2
_COUNTERS = ("decode_in", "decode_conv", "decode_scan", "decode_rotate", "decode_out")
_COUNTER_STRIDE = 32
_LANES = 8


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
        counters: (2, 5, 32) int32, blocks that have finished.
    """

    x_sums: torch.Tensor
    u_gate: torch.Tensor
    y: torch.Tensor
    codes: torch.Tensor | None
    x: torch.Tensor | None
    x_absmax: torch.Tensor | None
    squares: torch.Tensor | None
    counters: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One kernel launch: instance, blocks, threads, parameters, bytes of dynamic shared memory."""

    entry: str
    grid: tuple[int, int, int]
    threads: int
    args: tuple[Arg, ...]
    shared_bytes: int


def launch_steps(source: str, steps: Iterable[Step], device: torch.device, *, overlap: bool = False) -> None:
    """Launch steps in turn.

    Args:
        source: path below ``qmamba_cli/kernels`` of their instances.
        steps: instances, sizes and parameters.
        device: where the parameters lie.
        overlap: each may start while the one before it still runs; as for `_launch.launch`.
    """
    for step in steps:
        launch(
            source,
            step.entry,
            grid=step.grid,
            block=(step.threads, 1, 1),
            args=step.args,
            device=device,
            shared_bytes=step.shared_bytes,
            overlap=overlap,
        )


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
        counters=torch.zeros(_SETS, len(_COUNTERS), _COUNTER_STRIDE, dtype=torch.int32, device=device),
    )


def steps(
    packed: PackedBlock,
    residual: torch.Tensor,
    state: DecodeState,
    scratch: DecodeScratch,
    plan: DecodePlan,
    *,
    layer: int = 0,
) -> tuple[Step, ...]:
    """The launches of one block, in order.

    Raises:
        ShapeError: an argument is not as `decode_block` documents it.
    """
    sizes = Sizes(packed.d_model, packed.d_inner, STATES, packed.rank, packed.taps)
    batch = check_state(sizes, packed.columns, residual, state)
    if residual.data_ptr() % _ALIGNMENT:
        raise ShapeError(f"decode: `residual` must start at a multiple of {_ALIGNMENT} bytes")
    if scratch.x_sums.shape != (plan.copies, batch, packed.x_rows):
        raise ShapeError(
            f"decode: `scratch` is for another batch, plan or model, got sums {tuple(scratch.x_sums.shape)}, "
            f"expected {(plan.copies, batch, packed.x_rows)}"
        )
    if packed.columns.dynamic_input != (scratch.x_absmax is not None):
        raise ShapeError("decode: `scratch` is for another conv input")
    handed_on = packed.columns.dynamic_input and not plan.meet
    if handed_on != (scratch.x is not None):
        raise ShapeError("decode: `scratch` is for another plan")
    if plan.rotate_in_out != (scratch.codes is None) or plan.shared_squares != (scratch.squares is not None):
        raise ShapeError("decode: `scratch` is for another plan")
    kernels = [name for name in _COUNTERS if name not in _left_out(packed, plan)]
    blocks = {name: BLOCKS for name in kernels} | {"decode_rotate": -(-packed.hk // ROTATE_WIDTH) * batch}
    turns = dict(zip(kernels, _turns(kernels, blocks, scratch, plan, layer), strict=True))
    squares = scratch.squares if layer > 0 else None
    chain = [_in_step(packed, residual, state, scratch, plan, turns["decode_in"], squares)]
    if "decode_conv" in turns:
        chain.append(_conv_step(packed, state, scratch, plan, turns["decode_conv"]))
    stale = scratch.counters if layer == 0 else scratch.counters[(layer - 1) % _SETS]
    chain.append(_scan_step(packed, state, scratch, plan, turns["decode_scan"], stale))
    if "decode_rotate" in turns:
        chain.append(_rotate_step(packed, scratch, batch, turns["decode_rotate"]))
    chain.append(_out_step(packed, residual, scratch, plan, turns["decode_out"]))
    return tuple(chain)


class _Turn(NamedTuple):
    """decode_turn.cuh's Turn: counters or None, blocks to wait for, whether the next kernel starts late."""

    before: torch.Tensor | None
    mine: torch.Tensor | None
    full: int
    late: bool


def _left_out(packed: PackedBlock, plan: DecodePlan) -> set[str]:
    left_out = set() if planning.input_kind(packed, plan) is InputKind.HANDED_ON else {"decode_conv"}
    return left_out | ({"decode_rotate"} if plan.rotate_in_out else set())


def _turns(
    kernels: Sequence[str], blocks: Mapping[str, int], scratch: DecodeScratch, plan: DecodePlan, layer: int
) -> Iterator[_Turn]:
    """One turn a kernel.

    The first block of a model waits for ends of kernels: whatever ran before is over, however it left the
    counters. Its decode_out hands on by count, but lets the next block's kernels start only after its
    decode_scan has cleared them.
    """
    if not plan.counted:
        yield from (_Turn(None, None, 0, late=False) for _ in kernels)
        return
    for i, name in enumerate(kernels):
        last = i == len(kernels) - 1
        if layer == 0:
            yield _Turn(None, _counter(scratch, 0, name) if last else None, 0, late=last)
            continue
        previous, of_layer = (kernels[i - 1], layer) if i else (kernels[-1], layer - 1)
        yield _Turn(
            _counter(scratch, of_layer, previous),
            _counter(scratch, layer, name),
            blocks[previous],
            late=i == 0,
        )


def _counter(scratch: DecodeScratch, layer: int, kernel: str) -> torch.Tensor:
    return scratch.counters[layer % _SETS, _COUNTERS.index(kernel)]


def _in_step(
    packed: PackedBlock,
    residual: torch.Tensor,
    state: DecodeState,
    scratch: DecodeScratch,
    plan: DecodePlan,
    turn: _Turn,
    squares: torch.Tensor | None,
) -> Step:
    scales, matrix = packed.scales, packed.in_proj
    batch = residual.shape[0]
    return Step(
        entry=planning.in_entry(matrix.bits, planning.input_kind(packed, plan)),
        grid=(BLOCKS, 1, 1),
        threads=plan.in_warps * planning.WARP,
        args=(
            residual,
            squares,
            matrix.weight,
            matrix.multipliers,
            packed.in_constants,
            packed.x_weight,
            state.conv.values,
            scratch.u_gate,
            scratch.x_sums,
            scratch.x,
            scratch.x_absmax,
            state.conv.scale,
            turn.before,
            turn.mine,
            *_floats(
                packed.norm_eps,
                reciprocal(scales.in_proj_input),
                reciprocal(scales.in_proj_output),
                scales.in_proj_output,
            ),
            *_ints(
                packed.columns.true_u,
                batch,
                packed.d_model,
                packed.hk,
                packed.taps,
                packed.x_rows,
                plan.copies,
                matrix.units,
                matrix.fine,
                plan.in_splits,
                plan.in_room,
                plan.in_slice,
                turn.full,
                turn.late,
            ),
        ),
        shared_bytes=planning.in_bytes(packed, batch, plan),
    )


def _conv_step(
    packed: PackedBlock, state: DecodeState, scratch: DecodeScratch, plan: DecodePlan, turn: _Turn
) -> Step:
    batch = state.ssm.shape[0]
    return Step(
        entry="decode_conv",
        grid=(BLOCKS, 1, 1),
        threads=_CONV_THREADS,
        args=(
            scratch.x,
            scratch.x_absmax,
            packed.in_constants,
            packed.x_weight,
            state.conv.values,
            state.conv.scale,
            scratch.u_gate,
            scratch.x_sums,
            turn.before,
            turn.mine,
            *_ints(packed.columns.true_u, batch, packed.hk, packed.taps, packed.x_rows, plan.copies),
            *_ints(turn.full, turn.late),
        ),
        shared_bytes=planning.conv_bytes(packed, batch),
    )


def _scan_step(
    packed: PackedBlock,
    state: DecodeState,
    scratch: DecodeScratch,
    plan: DecodePlan,
    turn: _Turn,
    stale: torch.Tensor,
) -> Step:
    scales, batch = packed.scales, state.ssm.shape[0]
    int8_state = packed.columns.int8_state
    return Step(
        entry=f"decode_scan<{planning.scan_tokens(batch)}>",
        grid=(BLOCKS, 1, 1),
        threads=_LANES * packed.hk,
        args=(
            scratch.x_sums,
            packed.x_factor,
            packed.dt_weight,
            packed.A_log2e,
            packed.scan_constants,
            packed.core,
            scratch.u_gate,
            state.ssm,
            scratch.y,
            scratch.x_absmax,
            state.conv.scale,
            turn.before,
            turn.mine,
            stale,
            *_floats(
                scales.x_proj_output,
                reciprocal(scales.x_proj_output),
                scales.dt_proj_output,
                reciprocal(scales.dt_proj_output),
                scales.ssm_state,
                reciprocal(scales.ssm_state) if int8_state else 0.0,
            ),
            *_ints(batch, packed.hk, packed.rank, packed.x_rows, plan.copies, packed.dt_pieces, packed.taps),
            *_ints(turn.full, turn.late, stale.numel() // _COUNTER_STRIDE),
        ),
        shared_bytes=planning.scan_bytes(packed, batch),
    )


def _rotate_step(packed: PackedBlock, scratch: DecodeScratch, batch: int, turn: _Turn) -> Step:
    return Step(
        entry="decode_rotate",
        grid=(-(-packed.hk // ROTATE_WIDTH), batch, 1),
        threads=BLOCKS,
        args=(
            scratch.y,
            scratch.codes,
            turn.before,
            turn.mine,
            *_floats(packed.rotation_factor),
            *_ints(packed.hk, ROTATE_WIDTH, turn.full, turn.late),
        ),
        shared_bytes=0,
    )


def _out_step(
    packed: PackedBlock, residual: torch.Tensor, scratch: DecodeScratch, plan: DecodePlan, turn: _Turn
) -> Step:
    matrix: PackedMatrix = packed.out_proj
    batch = residual.shape[0]
    return Step(
        entry=f"decode_out<{matrix.bits}, {_bool(plan.rotate_in_out)}>",
        grid=(BLOCKS, 1, 1),
        threads=plan.out_warps * planning.WARP,
        args=(
            scratch.y,
            scratch.codes,
            matrix.weight,
            matrix.multipliers,
            packed.out_constants,
            residual,
            scratch.squares,
            scratch.x_sums,
            scratch.x_absmax if plan.meet else None,
            turn.before,
            turn.mine,
            *_ints(scratch.x_sums.numel()),
            *_floats(packed.rotation_factor),
            *_ints(
                batch,
                packed.d_model,
                packed.hk,
                matrix.rows,
                matrix.units,
                matrix.fine,
                plan.out_room,
                plan.out_slice,
                turn.full,
                turn.late,
            ),
        ),
        shared_bytes=planning.out_bytes(packed, batch, plan),
    )


def _floats(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


def _ints(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)


def _bool(value: bool) -> str:
    return "true" if value else "false"
