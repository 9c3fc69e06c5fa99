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
from qmamba_cli.kernels.decode.plan import ROTATE_WIDTH, ColumnPlan, DecodePlan, InputKind
from qmamba_cli.kernels.decode.scratch import COUNTER_STRIDE, COUNTERS, SETS, DecodeScratch, counter_of
from qmamba_cli.kernels.decode.tensors import BLOCKS, DecodeState, Sizes, check_state
from qmamba_cli.quant.grid import reciprocal

_CONV_THREADS = 256
_ALIGNMENT = 16
_LANES = 8


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


def steps(
    packed: PackedBlock,
    residual: torch.Tensor,
    state: DecodeState,
    scratch: DecodeScratch,
    plan: DecodePlan,
    *,
    layer: int = 0,
    after: PackedBlock | None = None,
    last: bool = True,
) -> tuple[Step, ...]:
    """The launches of one block, in order; arguments as of `cuda.decode_block`.

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
    wanted = (
        (scratch.x, handed_on),
        (scratch.codes, not plan.rotate_in_out),
        (scratch.squares, plan.shared_squares),
        (scratch.out_sums, plan.columns is not None),
    )
    if any((buffer is not None) != needed for buffer, needed in wanted):
        raise ShapeError("decode: `scratch` is for another plan")
    kernels = [name for name in COUNTERS if name not in _left_out(packed, plan)]
    blocks = {name: BLOCKS for name in kernels} | {"decode_rotate": -(-packed.hk // ROTATE_WIDTH) * batch}
    if plan.columns and after:
        blocks["decode_out"] = packed.hk * plan.columns.groups  # for this block's decode_in to wait for
    turns = dict(zip(kernels, _turns(kernels, blocks, scratch, plan, layer), strict=True))
    left = _Left(scratch.out_sums, after.out_constants) if plan.columns and after else _Left(None, None)
    squares = scratch.squares if layer > 0 else None
    chain = [_in_step(packed, residual, state, scratch, plan, turns["decode_in"], squares, left)]
    if "decode_conv" in turns:
        chain.append(_conv_step(packed, state, scratch, plan, turns["decode_conv"]))
    stale = scratch.counters if layer == 0 else scratch.counters[(layer - 1) % SETS]
    chain.append(_scan_step(packed, state, scratch, plan, turns["decode_scan"], stale, residual, left))
    if "decode_rotate" in turns:
        chain.append(_rotate_step(packed, scratch, batch, turns["decode_rotate"]))
    if plan.columns and not last:
        chain.append(_columns_step(packed, scratch, plan, plan.columns, turns["decode_out"]))
    else:
        chain.append(_out_step(packed, residual, scratch, plan, turns["decode_out"]))
    return tuple(chain)


class _Left(NamedTuple):
    """What the block before left to be added to the residual: out_proj's sums, scale and bias; or nothing."""

    sums: torch.Tensor | None
    constants: torch.Tensor | None


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
            yield _Turn(None, counter_of(scratch, 0, name) if last else None, 0, late=last)
            continue
        previous, of_layer = (kernels[i - 1], layer) if i else (kernels[-1], layer - 1)
        yield _Turn(
            counter_of(scratch, of_layer, previous),
            counter_of(scratch, layer, name),
            blocks[previous],
            late=i == 0,
        )


def _in_step(
    packed: PackedBlock,
    residual: torch.Tensor,
    state: DecodeState,
    scratch: DecodeScratch,
    plan: DecodePlan,
    turn: _Turn,
    squares: torch.Tensor | None,
    left: _Left,
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
            *left,
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
                plan.in_under_way,
                packed.out_proj.rows,
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
    residual: torch.Tensor,
    left: _Left,
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
            residual,
            *left,
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
            *_ints(packed.d_model, packed.out_proj.rows),
            *_ints(turn.full, turn.late, stale.numel() // COUNTER_STRIDE),
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


def _columns_step(
    packed: PackedBlock, scratch: DecodeScratch, plan: DecodePlan, columns: ColumnPlan, turn: _Turn
) -> Step:
    matrix: PackedMatrix = packed.out_proj
    return Step(
        entry=f"decode_out_columns<{matrix.bits}>",
        grid=(packed.hk * columns.groups, 1, 1),
        threads=columns.warps * planning.WARP,
        args=(
            scratch.y,
            matrix.weight,
            matrix.multipliers,
            scratch.out_sums,
            scratch.x_sums,
            scratch.x_absmax if plan.meet else None,
            turn.before,
            turn.mine,
            *_ints(scratch.x_sums.numel()),
            *_floats(packed.rotation_factor),
            *_ints(packed.d_model, packed.hk, matrix.rows, matrix.units, matrix.fine, columns.groups),
            *_ints(columns.room, turn.full, turn.late),
        ),
        shared_bytes=planning.column_bytes(packed, columns),
    )


def _floats(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


def _ints(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)


def _bool(value: bool) -> str:
    return "true" if value else "false"
