from typing import Any, NamedTuple

import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.selective_scan.reference import CHUNK, selective_scan
from qmamba_cli.modes import ScanOrder
from qmamba_cli.quant.grid import dequantize, fake_quantize, quantize

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ORDERS = tuple(ScanOrder)
# Around the ends of one, two, sixteen and thirty-two chunks.
LENGTHS = (1, 3, 4, 63, 64, 65, 127, 128, 129, 1025)
STATE_SCALE = 0.01
SCALES = {"u_scale": 0.02, "dt_scale": 0.03, "b_scale": 0.01, "c_scale": 0.01, "z_scale": 0.03}
TENSORS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")

both_orders = pytest.mark.parametrize("order", ORDERS, ids=str)


class Case(NamedTuple):
    u: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    z: torch.Tensor
    dt_bias: torch.Tensor

    def real(self) -> "Case":
        """The values that int8 operands stand for, in float64."""
        scales = {name.removesuffix("_scale").upper() if name[0] in "bc" else name.removesuffix("_scale"): s
                  for name, s in SCALES.items()}  # fmt: skip
        real = {}
        for name in TENSORS:
            tensor = getattr(self, name)
            factor = torch.tensor(scales[name]).double() if tensor.dtype == torch.int8 else 1.0
            real[name] = tensor.double() * factor
        return Case(**real)

    def options(self) -> dict[str, Any]:
        return SCALES if self.dt.dtype == torch.int8 else {}

    def part(self, start: int, stop: int | None) -> "Case":
        cut = {name: getattr(self, name)[:, :, start:stop] for name in ("u", "dt", "B", "C", "z")}
        return self._replace(**cut)

    def run(self, order: ScanOrder, **options: Any):
        return selective_scan(*self, order=order, **{**self.options(), **options})

    def on(self, backend, order: ScanOrder, **options: Any):
        return oracles.call(backend, "selective_scan", *self, order=order, **{**self.options(), **options})

    def oracle(self, state: torch.Tensor | None = None) -> oracles.Scan:
        return oracles.selective_scan(*self.real(), state=state)


def make(rng, *, b=2, d=5, n=8, l=65, int8=True) -> Case:
    def operand(channels: int, spread: float) -> torch.Tensor:
        if int8:
            return torch.randint(-128, 128, (b, channels, l), dtype=torch.int8, generator=rng)
        return torch.randn(b, channels, l, generator=rng) * spread

    return Case(
        u=operand(d, 1.0),
        dt=operand(d, 1.5),
        A=-torch.exp(torch.randn(d, n, generator=rng)),
        B=operand(n, 0.5),
        C=operand(n, 0.5),
        D=torch.randn(d, generator=rng),
        z=operand(d, 1.5),
        # Steps from 1e-4 to 1: some channels forget within a token, some keep through several chunks.
        dt_bias=torch.linspace(-6, 0.5, d),
    )


def assert_scan(got, exact: oracles.Scan, *, state: bool = True) -> None:
    factor = tolerances.SCAN.factor
    assert_close("y", got.y, exact.y, factor * exact.y_bound)
    if state:
        assert_close("state", got.state, exact.states[:, -1], factor * exact.state_bounds[:, -1])


@both_orders
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("l", LENGTHS, ids="l{}".format)
def test_equals_the_oracle(backend, torch_rng, order, int8, l):
    case = make(torch_rng, l=l, int8=int8)
    assert_scan(case.on(backend, order), case.oracle())


@both_orders
@pytest.mark.parametrize("l", [1, 65, 300], ids="l{}".format)
@pytest.mark.parametrize("requantize", [False, True], ids=["int8", "requantized"])
def test_a_scale_a_channel_of_u(backend, torch_rng, order, l, requantize):
    case = make(torch_rng, l=l)
    steps = torch.logspace(-3, -1, 5)
    real = dequantize(case.u, steps)
    handed = real + 0.4 * steps.unsqueeze(1) if requantize else case.u
    got = case._replace(u=handed).on(backend, order, u_scale=steps, requantize_u=requantize)
    exact = oracles.selective_scan(*case.real()._replace(u=real.double()))
    assert_scan(got, exact)
    # Equal scales are one scale, bit for bit.
    one, each = (
        case._replace(u=handed).on(backend, order, u_scale=scale, requantize_u=requantize)
        for scale in (0.02, torch.full((5,), 0.02))
    )
    assert_exact("y", each.y, one.y)
    assert_exact("state", each.state, one.state)


def test_a_scale_a_channel_must_fit(torch_rng):
    with pytest.raises(ShapeError, match=r"one each along axis 1, got torch.float32 \(4,\)"):
        make(torch_rng).run(ScanOrder.CHUNKED, u_scale=torch.ones(4))


@both_orders
@pytest.mark.parametrize("n", [1, 8, 16, 64], ids="n{}".format)
@pytest.mark.parametrize("d", [1, 31], ids="d{}".format)
def test_any_number_of_channels_and_states(backend, torch_rng, order, d, n):
    case = make(torch_rng, d=d, n=n, l=70)
    assert_scan(case.on(backend, order), case.oracle())


@both_orders
def test_more_channels_than_one_pass_takes(backend, torch_rng, order):
    # n * b * d is above the elements that the reference works on at a time, and d is no multiple of anything.
    case = make(torch_rng, b=3, d=1403, n=16, l=67)
    got, exact = case.on(backend, order, return_chunk_states=True), case.oracle()
    assert_scan(got, exact)
    for index, end in enumerate((64, 67)):
        bound = exact.state_bounds[:, end - 1]
        assert_close("chunk state", got.chunk_states[:, index], exact.states[:, end - 1], bound)


@both_orders
def test_a_long_sequence(backend, torch_rng, order):
    case = make(torch_rng, b=1, d=3, n=4, l=2049)
    assert_scan(case.on(backend, order), case.oracle())


def test_the_two_orders_differ_by_summation_order_only(torch_rng):
    case = make(torch_rng, d=31, n=16, l=300)
    chunked, sequential = (case.run(order) for order in ORDERS)
    scale = sequential.y.abs().amax()
    assert_close("y", chunked.y, sequential.y, 1e-6 * scale)
    assert_exact("first chunk", chunked.y[:, :CHUNK], sequential.y[:, :CHUNK])
    assert not torch.equal(chunked.y, sequential.y), "they are two orders"


@both_orders
def test_requantized_u_is_int8_u(backend, torch_rng, order):
    case = make(torch_rng, l=130)
    true_u = case.u.float() * SCALES["u_scale"] + 0.4 * SCALES["u_scale"] * torch.rand(
        case.u.shape, generator=torch_rng
    )
    expected = case.on(backend, order)
    got = case._replace(u=true_u).on(backend, order, requantize_u=True)
    assert_exact("y", got.y, expected.y)
    assert_exact("state", got.state, expected.state)
    # Without the grid the true u is read as it is, and D alone shows it.
    assert not torch.equal(case._replace(u=true_u).on(backend, order).y, expected.y)


@both_orders
def test_requantized_u_saturates(backend, torch_rng, order):
    case = make(torch_rng)
    loud = torch.randn(case.u.shape, generator=torch_rng) * 300 * SCALES["u_scale"]
    clipped = quantize(loud, SCALES["u_scale"])
    assert {-128, 127} <= set(clipped.flatten().tolist())
    got = case._replace(u=loud).on(backend, order, requantize_u=True)
    assert_exact("y", got.y, case._replace(u=clipped).on(backend, order).y)


@both_orders
def test_u_on_the_grid_is_int8_u(backend, torch_rng, order):
    case = make(torch_rng)
    on_grid = dequantize(case.u, SCALES["u_scale"])
    assert_exact("y", case._replace(u=on_grid).on(backend, order).y, case.on(backend, order).y)


@both_orders
def test_a_float_state_comes_in_and_goes_out(backend, torch_rng, order):
    case = make(torch_rng, l=70)
    state = torch.randn(2, 5, 8, generator=torch_rng)
    assert_scan(case.on(backend, order, state=state), case.oracle(state))


@both_orders
def test_an_int8_state_comes_in_and_goes_out(backend, torch_rng, order):
    case = make(torch_rng, b=4, d=31, n=16, l=70)
    codes = torch.randint(-128, 128, (4, 31, 16), dtype=torch.int8, generator=torch_rng)
    got = case.on(backend, order, state=codes, state_scale=STATE_SCALE)
    exact = case.oracle(codes.double() * torch.tensor(STATE_SCALE).double())
    # y is computed from the unrounded state.
    assert_scan(got, exact, state=False)
    row = tolerances.GRID
    expected = oracles.quantize(exact.states[:, -1], STATE_SCALE)
    assert {-128, 127} <= set(expected.flatten().tolist()), "the case must saturate"
    assert_grid("state", got.state, expected, share=row.share, steps=row.steps)


@both_orders
def test_a_step_of_zero_leaves_the_state(backend, torch_rng, order):
    case = make(torch_rng, l=67, int8=False)
    # softplus(-200) is 0 in float32.
    frozen = case._replace(dt=torch.full_like(case.dt, -200.0))
    state = torch.randn(2, 5, 8, generator=torch_rng)
    assert_exact("state", frozen.on(backend, order, state=state).state, state)


@both_orders
def test_a_large_step_is_its_own_softplus(backend, torch_rng, order):
    case = make(torch_rng, l=66, int8=False)
    # Through the threshold of 20 and far beyond it.
    steep = case._replace(dt=torch.linspace(10, 120, 66).expand(2, 5, 66).contiguous())
    got = steep.on(backend, order)
    assert got.y.isfinite().all()
    assert_scan(got, steep.oracle())


@both_orders
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_one_call_equals_any_split(order, data):
    l = data.draw(st.integers(2, 150), "l")
    cuts = sorted(data.draw(st.sets(st.integers(1, l - 1), min_size=1, max_size=5), "cuts"))
    case = make(torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed")), d=3, n=4, l=l)
    exact, state, parts = case.oracle(), None, []
    for start, stop in zip([0, *cuts], [*cuts, l], strict=True):
        out = case.part(start, stop).run(order, state=state)
        state = out.state
        parts.append(out.y)
    # A cut is the end of a chunk that the oracle's bound has not counted: as much again for each.
    factor = tolerances.SCAN.factor * (1 + len(cuts))
    assert_close("y", torch.cat(parts, dim=1), exact.y, factor * exact.y_bound)
    assert_close("state", state, exact.states[:, -1], factor * exact.state_bounds[:, -1])


@both_orders
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 128], ids="cut{}".format)
def test_the_seam_of_a_chunk(backend, torch_rng, order, cut):
    # Not bit for bit: exp, softplus and SiLU differ by an ulp between a vector's lanes and its remainder, and
    # the length decides which elements are remainders.
    case = make(torch_rng, l=129)
    exact, first = case.oracle(), case.part(0, cut).on(backend, order)
    second = case.part(cut, None).on(backend, order, state=first.state)
    joined = second._replace(y=torch.cat([first.y, second.y], dim=1))
    assert_close("y", joined.y, exact.y, 2 * exact.y_bound)
    assert_close("state", joined.state, exact.states[:, -1], 2 * exact.state_bounds[:, -1])


@both_orders
def test_steps_with_an_int8_state_err_by_what_its_grid_loses(torch_rng, order):
    case = make(torch_rng, l=40)
    whole, exact = case.run(order), case.oracle()
    first = case.part(0, 24).run(order)
    codes = quantize(first.state, STATE_SCALE)
    lost = (first.state - dequantize(codes, STATE_SCALE)).double()
    second = case.part(24, None).run(order, state=codes, state_scale=STATE_SCALE)
    # The recurrence is linear in the state: the loss decays on its own and reaches y through C and the gate.
    quiet = case.part(24, None)._replace(u=torch.zeros_like(case.u[:, :, 24:]))
    effect = quiet.oracle(lost).y
    budget = 2 * exact.y_bound[:, 24:] + tolerances.EPS * effect.abs()
    assert_close("y", second.y, whole.y[:, 24:].double() - effect, budget)
    assert effect.abs().max() > 100 * budget.max(), "the state's grid must show"


@both_orders
@pytest.mark.parametrize("l", [1, 63, 64, 65, 129, 200], ids="l{}".format)
def test_chunk_states_are_the_states_of_shorter_runs(backend, torch_rng, order, l):
    case = make(torch_rng, l=l)
    got = case.on(backend, order, return_chunk_states=True)
    ends = [*range(CHUNK, l, CHUNK), l]
    exact = case.oracle()
    assert got.chunk_states.shape == (2, len(ends), 5, 8)
    for index, end in enumerate(ends):
        bound = exact.state_bounds[:, end - 1]
        assert_close(f"state after {end}", got.chunk_states[:, index], exact.states[:, end - 1], bound)
        shorter = case.part(0, end).on(backend, order)
        assert_close(f"state of {end}", got.chunk_states[:, index], shorter.state.double(), 2 * bound)
    assert_exact("last state", got.chunk_states[:, -1], got.state)


@both_orders
def test_looking_changes_nothing(torch_rng, order):
    case = make(torch_rng, l=129)
    plain, looked = case.run(order), case.run(order, return_chunk_states=True)
    assert plain.chunk_states is None
    assert_exact("y", looked.y, plain.y)
    assert_exact("state", looked.state, plain.state)


@both_orders
def test_strided_operands_are_not_misread(backend, torch_rng, order):
    case = make(torch_rng, l=66)
    turned = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in
              ("u", "dt", "B", "C", "z")}  # fmt: skip
    strided = case._replace(**turned, A=case.A.T.contiguous().T)
    assert not any(getattr(strided, name).is_contiguous() for name in turned)
    assert_scan(strided.on(backend, order), case.oracle())


@both_orders
def test_batch_rows_do_not_mix(torch_rng, order):
    case = make(torch_rng, b=3, l=70)
    whole, exact = case.run(order), case.oracle()
    for row in range(3):
        one = {name: getattr(case, name)[row : row + 1] for name in ("u", "dt", "B", "C", "z")}
        alone = case._replace(**one).run(order)
        assert_close(f"row {row}", alone.y, whole.y[row : row + 1].double(), exact.y_bound[row : row + 1])


@both_orders
def test_two_runs_give_the_same_bits(backend, torch_rng, order):
    case = make(torch_rng, d=31, n=16, l=129)
    first, second = case.on(backend, order), case.on(backend, order)
    assert_exact("y", first.y, second.y)
    assert_exact("state", first.state, second.state)


@pytest.mark.parametrize(("b", "d", "n"), [(2, 5, 8), (1, 5, 1), (1, 1, 8), (3, 1, 1)], ids=str)
def test_arguments_are_left_alone(torch_rng, b, d, n):
    for int8 in (True, False):
        case = make(torch_rng, b=b, d=d, n=n, l=66, int8=int8)
        state = torch.randn(b, d, n, generator=torch_rng)
        before = [part.clone() for part in (*case, state)]
        for order in ORDERS:
            case.run(order, state=state)
        for part, copy in zip((*case, state), before, strict=True):
            assert_exact("argument", part, copy)


def test_the_state_does_not_share_memory_with_the_run(torch_rng):
    case = make(torch_rng, l=66)
    for order in ORDERS:
        first = case.run(order)
        kept = first.state.clone()
        case.run(order, state=first.state)
        assert_exact("state", first.state, kept)


def test_fake_quantized_u_is_what_requantizing_reads(torch_rng):
    case = make(torch_rng, int8=False)
    scale = 0.02
    expected = case._replace(u=fake_quantize(case.u, scale)).run(ScanOrder.SEQUENTIAL)
    got = case.run(ScanOrder.SEQUENTIAL, u_scale=scale, requantize_u=True)
    assert_exact("y", got.y, expected.y)


def half_rounding(dtype: torch.dtype, exact: oracles.Scan) -> torch.Tensor:
    """What rounding y once may add: half a unit in the last place, a normal number's at least.

    A quarter more keeps a value near the middle of two, which uses all of it, from warning.
    """
    largest = (exact.y.abs() + exact.y_bound).clamp(min=torch.finfo(dtype).tiny)
    return 1.25 * largest * torch.finfo(dtype).eps / 2


@both_orders
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("l", [1, 70], ids="l{}".format)
def test_half_precision_is_the_float32_scan_rounded_once(backend, torch_rng, order, dtype, l):
    case = make(torch_rng, l=l, int8=False)
    half = case._replace(**{name: getattr(case, name).to(dtype) for name in ("u", "dt", "B", "C", "z")})
    state = torch.randn(2, 5, 8, generator=torch_rng)
    got, exact = half.on(backend, order, state=state), half.oracle(state)
    assert got.y.dtype == dtype and got.state.dtype == torch.float32
    assert_close("y", got.y, exact.y, exact.y_bound + half_rounding(dtype, exact))
    assert_close("state", got.state, exact.states[:, -1], exact.state_bounds[:, -1])


@both_orders
def test_a_mixture_of_dtypes_is_computed_in_float32(backend, torch_rng, order):
    case = make(torch_rng, l=66)
    mixed = case._replace(
        u=(case.u.float() * SCALES["u_scale"]).bfloat16(), z=case.z.float() * SCALES["z_scale"]
    )
    widened = mixed._replace(u=mixed.u.float())
    got, expected = (x.on(backend, order, **SCALES) for x in (mixed, widened))
    assert_exact("y", got.y, expected.y.bfloat16())
    assert_exact("state", got.state, expected.state)


def test_refusals(torch_rng):
    case = make(torch_rng, l=4)
    order = ScanOrder.CHUNKED
    for name in ("u", "dt", "B", "C", "z"):
        scales: dict[str, Any] = {**SCALES, f"{name.lower()}_scale": None}
        with pytest.raises(ShapeError, match=f"`{name}` is int8 and needs `{name.lower()}_scale`"):
            selective_scan(*case, order=order, **scales)
        with pytest.raises(ShapeError, match=f"`{name}` is torch.float64, expected int8, float32, float16"):
            selective_scan(*case._replace(**{name: getattr(case, name).double()}), order=order, **SCALES)
    with pytest.raises(ShapeError, match="requantizing `u` needs `u_scale`"):
        make(torch_rng, l=4, int8=False).run(order, requantize_u=True)
    for wrong in (case.u[0], case.u[:, :, :0]):
        with pytest.raises(ShapeError, match=r"`u` must be \(b, d, l\) with l >= 1"):
            case._replace(u=wrong).run(order)
    for name in ("dt", "B", "C", "z"):
        with pytest.raises(ShapeError, match=f"`{name}` must be"):
            case._replace(**{name: getattr(case, name)[:, :, :3]}).run(order)
    with pytest.raises(ShapeError, match="`A` must be"):
        case._replace(A=case.A[:4]).run(order)
    state = torch.zeros(2, 5, 8)
    for wrong in (state[:1], state[:, :, :7], state.to(torch.int8), state.double()):
        with pytest.raises(ShapeError, match="`state` must be"):
            case.run(order, state=wrong)
    with pytest.raises(ShapeError, match="`state` must be"):
        case.run(order, state=state, state_scale=STATE_SCALE)
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        case.run(order, state_scale=0.0)
