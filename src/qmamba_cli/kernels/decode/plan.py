"""How the decode kernels are launched: warps, parts of a row, and how much of the weights is copied ahead.

A kernel's blocks sit beside those of the kernels before it on a multiprocessor and copy their weights
meanwhile, so the shared memory of decode_in, decode_scan and decode_out should fit together.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode.pack import STATES, PackedBlock, PackedMatrix
from qmamba_cli.kernels.decode.tensors import BLOCKS

WARP = 32
MAX_WARPS = 20
MAX_OUT_WARPS = 16
# Of decode_out_columns, to aim at: of its blocks there are fewer than multiprocessors on the largest devices.
_COLUMN_WARPS = 14
_COLUMN_BLOCKS = 132
_TILE = 16
_UNIT_BYTES = 64  # of one row
_IN_CONSTANTS = 8
_TOKEN_PADDING = 32
# The memory that the driver keeps for each block.
_RESERVED_BYTES = 1024
# Channels of one block of decode_rotate.
ROTATE_WIDTH = 8
# From this many channels of a thread block on, several sequences of a dynamic conv input gain by counts.
_COUNTED_FROM = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnPlan:
    """How decode_out_columns is launched.

    Attributes:
        groups: parts of the rows of out_proj; every vector of 128 channels has that many blocks.
        warps: of a block, one a part of its tiles of 16 rows.
        room: tiles of a warp that fit in shared memory at a time.
    """

    groups: int
    warps: int
    room: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """One way to launch the kernels; every plan computes the same bits.

    Attributes:
        in_splits: parts of a row of in_proj, one a warp and tile of 16 rows.
        in_warps: warps of decode_in, at least tiles times in_splits and one a token.
        in_room: units of a warp that fit in shared memory at a time.
        in_slice: units of a warp that are asked for at a time before the block's turn.
        in_under_way: slices of a warp that are on their way at a time, 1 or 2.
        out_warps: warps of decode_out, one a part of a row.
        out_room: as in_room.
        out_slice: as in_slice.
        rotate_in_out: every block of decode_out turns y itself; else decode_rotate does it once.
        meet: thread blocks of decode_in wait for each other to find the scale of a token's x, for which all
            must run at the same time; else decode_conv comes after them. False for a static conv input.
        copies: buffers among which the blocks' sums of x_proj are spread.
        in_least: bytes of shared memory that a block of decode_in asks for at least; more than half of a
            multiprocessor's keeps two of them apart. Measured slower; for experiments.
        out_least: as in_least.
        overlap: kernels start while the ones before them run.
        counted: from the second block of a model on, kernels wait for the count of finished blocks of the
            kernel before, not for its end.
        shared_squares: decode_out adds up the squares of its part of the residual for the next decode_in.
        columns: how all blocks of a model but the last take out_proj of one token by columns, or None where
            decode_out takes every block's by rows.
    """

    in_splits: int
    in_warps: int
    in_room: int
    in_slice: int
    out_warps: int
    out_room: int
    out_slice: int
    rotate_in_out: bool
    meet: bool = False
    copies: int = 1
    in_least: int = 0
    out_least: int = 0
    overlap: bool = True
    counted: bool = False
    shared_squares: bool = False
    in_under_way: int = 2
    columns: ColumnPlan | None = None


class InputKind(IntEnum):
    """What becomes of in_proj's x in decode_in, as decode.cu numbers it."""

    STATIC = 0
    HANDED_ON = 1
    MET = 2


def in_entry(bits: int, kind: InputKind) -> str:
    """Name expression of an instance of decode_in."""
    return f"decode_in<{bits}, {kind.value}>"


def input_kind(packed: PackedBlock, plan: DecodePlan) -> InputKind:
    """The instance of decode_in that a plan takes."""
    if not packed.columns.dynamic_input:
        return InputKind.STATIC
    return InputKind.MET if plan.meet else InputKind.HANDED_ON


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """Dynamic shared memory in bytes: of a multiprocessor, and of one block at most."""

    multiprocessor: int = 228 * 1024
    block: int = 227 * 1024


def make_plan(
    packed: PackedBlock,
    batch: int,
    memory: SharedMemory | None = None,
    *,
    in_warps: int = MAX_WARPS,
    out_warps: int = MAX_OUT_WARPS,
    in_slice: int = 0,
    out_slice: int = 0,
    max_rotated: int = 2,
    meet: bool = False,
    columns: bool = True,
) -> DecodePlan:
    """A plan for one block and batch size.

    Args:
        packed: the block; only its sizes count.
        batch: sequences.
        memory: shared memory of the device, default that of compute capability 9.0.
        in_warps: warps of decode_in to aim at.
        out_warps: warps of decode_out to aim at.
        in_slice: units a slice; 0 takes one where out_proj is taken by columns, and where not all fits in W8;
            else it asks for everything at once.
        out_slice: units a slice; 0 asks for everything at once.
        max_rotated: the largest batch whose tokens every block of decode_out turns itself.
        meet: as in the plan.
        columns: whether one token's out_proj may be taken by columns.

    Raises:
        ShapeError: a block does not fit in the device's shared memory.
    """
    memory = memory or SharedMemory()
    matrix, out = packed.in_proj, packed.out_proj
    tiles = -(-matrix.rows // _TILE)
    # A thread keeps two vectors of four of the residual in registers, which should cover one token.
    of_norm = -(-packed.d_model // (2 * 4 * WARP))
    in_splits = _even_parts(matrix.units, max(1, min(in_warps, MAX_WARPS) // tiles))
    rotate = batch <= max_rotated
    warps = min(MAX_WARPS, max(tiles * in_splits, batch, of_norm))
    parts = _even_parts(out.units, max(1, min(out_warps, MAX_OUT_WARPS)))
    # Every row of decode_out's result has its thread.
    parts = max(parts, -(-out.rows * batch // WARP))
    of_in = _Weights(
        kernel="decode_in",
        need=-(-matrix.units // in_splits),
        unit=tiles * in_splits * _TILE * _UNIT_BYTES,
        fixed=_in_bytes(packed, batch, meet=meet),
    )
    of_out = _Weights(
        kernel="decode_out",
        need=-(-out.units // parts),
        unit=parts * out.rows * _UNIT_BYTES,
        fixed=_out_bytes(packed, batch),
    )
    between = _small_bytes(packed, batch, rotate=rotate, meet=meet)
    matrices = memory.multiprocessor - 2 * _RESERVED_BYTES - between
    in_room, out_room = _rooms(of_in, of_out, matrices, memory)
    # The rest waits in the second-level cache, for which small messages should not queue.
    one_by_one = matrix.bits == 8 and in_room < of_in.need
    plan = DecodePlan(
        in_splits=in_splits,
        in_warps=warps,
        in_room=in_room,
        in_slice=in_slice or (1 if one_by_one else in_room),
        out_warps=parts,
        out_room=out_room,
        out_slice=out_slice or out_room,
        rotate_in_out=rotate,
        meet=meet,
        counted=packed.columns.dynamic_input and batch > 2 and packed.hk >= _COUNTED_FROM,
        shared_squares=batch > 2,
    )
    # A thread of decode_in has four neighbours of the residual at most.
    columns = columns and batch == 1 and packed.d_model <= 4 * WARP * MAX_WARPS
    return by_columns(plan, packed, memory, in_slice=in_slice or 1) if columns else plan


def by_columns(
    plan: DecodePlan,
    packed: PackedBlock,
    memory: SharedMemory | None = None,
    *,
    warps: int = _COLUMN_WARPS,
    blocks: int = _COLUMN_BLOCKS,
    in_slice: int = 1,
) -> DecodePlan:
    """The plan of one token with out_proj by columns; the one given where the device has too little memory.

    Args:
        plan: by rows, for one token and a d_model up to 2560.
        packed: the block; only its sizes count.
        memory: shared memory of the device, default that of compute capability 9.0.
        warps: warps of decode_out_columns to aim at.
        blocks: thread blocks of it to aim at.
        in_slice: as in the plan.
    """
    memory = memory or SharedMemory()
    matrix, out = packed.in_proj, packed.out_proj
    tiles = -(-matrix.rows // _TILE)
    out_tiles = packed.d_model // _TILE
    groups = max(1, min(out_tiles, blocks // packed.hk))
    of_block = -(-out_tiles // groups)
    parts = _even_parts(of_block, max(1, min(warps, MAX_OUT_WARPS)))
    of_in = _Weights(
        kernel="decode_in",
        need=-(-matrix.units // plan.in_splits),
        unit=tiles * plan.in_splits * _TILE * _UNIT_BYTES,
        fixed=_in_bytes(packed, 1, meet=plan.meet),
    )
    of_columns = _Weights(
        kernel="decode_out_columns",
        need=-(-of_block // parts),
        unit=parts * _tile_bytes(out),
        fixed=_column_bytes(out, of_block, parts),
    )
    free = memory.multiprocessor - 2 * _RESERVED_BYTES
    free -= _small_bytes(packed, 1, rotate=plan.rotate_in_out, meet=plan.meet)
    if of_columns.total(1) > memory.block or of_in.total(1) + of_columns.total(1) > free:
        return plan
    room, in_room = _rooms(of_columns, of_in, free, memory)
    of_out = plan.out_warps * out.rows * _UNIT_BYTES
    out_room = (free - of_in.total(in_room) - _out_bytes(packed, 1)) // of_out
    return replace(
        plan,
        in_warps=max(plan.in_warps, -(-packed.d_model // (4 * WARP))),
        in_room=in_room,
        in_slice=in_slice,
        in_under_way=1 if in_room == of_in.need else 2,
        out_room=max(1, min(plan.out_room, out_room)),
        columns=ColumnPlan(groups=groups, warps=parts, room=room),
    )


class _Weights(NamedTuple):
    """A kernel's shared memory: bytes that it needs anyway, and of one unit of each of its warps."""

    kernel: str
    need: int
    unit: int
    fixed: int

    def total(self, room: int) -> int:
        return self.fixed + room * self.unit


def _rooms(one: _Weights, other: _Weights, matrices: int, memory: SharedMemory) -> tuple[int, int]:
    """Units of a warp that fit: the same share of each kernel's, then one more, first of ``one``."""
    free = matrices - one.fixed - other.fixed
    share = min(1.0, free / (one.need * one.unit + other.need * other.unit))
    room, other_room = _room(one, share, memory.block), _room(other, share, memory.block)
    left = free - room * one.unit - other_room * other.unit
    if room < one.need and one.unit <= left and one.total(room + 1) <= memory.block:
        room, left = room + 1, left - one.unit
    if other_room < other.need and other.unit <= left and other.total(other_room + 1) <= memory.block:
        other_room += 1
    return room, other_room


def _small_bytes(packed: PackedBlock, batch: int, *, rotate: bool, meet: bool) -> int:
    """Shared memory of the kernels between decode_in and decode_out."""
    sizes = [scan_bytes(packed, batch)]
    if packed.columns.dynamic_input and not meet:
        sizes.append(conv_bytes(packed, batch))
    if not rotate:
        sizes.append(0)  # decode_rotate's
    return sum(sizes) + len(sizes) * _RESERVED_BYTES


def in_bytes(packed: PackedBlock, batch: int, plan: DecodePlan) -> int:
    """Dynamic shared memory of decode_in."""
    tiles = -(-packed.in_proj.rows // _TILE)
    weights = tiles * plan.in_splits * plan.in_room * _TILE * _UNIT_BYTES
    return max(plan.in_least, weights + _in_bytes(packed, batch, meet=plan.meet))


def conv_bytes(packed: PackedBlock, batch: int) -> int:
    """Dynamic shared memory of decode_conv."""
    return _sum(packed.hk * packed.x_rows, _IN_CONSTANTS * packed.hk * 4, batch * packed.hk, batch * 16)


def scan_bytes(packed: PackedBlock, batch: int) -> int:
    """Dynamic shared memory of decode_scan."""
    tokens = scan_tokens(batch)
    return _sum(tokens * packed.dt_pieces * 16, tokens * 2 * STATES * 4, tokens * packed.hk * 4)


def out_bytes(packed: PackedBlock, batch: int, plan: DecodePlan) -> int:
    """Dynamic shared memory of decode_out."""
    weights = plan.out_warps * plan.out_room * packed.out_proj.rows * _UNIT_BYTES
    return max(plan.out_least, weights + _out_bytes(packed, batch))


def column_bytes(packed: PackedBlock, columns: ColumnPlan) -> int:
    """Dynamic shared memory of decode_out_columns."""
    tiles = -(-(packed.d_model // _TILE) // columns.groups)
    weights = columns.warps * columns.room * _tile_bytes(packed.out_proj)
    return weights + _column_bytes(packed.out_proj, tiles, columns.warps)


def scan_tokens(batch: int) -> int:
    """The batch rounded up to a power of two, for which decode_scan has an instance."""
    return 1 << (batch - 1).bit_length()


def _in_bytes(packed: PackedBlock, batch: int, *, meet: bool) -> int:
    matrix, hk = packed.in_proj, packed.hk
    x_weight = 0 if packed.columns.dynamic_input and not meet else hk * packed.x_rows
    return _sum(
        _multiplier_bytes(matrix),
        x_weight,
        _IN_CONSTANTS * hk * 4,
        batch * (_columns(matrix) + _TOKEN_PADDING),
        batch * matrix.rows * 4,
        batch * hk,
        WARP * 4,
        8 * 4,
        batch * 16 if meet else 0,
    )


def _out_bytes(packed: PackedBlock, batch: int) -> int:
    return _sum(
        _multiplier_bytes(packed.out_proj),
        batch * (packed.d_inner + _TOKEN_PADDING),
        batch * packed.out_proj.rows * 4,
    )


def _tile_bytes(out: PackedMatrix) -> int:
    """Of 16 rows and 128 columns."""
    return _TILE * BLOCKS * out.bits // 8


def _column_bytes(out: PackedMatrix, tiles: int, warps: int) -> int:
    multipliers = 0 if out.multipliers is None else _TILE * (4 if out.fine else 1)
    return _sum(BLOCKS, warps * -(-tiles // warps) * multipliers)


def _multiplier_bytes(matrix: PackedMatrix) -> int:
    return 0 if matrix.multipliers is None else matrix.multipliers[0].numel()


def _columns(matrix: PackedMatrix) -> int:
    return matrix.units * (128 if matrix.bits == 4 else 64)


def _sum(*sizes: int) -> int:
    """Arrays of whole 16 bytes, as decode_parts.cuh's Carver cuts them."""
    return sum(-(-size // 16) * 16 for size in sizes)


def _even_parts(units: int, most: int) -> int:
    """The fewest parts that are as short as ``most`` parts can make them."""
    return -(-units // -(-units // most))


def _room(weights: _Weights, share: float, most: int) -> int:
    left = most - weights.fixed
    room = min(max(1, int(weights.need * share)), left // weights.unit)
    if room < 1:
        raise ShapeError(
            f"{weights.kernel}: a block needs {weights.unit} bytes of shared memory for weights, got {left}"
        )
    return room
