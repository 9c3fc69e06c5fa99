import inspect

import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.causal_conv1d import cuda, reference
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.quant.grid import quantize

gpu = pytest.mark.gpu
DEVICE = torch.device("cuda")
X_SCALE = 0.037
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("static", "token", "float", *HALVES)
LAYOUTS = ("time", "channels", "half", "shifted", "padded", "strided")
# (b, d, l): every length with few channels, every width with few steps, every batch.
SHAPES = (
    *((2, 31, l) for l in (1, 2, 3, 4, 63, 64, 65, 127, 129)),
    *((1, 8, l) for l in (1023, 1025, 2049, 8193)),
    *((3, d, 5) for d in (8, 31, 64, 96, 512, 1536, 5120)),
    (8, 64, 16),
    # Eight channels a thread: more than one block, ragged runs and channels.
    (2, 264, 130),
    (3, 40, 64),
    (1, 1, 1),
    (1, 1, 40),
)

kinds = pytest.mark.parametrize("kind", KINDS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def shape_id(shape):
    return "b{}-d{}-l{}".format(*shape)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same (b, d, l) values on the GPU, in another order or amid other elements."""
    x = x.to(DEVICE)
    b, d, l = x.shape
    fill = 0x55
    match layout:
        case "time":
            return x
        case "channels":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "half":
            wide = x.new_full((b, l, 2 * d), fill)
            view = wide[:, :, :d].transpose(1, 2)
        case "shifted":
            wide = x.new_full((b, l, d + 3), fill)
            view = wide[:, :, 1 : d + 1].transpose(1, 2)
        case "padded":
            view = x.new_full((b, d, (l + 31) // 16 * 16), fill)[:, :, :l]
        case _:
            view = x.new_full((b, d, l, 2), fill)[..., 0]
    view.copy_(x)
    return view


def make(rng, shape, kind, *, w=4, with_bias=True, with_state=True):
    """Operands on the CPU: x, keyword arguments."""
    b, d, l = shape
    bias = torch.randn(d, generator=rng) if with_bias else None
    state_scale = None
    if kind in ("float", *HALVES):
        dtype = HALVES.get(kind, torch.float32)
        x = torch.randn(b, d, l, generator=rng).to(dtype)
        history = torch.randn(b, d, w - 1, generator=rng).to(dtype)
        weight = torch.randn(d, w, generator=rng)
        scales = {}
    else:
        x, weight, history = (
            torch.randint(-128, 128, size, dtype=torch.int8, generator=rng)
            for size in ((b, d, l), (d, w), (b, d, w - 1))
        )
        weight_scale = torch.rand(d, generator=rng) * 4e-3 + 1e-5
        x_scale = X_SCALE
        if kind == "token":
            x_scale = torch.rand(b, l, generator=rng) * 0.05 + 1e-4
            state_scale = torch.rand(b, w - 1, generator=rng) * 0.05 + 1e-4
        scales = {"x_scale": x_scale, "weight_scale": weight_scale}
    state = ConvState(history, state_scale) if with_state else None
    return x, {"weight": weight, "bias": bias, "state": state, **scales}


def to_gpu(value):
    if isinstance(value, ConvState):
        return ConvState(*(to_gpu(part) for part in value))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def run(x, options, *, layout="time", **more):
    """The kernel with operands moved to the GPU, its results on the CPU."""
    moved = {name: to_gpu(value) for name, value in options.items()}
    out, state = cuda.causal_conv1d(lay_out(x, layout), **moved, **more)
    return out.cpu(), ConvState(state.values.cpu(), None if state.scale is None else state.scale.cpu())


def exact(x, options):
    """Float64 result and the magnitude that its rounding is measured by, without a loop over time."""
    weight, bias, state = options["weight"].double(), options["bias"], options["state"]
    b, d, _ = x.shape
    w = weight.shape[1]
    padded = torch.cat([x.new_zeros(b, d, w - 1) if state is None else state.values, x], dim=2).double()
    scale = options.get("x_scale")
    if isinstance(scale, torch.Tensor):
        before = torch.ones(b, w - 1) if state is None else state.scale
        padded *= torch.cat([before, scale], dim=1).double().unsqueeze(1)
    elif scale is not None:
        padded *= torch.tensor(scale).double()
    if "weight_scale" in options:
        weight = weight * options["weight_scale"].double().unsqueeze(1)
    terms = padded.unfold(2, w, 1) * weight[:, None]
    offset = torch.zeros(d, 1).double() if bias is None else bias.double().unsqueeze(1)
    a = terms.sum(3) + offset
    return a * torch.sigmoid(a), terms.abs().sum(3) + offset.abs()


def check_all(x, options, layout):
    w = options["weight"].shape[1]
    expected, magnitude = exact(x, options)
    v, state = run(x, options, layout=layout)
    budget = tolerances.CONV.budget(magnitude, w + 6)
    if x.dtype in HALVES.values():
        # One more rounding, of half a unit; a whole one is allowed. float16 also has a smallest step.
        info = torch.finfo(x.dtype)
        budget = budget + expected.abs() * info.eps + info.smallest_normal * info.eps
    assert v.dtype == (torch.float32 if x.dtype == torch.int8 else x.dtype)
    assert_close("causal_conv1d", v, expected, budget)
    step = max(float(expected.abs().max()) / 127, 1e-6)
    by_channel = torch.linspace(step / 50, step, x.shape[1])
    # The second scale saturates about half of the elements.
    for out_scale in (step, step / 50, by_channel):
        q, same_state = run(x, options, layout=layout, out_scale=to_gpu(out_scale))
        wanted, wanted_state = reference.causal_conv1d(x, **options, out_scale=out_scale)
        row = tolerances.GRID
        assert_grid("causal_conv1d", q, wanted, share=row.share, steps=row.steps)
        for got in (state, same_state):
            assert_exact("state", got.values, wanted_state.values)
            if wanted_state.scale is not None:
                assert_exact("state.scale", got.scale, wanted_state.scale)


def test_the_signature_is_the_reference_s():
    assert inspect.signature(cuda.causal_conv1d) == inspect.signature(reference.causal_conv1d)
    assert inspect.signature(cuda.causal_conv1d_both) == inspect.signature(reference.causal_conv1d_both)


@given(
    b=st.integers(1, 9),
    d=st.integers(1, 6000),
    l=st.integers(1, 200_000),
    multiprocessors=st.sampled_from([1, 20, 108, 132]),
)
@settings(deadline=None, max_examples=60)
def test_every_element_has_one_thread(b, d, l, multiprocessors):
    for steps in (4, 16):
        config = cuda.time_config(b, d, l, steps=steps, multiprocessors=multiprocessors)
        x, y, _ = config.block
        along = x * steps
        assert (config.grid[1] - 1) * along < l <= config.grid[1] * along
        down = y * config.span
        assert (config.grid[0] - 1) * down < d <= config.grid[0] * down
        assert x * y <= 128 and config.grid[1] <= 65535 and config.grid[2] == b

    for cut in (cuda.channels_config, cuda.real_config, cuda.wide_config):
        config = cut(b, d, l, multiprocessors=multiprocessors)
        x, y, _ = config.block
        width = 4 * config.quads * x
        assert (config.grid[0] - 1) * width < d <= config.grid[0] * width
        assert (config.grid[1] - 1) * y * config.span < l <= config.grid[1] * y * config.span
        assert x * y <= 128 and config.grid[1] <= 65535 and config.grid[2] == b
        assert config.span % 4 == 0


@pytest.mark.parametrize("cut", [cuda.channels_config, cuda.real_config, cuda.wide_config])
def test_very_long_sequences_fit_the_grid(cut):
    config = cut(1, 4, 2**30, multiprocessors=132)
    assert config.grid[1] <= 65535 and config.grid[1] * config.block[1] * config.span >= 2**30


def test_entries_are_distinct():
    assert len(set(cuda.ENTRIES)) == len(cuda.ENTRIES) == 19


def test_a_cpu_tensor_is_refused():
    with pytest.raises(ShapeError, match="expected a CUDA tensor"):
        cuda.causal_conv1d(torch.zeros(1, 4, 4), torch.zeros(4, 4), None)


@gpu
@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("layout", ["time", "channels"])
def test_shapes(poisoned_memory, torch_rng, shape, kind, layout):
    check_all(*make(torch_rng, shape, kind), layout)


@gpu
@kinds
@layouts
@pytest.mark.parametrize("w", [2, 3, 4], ids="w{}".format)
@pytest.mark.parametrize("l", [1, 2, 21, 64])
def test_layouts_and_widths(poisoned_memory, torch_rng, kind, layout, w, l):
    for with_bias, with_state in ((True, False), (False, True)):
        options = make(torch_rng, (2, 36, l), kind, w=w, with_bias=with_bias, with_state=with_state)
        check_all(*options, layout)


@gpu
@kinds
def test_float_bits_depend_on_nothing_but_the_window(torch_rng, kind):
    x, options = make(torch_rng, (2, 37, 97), kind)
    expected, _ = run(x, options)
    for layout in LAYOUTS:
        assert_exact(layout, run(x, options, layout=layout)[0], expected)
    for cut in (1, 4, 50, 96):
        for layout in ("time", "channels"):
            parts, state = [], options["state"]
            for piece in (slice(None, cut), slice(cut, None)):
                each = {**options, "state": state}
                if kind == "token":
                    each["x_scale"] = options["x_scale"][:, piece]
                part, state = run(x[:, :, piece], each, layout=layout)
                parts.append(part)
            assert_exact(f"cut {cut}", torch.cat(parts, dim=2), expected)


@gpu
@kinds
def test_token_by_token_with_int8_outputs(torch_rng, kind):
    x, options = make(torch_rng, (3, 40, 33), kind)
    wanted, last = reference.causal_conv1d(x, **options, out_scale=0.05)
    parts, state = [], options["state"]
    for t in range(33):
        each = {**options, "state": state}
        if kind == "token":
            each["x_scale"] = options["x_scale"][:, t : t + 1]
        part, state = run(x[:, :, t : t + 1], each, out_scale=0.05)
        parts.append(part)
    row = tolerances.GRID
    assert_grid("decode", torch.cat(parts, dim=2), wanted, share=row.share, steps=row.steps)
    assert_exact("state", state.values, last.values)


@gpu
@layouts
@pytest.mark.parametrize(
    "shape", [(1, 5120, 2048), (1, 5120, 1), (64, 5120, 1), (3, 5117, 129), (2, 264, 1023)], ids=shape_id
)
def test_an_int8_output_is_the_float_output_quantized(torch_rng, layout, shape):
    # Few distinct windows, and in each channel one of their values lies on a border between two steps, as
    # near as float32 allows: an int8 output of other arithmetic would fall to the other side.
    x, options = make(torch_rng, shape, "static")
    x = x.clamp(-1, 1)
    v, _ = run(x, options, layout=layout)
    steps = torch.randint(0, 20, (shape[1],), generator=torch_rng) + 0.5
    on_border = (v[0, :, -1].abs() / steps).clamp(1e-6, 1e4)
    for out_scale in (on_border, float(on_border[0]), 0.05):
        q, _ = run(x, options, layout=layout, out_scale=to_gpu(out_scale))
        assert_exact("quantized", q, quantize(v, out_scale))


@gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize("out_scale", [0.05, None], ids=["int8", "float"])
@pytest.mark.parametrize("shape", [(1, 4096, 2**19 + 128), (9, 8192, 2**15)], ids=shape_id)
def test_more_elements_than_32_bits_count(torch_rng, shape, out_scale, layout):
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    b, d, l = shape
    tail, history = 64, 3
    size = (b, l, d) if layout == "channels" else (b, d, l)
    x = torch.randint(-128, 128, size, dtype=torch.int8, device=DEVICE)
    x = x.transpose(1, 2) if layout == "channels" else x
    _, options = make(torch_rng, (1, d, 1), "static", with_state=False)
    moved = {name: to_gpu(value) for name, value in options.items()}
    whole, state = cuda.causal_conv1d(x, **moved, out_scale=out_scale)
    # A value depends on four steps only: at the ends, those of a short call.
    last, last_state = cuda.causal_conv1d(x[-1:, :, -tail:].contiguous(), **moved, out_scale=out_scale)
    assert_exact("end", whole[-1:, :, history - tail :].cpu(), last[:, :, history:].cpu())
    assert_exact("state", state.values[-1:].cpu(), last_state.values.cpu())
    first, _ = cuda.causal_conv1d(x[:1, :, :tail].contiguous(), **moved, out_scale=out_scale)
    assert_exact("start", whole[:1, :, :tail].cpu(), first.cpu())


@gpu
@layouts
@pytest.mark.parametrize("kind", ["static", "token"])
@pytest.mark.parametrize("shape", [(2, 5120, 130), (3, 37, 83), (2, 264, 1), (1, 96, 1023)], ids=shape_id)
def test_both_outputs_are_those_of_two_passes(poisoned_memory, torch_rng, layout, kind, shape):
    x, options = make(torch_rng, shape, kind)
    moved = {name: to_gpu(value) for name, value in options.items()}
    laid = lay_out(x, layout)
    v, state = cuda.causal_conv1d(laid, **moved)
    by_channel = torch.linspace(0.01, 2.0, shape[1])
    for out_scale in (0.05, to_gpu(by_channel)):
        both_v, q, both_state = cuda.causal_conv1d_both(laid, **moved, out_scale=out_scale)
        assert_exact("v", both_v, v)
        assert_exact("q", q.cpu(), quantize(v.cpu(), 0.05 if isinstance(out_scale, float) else by_channel))
        assert q.stride() == v.stride()
        for got, expected in zip(both_state, state, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                assert_exact("state", got, expected)


@gpu
@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize("out_scale", [1e-8, 1e-7, 1e-6, 1e-3, 1.0, 1e4, 1e6])
@pytest.mark.parametrize("weight_scale", [1e-8, 1e-3, 1.0, 1e3])
def test_extreme_values_and_scales(layout, out_scale, weight_scale):
    # All corners of the window, a saturated stretch and zeros: sums reach the largest |sum| of four products.
    corners = torch.cartesian_prod(*[torch.tensor([-128, 127, 0])] * 4).flatten()
    x = corners.to(torch.int8).expand(1, 8, -1).contiguous()
    weight = torch.tensor([[-128] * 4, [127] * 4, [-128, 127, -128, 127], [0, 0, 0, 1]] * 2, dtype=torch.int8)
    options = {
        "weight": weight,
        "bias": torch.tensor([0.0] * 4 + [-80.0, 80.0, 1e5, -1e5]),
        "state": None,
        "x_scale": 1.0,
        "weight_scale": torch.full((8,), weight_scale),
    }
    q, _ = run(x, options, layout=layout, out_scale=out_scale)
    wanted, _ = reference.causal_conv1d(x, **options, out_scale=out_scale)
    # Few distinct values: one tie may fill more than the usual share, so only the steps are bounded.
    assert_grid("extremes", q, wanted, share=0.02, steps=1)
    v, _ = run(x, options, layout=layout)
    expected, magnitude = exact(x, options)
    assert_close("extremes", v, expected, tolerances.CONV.budget(magnitude, 10))


@gpu
@kinds
@pytest.mark.parametrize("layout", ["time", "channels"])
@pytest.mark.parametrize("out_scale", [None, 0.05])
def test_nothing_is_written_beside_the_outputs(monkeypatch, torch_rng, kind, layout, out_scale):
    x, options = make(torch_rng, (3, 37, 83), kind)
    moved = {name: to_gpu(value) for name, value in options.items()}
    laid = lay_out(x, layout)
    guard, blocks, empty = 512, [], torch.empty

    def guarded(*shape, dtype=torch.float32, device=None):
        sizes = torch.Size(shape)
        count = sizes.numel() * dtype.itemsize
        block = empty(count + 2 * guard, dtype=torch.uint8, device=device).fill_(0x55)
        blocks.append((block, count))
        return block[guard : guard + count].view(dtype).view(sizes)

    monkeypatch.setattr(torch, "empty", guarded)
    cuda.causal_conv1d(laid, **moved, out_scale=out_scale)
    monkeypatch.undo()
    assert len(blocks) == (3 if kind == "token" else 2)
    for block, count in blocks:
        assert bool((block[:guard] == 0x55).all()) and bool((block[guard + count :] == 0x55).all())


@gpu
@kinds
def test_two_runs_give_the_same_bits_and_leave_the_arguments_alone(torch_rng, kind):
    x, options = make(torch_rng, (2, 96, 129), kind)
    moved = {name: to_gpu(value) for name, value in options.items()}
    for layout in ("time", "channels"):
        laid = lay_out(x, layout)
        first, first_state = cuda.causal_conv1d(laid, **moved, out_scale=0.05)
        again, again_state = cuda.causal_conv1d(laid, **moved, out_scale=0.05)
        assert torch.equal(first, again) and torch.equal(first_state.values, again_state.values)
        assert_exact("x", laid.cpu(), x)
        assert_exact("state", moved["state"].values.cpu(), options["state"].values)


@gpu
def test_the_output_has_the_input_s_layout(torch_rng):
    x, options = make(torch_rng, (2, 24, 40), "static")
    moved = {name: to_gpu(value) for name, value in options.items()}
    assert cuda.causal_conv1d(lay_out(x, "time"), **moved)[0].is_contiguous()
    assert cuda.causal_conv1d(lay_out(x, "half"), **moved)[0].transpose(1, 2).is_contiguous()


@gpu
def test_operands_elsewhere_or_of_another_dtype_are_refused(torch_rng):
    x, options = make(torch_rng, (2, 8, 9), "static")
    moved = {name: to_gpu(value) for name, value in options.items()}
    with pytest.raises(ShapeError, match="`bias`"):
        cuda.causal_conv1d(x.to(DEVICE), **{**moved, "bias": options["bias"]})
    with pytest.raises(ShapeError, match="`weight_scale` must be"):
        cuda.causal_conv1d(x.to(DEVICE), **{**moved, "weight_scale": moved["weight_scale"].double()})
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        cuda.causal_conv1d(x.to(DEVICE), **moved, out_scale=0.0)
