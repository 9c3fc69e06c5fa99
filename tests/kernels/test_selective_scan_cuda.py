import inspect
import re
from itertools import pairwise

import numpy as np
import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid
from test_selective_scan import SCALES, STATE_SCALE, Case, assert_scan, half_rounding, make

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels._source import kernel_source
from qmamba_cli.kernels.selective_scan import cuda, reference
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import dequantize, quantize

CHUNKED, SEQUENTIAL = ScanOrder.CHUNKED, ScanOrder.SEQUENTIAL
H200 = cuda.Gpu(multiprocessors=132, block_shared_bytes=232448, shared_bytes=233472)
# The smallest shared memory of the supported generations.
SMALL = cuda.Gpu(multiprocessors=24, block_shared_bytes=101376, shared_bytes=102400)
TYPES = ("signed char, signed char", "signed char, float", "float, float", "F16, F16", "BF16, BF16")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
LENGTHS = (1, 2, 3, 4, 63, 64, 65, 127, 129, 1023, 1025, 2049, 8193)
WIDTHS = ((8, 3), (31, 8), (64, 1), (96, 3), (512, 8), (1536, 3), (5120, 1))
OPERANDS = ("u", "dt", "B", "C", "z")


def config_of(entry: str) -> cuda.LaunchConfig:
    """A launch of this instance that is legal for every shape with few enough states."""
    kernel, arguments = entry.rstrip(">").split("<")
    operand, u, *sizes = arguments.split(", ")
    if kernel == "selective_scan_lanes":
        # 3 warps that compute and 2 that fetch.
        lanes = int(sizes[0])
        return cuda.LaunchConfig(
            entry=entry,
            threads=5 * 32,
            channels=3 * 32 // lanes,
            lanes_per_channel=lanes,
            shared_bytes=cuda.lanes_shared_bytes(lanes, f"{operand}, {u}"),
        )
    lanes = 8 if kernel == "selective_scan_step" else int(sizes[1])
    return cuda.LaunchConfig(entry=entry, threads=128, channels=128 // lanes, lanes_per_channel=lanes)


def states_of(entry: str) -> int:
    if "walk" not in entry:
        return 16
    states, lanes = entry.rstrip(">").split(", ")[-2:]
    return int(states) * int(lanes)


def of_types(case: Case, types: str) -> Case:
    """Operands of a kernel's C++ types, from int8 ones or float32 ones."""
    operand, u = types.split(", ")
    if (operand, u) == ("signed char", "float"):
        return case._replace(u=case.u.float() * SCALES["u_scale"] + 0.01)
    dtype = DTYPES.get(operand, case.u.dtype)
    return case._replace(**{name: getattr(case, name).to(dtype) for name in OPERANDS})


def assert_rounded_scan(got: reference.ScanResult, exact: oracles.Scan) -> None:
    """`assert_scan` for any dtype of y, which is rounded once."""
    rounding = 0.0 if got.y.dtype == torch.float32 else half_rounding(got.y.dtype, exact)
    assert_close("y", got.y, exact.y, exact.y_bound + rounding)
    assert_close("state", got.state, exact.states[:, -1], exact.state_bounds[:, -1])


def embedded(case: Case) -> Case:
    """The same values inside larger tensors of other values, channels adjacent, no pointer aligned."""

    def inside(x: torch.Tensor) -> torch.Tensor:
        b, c, l = x.shape
        poison = 127 if x.dtype == torch.int8 else float("nan")
        whole = torch.full((b, l + 1, c + 7), poison, dtype=x.dtype)
        whole[:, :l, 3 : c + 3] = x.transpose(1, 2)
        return whole[:, :l, 3 : c + 3].transpose(1, 2)

    return case._replace(**{name: inside(getattr(case, name)) for name in OPERANDS})


def turned(case: Case) -> Case:
    """The same values with channels adjacent and every row aligned."""
    return case._replace(
        **{name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in OPERANDS}
    )


def run(case: Case, order: ScanOrder = CHUNKED, **options):
    options = {**case.options(), **options}
    moved = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in options.items()
    }
    # Tensor.cuda() packs; an embedded view must arrive as a view.
    tensors = [
        x if x._base is None else x._base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())
        for x in case
    ]
    result = cuda.selective_scan(*(x.cuda() for x in tensors), order=order, **moved)
    return reference.ScanResult(*(None if x is None else x.cpu() for x in result))


def test_signatures_are_equal():
    assert inspect.signature(cuda.selective_scan) == inspect.signature(reference.selective_scan)


@pytest.mark.parametrize("gpu", [H200, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("types", TYPES)
def test_every_plan_is_a_launch_that_fits(gpu, types):
    used = set()
    # Other operands with more states are widened.
    for n in (1, 4, 8, 9, 16, 17, 32, 64, 100, 128) if types == "float, float" else (1, 4, 8, 9, 16):
        for b, d in ((1, 1), (1, 768), (3, 1536), (1, 5120), (8, 1536), (8, 5120), (64, 5120)):
            for l in (1, 2, 127, 128, 1025):
                for order in ScanOrder:
                    config = cuda.plan(b, d, l, n, order, types=types, gpu=gpu)
                    assert config.entry in cuda.ENTRIES
                    helpers = 64 if "lanes<" in config.entry else 0
                    assert config.channels * config.lanes_per_channel == config.threads - helpers <= 320
                    assert config.shared_bytes <= gpu.block_shared_bytes
                    if helpers:
                        assert n <= 16 and order is CHUNKED
                    elif "step" in config.entry:
                        assert l == 1 and 4 * config.lanes_per_channel >= n and config.lanes_per_channel <= 32
                    else:
                        assert states_of(config.entry) >= n
                    used.add(config.entry)
    assert len(used) > 2


@pytest.mark.parametrize(
    ("b", "d", "l", "kernel", "channels"),
    [
        (8, 5120, 1024, "selective_scan_walk<signed char, signed char, 8, 2>", 64),
        (8, 1536, 1024, "selective_scan_walk<signed char, signed char, 4, 4>", 32),
        (1, 5120, 2048, "selective_scan_lanes<signed char, signed char, 8>", 40),
        (1, 1536, 1024, "selective_scan_lanes<signed char, signed char, 16>", 12),
    ],
)
def test_the_measured_shapes_take_the_kernel_that_was_fastest(b, d, l, kernel, channels):
    config = cuda.plan(b, d, l, 16, CHUNKED, types=TYPES[0], gpu=H200)
    assert (config.entry, config.channels) == (kernel, channels)


@pytest.fixture
def recorded(monkeypatch):
    """Launches are recorded, not run: what the host side does is testable without a GPU."""
    launches = []
    monkeypatch.setattr(cuda, "launch", lambda *args, **kwargs: launches.append((args, kwargs)))
    monkeypatch.setattr(cuda, "require_cuda", lambda name, tensor: tensor)
    monkeypatch.setattr(cuda, "contiguous", lambda name, tensor: tensor.contiguous())
    monkeypatch.setattr(cuda, "gpu_of", lambda device: H200)
    return launches


def test_arguments_match_the_parameters_of_the_kernels(torch_rng, recorded):
    case = make(torch_rng, n=16, l=70)
    cuda.selective_scan(*case, order=CHUNKED, **SCALES, state_scale=0.1, return_chunk_states=True)
    text = kernel_source(cuda.SOURCE)
    macro = re.search(r"#define SCAN_PARAMETERS((?:.*\\\n)*.*)", text)[1].replace("\\\n", " ")
    wanted = [re.sub(r"\s+", " ", parameter).strip() for parameter in macro.split(",")]
    given = recorded[0][1]["args"]
    assert len(given) == len(wanted)
    kinds = {"long long": np.int64, "float": np.float32, "int": np.int32}
    for parameter, value in zip(wanted, given, strict=True):
        if "*" in parameter:
            assert value is None or isinstance(value, torch.Tensor), parameter
        else:
            assert type(value) is kinds[parameter.rsplit(" ", 1)[0]], parameter


def test_adjacent_channels_are_read_in_place_and_other_layouts_copied(torch_rng, recorded):
    case = embedded(make(torch_rng, n=16, l=70))
    cuda.selective_scan(*case, order=CHUNKED, **SCALES)
    args = recorded[0][1]["args"]
    for given, name in zip(args, ("u", "dt", "z", "B", "C"), strict=False):
        assert given.data_ptr() == getattr(case, name).data_ptr(), name
    assert [int(stride) for stride in args[13:15]] == [71 * 12, 12]
    packed = make(torch_rng, n=16, l=70)
    cuda.selective_scan(*packed, order=CHUNKED, **SCALES)
    u = recorded[1][1]["args"][0]
    assert u.stride() == (70 * 5, 5, 1)
    assert_exact("u", u, packed.u.transpose(1, 2).contiguous())


def test_refusals(torch_rng, recorded):
    case = make(torch_rng, l=4)
    with pytest.raises(ShapeError, match="`n` must be at most 128 on a GPU, got 129"):
        cuda.selective_scan(*make(torch_rng, n=129, l=2), order=CHUNKED, **SCALES)
    with pytest.raises(ShapeError, match="`D` must be"):
        cuda.selective_scan(*case._replace(D=case.D[:2]), order=CHUNKED, **SCALES)
    with pytest.raises(ShapeError, match=r"`A` must be .* float32"):
        cuda.selective_scan(*case._replace(A=case.A.double()), order=CHUNKED, **SCALES)
    for name in OPERANDS:
        missing = {**SCALES, f"{name.lower()}_scale": None}
        with pytest.raises(ShapeError, match=f"`{name}` is int8 and needs"):
            cuda.selective_scan(*case, order=CHUNKED, **missing)
    with pytest.raises(ShapeError, match="requantizing `u` needs"):
        cuda.selective_scan(*make(torch_rng, l=4, int8=False), order=CHUNKED, requantize_u=True)
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        cuda.selective_scan(*case, order=CHUNKED, **SCALES, state_scale=0.0)
    assert not recorded


def test_tensors_of_the_cpu_are_refused(torch_rng):
    with pytest.raises(ShapeError, match="expected a CUDA tensor"):
        cuda.selective_scan(*make(torch_rng, l=4), order=CHUNKED, **SCALES)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("entry", cuda.ENTRIES)
def test_every_instance_equals_the_oracle(torch_rng, monkeypatch, entry):
    config = config_of(entry)
    types = ", ".join(entry.split("<")[1].rstrip(">").split(", ")[:2])
    lengths = (1,) if "step" in entry else (3, 65, 530) if "lanes" in entry else (1, 65, 130, 300)
    monkeypatch.setattr(cuda, "plan", lambda *args, **kwargs: config)
    for l in lengths:
        for n, d in ((states_of(entry), 31), (states_of(entry) - 3, 70), (states_of(entry), 64)):
            case = of_types(make(torch_rng, b=2, d=d, n=n, l=l, int8=types.startswith("signed char")), types)
            state = torch.randn(2, d, n, generator=torch_rng)
            # The last width is copied in whole quads, the others one by one.
            placed = turned(case) if d == 64 else embedded(case)
            got = run(placed, state=state, return_chunk_states=True)
            exact = case.oracle(state)
            assert_rounded_scan(got, exact)
            for index, end in enumerate([*range(64, l, 64), l]):
                bound = tolerances.SCAN.factor * exact.state_bounds[:, end - 1]
                assert_close("chunk state", got.chunk_states[:, index], exact.states[:, end - 1], bound)
            assert_exact("last state", got.chunk_states[:, -1], got.state)
            if types.endswith(("char", "float")):
                assert_steps_of_u_are_taken(placed, case, state)


def assert_steps_of_u_are_taken(placed: Case, case: Case, state: torch.Tensor) -> None:
    """A scale a channel, of an int8 u and of one that is put on its grid."""
    steps = torch.logspace(-3, -1, case.A.shape[0])
    got = run(placed, state=state, u_scale=steps, requantize_u=True)
    u = case.u if case.u.dtype == torch.int8 else quantize(case.u, steps)
    real = case.real()._replace(u=dequantize(u, steps).double())
    exact = oracles.selective_scan(*real, state=state)
    assert_close("y", got.y, exact.y, tolerances.SCAN.factor * exact.y_bound)
    # A state that no u drives, since it is 0 on the grid, may decay to what the kernels take for zero.
    budget = tolerances.SCAN.factor * exact.state_bounds[:, -1] + 2.0**-126
    assert_close("state", got.state, exact.states[:, -1], budget)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("l", LENGTHS, ids="l{}".format)
def test_lengths(torch_rng, l):
    for int8 in (True, False):
        case = make(torch_rng, b=1, d=9, n=16, l=l, int8=int8)
        exact = case.oracle()
        for order in ScanOrder:
            assert_scan(run(case, order), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [17, 40])
def test_more_states_than_a_narrow_kernel_holds(torch_rng, n):
    case = make(torch_rng, b=2, d=9, n=n, l=70)
    for order in ScanOrder:
        assert_scan(run(case, order), case.oracle())
    half = case._replace(u=(case.u.float() * SCALES["u_scale"]).half())
    expected = run(half._replace(u=half.u.float()))
    got = run(half)
    assert got.y.dtype == torch.float16
    assert_exact("y", got.y, expected.y.half())


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("d", "b"), WIDTHS, ids=str)
def test_widths_with_an_int8_state(torch_rng, d, b):
    case = embedded(make(torch_rng, b=b, d=d, n=16, l=21))
    codes = torch.randint(-128, 128, (b, d, 16), dtype=torch.int8, generator=torch_rng)
    exact = case.oracle(codes.double() * torch.tensor(STATE_SCALE).double())
    expected = oracles.quantize(exact.states[:, -1], STATE_SCALE)
    for order in ScanOrder:
        got = run(case, order, state=codes, state_scale=STATE_SCALE)
        assert_scan(got, exact, state=False)
        assert_grid("state", got.state, expected, share=tolerances.GRID.share, steps=tolerances.GRID.steps)


@pytest.mark.gpu
@pytest.mark.parametrize("fill", [-128, 0, 127])
@pytest.mark.parametrize("l", [1, 67, 260])
def test_constant_operands(torch_rng, l, fill):
    case = make(torch_rng, b=1, d=33, n=16, l=l)
    case = case._replace(**{name: torch.full_like(getattr(case, name), fill) for name in OPERANDS})
    exact = case.oracle()
    for order in ScanOrder:
        got = run(case, order)
        assert_scan(got, exact)
        if fill == 0:
            assert not got.y.any() and not got.state.any()


@pytest.mark.gpu
@pytest.mark.parametrize("order", ScanOrder, ids=str)
@pytest.mark.parametrize("l", [1, 67, 300])
def test_three_ways_to_hand_over_the_same_u(torch_rng, order, l):
    case = make(torch_rng, b=2, d=33, n=16, l=l)
    scale = SCALES["u_scale"]
    off_grid = case.u.float() * scale + 0.4 * scale * torch.rand(case.u.shape, generator=torch_rng)
    assert_exact("grid", quantize(off_grid, scale), case.u)
    expected = run(case, order)
    on_grid = run(case._replace(u=dequantize(case.u, scale)), order)
    requantized = run(case._replace(u=off_grid), order, requantize_u=True)
    for got in (on_grid, requantized):
        assert_exact("y", got.y, expected.y)
        assert_exact("state", got.state, expected.state)


@pytest.mark.gpu
def test_gates_far_from_zero(torch_rng):
    case = make(torch_rng, b=1, d=8, n=16, l=130, int8=False)
    case = case._replace(z=torch.linspace(-120, 120, 130).expand(1, 8, 130).contiguous())
    got, exact = run(case), case.oracle()
    # Results below the smallest normal number are zero.
    tiny = torch.finfo(torch.float32).tiny
    assert_close("y", got.y, exact.y, exact.y_bound + 100 * tiny * (1 + exact.y.abs().amax()))


@pytest.mark.gpu
@pytest.mark.parametrize("order", ScanOrder, ids=str)
def test_a_call_continues_the_call_before(torch_rng, order):
    case = make(torch_rng, b=2, d=40, n=16, l=601)
    exact, state, parts = case.oracle(), None, []
    cuts = (0, 1, 64, 65, 321, 600, 601)
    for start, stop in pairwise(cuts):
        got = run(case.part(start, stop), order, state=state)
        state = got.state
        parts.append(got.y)
    factor = tolerances.SCAN.factor * len(cuts)
    assert_close("y", torch.cat(parts, dim=1), exact.y, factor * exact.y_bound)
    assert_close("state", state, exact.states[:, -1], factor * exact.state_bounds[:, -1])


@pytest.mark.gpu
@pytest.mark.parametrize("order", ScanOrder, ids=str)
def test_bits_do_not_depend_on_the_run_or_on_looking(torch_rng, order):
    for l in (1, 700):
        case = make(torch_rng, b=3, d=96, n=16, l=l)
        first, second, looked = run(case, order), run(case, order), run(case, order, return_chunk_states=True)
        for other in (second, looked):
            assert_exact("y", other.y, first.y)
            assert_exact("state", other.state, first.state)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("d", [4096, 8192])
def test_more_elements_than_32_bits_count(d):
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    l, tail, n = 2**31 // d + 128, 256, 16
    u, dt, z = (torch.randint(-128, 128, (1, l, d), dtype=torch.int8, device="cuda") for _ in range(3))
    B, C = (torch.randint(-128, 128, (1, l, n), dtype=torch.int8, device="cuda") for _ in range(2))
    A, D = -torch.ones(d, n, device="cuda"), torch.ones(d, device="cuda")
    rows = [x.transpose(1, 2) for x in (u, dt, B, C, z)]

    def scan(u, dt, B, C, z):
        # Each step forgets more than half: the last steps are those of a call of their own.
        bias = torch.full((d,), 5.0, device="cuda")
        return cuda.selective_scan(u, dt, A, B, C, D, z, bias, order=CHUNKED, **SCALES)

    whole = scan(*rows)
    short = scan(*(x[:, :, -tail:] for x in rows))
    got, expected = whole.y[:, -tail // 2 :], short.y[:, -tail // 2 :]
    assert_close("y", got.cpu(), expected.cpu(), 1e-5 * float(expected.abs().amax()))
    assert_close("state", whole.state.cpu(), short.state.cpu(), 1e-5 * float(short.state.abs().amax()))


@pytest.mark.gpu
@pytest.mark.graph
def test_a_graph_replays_it(torch_rng):
    case = Case(*(x.cuda() for x in make(torch_rng, b=1, d=64, n=16, l=1)))
    eager = cuda.selective_scan(*case, order=CHUNKED, **SCALES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.selective_scan(*case, order=CHUNKED, **SCALES)
    captured.y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_exact("y", captured.y, eager.y)
    assert_exact("state", captured.state, eager.state)
