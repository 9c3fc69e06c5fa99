import inspect

import pytest
import torch
from close import assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.quantize import cuda, reference

gpu = pytest.mark.gpu
DEVICE = torch.device("cuda")
LAYOUTS = ("time", "channels", "half", "second half", "shifted", "padded", "strided")
SHAPES = (
    *((2, 31, l) for l in (1, 2, 63, 64, 65, 129)),
    *((1, 8, l) for l in (1023, 1025, 8193)),
    *((3, d, 5) for d in (1, 8, 31, 64, 96, 512, 1536, 5120)),
)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same (b, d, l) values in another order or amid other elements."""
    b, d, l = x.shape
    wide = {"half": (b, l, 2 * d), "second half": (b, l, 2 * d), "shifted": (b, l, d + 3)}
    starts = {"half": 0, "second half": d, "shifted": 1}
    if layout == "time":
        return x.contiguous()
    if layout == "channels":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        view = x.new_full((b, d, (l + 31) // 16 * 16), 0x55)[:, :, :l]
    elif layout == "strided":
        view = x.new_full((b, d, l, 2), 0x55)[..., 0]
    else:
        start = starts[layout]
        view = x.new_full(wide[layout], 0x55)[:, :, start : start + d].transpose(1, 2)
    view.copy_(x)
    return view


def values(rng, shape) -> torch.Tensor:
    """Ties, saturating values, zeros and ordinary ones, in steps of 0.5."""
    x = torch.randn(shape, generator=rng) * 60
    flat = x.view(-1)
    ties = torch.arange(-140, 141).float() + 0.5
    flat[: ties.numel()] = ties[: flat.numel()]
    flat[::7] = 0.0
    return x * 0.5


@pytest.mark.parametrize("name", reference.__all__)
def test_signatures_are_the_reference_s(name):
    assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(reference, name))


def test_a_cpu_tensor_is_refused():
    for call in (
        lambda x: cuda.quantize(x, 0.5),
        lambda x: cuda.dequantize(x.to(torch.int8), 0.5),
        cuda.quantize_per_token,
    ):
        with pytest.raises(ShapeError, match="expected a CUDA tensor"):
            call(torch.zeros(1, 4, 4))


@given(
    b=st.integers(1, 3),
    d=st.integers(1, 9),
    l=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
)
@settings(deadline=None, max_examples=60)
def test_rows_name_every_element_once_and_in_order(b, d, l, layout):
    x = lay_out(torch.arange(b * d * l).float().reshape(b, d, l), layout)
    view = cuda.as_rows(x, torch.int8)
    assert view.out.shape == x.shape and view.rows * view.inner == x.numel()
    # What the kernel does: rows from the input's storage to dense rows of the output's.
    start = view.x.storage_offset()
    source = torch.as_strided(view.x, (view.rows, view.inner), (view.stride, 1), start)
    copied = torch.as_strided(source.flatten().clone(), x.shape, view.out.stride(), 0)
    assert torch.equal(copied, x)


@gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}-{0[1]}-{0[2]}".format)
def test_elementwise_is_exact(poisoned_memory, torch_rng, shape, layout):
    x = values(torch_rng, shape)
    for scale in (0.5, 0.037, 3e-8, 1e5):
        q = cuda.quantize(lay_out(x.to(DEVICE), layout), scale)
        wanted = reference.quantize(x, scale)
        assert_exact("quantize", q.cpu(), wanted)
        back = cuda.dequantize(lay_out(wanted.to(DEVICE), layout), scale)
        assert_exact("dequantize", back.cpu(), reference.dequantize(wanted, scale))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}-{0[1]}-{0[2]}".format)
def test_a_scale_a_channel_is_exact(poisoned_memory, torch_rng, shape, layout, dtype):
    x = values(torch_rng, shape).to(dtype)
    scale = torch.rand(shape[1], generator=torch_rng) + 0.01
    q = cuda.quantize(lay_out(x.to(DEVICE), layout), scale.to(DEVICE))
    wanted = reference.quantize(x, scale)
    assert_exact("quantize", q.cpu(), wanted)
    back = cuda.dequantize(lay_out(wanted.to(DEVICE), layout), scale.to(DEVICE))
    assert_exact("dequantize", back.cpu(), reference.dequantize(wanted, scale))
    flat = cuda.quantize(x[:, :, 0].to(DEVICE), scale.to(DEVICE))
    assert_exact("quantize (b, d)", flat.cpu(), wanted[:, :, 0])


@gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}-{0[1]}-{0[2]}".format)
def test_per_token_is_exact(poisoned_memory, torch_rng, shape, layout):
    x = values(torch_rng, shape)
    x[:, :, ::3] = 0.0
    wanted, wanted_scale = reference.quantize_per_token(x)
    q, scale = cuda.quantize_per_token(lay_out(x.to(DEVICE), layout))
    assert_exact("scale", scale.cpu(), wanted_scale)
    assert_exact("q", q.cpu(), wanted)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 31, 65), (3, 96, 5), (1, 8, 1025)], ids="{0[0]}-{0[1]}-{0[2]}".format)
def test_halves_are_exact(poisoned_memory, torch_rng, shape, layout, dtype):
    x = values(torch_rng, shape).to(dtype)
    laid = lay_out(x.to(DEVICE), layout)
    for scale in (0.5, 0.037, 1e5):
        assert_exact("quantize", cuda.quantize(laid, scale).cpu(), reference.quantize(x, scale))
    wanted, wanted_scale = reference.quantize_per_token(x)
    q, scale = cuda.quantize_per_token(laid)
    assert_exact("scale", scale.cpu(), wanted_scale)
    assert_exact("q", q.cpu(), wanted)


def test_the_reference_widens_halves_first():
    # The reciprocal of the scale is no bfloat16, and neither is the product.
    x = torch.tensor([[[1.0, 0.3], [-3.0, 100.0]]], dtype=torch.bfloat16)
    assert_exact("quantize", reference.quantize(x, 0.037), reference.quantize(x.float(), 0.037))
    wanted, wanted_scale = reference.quantize_per_token(x.float())
    q, scale = reference.quantize_per_token(x)
    assert_exact("q", q, wanted)
    assert_exact("scale", scale, wanted_scale)


@gpu
@pytest.mark.parametrize("count", [1, 3, 4, 4095, 4096, 4097, 70_001])
def test_flat_tensors_at_any_offset(torch_rng, count):
    whole = values(torch_rng, (count + 5,)).to(DEVICE)
    for start in (0, 1, 4):
        x = whole[start : start + count]
        assert_exact("quantize", cuda.quantize(x, 0.5).cpu(), reference.quantize(x.cpu(), 0.5))


@gpu
def test_layouts_are_kept(torch_rng):
    x = values(torch_rng, (2, 24, 40)).to(DEVICE)
    for layout in ("channels", "half", "second half"):
        laid = lay_out(x, layout)
        for out in (cuda.quantize(laid, 0.5), cuda.quantize_per_token(laid)[0]):
            assert out.transpose(1, 2).is_contiguous()
        assert cuda.quantize(laid, torch.ones(24, device=DEVICE)).transpose(1, 2).is_contiguous()
    assert cuda.quantize(x, 0.5).is_contiguous() and cuda.quantize_per_token(x)[0].is_contiguous()


@gpu
def test_two_runs_give_the_same_bits(torch_rng):
    x = values(torch_rng, (2, 1536, 65)).to(DEVICE)
    for layout in ("time", "channels"):
        first, again = (cuda.quantize_per_token(lay_out(x, layout)) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@gpu
def test_empty_and_wrong_inputs():
    assert cuda.quantize(torch.zeros(0, 4, device=DEVICE), 1.0).shape == (0, 4)
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        cuda.quantize(torch.zeros(4, device=DEVICE), 0.0)
    with pytest.raises(ShapeError, match=r"expected torch\.float32"):
        cuda.quantize(torch.zeros(4, device=DEVICE, dtype=torch.float64), 1.0)
    with pytest.raises(ShapeError, match=r"\(b, d, l\) with d >= 1"):
        cuda.quantize_per_token(torch.zeros(4, 4, device=DEVICE))
