"""The laws that tie the modes to each other, as docs/modes.md states them."""

from dataclasses import replace

import pytest
import torch
from close import assert_close, assert_exact
from quantized_models import Recorder, mean_kl

from qmamba_cli.kernels.backend import CPU
from qmamba_cli.model.block import BlockState, block_forward
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.modes import COLUMNS, MODES, Mode, State
from qmamba_cli.quant.grid import dequantize, quantize

QUANTIZED = [mode for mode in MODES.values() if mode.name != "fp"]
EPS = torch.finfo(torch.float32).eps

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
each_quantized_mode = pytest.mark.parametrize("mode", QUANTIZED, ids=lambda mode: mode.name)


def prefill_and_decode(model: Mamba, ids: torch.Tensor, steps: int = 3):
    """Hidden states of a prefill and of the steps after it, and the state after each call."""
    hidden, state = model.forward(ids[:, :-steps])
    hiddens, states = [hidden], [state]
    for t in range(ids.shape[1] - steps, ids.shape[1]):
        hidden, state = model.forward(ids[:, t : t + 1], state)
        hiddens.append(hidden)
        states.append(state)
    return hiddens, states


def assert_states_exact(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert_exact("conv state", one.conv.values, other.conv.values)
        assert (one.conv.scale is None) == (other.conv.scale is None)
        if one.conv.scale is not None:
            assert_exact("conv scale", one.conv.scale, other.conv.scale)
        assert_exact("ssm state", one.ssm, other.ssm)


def assert_runs_exact(got, expected):
    for one, other in zip(got[0], expected[0], strict=True):
        assert_exact("hidden", one, other)
    for one, other in zip(got[1], expected[1], strict=True):
        assert_states_exact(one, other)


def block(subject, layer, mode, residual, state=None, backend=CPU):
    weights = subject.weights(mode).blocks[layer]
    return block_forward(weights, mode, backend, residual, state, norm_eps=subject.config.norm_eps)


def layer_inputs(subject):
    """(layer, residual) of every layer in mode 2-1: compared modes start a layer from the same one."""
    residual = subject.quantized.embedding[subject.ids]
    for layer in range(subject.config.n_layer):
        yield layer, residual
        residual, _ = block(subject, layer, MODES["2-1"], residual)


# Law 1.
@pytest.mark.parametrize(("one", "other"), [("2-0", "0"), ("2-3", "2-1")], ids=["2-0=0", "2-3=2-1"])
def test_equal_rows_are_equal_bit_for_bit(subject, one, other):
    got, expected = (prefill_and_decode(subject.model(name), subject.ids) for name in (one, other))
    assert_runs_exact(got, expected)


def test_a_finer_state_is_equal_in_prefill_and_parts_in_decode(subject):
    (fine, *fine_steps), fine_states = prefill_and_decode(subject.model("2-2"), subject.ids)
    (coarse, *coarse_steps), coarse_states = prefill_and_decode(subject.model("2-1"), subject.ids)
    assert_exact("prefill", fine, coarse)
    assert not torch.equal(fine_steps[0], coarse_steps[0])

    # By the state's grid only: the fine state, quantized, is the coarse one, and a step from the coarse
    # state's real values is the coarse step.
    scales = [layer.scales.ssm_state for layer in subject.quantized.blocks]
    on_grid = []
    for float_state, int8_state, scale in zip(fine_states[0], coarse_states[0], scales, strict=True):
        assert_exact("state", quantize(float_state.ssm, scale), int8_state.ssm)
        on_grid.append(BlockState(int8_state.conv, dequantize(int8_state.ssm, scale)))
    token = subject.ids[:, -3:-2]
    step, _ = subject.model("2-2").forward(token, on_grid)
    assert_exact("step", step, coarse_steps[0])


# Law 2.
def test_the_two_scan_orders_agree_before_the_next_rounding(subject):
    for layer, residual in layer_inputs(subject):
        runs = []
        for name in ("0", "2-1"):
            recorder = Recorder("selective_scan")
            block(subject, layer, MODES[name], residual, backend=recorder.backend)
            runs.append(recorder.calls[0])
        (args, _, chunked), (same_args, _, sequential) = runs
        for one, other in zip(args, same_args, strict=True):
            assert_exact("operand", one, other)
        # 1e-6 of the layer's largest output.
        assert_close("y", chunked.y, sequential.y.double(), 1e-6 * float(sequential.y.abs().max()))


# Law 3.
@pytest.mark.parametrize("shrink", [1.0, 0.5], ids=["calibrated", "clipping"])
def test_true_u_is_half_a_step_from_the_grid_or_clipped(subject, shrink):
    for layer, residual in layer_inputs(subject):
        scale = subject.quantized.blocks[layer].scales.x_proj_input * shrink
        narrowed = replace(subject.quantized.blocks[layer].scales, x_proj_input=scale)
        weights = replace(subject.quantized.blocks[layer], scales=narrowed)
        u = {}
        for name in ("2-2", "2-4"):
            recorder = Recorder("selective_scan")
            block_forward(
                weights, MODES[name], recorder.backend, residual, None, norm_eps=subject.config.norm_eps
            )
            u[name] = recorder.calls[0][0][0].double()
        true, on_grid = u["2-4"], u["2-2"]
        scale = torch.as_tensor(scale).double().view(-1, 1)
        low, high = -128 * scale, 127 * scale
        inside = (true >= low - scale / 2) & (true <= high + scale / 2)
        assert inside.double().mean() > 0.8
        # Half a step, and the rounding of the product with the reciprocal.
        error = (on_grid - true).abs()
        assert bool((error <= scale / 2 + 2 * EPS * true.abs())[inside].all())
        assert float((error / scale)[inside].max()) > 0.49, "the bound is reached"
        beyond = ~inside
        assert beyond.any() or shrink == 1.0, "some values must clip"
        ends = torch.where(true > 0, high, low)
        assert bool(((on_grid - ends).abs() <= EPS * ends.abs())[beyond].all())


# Law 5.
def narrowed_model(subject, mode, name, backend):
    """The model with one activation scale a fiftieth of what its values need."""
    blocks = tuple(
        replace(weights, scales=replace(weights.scales, **{name: getattr(weights.scales, name) / 50}))
        for weights in subject.quantized.blocks
    )
    return Mamba(replace(subject.quantized, blocks=blocks), mode, backend)


@each_quantized_mode
@pytest.mark.parametrize(
    ("scale_name", "op"),
    [
        ("in_proj_input", "rms_norm"),
        ("in_proj_output", "linear"),
        ("x_proj_input", "causal_conv1d"),
        ("x_proj_output", "linear"),
        ("dt_proj_output", "linear"),
        ("out_proj_input", "hadamard"),
    ],
)
def test_out_of_range_values_saturate_and_never_wrap(small, mode, scale_name, op):
    recorder = Recorder(op)
    hidden, _ = narrowed_model(small, mode, scale_name, recorder.backend).forward(small.ids[:, :20])
    assert hidden.isfinite().all()
    narrow = {getattr(weights.scales, scale_name) / 50 for weights in small.quantized.blocks}
    tested = 0
    for args, kwargs, result in recorder.calls:
        scale = kwargs.get("out_scale")
        if scale not in narrow:
            continue
        codes, real = result, getattr(CPU, op)(*args, **{**kwargs, "out_scale": None})
        if op == "causal_conv1d":
            codes, real = codes[0], real[0]
        above, below = real > 128 * scale, real < -129 * scale
        assert (above | below).double().mean() > 0.1
        assert set(codes[above].tolist()) == {127}
        # SiLU has no large negative values.
        assert set(codes[below].tolist()) <= {-128}
        tested += 1
    # The other modes put u and the x half on their grids without an operator, by `quantize`.
    fused = {"causal_conv1d": str(mode.conv_output) == "int8", "linear": str(mode.conv_input) == "static"}
    expected = small.config.n_layer if fused.get(op, True) or scale_name != _FUSED_SCALE[op] else 0
    assert tested == expected


_FUSED_SCALE = {"causal_conv1d": "x_proj_input", "linear": "in_proj_output"}


@pytest.mark.parametrize(
    "mode", [mode for mode in QUANTIZED if mode.state is State.INT8], ids=lambda m: m.name
)
def test_a_state_out_of_range_saturates_and_never_wraps(small, mode):
    recorder = Recorder("selective_scan")
    narrowed_model(small, mode, "ssm_state", recorder.backend).forward(small.ids[:, :20])
    for args, kwargs, result in recorder.calls:
        real = CPU.selective_scan(*args, **{**kwargs, "state_scale": None}).state
        above, below = real > 128 * kwargs["state_scale"], real < -129 * kwargs["state_scale"]
        assert above.any() and below.any()
        assert set(result.state[above].tolist()) == {127}
        assert set(result.state[below].tolist()) == {-128}


# Law 6.
@each_mode
def test_two_runs_give_the_same_bits(subject, mode):
    ids = subject.ids[:, -70:]
    assert_runs_exact(
        prefill_and_decode(subject.model(mode), ids), prefill_and_decode(subject.model(mode), ids)
    )


@each_quantized_mode
def test_a_quantized_mode_stays_near_the_float_model(subject, mode):
    logits = {}
    for name in (mode.name, "fp"):
        model = subject.model(name)
        logits[name] = model.logits(model.hidden(subject.ids))
    spread = mean_kl(logits["fp"], logits["fp"].roll(1, dims=1))
    kl = mean_kl(logits["fp"], logits[mode.name])
    assert 0 < kl < spread / 20


def constructible_rows() -> list[Mode]:
    from qmamba_cli.errors import UsageError

    rows = {}
    for mode in MODES.values():
        for column, vocabulary in COLUMNS.items():
            for value in vocabulary:
                try:
                    row = mode.with_columns({column: str(value)})
                except UsageError:
                    continue
                if row.name not in MODES:
                    rows[row.name] = row
    return list(rows.values())


@pytest.mark.parametrize("row", constructible_rows(), ids=lambda row: row.name)
def test_every_row_that_can_be_built_runs(small, row):
    ids = small.ids[:, :12]
    hiddens, states = prefill_and_decode(small.model(row), ids)
    assert all(hidden.isfinite().all() for hidden in hiddens)
    wanted = torch.int8 if row.state is State.INT8 else torch.float32
    assert {layer.ssm.dtype for state in states for layer in state} == {wanted}


def test_there_are_rows_beyond_the_table():
    names = {row.name for row in constructible_rows()}
    assert {"0+conv_input=dynamic", "2-4+state=int8", "fp+scan_order=sequential"} <= names


@pytest.mark.parametrize(
    ("base", "column", "value"),
    [
        ("0", "conv_input", "dynamic"),
        ("2-4", "scan_reads", "requantized"),
        ("2-3", "scan_reads", "fp32"),
        ("0", "conv_output", "fp32"),
    ],
)
def test_a_column_does_what_it_says(small, base, column, value):
    row = MODES[base].with_columns({column: value})
    plain, changed = (small.model(mode).hidden(small.ids) for mode in (base, row))
    if column == "conv_output":
        # u is put on the grid outside the conv instead of inside it: the same rounding rule.
        assert_exact("hidden", changed, plain)
    else:
        assert not torch.equal(changed, plain)


def test_columns_compose_to_the_table_rows(small):
    made = MODES["2-4"].with_columns({"conv_input": "dynamic", "scan_order": "chunked"})
    assert_exact("hidden", small.model(made).hidden(small.ids), small.model("3").hidden(small.ids))
