"""What the kernels for many sequences work on: constants, buffers, and the state in their own layouts."""

from dataclasses import dataclass

import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.decode.pack import STATES, PackedBlock
from qmamba_cli.kernels.decode.tensors import BLOCKS, DecodeColumns, DecodeState
from qmamba_cli.kernels.decode_batch.plan import X_COPIES, BatchPlan, core_rows
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for

_TAPS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchBlock:
    """A packed block and its constants in the order of these kernels.

    Attributes:
        packed: the block.
        out_scale: (128 rows,) float32, real units a step of out_proj's sums.
        out_bias: (128 rows,) float32.
        core: (order, order / rows, pitch) float32, the columns of the core of H_hk, with `core_rows`.
        scan_constants: (3, d_inner) float32: real units a step of dt_proj's sums, dt_bias, D.
    """

    packed: PackedBlock
    out_scale: torch.Tensor
    out_bias: torch.Tensor
    core: torch.Tensor
    scan_constants: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchState:
    """What a block carries, channels by thread block; updated in place.

    Attributes:
        history: (groups, d_inner, tokens) int32: the last three inputs of the convolution as the low bytes
            of a word, oldest first, zeros before them.
        history_scale: (groups, tokens, 4) float32: scales of those inputs, or None where they share one.
        ssm: (groups, d_inner, tokens, 16) int8 or float32.
    """

    history: torch.Tensor
    history_scale: torch.Tensor | None
    ssm: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchScratch:
    """What the kernels hand to each other; one for all blocks of a model, in one stream.

    Attributes:
        in_codes: (groups, units of 64, tokens, 64) int8.
        out_codes: (groups, 2 hk, tokens, 64) int8.
        u: (groups, d_inner, tokens) float32.
        gate: (groups, d_inner, tokens) float32.
        x_sums: (groups, X_COPIES, x_rows, tokens) int32, zero between blocks; their sum counts.
        y: (groups, hk, 128, tokens) float32.
        out_sums: (groups, parts, tokens, 128 rows) int32.
        x: (groups, d_inner, tokens) float32; dynamic conv input only.
        x_absmax: (groups, 128, tokens) float32; dynamic conv input only.
        newest: (groups, tokens) float32; dynamic conv input only.
    """

    in_codes: torch.Tensor
    out_codes: torch.Tensor
    u: torch.Tensor
    gate: torch.Tensor
    x_sums: torch.Tensor
    y: torch.Tensor
    out_sums: torch.Tensor
    x: torch.Tensor | None
    x_absmax: torch.Tensor | None
    newest: torch.Tensor | None


def batch_block(packed: PackedBlock) -> BatchBlock:
    """A packed block with what these kernels need beside it."""
    return BatchBlock(
        packed=packed,
        out_scale=packed.out_constants[:, 0].reshape(-1).contiguous(),
        out_bias=packed.out_constants[:, 1].reshape(-1).contiguous(),
        core=_core_table(packed.d_inner).to(packed.device),
        scan_constants=packed.scan_constants.transpose(0, 1).reshape(3, -1).contiguous(),
    )


def _core_table(d_inner: int) -> torch.Tensor:
    core = core_matrix(plan_for(d_inner).core).float()
    rows, pitch = core_rows(core.shape[0])
    columns = core.t().reshape(core.shape[0], -1, rows)
    return torch.nn.functional.pad(columns, (0, pitch - rows)).contiguous()


def new_scratch(packed: PackedBlock, plan: BatchPlan) -> BatchScratch:
    """Buffers for every block of the sizes and columns of ``packed``, on its device."""
    groups, tokens, d, device = plan.groups, plan.tokens, packed.d_inner, packed.device
    dynamic = packed.columns.dynamic_input
    units = packed.in_proj.units * (1 if packed.in_proj.bits == 8 else 2)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(groups, *shape, device=device)

    # Zeros where tokens or columns behind the last one are read.
    def codes(of_units: int) -> torch.Tensor:
        return torch.zeros(groups, of_units, tokens, 64, dtype=torch.int8, device=device)

    return BatchScratch(
        in_codes=codes(units),
        out_codes=codes(2 * packed.hk),
        u=floats(d, tokens),
        gate=floats(d, tokens),
        x_sums=torch.zeros(groups, X_COPIES, packed.x_rows, tokens, dtype=torch.int32, device=device),
        y=floats(d, tokens),
        out_sums=torch.empty(
            groups, plan.out_parts, tokens, BLOCKS * packed.out_proj.rows, dtype=torch.int32, device=device
        ),
        x=floats(d, tokens) if dynamic else None,
        x_absmax=floats(BLOCKS, tokens) if dynamic else None,
        newest=floats(tokens) if dynamic else None,
    )


def new_state(packed: PackedBlock, plan: BatchPlan) -> BatchState:
    """The state before the first token."""
    shape, device = (plan.groups, packed.d_inner, plan.tokens), packed.device
    dynamic = packed.columns.dynamic_input
    dtype = torch.int8 if packed.columns.int8_state else torch.float32
    return BatchState(
        history=torch.zeros(shape, dtype=torch.int32, device=device),
        history_scale=torch.ones(plan.groups, plan.tokens, _TAPS, device=device) if dynamic else None,
        ssm=torch.zeros(*shape, STATES, dtype=dtype, device=device),
    )


def load_state(to: BatchState, state: DecodeState) -> None:
    """Take over a state of the references' layout.

    Args:
        to: written.
        state: conv values (b, d_inner, w-1), their scales (b, w-1) or None, ssm (b, d_inner, 16).

    Raises:
        ShapeError: a tensor is of another size or dtype.
    """
    values, scale, ssm = state.conv.values, state.conv.scale, state.ssm
    groups, d, tokens = to.history.shape
    batch, held = ssm.shape[0], values.shape[2]
    fits = values.shape == (batch, d, held) and ssm.shape == (batch, d, STATES) and held < _TAPS
    if not fits or not (groups - 1) * tokens < batch <= groups * tokens or ssm.dtype != to.ssm.dtype:
        raise ShapeError(
            f"decode_batch: a state of {tuple(values.shape)} and {tuple(ssm.shape)} {ssm.dtype} does not fit "
            f"{groups} groups of {tokens} with {d} channels and {to.ssm.dtype} states"
        )
    if values.dtype != torch.int8 or (scale is None) != (to.history_scale is None):
        raise ShapeError("decode_batch: `state.conv` belongs to another conv input")
    octets = to.history.view(torch.int8).view(groups, d, tokens, _TAPS)
    for group in range(groups):
        rows = slice(group * tokens, min(batch, (group + 1) * tokens))
        count = rows.stop - rows.start
        octets[group, :, :count, _TAPS - 1 - held : _TAPS - 1].copy_(_by_block(values[rows]))
        to.ssm[group, :, :count].copy_(_by_block(ssm[rows]))
        if scale is not None and to.history_scale is not None:
            to.history_scale[group, :count, _TAPS - 1 - held : _TAPS - 1].copy_(scale[rows])


def state_of(state: BatchState, batch: int, taps: int) -> DecodeState:
    """A copy in the references' layout, of the first ``batch`` sequences and a convolution of ``taps``."""
    groups, d, tokens = state.history.shape
    octets = state.history.view(torch.int8).view(groups, d, tokens, _TAPS)[..., _TAPS - taps : _TAPS - 1]
    scale = state.history_scale
    if scale is not None:
        scale = scale.reshape(-1, _TAPS)[:batch, _TAPS - taps : _TAPS - 1].contiguous()
    return DecodeState(ConvState(_by_sequence(octets, batch), scale), _by_sequence(state.ssm, batch))


def fits(state: BatchState, columns: DecodeColumns) -> bool:
    """Whether a state is one of a mode's."""
    return (state.history_scale is not None) == columns.dynamic_input and (
        state.ssm.dtype == (torch.int8 if columns.int8_state else torch.float32)
    )


def _by_block(x: torch.Tensor) -> torch.Tensor:
    """(b, d, ...) to a (128, hk) order of channels, (d, b, ...)."""
    b, d, k = x.shape
    return x.reshape(b, -1, BLOCKS, k).permute(2, 1, 0, 3).reshape(d, b, k)


def _by_sequence(x: torch.Tensor, batch: int) -> torch.Tensor:
    """(groups, d, tokens, k) in a (128, hk) order of channels to (b, d, k)."""
    groups, d, tokens, k = x.shape
    rows = x.reshape(groups, BLOCKS, -1, tokens, k).permute(0, 3, 2, 1, 4)
    return rows.reshape(groups * tokens, d, k)[:batch].contiguous()
