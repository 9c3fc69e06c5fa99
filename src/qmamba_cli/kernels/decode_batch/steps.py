"""The launches of one step of many sequences, in order: instances, sizes and parameters."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode.steps import Step
from qmamba_cli.kernels.decode.tensors import BLOCKS
from qmamba_cli.kernels.decode_batch import plan as planning
from qmamba_cli.kernels.decode_batch.plan import BatchPlan
from qmamba_cli.kernels.decode_batch.tensors import BatchBlock, BatchScratch, BatchState, fits
from qmamba_cli.quant.grid import reciprocal

_NORM_BYTES = 64


def steps(
    blocks: Sequence[BatchBlock],
    residual: torch.Tensor,
    states: Sequence[BatchState],
    scratch: BatchScratch,
    plan: BatchPlan,
) -> Iterator[Step]:
    """The launches of `step_blocks`, in order.

    Raises:
        ShapeError: an argument is not as `step_blocks` documents it.
    """
    before: BatchBlock | None = None
    for block, state in zip(blocks, states, strict=True):
        _check(block, residual, state, plan)
        yield _norm_step(block, before, residual, scratch, plan)
        yield _in_step(block, state, scratch, plan)
        if block.packed.columns.dynamic_input:
            yield _conv_step(block, state, scratch, plan)
        yield _scan_step(block, state, scratch, plan)
        yield _rotate_step(block, scratch, plan)
        yield _out_step(block, scratch, plan)
        before = block
    if before is not None:
        yield _norm_step(None, before, residual, scratch, plan)


def _check(block: BatchBlock, residual: torch.Tensor, state: BatchState, plan: BatchPlan) -> None:
    wanted = (plan.batch, block.packed.d_model)
    if residual.shape != wanted or residual.dtype != torch.float32 or not residual.is_contiguous():
        raise ShapeError(
            f"decode_batch: `residual` is {residual.dtype} {tuple(residual.shape)}, expected a contiguous "
            f"torch.float32 {wanted}"
        )
    if residual.data_ptr() % 16:
        raise ShapeError("decode_batch: `residual` must start at a multiple of 16 bytes")
    if not fits(state, block.packed.columns):
        raise ShapeError("decode_batch: a state is of another mode than its block")


def _norm_step(
    block: BatchBlock | None,
    before: BatchBlock | None,
    residual: torch.Tensor,
    scratch: BatchScratch,
    plan: BatchPlan,
) -> Step:
    packed = None if block is None else block.packed
    return Step(
        entry=f"batch_norm<{planning.norm_parts(plan.out_parts)}>",
        grid=(plan.batch, 1, 1),
        threads=planning.NORM_THREADS,
        args=(
            residual,
            None if before is None else scratch.out_sums,
            None if before is None else before.out_scale,
            None if before is None else before.out_bias,
            None if packed is None else scratch.in_codes,
            *_floats(
                0.0 if packed is None else packed.norm_eps,
                0.0 if packed is None else reciprocal(packed.scales.in_proj_input),
            ),
            *_ints(
                plan.tokens,
                residual.shape[1],
                scratch.in_codes.shape[1],
                scratch.out_sums.shape[3],
                plan.out_parts,
            ),
        ),
        shared_bytes=_NORM_BYTES,
    )


def _in_step(block: BatchBlock, state: BatchState, scratch: BatchScratch, plan: BatchPlan) -> Step:
    packed = block.packed
    matrix, scales = packed.in_proj, packed.scales
    return Step(
        entry=f"batch_in<{matrix.bits}, {_shares(plan)}>",
        grid=(BLOCKS, plan.groups, 1),
        threads=plan.product_threads,
        args=(
            scratch.in_codes,
            matrix.weight,
            matrix.multipliers,
            packed.in_constants,
            packed.x_weight,
            state.history,
            scratch.x_sums,
            scratch.u,
            scratch.gate,
            scratch.x,
            scratch.x_absmax,
            *_floats(
                reciprocal(scales.in_proj_output),
                scales.in_proj_output,
            ),
            *_ints(
                packed.columns.true_u,
                plan.tokens,
                packed.hk,
                packed.x_rows,
                matrix.units,
                matrix.fine,
                plan.in_tiles,
                plan.in_room,
            ),
        ),
        shared_bytes=planning.in_bytes(packed, plan),
    )


def _conv_step(block: BatchBlock, state: BatchState, scratch: BatchScratch, plan: BatchPlan) -> Step:
    packed = block.packed
    return Step(
        entry="batch_conv",
        grid=(BLOCKS, plan.groups, 1),
        threads=planning.THREADS,
        args=(
            scratch.x,
            scratch.x_absmax,
            packed.in_constants,
            state.history,
            state.history_scale,
            scratch.newest,
            packed.x_weight,
            scratch.x_sums,
            scratch.u,
            *_ints(packed.columns.true_u, plan.tokens, packed.hk, packed.x_rows),
        ),
        shared_bytes=planning.conv_bytes(packed, plan),
    )


def _scan_step(block: BatchBlock, state: BatchState, scratch: BatchScratch, plan: BatchPlan) -> Step:
    packed = block.packed
    scales, int8_state = packed.scales, packed.columns.int8_state
    return Step(
        entry=f"batch_scan<{'true' if int8_state else 'false'}>",
        grid=(BLOCKS // plan.scan_width * plan.sixteens, plan.groups, 1),
        threads=planning.THREADS,
        args=(
            scratch.x_sums,
            packed.x_factor,
            packed.dt_weight,
            packed.A_log2e,
            block.scan_constants,
            block.core,
            scratch.u,
            scratch.gate,
            state.ssm,
            scratch.y,
            scratch.newest,
            state.history_scale,
            *_floats(
                scales.x_proj_output,
                reciprocal(scales.x_proj_output),
                scales.dt_proj_output,
                reciprocal(scales.dt_proj_output),
                scales.ssm_state,
                reciprocal(scales.ssm_state),
            ),
            *_ints(
                plan.tokens,
                plan.sixteens,
                packed.hk,
                packed.rank,
                packed.x_rows,
                packed.dt_pieces,
                plan.scan_width,
                planning.core_levels(packed.d_inner),
            ),
        ),
        shared_bytes=planning.scan_bytes(packed, plan),
    )


def _rotate_step(block: BatchBlock, scratch: BatchScratch, plan: BatchPlan) -> Step:
    return Step(
        entry="batch_rotate",
        grid=(block.packed.hk * plan.sixteens, plan.groups, 1),
        threads=BLOCKS,
        args=(
            scratch.y,
            scratch.out_codes,
            scratch.x_sums,
            *_floats(block.packed.rotation_factor),
            *_ints(scratch.x_sums.numel(), plan.tokens, plan.sixteens, block.packed.hk),
        ),
        shared_bytes=planning.rotate_bytes(),
    )


def _out_step(block: BatchBlock, scratch: BatchScratch, plan: BatchPlan) -> Step:
    matrix = block.packed.out_proj
    return Step(
        entry=f"batch_out<{matrix.bits}, {_shares(plan)}>",
        grid=(BLOCKS // plan.out_packs * plan.out_parts, plan.groups, 1),
        threads=plan.product_threads,
        args=(
            scratch.out_codes,
            matrix.weight,
            matrix.multipliers,
            scratch.out_sums,
            *_ints(
                plan.tokens,
                matrix.rows,
                matrix.units,
                matrix.fine,
                plan.out_packs,
                plan.out_parts,
                plan.out_room,
            ),
        ),
        shared_bytes=planning.out_bytes(block.packed, plan),
    )


def _shares(plan: BatchPlan) -> int:
    return plan.tokens // planning.WARP_TOKENS


def _floats(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


def _ints(*values: int) -> Sequence[np.int32]:
    return tuple(np.int32(value) for value in values)
