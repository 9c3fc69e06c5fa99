"""Which kernel multiplies a shape, and how it is cut; plain arithmetic, no GPU."""

from dataclasses import dataclass, replace
from functools import lru_cache

# Tokens of one tile of the skinny kernel; a tile of the tensor core has 8.
_TILE_TOKENS = 8
_TILE_ROWS = 16
# Bytes of a weight row that the skinny kernel's warp reads in one round.
_ROUND_BYTES = 128
# Columns of a packed row that are multiplied by one multiplier at a time.
CHUNK = 128
_ALIGNMENT = 16
# Up to here the skinny kernel reads the weight once for all tokens.
_FEW_TOKENS = 32
# Where a weight has many rows, tiles overtake it earlier; a packed weight would first be expanded for them.
_FEW_TOKENS_MANY_ROWS = 8
MOST_SKINNY_TOKENS = 64
# Warps of the skinny kernel that keep a large GPU's memory busy, all blocks together.
_BUSY_WARPS = 3200
_LEAST_WARPS = 4
# Float tokens that one pass of `linear_rows` takes, and up to where passes beat a product on tensor cores.
ROW_TOKENS = (1, 4)
FEW_FLOAT_TOKENS = 1
# Columns of one 16-byte piece of a 16-bit row; up to one piece a lane a warp takes several rows at once.
HALF_COLUMNS = 8
_SHORT_PIECES = 32
# Warps of a block of `linear_halves`, and what a round costs beside a warp's row.
_HALF_WARPS, _HALF_ROUND = range(8, 25), 4
# Tokens that one tile of the head takes, their 16-bit parts made beforehand.
MOST_FEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SkinnyPlan:
    """How the skinny kernel is cut.

    Attributes:
        row_tiles: tiles of 16 weight rows a warp.
        token_tiles: tiles of 8 tokens a warp.
        warps: warps of a block that share the columns.
        row_warps: groups of such warps in a block, each with rows of its own.
    """

    row_tiles: int
    token_tiles: int
    warps: int
    row_warps: int

    @property
    def rows(self) -> int:
        """Weight rows a block."""
        return _TILE_ROWS * self.row_tiles * self.row_warps

    @property
    def tokens(self) -> int:
        """Tokens a block."""
        return _TILE_TOKENS * self.token_tiles

    @property
    def shared_bytes(self) -> int:
        """Shared memory for the warps' sums."""
        return 4 * self.warps * _TILE_ROWS * self.row_tiles * self.row_warps * self.tokens


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How a Triton product is cut.

    Attributes:
        tokens: rows of x a tile.
        rows: rows of the weight a tile.
        columns: columns of one step.
        warps: warps a program.
        stages: steps whose loads are in flight.
        parts: programs that share the columns of one tile; their int32 sums are added by a second kernel.
        registers: most of a thread, so that more programs fit on a multiprocessor; 0 leaves it open.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    parts: int = 1
    registers: int = 0


@dataclass(frozen=True, slots=True)
class HalfPlan:
    """How the product of one 16-bit token is cut.

    Attributes:
        rows: of the weight that a warp takes at once.
        pieces: of 16 bytes that a lane reads of each before it adds them.
        split: warps that share a row.
        warps: of a block.
        blocks: of the launch, at most one a multiprocessor where rows fill their warps.
    """

    rows: int
    pieces: int
    split: int
    warps: int
    blocks: int


# Rows a warp, pieces a lane and warps a row of `linear_halves`: short rows, few rows, and all others.
_HALF_SHORT, _HALF_FEW, _HALF_MANY = (4, 1, 1), (1, 3, 8), (1, 5, 1)
HALF_TILES = (_HALF_SHORT, _HALF_FEW, _HALF_MANY)
# Instances of the skinny kernel: (row tiles, token tiles), by the tokens they take.
SKINNY_TILES = ((1, 1), (1, 2), (2, 4), (2, 8))
# Tiles from large to small, with the least number of them a multiprocessor that keeps it busy: a large tile
# reads less, many tiles end together.
_TILES = (
    (8.0, TilePlan(128, 128, 128, 4, 3)),
    (4.0, TilePlan(128, 128, 128, 8, 3)),
    (4.0, TilePlan(64, 128, 128, 4, 4)),
    # Three programs a multiprocessor.
    (2.0, TilePlan(64, 128, 128, 4, 3, registers=168)),
    (1.4, TilePlan(128, 64, 128, 4, 4)),
    (0.3, TilePlan(64, 64, 128, 4, 5)),
    (0.0, TilePlan(64, 32, 128, 4, 6)),
)
# For few columns, where the outputs are most of the bytes.
_MASKED = TilePlan(64, 128, 64, 4, 3)
_SHORT_TILES = (
    (4.0, TilePlan(128, 128, 32, 4, 3)),
    # Few steps: masks cost less than more of them.
    (4.0, _MASKED),
    (2.0, TilePlan(128, 128, 32, 4, 5)),
    (1.0, TilePlan(64, 64, 32, 4, 5)),
    (0.0, TilePlan(64, 32, 32, 4, 6)),
)
_SHORT_COLUMNS = 512
# For up to 64 tokens, by the rows of the weight; and for up to 16 of a weight of many rows.
_FEW_MANY_ROWS = TilePlan(64, 64, 128, 4, 6)
_FEW_FEW_ROWS = TilePlan(64, 32, 512, 4, 3)
_FEW_NARROW = TilePlan(16, 32, 512, 4, 4)
_LEAST_MANY_ROWS = TilePlan(16, 64, 256, 4, 5)
_MANY_ROWS = 4096
_NARROW_ROWS = 1024
_MOST_TILED_FEW = 64
# Columns of a row that lie together in a weight packed for decoding.
PIECE_COLUMNS = 64
# Rows of a tile of such a weight: in_proj's next 128 channels are the next row of each thread block.
PIECE_ROWS = 128
# Columns that one instruction of the tensor core takes.
_LEAST_COLUMNS = 32
# Steps below which a part of the columns is not worth a second kernel.
_LEAST_STEPS = 8
_MOST_PARTS = 4


def is_skinny(tokens: int, rows: int, k: int, *, packed: bool, group_size: int = CHUNK) -> bool:
    """Whether the skinny kernel takes a shape; operands must also be aligned to 16 bytes."""
    if packed:
        return tokens <= _FEW_TOKENS and k % (2 * _ALIGNMENT) == 0 and group_size % CHUNK == 0
    many = rows > _MANY_ROWS and k > _SHORT_COLUMNS
    return tokens <= (_FEW_TOKENS_MANY_ROWS if many else _FEW_TOKENS) and k % _ALIGNMENT == 0


@lru_cache(maxsize=1024)
def skinny_plan(tokens: int, rows: int, k: int, *, packed: bool) -> SkinnyPlan:
    """The cut with the fewest rounds a warp, and of those the fewest warps.

    Many rows make many blocks, which keep the memory busy with fewer warps each.

    >>> skinny_plan(1, 10240, 2560, packed=False)
    SkinnyPlan(row_tiles=1, token_tiles=1, warps=5, row_warps=1)
    >>> skinny_plan(1, 2560, 5120, packed=False).warps
    10
    >>> skinny_plan(33, 5120, 160, packed=False)
    SkinnyPlan(row_tiles=2, token_tiles=8, warps=2, row_warps=2)
    """
    fitting = [tiles for tiles in SKINNY_TILES if tiles[1] * _TILE_TOKENS >= tokens]
    row_tiles, token_tiles = fitting[0] if fitting else SKINNY_TILES[-1]
    rounds = -(-(k // 2 if packed else k) // _ROUND_BYTES)
    blocks = -(-rows // (_TILE_ROWS * row_tiles))
    most = max(_LEAST_WARPS, min(most_warps(token_tiles), _BUSY_WARPS // blocks))
    if packed:
        # Half the bytes leave less to wait for, and two blocks of ten warps and two token tiles do not fit
        # on a multiprocessor.
        most = min(most, 8) if token_tiles > 1 else max(_LEAST_WARPS, most - (most < most_warps(1)))
    warps = min(range(1, most + 1), key=lambda count: (-(-rounds // count), count))
    return SkinnyPlan(row_tiles, token_tiles, warps, max(1, 4 // warps))


def most_warps(token_tiles: int) -> int:
    """Warps a block that the skinny kernel's launch bounds allow."""
    return 10 if token_tiles < 4 else 8


@lru_cache(maxsize=1024)
def tile_plan(tokens: int, rows: int, k: int, processors: int) -> TilePlan:
    """The tile of a Triton product.

    >>> tile_plan(2048, 10240, 2560, 132)
    TilePlan(tokens=128, rows=128, columns=128, warps=4, stages=3, parts=1, registers=0)
    >>> tile_plan(1024, 192, 5120, 132).parts
    4
    """
    if tokens <= _MOST_TILED_FEW:
        plan = _few_tokens(tokens, rows)
    else:
        tiles = _SHORT_TILES if k <= _SHORT_COLUMNS else _TILES
        plan = next(plan for least, plan in tiles if _tiles(plan, tokens, rows) >= least * processors)
    columns = plan.columns
    # Steps of whole length need no masks.
    while columns > _LEAST_COLUMNS and k % columns and plan is not _MASKED:
        columns //= 2
    parts, count, steps = 1, _tiles(plan, tokens, rows), -(-k // columns)
    least = 2 if plan is _FEW_NARROW else _LEAST_STEPS
    if 2 * count < processors:
        while parts < _MOST_PARTS and count * parts < processors and steps // (2 * parts) >= least:
            parts *= 2
    return replace(plan, columns=columns, parts=parts)


def _few_tokens(tokens: int, rows: int) -> TilePlan:
    if rows > _MANY_ROWS:
        return _LEAST_MANY_ROWS if tokens <= 2 * _TILE_TOKENS else _FEW_MANY_ROWS
    return _FEW_NARROW if rows < _NARROW_ROWS else _FEW_FEW_ROWS


@lru_cache(maxsize=256)
def half_plan(rows: int, k: int, processors: int) -> HalfPlan:
    """The cut of a product of one 16-bit token whose busiest multiprocessor has the least to read.

    >>> half_plan(10240, 2560, 132)
    HalfPlan(rows=1, pieces=5, split=1, warps=20, blocks=132)
    >>> half_plan(192, 5120, 132)
    HalfPlan(rows=1, pieces=3, split=8, warps=16, blocks=96)
    """
    if k <= HALF_COLUMNS * _SHORT_PIECES:
        tile = _HALF_SHORT
    else:
        tile = _HALF_FEW if rows < _HALF_WARPS[0] * processors else _HALF_MANY
    units = -(-rows // tile[0])

    def cost(warps: int) -> int:
        return -(-units * tile[2] // (warps * processors)) * (warps + _HALF_ROUND)

    warps = min((count for count in _HALF_WARPS if count % tile[2] == 0), key=cost)
    return HalfPlan(*tile, warps, min(processors, -(-units * tile[2] // warps)))


@lru_cache(maxsize=256)
def few_float_plan(tokens: int, itemsize: int) -> TilePlan:
    """The tile of a product of up to `MOST_FEW_TOKENS` float32 tokens, which are all in one tile.

    Args:
        tokens: rows of x.
        itemsize: bytes of an element of the weight.
    """
    wide = itemsize > 1
    if tokens <= 16:
        return TilePlan(16, 64, 128, 4, 4 if wide else 5)
    if tokens <= 32:
        return TilePlan(32, 128, 64, 4, 4 if wide else 5)
    return TilePlan(64, 128, 64, 4, 3 if wide else 4)


@lru_cache(maxsize=256)
def float_tile_plan(tokens: int) -> TilePlan:
    """The tile of a product of float32 tokens with int8 or 16-bit rows."""
    if tokens <= 16:
        return TilePlan(16, 64, 128, 4, 4)
    if tokens <= 64:
        return TilePlan(64, 64, 64, 4, 4)
    return TilePlan(128, 128, 64, 8, 3)


def _tiles(plan: TilePlan, tokens: int, rows: int) -> int:
    return -(-tokens // plan.tokens) * -(-rows // plan.rows)
