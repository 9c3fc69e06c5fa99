import inspect

import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.rms_norm import cuda, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = (1, 2, 3, 4, 8, 31, 64, 90, 96, 127, 256, 512, 768, 1023, 1025, 1536, 2560, 4097, 5120, 8193)
EPSILON = 1e-5


def exact(x: torch.Tensor, weight: torch.Tensor | None, eps: float = EPSILON) -> torch.Tensor:
    """The reference in float64, on the CPU; `test_rms_norm` judges it by plain loops."""
    return reference.rms_norm(x.double(), None if weight is None else weight.double(), eps=eps)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_signatures_are_equal(name):
    assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("width", WIDTHS)
def test_launch_shape(width):
    vector, threads = cuda.launch_shape(width)
    assert width % vector == 0
    assert threads % 32 == 0 and 32 <= threads <= 256
    # No warp of a small row is idle.
    assert threads == 32 or (threads - 32) * vector < width


def test_entries_are_all_that_can_be_launched():
    assert len(set(cuda.ENTRIES)) == len(cuda.ENTRIES) == 24


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 4), None, "expected a CUDA tensor"),
        (torch.zeros(2, 4, dtype=torch.float16), None, "must be float32"),
        (torch.zeros(2, 4), torch.zeros(5), r"must be float32 \(4,\)"),
    ],
    ids=["cpu", "dtype", "weight"],
)
def test_refusals(x, weight, message):
    with pytest.raises(ShapeError, match=message):
        cuda.rms_norm(x, weight, eps=EPSILON)


def test_other_dtypes_of_the_output_and_the_delta_are_refused():
    x = torch.zeros(2, 4)
    with pytest.raises(ShapeError, match=r"`out_dtype` is torch\.float64, expected float32"):
        cuda.rms_norm(x, None, eps=EPSILON, out_dtype=torch.float64)
    for delta in (torch.zeros(2, 4, dtype=torch.int8), torch.zeros(1, 4)):
        with pytest.raises(ShapeError, match="`delta` is"):
            cuda.add_rms_norm(x, delta, None, eps=EPSILON)


def test_a_zero_scale_is_refused():
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        cuda.rms_norm(torch.ones(1, 4), None, eps=EPSILON, out_scale=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "folded"])
@pytest.mark.parametrize("width", WIDTHS)
def test_float32(torch_rng, width, with_weight):
    weight = torch.randn(width, generator=torch_rng) if with_weight else None
    for batch, length in ((1, 1), (3, 5)):
        x = torch.randn(batch, length, width, generator=torch_rng) * 3
        expected = exact(x, weight)
        got = cuda.rms_norm(x.cuda(), None if weight is None else weight.cuda(), eps=EPSILON)
        assert_close("rms_norm", got.cpu(), expected, tolerances.RMS_NORM.budget(expected.abs(), width + 6))


@pytest.mark.gpu
@pytest.mark.parametrize("saturated", [1.0, 3.0], ids=["fits", "saturates"])
@pytest.mark.parametrize("width", WIDTHS)
def test_int8(torch_rng, width, saturated):
    x = torch.randn(60, width, generator=torch_rng)
    weight = torch.randn(width, generator=torch_rng)
    expected = exact(x, weight)
    # No simple fraction of the largest value, which would put many elements on ties.
    scale = float(expected.abs().max()) / (127.37 * saturated)
    got = cuda.rms_norm(x.cuda(), weight.cuda(), eps=EPSILON, out_scale=scale).cpu()
    row = tolerances.GRID
    assert_grid("rms_norm", got, oracles.quantize(expected, scale), share=row.share, steps=row.steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_halves(torch_rng, width, dtype):
    x, weight = torch.randn(7, width, generator=torch_rng) * 3, torch.randn(width, generator=torch_rng)
    got = cuda.rms_norm(x.cuda(), weight.cuda(), eps=EPSILON, out_dtype=dtype)
    # The float32 output, rounded once.
    assert_exact("half", got, cuda.rms_norm(x.cuda(), weight.cuda(), eps=EPSILON).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_with_the_addition(torch_rng, width, dtype):
    residual, delta = (torch.randn(2, 5, width, generator=torch_rng).cuda() for _ in range(2))
    before = residual.clone()
    delta = delta.to(dtype)
    for options in ({"out_scale": 0.03}, {"out_dtype": torch.bfloat16}, {}):
        normed, added = cuda.add_rms_norm(residual, delta, None, eps=EPSILON, **options)
        assert_exact("residual", residual, before)
        assert_exact("sum", added, residual + delta.float())
        assert_exact("norm", normed, cuda.rms_norm(added, None, eps=EPSILON, **options))


@pytest.mark.gpu
def test_ties_and_the_ends_of_the_grid():
    # A constant row has factor 1 / |x|; the weight then is the result.
    weight = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5, -128.5, 300.0, -300.0])
    x = torch.full((2, 12), 2.0)
    got = cuda.rms_norm(x.cuda(), weight.cuda(), eps=0.0, out_scale=1.0).cpu()
    assert got.tolist() == 2 * [[0, 2, 2, 0, -2, -2, 126, 127, -128, -128, 127, -128]]


@pytest.mark.gpu
def test_a_zero_row_stays_zero():
    got = cuda.rms_norm(torch.zeros(3, 90, device="cuda"), None, eps=EPSILON)
    assert_exact("rms_norm", got.cpu(), torch.zeros(3, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [31, 96, 2560, 9000])
def test_a_row_does_not_depend_on_the_others(torch_rng, width):
    x = torch.randn(1000, width, generator=torch_rng).cuda()
    whole = cuda.rms_norm(x, None, eps=EPSILON)
    for rows in (slice(0, 1), slice(5, 8), slice(990, 1000)):
        assert_exact("rows", cuda.rms_norm(x[rows], None, eps=EPSILON), whole[rows])
    assert_exact("again", cuda.rms_norm(x, None, eps=EPSILON), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4, 31, 256, 1536])
def test_views_are_not_misread(torch_rng, width):
    x = torch.randn(6, 5, width + 3, generator=torch_rng).cuda()[..., 1 : width + 1]
    weight = torch.randn(2 * width + 1, generator=torch_rng).cuda()[1::2]
    whole = cuda.rms_norm(x.contiguous(), weight.contiguous(), eps=EPSILON)
    assert_exact("slice", cuda.rms_norm(x, weight, eps=EPSILON), whole)
    swapped = cuda.rms_norm(x.transpose(0, 1), weight, eps=EPSILON)
    assert_exact("transposed", swapped, whole.transpose(0, 1))
    # Contiguous tensors that start 4 bytes off the boundary of vector loads.
    shifted = torch.empty(1 + 30 * width, device="cuda")[1:].view(6, 5, width)
    shifted.copy_(x)
    gain = torch.empty(1 + width, device="cuda")[1:]
    gain.copy_(weight)
    assert_exact("shifted", cuda.rms_norm(shifted, gain, eps=EPSILON), whole)


@pytest.mark.gpu
def test_the_argument_is_left_alone(torch_rng):
    x = torch.randn(3, 96, generator=torch_rng).cuda()
    before = x.clone()
    cuda.rms_norm(x, None, eps=EPSILON, out_scale=0.01)
    assert_exact("x", x, before)


@pytest.mark.gpu
def test_no_rows():
    got = cuda.rms_norm(torch.zeros(0, 7, 256, device="cuda"), None, eps=EPSILON, out_scale=1.0)
    assert got.shape == (0, 7, 256) and got.dtype == torch.int8
