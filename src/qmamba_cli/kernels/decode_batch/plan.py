"""How the kernels for many sequences are launched; plain arithmetic, no GPU."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode.pack import PackedBlock
from qmamba_cli.kernels.decode.plan import SharedMemory
from qmamba_cli.kernels.decode.tensors import BLOCKS, MAX_BATCH
from qmamba_cli.kernels.hadamard.matrix import plan_for

# Sequences beyond which a weight is multiplied tile by tile as for a prompt.
MOST_SEQUENCES = 256
# Tokens of a group: one warp of a part of the columns has 32 of them.
GROUPS = (32, 64)
WARP_TOKENS = 32
THREADS = 512
_WARPS = THREADS // 32
_TILE = 16
# Spans of 64 columns of a part on their way or in use, by the tokens of a group.
_TOKEN_SLOTS = {32: 3, 64: 4}
# Spans of W4's weights of a part, unpacked for a group of 64 tokens.
_CODE_SLOTS = 2
# Rows of 64 bytes lie in eights, behind words that count arrivals.
_FRONT = 512 + 96 * 8
# Units of a part that those words can count.
_MOST_ROOM = 16
# Warps beside each other along the rows, and the tiles of 16 rows of both.
_SIDES = 2
_MOST_TILES = 6
NORM_THREADS = 512
NORM_PARTS = (4, 8)
SCAN_TOKENS = 16
# Copies of x_proj's sums, which thread blocks add to in turn.
X_COPIES = 4
_STATES = 16
# Shared memory of a product, beside which blocks of the kernels before and after it fit.
_PRODUCT_BYTES = 180 * 1024
_MOST_PARTS = 8
_CONSTANTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """One way to launch the kernels; every plan computes the same bits.

    Attributes:
        batch: sequences.
        tokens: sequences of a group, one of `GROUPS`.
        in_tiles: tiles of 16 rows of in_proj that are multiplied at a time.
        in_room: units of a part of the columns that fit in shared memory at a time.
        out_packs: blocks of out_proj's pack that one thread block multiplies.
        out_parts: thread blocks that share the columns of out_proj.
        out_room: as in_room.
        scan_width: blocks of channels of one thread block of the scan.
        wide: groups of 64 tokens are multiplied by groups of warps, as on compute capability 9.0.
        overlap: kernels start while the ones before them run.
    """

    batch: int
    tokens: int
    in_tiles: int
    in_room: int
    out_packs: int
    out_parts: int
    out_room: int
    scan_width: int
    wide: bool = False
    overlap: bool = True

    @property
    def groups(self) -> int:
        """Groups of tokens."""
        return -(-self.batch // self.tokens)

    @property
    def product_threads(self) -> int:
        """Threads of a block of a product: of wide ones a warp a part asks for what four others multiply."""
        return THREADS // 4 * 5 if self.wide and self.tokens == GROUPS[-1] else THREADS

    @property
    def sixteens(self) -> int:
        """Runs of 16 tokens that the scan takes of each group."""
        return -(-min(self.batch, self.tokens) // SCAN_TOKENS)

    @property
    def column_parts(self) -> int:
        """Parts of the columns in a thread block of a product."""
        return _WARPS * WARP_TOKENS // (_SIDES * self.tokens)


def unsupported_batch(batch: int) -> str | None:
    """Why the kernels cannot take a number of sequences, or None where they can."""
    if MAX_BATCH < batch <= MOST_SEQUENCES:
        return None
    return f"batch is {batch}, the step of many sequences takes {MAX_BATCH + 1} to {MOST_SEQUENCES}"


def make_plan(
    packed: PackedBlock,
    batch: int,
    memory: SharedMemory | None = None,
    *,
    wide: bool = False,
    product_bytes: int = _PRODUCT_BYTES,
    out_parts: int = 0,
    scan_width: int = 0,
) -> BatchPlan:
    """A plan for one block and number of sequences.

    Args:
        packed: the block; only its sizes count.
        batch: sequences.
        memory: shared memory of the device, default that of compute capability 9.0.
        wide: whether the device multiplies by groups of warps.
        product_bytes: shared memory of a product to aim at.
        out_parts: thread blocks that share the columns of out_proj; 0 chooses.
        scan_width: blocks of channels of a thread block of the scan; 0 chooses.

    Raises:
        ShapeError: a block does not fit in the device's shared memory, or `unsupported_batch` names a reason.
    """
    memory = memory or SharedMemory()
    reason = unsupported_batch(batch)
    if reason is not None:
        raise ShapeError(f"decode_batch: {reason}")
    tokens = next((size for size in GROUPS if size >= batch), GROUPS[-1])
    sixteens = -(-min(batch, tokens) // SCAN_TOKENS)
    all_tiles = -(-packed.in_proj.rows // _TILE)
    packs = _packs(packed.out_proj.rows)
    plan = BatchPlan(
        batch=batch,
        tokens=tokens,
        in_tiles=-(-all_tiles // -(-all_tiles // _MOST_TILES)),
        in_room=1,
        out_packs=packs,
        out_parts=out_parts or max(1, min(_MOST_PARTS, packs, packed.out_proj.units // 2)),
        out_room=1,
        scan_width=scan_width or 1 << (sixteens - 1).bit_length(),
        wide=wide,
    )
    most = min(memory.block, product_bytes)
    return replace(
        plan,
        in_room=_room(_in_product(packed, plan), plan, most, memory.block),
        out_room=_room(_out_product(packed, plan), plan, most, memory.block),
    )


def _packs(rows: int) -> int:
    """Blocks of out_proj's pack, a power of two, whose rows a thread block multiplies at a time."""
    packs = 1
    while 2 * packs * rows <= _MOST_TILES * _TILE and 2 * packs <= _MOST_PARTS:
        packs *= 2
    return packs


class _Product(NamedTuple):
    """What decides the shared memory of a product.

    Attributes:
        kernel: its name.
        bits: of a weight.
        tiles: of 16 rows, at a time.
        units: of a thread block.
        fixed: bytes beside weights and tokens.
    """

    kernel: str
    bits: int
    tiles: int
    units: int
    fixed: int

    def total(self, plan: BatchPlan, room: int) -> int:
        """Bytes with so many units; the sums take the place of weights and tokens."""
        rows, unpacked = self.tiles * _TILE, _CODE_SLOTS if self.bits == 4 and plan.tokens == 64 else 0
        weights = (room + unpacked) * rows * 64
        tokens = _TOKEN_SLOTS[plan.tokens] * plan.tokens * 64
        sums = max(rows * (plan.tokens + 4), plan.tokens * (rows + 8)) * 4
        return self.fixed + _FRONT + plan.column_parts * max(weights + tokens, sums)


def _in_product(packed: PackedBlock, plan: BatchPlan) -> _Product:
    hk, matrix = packed.hk, packed.in_proj
    multipliers = 0 if matrix.multipliers is None else matrix.multipliers[0].numel()
    sizes = (
        _CONSTANTS * hk * 4,
        hk * plan.tokens * 4,
        plan.tokens * hk,
        plan.tokens * 4,
        hk * 4,
        _x_weight_bytes(packed),
        multipliers,
    )
    return _Product("batch_in", matrix.bits, plan.in_tiles, matrix.units, _sum(*sizes))


def _out_product(packed: PackedBlock, plan: BatchPlan) -> _Product:
    matrix = packed.out_proj
    multipliers = 0 if matrix.multipliers is None else plan.out_packs * matrix.multipliers[0].numel()
    tiles = -(-plan.out_packs * matrix.rows // _TILE)
    return _Product("batch_out", matrix.bits, tiles, -(-matrix.units // plan.out_parts), _sum(multipliers))


def _room(product: _Product, plan: BatchPlan, most: int, limit: int) -> int:
    """Units of a part of the columns that fit into ``most`` bytes, or the fewest within the limit."""
    # A part may begin and end within a unit of W4.
    need = min(_MOST_ROOM, -(-product.units // plan.column_parts) + (product.bits == 4))
    least = min(need, _TOKEN_SLOTS[plan.tokens])
    fitting = [room for room in range(least, need + 1) if product.total(plan, room) <= most]
    if fitting:
        return fitting[-1]
    wanted = product.total(plan, least)
    if wanted > limit:
        raise ShapeError(f"{product.kernel}: a block needs {wanted} bytes of shared memory, got {limit}")
    return least


def in_bytes(packed: PackedBlock, plan: BatchPlan) -> int:
    """Dynamic shared memory of batch_in."""
    return _in_product(packed, plan).total(plan, plan.in_room)


def out_bytes(packed: PackedBlock, plan: BatchPlan) -> int:
    """Dynamic shared memory of batch_out."""
    return _out_product(packed, plan).total(plan, plan.out_room)


def norm_parts(parts: int) -> int:
    """The instance of batch_norm that adds so many parts."""
    return next(most for most in NORM_PARTS if most >= parts)


def conv_bytes(packed: PackedBlock, plan: BatchPlan) -> int:
    """Dynamic shared memory of batch_conv."""
    return _sum(
        _CONSTANTS * packed.hk * 4,
        plan.tokens * packed.hk,
        THREADS * 4,
        4 * plan.tokens * 4,
        _x_weight_bytes(packed),
    )


def _x_weight_bytes(packed: PackedBlock) -> int:
    """x_proj's weights of a block's channels, rows apart so that they lie in different banks."""
    return packed.hk // 4 * (packed.x_rows + 8) * 4


def scan_bytes(packed: PackedBlock, plan: BatchPlan) -> int:
    """Dynamic shared memory of batch_scan."""
    channels, dt_bytes = plan.scan_width * packed.hk, packed.dt_pieces * 16
    return _sum(
        channels * dt_bytes,
        channels * _STATES * 4,
        3 * channels * 4,
        SCAN_TOKENS * (dt_bytes + 16),
        2 * _STATES * SCAN_TOKENS * 4,
        channels * SCAN_TOKENS * 4,
        core_floats(packed.hk >> core_levels(packed.d_inner)) * 4,
        packed.x_rows * 4,
    )


def rotate_bytes() -> int:
    """Dynamic shared memory of batch_rotate."""
    return (BLOCKS + BLOCKS // 16) * SCAN_TOKENS * 4


def core_rows(order: int) -> tuple[int, int]:
    """Rows of the core of H_hk that a thread makes, and how many floats they are apart."""
    return (5, 8) if order % 5 == 0 else (min(order, 4), 4)


def core_floats(order: int) -> int:
    """Size of the table of the core's signs."""
    rows, pitch = core_rows(order)
    return order * (order // rows) * pitch


def core_levels(d_inner: int) -> int:
    """log2 of the Sylvester part of H_hk, where ``H_n = H_hk (x) S_128``."""
    core = plan_for(d_inner).core
    return (d_inner // BLOCKS // core).bit_length() - 1


def _sum(*sizes: int) -> int:
    """Arrays of whole 16 bytes, as decode_parts.cuh's Carver cuts them."""
    return sum(-(-size // 16) * 16 for size in sizes)
