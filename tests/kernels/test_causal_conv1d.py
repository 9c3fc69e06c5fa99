from typing import NamedTuple

import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.causal_conv1d.reference import ConvState, causal_conv1d
from qmamba_cli.quant.grid import quantize

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = (2, 3, 4)
# Around a block of 64, 128, 1024 and 2048; `lengths` adds those around the conv's width.
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049)
X_SCALE = 0.037


class Case(NamedTuple):
    """Operands on the int8 grid, with one scale a tensor or one a token."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    x_scale: float | torch.Tensor
    weight_scale: torch.Tensor

    def real(self) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.x_scale, torch.Tensor):
            x = self.x.double() * self.x_scale.double().unsqueeze(1)
        else:
            x = self.x.double() * torch.tensor(self.x_scale).double()
        return x, self.weight.double() * self.weight_scale.double().unsqueeze(1)

    def oracle(self) -> oracles.Conv:
        x, weight = self.real()
        return oracles.causal_conv1d(x, weight, self.bias)

    def run(self, start=0, stop=None, *, state=None, out_scale=None):
        """The operator on the tokens from start to stop."""
        scale = self.x_scale
        return causal_conv1d(
            self.x[:, :, start:stop],
            self.weight,
            self.bias,
            x_scale=scale[:, start:stop] if isinstance(scale, torch.Tensor) else scale,
            weight_scale=self.weight_scale,
            out_scale=out_scale,
            state=state,
        )

    def on(self, backend, *, operator="causal_conv1d", **options):
        return oracles.call(
            backend,
            operator,
            self.x,
            self.weight,
            self.bias,
            x_scale=self.x_scale,
            weight_scale=self.weight_scale,
            **options,
        )


def make(rng, *, b=2, l=65, d=31, w=4, with_bias=True, per_token=False) -> Case:
    return Case(
        x=torch.randint(-128, 128, (b, d, l), dtype=torch.int8, generator=rng),
        weight=torch.randint(-128, 128, (d, w), dtype=torch.int8, generator=rng),
        bias=torch.randn(d, generator=rng) if with_bias else None,
        x_scale=torch.rand(b, l, generator=rng) * 0.05 + 1e-4 if per_token else X_SCALE,
        weight_scale=torch.rand(d, generator=rng) * 4e-3 + 1e-5,
    )


def budget(exact: oracles.Conv, w: int):
    return tolerances.CONV.budget(exact.magnitude, w + 6)


per_token = pytest.mark.parametrize("per_token", [False, True], ids=["per-tensor", "per-token"])


@pytest.mark.parametrize("w", WIDTHS, ids="w{}".format)
@pytest.mark.parametrize("l", LENGTHS, ids="l{}".format)
@per_token
def test_int8_equals_the_oracle(backend, torch_rng, l, w, per_token):
    case = make(torch_rng, l=l, w=w, d=5 if l > 200 else 31, per_token=per_token)
    exact = case.oracle()
    v, state = case.on(backend)
    assert_close("causal_conv1d", v, exact.v, budget(exact, w))

    step = float(exact.v.abs().max().float() / 127)
    q, same_state = case.on(backend, out_scale=step)
    row = tolerances.GRID
    assert_grid("causal_conv1d", q, oracles.quantize(exact.v, step), share=row.share, steps=row.steps)

    # The state is a copy of the last inputs, zeros where there were none.
    padded = torch.cat([torch.zeros(2, case.x.shape[1], w - 1, dtype=torch.int8), case.x], dim=2)
    assert_exact("state", state.values, padded[:, :, l:])
    assert_exact("state", same_state.values, state.values)


@per_token
def test_int8_outputs_with_a_scale_a_channel_equal_the_oracle(backend, torch_rng, per_token):
    case = make(torch_rng, l=70, per_token=per_token)
    exact = case.oracle()
    # From all values saturated to all of them zero.
    steps = torch.logspace(-5, 2, 31)
    q, _ = case.on(backend, out_scale=steps)
    row = tolerances.GRID
    for channel, step in enumerate(steps.tolist()):
        wanted = oracles.quantize(exact.v[:, channel], step)
        assert_grid(f"channel {channel}", q[:, channel], wanted, share=row.share, steps=row.steps)
    assert set(q[:, 0].flatten().tolist()) == {-128, 127} and not q[:, -1].any()


@per_token
@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale a channel"])
def test_both_outputs_are_the_float_one_and_its_codes(backend, torch_rng, per_token, each):
    # Channels contiguous, as in a model, where one kernel writes both.
    case = make(torch_rng, l=70, per_token=per_token)
    case = case._replace(x=case.x.transpose(1, 2).contiguous().transpose(1, 2))
    scale = torch.logspace(-5, 2, 31) if each else 0.03
    v, q, state = case.on(backend, operator="causal_conv1d_both", out_scale=scale)
    alone, same_state = case.on(backend)
    assert_exact("v", v, alone)
    assert_exact("q", q, quantize(v, scale))
    for got, expected in zip(state, same_state, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert_exact("state", got, expected)


def test_a_scale_a_channel_must_fit(torch_rng):
    with pytest.raises(ShapeError, match=r"one each along axis 1, got torch.float32 \(30,\)"):
        make(torch_rng).run(out_scale=torch.ones(30))


@pytest.mark.parametrize("w", WIDTHS, ids="w{}".format)
def test_float_equals_the_oracle(backend, torch_rng, w):
    x = torch.randn(2, 31, 65, generator=torch_rng)
    weight, bias = torch.randn(31, w, generator=torch_rng), torch.randn(31, generator=torch_rng)
    for offset in (bias, None):
        exact = oracles.causal_conv1d(x, weight, offset)
        v, state = oracles.call(backend, "causal_conv1d", x, weight, offset)
        assert_close("causal_conv1d", v, exact.v, budget(exact, w))
        assert_exact("state", state.values, x[:, :, 65 - w + 1 :])


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32 taps", "half taps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_float32_and_rounded_once(backend, torch_rng, dtype, weight_dtype):
    x, history = (torch.randn(2, 31, l, generator=torch_rng).to(dtype) for l in (65, 3))
    weight = torch.randn(31, 4, generator=torch_rng).to(weight_dtype or dtype)
    bias = torch.randn(31, generator=torch_rng)
    exact = oracles.causal_conv1d(x, weight, bias, history)
    v, state = oracles.call(backend, "causal_conv1d", x, weight, bias, state=ConvState(history))
    info = torch.finfo(dtype)
    rounding = exact.v.abs() * info.eps + info.smallest_normal * info.eps
    assert v.dtype == dtype
    assert_close("causal_conv1d", v, exact.v, budget(exact, 4) + rounding)
    assert_exact("state", state.values, x[:, :, 62:])
    q, same_state = oracles.call(
        backend, "causal_conv1d", x, weight, bias, state=ConvState(history), out_scale=0.03
    )
    row = tolerances.GRID
    assert_grid("causal_conv1d", q, oracles.quantize(exact.v, 0.03), share=row.share, steps=row.steps)
    assert_exact("state", same_state.values, state.values)


def test_no_bias_is_a_zero_bias(torch_rng):
    case = make(torch_rng, with_bias=False)
    assert_exact("v", case.run()[0], case._replace(bias=torch.zeros(31)).run()[0])


def test_integer_sums_are_exact(backend):
    # Scales of 1 and a bias that undoes the sum leave a = 0 only if the sum is exact.
    x = torch.full((1, 2, 4), -128, dtype=torch.int8)
    weight = torch.tensor([[-128] * 4, [127] * 4], dtype=torch.int8)
    bias = torch.tensor([-4.0 * 128 * 128, 4.0 * 128 * 127])
    v, _ = oracles.call(backend, "causal_conv1d", x, weight, bias, x_scale=1.0, weight_scale=torch.ones(2))
    assert v[:, :, 3].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("w", WIDTHS, ids="w{}".format)
def test_an_impulse_returns_the_taps_reversed_in_time(backend, w):
    taps = torch.tensor([[3, -20, 77, 100][:w]], dtype=torch.int8)
    x = torch.zeros(1, 1, 9, dtype=torch.int8)
    x[0, 0, 2] = 1
    # Far above zero SiLU is the identity to the last bit.
    bias = torch.tensor([1000.0])
    v, _ = oracles.call(backend, "causal_conv1d", x, taps, bias, x_scale=1.0, weight_scale=torch.ones(1))
    response = (v - 1000).flatten().tolist()
    assert response == [0, 0, *taps[0].flip(0).tolist(), *[0] * (7 - w)]


@per_token
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_one_call_equals_any_split(per_token, data):
    w, l = data.draw(st.sampled_from(WIDTHS), "w"), data.draw(st.integers(1, 40), "l")
    cuts = sorted(data.draw(st.sets(st.integers(1, l - 1), max_size=6), "cuts")) if l > 1 else []
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    case = make(rng, l=l, w=w, d=3, per_token=per_token)
    whole, whole_state = case.run()
    parts, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, l], strict=True):
        out, state = case.run(start, stop, state=state)
        parts.append(out)
    exact = case.oracle()
    assert_close("split", torch.cat(parts, dim=2), whole, budget(exact, w))
    assert_exact("state", state.values, whole_state.values)
    if per_token:
        # Only what lies inside the sequence: before its start the values are 0 and any scale will do.
        inside = min(l, w - 1)
        assert_exact("state", state.scale[:, -inside:], case.x_scale[:, l - inside :])
        assert_exact("state", state.scale, whole_state.scale)


@per_token
def test_the_seam_of_a_block(torch_rng, per_token):
    case = make(torch_rng, l=129, per_token=per_token)
    first, state = case.run(0, 64)
    second, _ = case.run(64, 129, state=state)
    exact = case.oracle()
    assert_close("seam", torch.cat([first, second], dim=2), exact.v, budget(exact, 4))


@per_token
def test_token_by_token(torch_rng, per_token):
    case = make(torch_rng, l=20, w=4, per_token=per_token)
    exact, state = case.oracle(), None
    for t in range(20):
        out, state = case.run(t, t + 1, state=state)
        assert_close(f"token {t}", out[:, :, 0], exact.v[:, :, t], budget(exact, 4)[:, :, t])


def test_a_later_token_changes_no_earlier_one(torch_rng):
    case = make(torch_rng, l=40, per_token=True)
    louder = case._replace(x_scale=case.x_scale.clone())
    louder.x_scale[:, 30:] *= 100
    assert_exact("v", louder.run()[0][:, :, :30], case.run()[0][:, :, :30])


def test_equal_scales_a_token_are_one_scale(torch_rng):
    case = make(torch_rng, l=40)
    each = case._replace(x_scale=torch.full((2, 40), X_SCALE))
    assert_close("v", each.run()[0], case.run()[0], budget(case.oracle(), 4))


def test_strided_input_is_not_misread(backend, torch_rng):
    case = make(torch_rng)
    channels_last = case._replace(x=case.x.transpose(1, 2).contiguous().transpose(1, 2))
    half = case._replace(x=torch.cat([case.x, case.x.flip(1)], dim=1)[:, :31])
    assert not channels_last.x.is_contiguous() and not half.x.is_contiguous()
    expected, _ = case.on(backend)
    for strided in (channels_last, half):
        assert_exact("v", strided.on(backend)[0], expected)


def test_out_of_range_saturates_and_never_wraps(backend):
    x = torch.tensor([[[100, -100]]], dtype=torch.int8)
    taps = torch.tensor([[0, 127]], dtype=torch.int8)
    q, _ = oracles.call(
        backend, "causal_conv1d", x, taps, None, x_scale=1.0, weight_scale=torch.ones(1), out_scale=1e-3
    )
    # SiLU of a large negative number is 0.
    assert q.tolist() == [[[127, 0]]]
    # Its minimum, -0.278, is far below the grid.
    bottom, _ = oracles.call(
        backend, "causal_conv1d", -x, taps, None, x_scale=1e-4, weight_scale=torch.ones(1), out_scale=1e-4
    )
    assert bottom.tolist() == [[[-128, 127]]]


def test_arguments_are_left_alone(torch_rng):
    case = make(torch_rng, per_token=True)
    before = [part.clone() for part in case]
    _, state = case.run()
    kept = ConvState(state.values.clone(), state.scale.clone())
    case.run(state=state, out_scale=0.1)
    for part, copy in zip((*case, *state), (*before, *kept), strict=True):
        assert_exact("argument", part, copy)


def test_two_runs_give_the_same_bits(backend, torch_rng):
    case = make(torch_rng, l=129, d=64)
    assert_exact("v", case.on(backend)[0], case.on(backend)[0])


def test_refusals(torch_rng):
    case = make(torch_rng, l=6, d=3)
    x, weight, bias, x_scale, weight_scale = case
    scales = {"x_scale": x_scale, "weight_scale": weight_scale}
    with pytest.raises(ShapeError, match=r"\(b, d, l\) with l >= 1"):
        causal_conv1d(x[:, :, :0], weight, bias, **scales)
    with pytest.raises(ShapeError, match=r"\(b, d, l\) with l >= 1"):
        causal_conv1d(x[0], weight, bias, **scales)
    for wrong in (weight[:, :1], weight[:2], torch.ones(3, 5, dtype=torch.int8), weight[0]):
        with pytest.raises(ShapeError, match="`weight` must be"):
            causal_conv1d(x, wrong, bias, **scales)
    with pytest.raises(ShapeError, match="both or neither"):
        causal_conv1d(x, weight, bias, x_scale=x_scale)
    with pytest.raises(ShapeError, match="both or neither"):
        causal_conv1d(x, weight, bias, weight_scale=weight_scale)
    with pytest.raises(ShapeError, match="expected both torch"):
        causal_conv1d(x, weight, bias)
    with pytest.raises(ShapeError, match="expected both torch"):
        causal_conv1d(x.float(), weight, bias, **scales)
    with pytest.raises(ShapeError, match=r"`x_scale` must be \(2, 6\)"):
        causal_conv1d(x, weight, bias, x_scale=torch.ones(2, 5), weight_scale=weight_scale)
    for values in (x[:, :, :2], x[:1, :, :3], x[:, :, :3].float()):
        with pytest.raises(ShapeError, match="`state` must be"):
            causal_conv1d(x, weight, bias, **scales, state=ConvState(values))
    with pytest.raises(ShapeError, match="one scale a token"):
        causal_conv1d(x, weight, bias, **scales, state=ConvState(x[:, :, :3], torch.ones(2, 3)))
    each = {"x_scale": torch.ones(2, 6), "weight_scale": weight_scale}
    with pytest.raises(ShapeError, match="one scale a token"):
        causal_conv1d(x, weight, bias, **each, state=ConvState(x[:, :, :3]))
    with pytest.raises(ShapeError, match="scale must be finite and > 0"):
        causal_conv1d(x, weight, bias, **scales, out_scale=0.0)
