import inspect
import math

import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.hadamard import cuda, reference
from qmamba_cli.kernels.hadamard.matrix import core_matrix, plan_for

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PROCESSORS = 132
# Orders with a kernel to int8 that keeps its blocks: on tensor cores, and others.
TENSOR = (1536, 2048, 3072, 4096, 5120)
STREAMED = (7168, 8192)
MAX_SHARED_BYTES = 99 * 1024
# Orders 2^k, then K * 2^k for compiled cores, for cores read at run time, then widths in blocks.
WIDTHS = (
    *(2**k for k in range(15)),
    *(12, 24, 96, 192, 384, 768, 1536, 3072, 12288),
    *(20, 40, 160, 320, 640, 2560, 5120, 10240, 20480),
    *(28, 56, 224, 448, 1792, 3584, 7168),
    *(36, 44, 72, 148, 176, 2304, 5632),
    *(31, 90, 100, 172, 1416),
)


def test_signatures_are_equal():
    assert inspect.signature(cuda.hadamard) == inspect.signature(reference.hadamard)


def test_a_cpu_tensor_is_refused():
    with pytest.raises(ShapeError, match="expected a CUDA tensor"):
        cuda.hadamard(torch.zeros(4))


@pytest.mark.parametrize("rows", [1, 3, 131, 1000, 100_000])
@pytest.mark.parametrize("width", [width for width in WIDTHS if plan_for(width).order > 16])
def test_layout_of_rows(width, rows):
    plan = plan_for(width)
    config = cuda.row_config(plan, rows, PROCESSORS)
    assert config.core << config.bits == plan.order
    # 16-byte stores: blocks begin at a multiple of 16 elements.
    assert config.tile_rows * plan.order % 16 == 0
    assert config.shared_bytes == 4 * config.tile_rows * config.core * config.segment_stride
    assert config.shared_bytes <= MAX_SHARED_BYTES
    assert config.threads % 32 == 0 and config.threads <= 128
    # The kernel's tiles are indexed in 32 bits; short rows share a block only where there are enough of them.
    assert config.tile_rows == 1 or config.tile_rows * plan.order <= max(4096, 16 * plan.order)
    assert (config.blocks - 1) * config.tile_rows < rows <= config.blocks * config.tile_rows


@pytest.mark.parametrize("rows", [1, 3, 131, 1000, 2048, 8192, 100_000])
@pytest.mark.parametrize("width", STREAMED)
def test_layout_of_streams(width, rows):
    plan = plan_for(width)
    for shared_bytes in (100 * 1024, 228 * 1024):
        config = cuda.stream_config(plan, rows, 4, PROCESSORS, shared_bytes)
        assert config.core << config.bits == plan.order
        assert config.tile_rows == 1 and config.stage_bytes == plan.order * 4
        # Bulk copies and 16-byte stores.
        assert config.stage_bytes % 16 == 0
        tile_bytes = 4 * config.core * config.segment_stride
        assert config.shared_bytes == config.stage_bytes + tile_bytes <= MAX_SHARED_BYTES
        assert config.threads % 32 == 0 and config.threads <= max(128, 8 * config.core)
        # Nobody is without a tile, and all blocks are resident at once.
        resident = max(1, shared_bytes // (config.shared_bytes + 1024))
        assert 1 <= config.blocks <= min(rows, resident * PROCESSORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 131, 1000, 2048, 8192, 100_000])
@pytest.mark.parametrize("width", TENSOR)
def test_layout_on_tensor_cores(width, rows, dtype):
    plan = plan_for(width)
    for shared_bytes in (100 * 1024, 228 * 1024):
        config = cuda.tensor_config(plan, rows, dtype, PROCESSORS, shared_bytes)
        assert config.core << config.bits == plan.order
        # A warp has a row, or half of the work of a long float32 row.
        halves = 2 if dtype == torch.float32 and config.bits == 8 else 1
        assert config.threads == 32 * halves * config.tile_rows
        # A barrier a row; for halves 512 bytes for each 16 by 16 of the matrix of 4 K terms.
        beside = 8 * config.tile_rows if dtype == torch.float32 else (config.core // 4) ** 2 * 512
        assert config.stage_bytes == config.tile_rows * plan.order * dtype.itemsize
        assert config.shared_bytes == config.stage_bytes + beside <= MAX_SHARED_BYTES
        tiles = -(-rows // config.tile_rows)
        resident = max(1, shared_bytes // (config.shared_bytes + 1024))
        assert 1 <= config.blocks <= min(tiles, resident * PROCESSORS)


@pytest.mark.parametrize("bits", range(11))
def test_segments_hold_their_padding(bits):
    last = (1 << bits) - 1
    place = last + (4 * (last >> 5) + 16 * (last >> 8) if bits >= 5 else 0)
    stride = cuda.segment_stride(bits)
    assert stride > place
    # float4 accesses of chunks of 16 stay aligned.
    assert bits < 4 or stride % 4 == 0


@pytest.mark.parametrize("width", [24576, 2**15])
def test_rows_that_do_not_fit_have_no_layout(width):
    assert cuda.row_config(plan_for(width), 8, PROCESSORS) is None


@pytest.mark.parametrize("core", [12, 20, 28])
def test_a_compiled_core_is_the_matrix(core):
    order, *masks = cuda.core_arguments(core).split(", ")
    rows = [[-1.0 if int(mask.rstrip("u"), 16) >> j & 1 else 1.0 for j in range(core)] for mask in masks]
    assert int(order) == core
    assert_exact("core", torch.tensor(rows, dtype=torch.float64), core_matrix(core))


def test_entries_are_all_that_can_be_launched():
    assert len(set(cuda.ENTRIES)) == len(cuda.ENTRIES) == 30


def exact_and_budget(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 result and what float32 sums may err by, on the CPU."""
    plan = plan_for(x.shape[-1])
    exponent = round(math.log2(plan.order // plan.core))
    terms = plan.core + 32 * -(-exponent // 5) + 1
    blocks = x.double().abs().reshape(-1, plan.order).sum(1, keepdim=True) / math.sqrt(plan.order)
    magnitude = blocks.expand(-1, plan.order).reshape(x.shape)
    return reference.hadamard(x.double()), tolerances.HADAMARD.budget(magnitude, terms)


def grid_of(exact: torch.Tensor, saturated: float = 1.0) -> float:
    # No simple fraction of the largest value, which would put many elements on ties.
    return float(exact.abs().max()) / (127.37 * saturated)


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_float32(torch_rng, width):
    for rows in (1, 7):
        x = torch.randn(rows, width, generator=torch_rng)
        exact, budget = exact_and_budget(x)
        assert_close("hadamard", cuda.hadamard(x.cuda()).cpu(), exact, budget)


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_int8(torch_rng, width):
    for rows, saturated in ((1, 1.0), (600, 1.0), (7, 3.0)):
        x = torch.randn(rows, width, generator=torch_rng)
        exact = reference.hadamard(x.double())
        scale = grid_of(exact, saturated)
        got = cuda.hadamard(x.cuda(), out_scale=scale).cpu()
        row = tolerances.GRID
        assert_grid("hadamard", got, oracles.quantize(exact, scale), share=row.share, steps=row.steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 16, 31, 96, 256, 1536, 5120, 2304])
def test_other_dtypes(torch_rng, width, dtype):
    x = torch.randn(40, width, generator=torch_rng).to(dtype)
    exact, budget = exact_and_budget(x)
    got = cuda.hadamard(x.cuda())
    assert got.dtype == dtype
    # One more rounding, of half a unit; a whole one is allowed. float16 also has a smallest step.
    info = torch.finfo(dtype)
    rounding = exact.abs() * info.eps + info.smallest_normal * info.eps
    assert_close("hadamard", got.cpu(), exact, budget + rounding)
    scale = grid_of(exact)
    got = cuda.hadamard(x.cuda(), out_scale=scale).cpu()
    assert_grid("hadamard", got, oracles.quantize(exact, scale), share=tolerances.GRID.share)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", (*TENSOR, *STREAMED))
def test_tiles_in_turn_equal_tiles_alone(torch_rng, width, dtype):
    # Several turns of every block of any GPU, and a last tile that is not full.
    x = torch.randn(2501, width, generator=torch_rng).to(dtype).cuda()
    whole = cuda.hadamard(x, out_scale=0.03)
    for rows in (slice(0, 1), slice(1, 200), slice(2000, 2501)):
        assert_exact("rows", cuda.hadamard(x[rows], out_scale=0.03), whole[rows])
    # The same sums in the same order, one block a tile.
    y = cuda.hadamard(x.float()).cpu()
    row = tolerances.GRID
    assert_grid("hadamard", whole.cpu(), oracles.quantize(y, 0.03), share=row.share, steps=row.steps)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [24576, 2**15])
def test_rows_beyond_shared_memory(torch_rng, width):
    x = torch.randn(3, width, generator=torch_rng)
    exact, budget = exact_and_budget(x)
    assert_close("hadamard", cuda.hadamard(x.cuda()).cpu(), exact, budget)
    scale = grid_of(exact)
    for dtype in (torch.float32, torch.float16):
        expected = oracles.quantize(reference.hadamard(x.to(dtype).double()), scale)
        got = cuda.hadamard(x.to(dtype).cuda(), out_scale=scale).cpu()
        assert_grid("hadamard", got, expected, share=tolerances.GRID.share)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4, 16, 64, 256, 1024, 4096, 16384])
def test_ties_round_to_even(width):
    # An impulse spreads evenly, and orders 4^k have an exact root: every element is the same tie.
    steps = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5, -128.5, 0.0])
    rounded = torch.tensor([0, 2, 2, 0, -2, -2, 126, 127, -128, -128, 0], dtype=torch.int8)
    x = torch.zeros(len(steps), width)
    x[:, 0] = steps * math.sqrt(width)
    got = cuda.hadamard(x.cuda(), out_scale=1.0).cpu()
    assert_exact("hadamard", got, rounded.unsqueeze(1).expand(-1, width))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [12, 90, 256, 1536, 5120])
def test_saturates_and_never_wraps(width):
    # A constant row has all its energy where a row of the matrix is constant too: far outside the grid.
    x = torch.tensor([1.0, -1.0, 0.0]).unsqueeze(1).expand(3, width)
    exact = reference.hadamard(x.double())
    expected = torch.zeros(3, width, dtype=torch.int8)
    expected[exact > 1e-9], expected[exact < -1e-9] = 127, -128
    assert_exact("hadamard", cuda.hadamard(x.cuda(), out_scale=1e-6).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((torch.float16, value) for value in (1.0, 65504.0, 6e-8)),
        *((torch.float32, value) for value in (1.0, 2.0**100, 2.0**-100)),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", TENSOR)
def test_extremes_saturate_and_never_wrap(width, dtype, value):
    # Almost from the smallest to the largest at every scale, past any integer that a kernel counts with.
    x = torch.tensor([value, -value, 0.0], dtype=dtype).unsqueeze(1).expand(3, width)
    exact = reference.hadamard(x.double())
    # What is 0 but for the rounding of the root.
    exact[exact.abs() < 1e-9 * value] = 0
    for out_scale in (1e-8, 1e-6, 3e-3, 0.37, 1e4):
        expected = (exact / out_scale).round().clamp(-128, 127).to(torch.int8)
        got = cuda.hadamard(x.cuda(), out_scale=out_scale).cpu()
        assert_grid("hadamard", got, expected, share=1e-3, steps=1)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 24, 100, 256, 1536, 2304, 5120])
def test_a_row_does_not_depend_on_the_others(torch_rng, width):
    # Few rows get a block each, many share one.
    x = torch.randn(2000, width, generator=torch_rng).cuda()
    whole = cuda.hadamard(x)
    for rows in (slice(0, 1), slice(5, 8), slice(1990, 2000)):
        assert_exact("rows", cuda.hadamard(x[rows]), whole[rows])
    assert_exact("again", cuda.hadamard(x), whole)
    assert_exact("int8", cuda.hadamard(x[3:4], out_scale=0.03), cuda.hadamard(x, out_scale=0.03)[3:4])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4, 24, 31, 256, 1536])
def test_views_are_not_misread(torch_rng, width):
    x = torch.randn(6, 5, width + 3, generator=torch_rng).cuda()
    whole = cuda.hadamard(x[..., 1 : width + 1].contiguous())
    assert_exact("slice", cuda.hadamard(x[..., 1 : width + 1]), whole)
    swapped = cuda.hadamard(x[..., 1 : width + 1].transpose(0, 1))
    assert_exact("transposed", swapped, whole.transpose(0, 1))
    # A contiguous tensor that starts 4 bytes off the boundary of vector loads.
    shifted = torch.empty(1 + 30 * width, device="cuda")[1:].view(6, 5, width)
    shifted.copy_(x[..., 1 : width + 1])
    assert_exact("shifted", cuda.hadamard(shifted), whole)


@pytest.mark.gpu
def test_no_rows():
    got = cuda.hadamard(torch.zeros(0, 256, device="cuda"), out_scale=1.0)
    assert got.shape == (0, 256) and got.dtype == torch.int8


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 1536])
@pytest.mark.graph
def test_runs_in_a_captured_graph(torch_rng, width):
    x = torch.randn(3, width, generator=torch_rng).cuda()
    expected = cuda.hadamard(x, out_scale=0.05)
    still = x.clone()
    x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cuda.hadamard(x, out_scale=0.05)
    x.copy_(still)
    graph.replay()
    assert_exact("graph", got, expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.large
def test_more_than_2_to_31_elements():
    rows, width = 2**20 + 3, 2048
    x = torch.zeros(rows, width, dtype=torch.float16, device="cuda")
    x[-1, 0] = 4.0
    got = cuda.hadamard(x, out_scale=float(x[-1, 0]) / math.sqrt(width) / 8)
    assert_exact("last row", got[-1], torch.full((width,), 8, dtype=torch.int8, device="cuda"))
    assert int(got[:-1].any()) == 0
