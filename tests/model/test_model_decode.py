"""Law 4: a sequence in one call, in parts, or token by token, is the same sequence in the same mode."""

import oracles
import pytest
import torch
from close import assert_close, assert_exact
from quantized_models import Recorder, mean_kl, run_in_parts

from qmamba_cli.kernels.backend import CPU
from qmamba_cli.modes import MODES, ConvInput, State
from qmamba_cli.quant.grid import dequantize, quantize

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
QUANTIZED_STATE = [mode for mode in MODES.values() if mode.state is State.INT8]

# Before and after the ends of a chunk, ragged parts, and steps after a prefill of 60.
CUTS = {
    "1": [1],
    "63-65": [63, 65],
    "64": [64],
    "ragged": [2, 5, 9, 37],
    "steps": list(range(63, 72)),
}


def logits_of(model, ids, cuts=()):
    hidden, state = run_in_parts(model, ids, list(cuts))
    return model.logits(hidden), state


@pytest.fixture(scope="module")
def in_one_call():
    """Logits and state of a subject's sequences in one call, each computed once."""
    done = {}

    def run(subject, name):
        key = (id(subject), name)
        if key not in done:
            done[key] = logits_of(subject.model(name), subject.ids)
        return done[key]

    return run


@each_mode
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_model_in_parts_is_the_model_in_one_call(subject, in_one_call, mode, cuts):
    model = subject.model(mode)
    whole, whole_state = in_one_call(subject, mode.name)
    parts, state = logits_of(model, subject.ids, cuts)
    apart = mean_kl(whole, parts)
    if mode.name == "fp":
        # Float32 order only; measured below 1e-12.
        assert apart < 1e-10
    else:
        cost = mean_kl(in_one_call(subject, "fp")[0], whole)
        # A float state leaves float32 order, which moves next to no value across a rounding boundary. An int8
        # state is rounded, and clipped at its percentile, at each seam: this may cost as much as all other
        # quantization together, and not more.
        assert apart <= cost * (1.0 if mode.state is State.INT8 else 0.01)
    for layer, whole_layer in zip(state, whole_state, strict=True):
        assert layer.ssm.dtype == whole_layer.ssm.dtype
        assert layer.conv.values.shape == whole_layer.conv.values.shape


@pytest.mark.parametrize("mode", QUANTIZED_STATE, ids=lambda mode: mode.name)
@pytest.mark.parametrize("cut", [1, 64])
def test_an_int8_state_errs_by_what_its_grid_loses_and_no_more(demo, mode, cut):
    """On each layer's operands: the scan is linear in the state, so the effect of the loss on y is known."""
    recorder = Recorder("selective_scan")
    demo.model(mode, recorder.backend).forward(demo.ids)
    assert len(recorder.calls) == demo.config.n_layer
    for args, kwargs, _ in recorder.calls:
        u, dt, A, B, C, D, z, bias = args
        scale = kwargs["state_scale"]
        exact = CPU.selective_scan(*args, **{**kwargs, "state_scale": None})
        before = [x[:, :, :cut] for x in (u, dt, B, C, z)]
        after = [x[:, :, cut:] for x in (u, dt, B, C, z)]
        first = CPU.selective_scan(*arranged(before, A, D, bias), **{**kwargs, "state_scale": None})
        codes = quantize(first.state, scale)
        second = CPU.selective_scan(*arranged(after, A, D, bias), **{**kwargs, "state": codes})

        lost = first.state.double() - dequantize(codes, scale).double()
        clipped = first.state.abs() > 127.5 * scale
        assert float(lost[~clipped].abs().max()) <= 0.501 * scale
        quiet = [torch.zeros_like(after[0]), *after[1:]]
        real = [
            x.double() * kwargs[f"{name}_scale"] if x.dtype == torch.int8 else x
            for x, name in zip(quiet, ("u", "dt", "b", "c", "z"), strict=True)
        ]
        effect = oracles.selective_scan(*arranged(real, A, D, bias), state=lost).y
        size = float(exact.y.abs().max())
        assert_close("y", second.y, exact.y[:, cut:].double() - effect, 2e-6 * size)
        assert float(effect.abs().max()) > 1e-4 * size, "the state's grid must show"


def arranged(sequences, A, D, bias):
    u, dt, B, C, z = sequences
    return u, dt, A, B, C, D, z, bias


@each_mode
def test_decode_honours_the_mode(small, mode):
    """The operators of a step are asked for what those of the prefill were asked for, but for the state."""
    prefill, step = [], []
    for op in ("causal_conv1d", "selective_scan"):
        recorder = Recorder(op)
        model = small.model(mode, recorder.backend)
        _, state = model.forward(small.ids[:, :70])
        prefill += [asked(call) for call in recorder.calls]
        recorder.calls.clear()
        model.forward(small.ids[:, 70:71], state)
        step += [asked(call) for call in recorder.calls]
        for layer, (_, kwargs, _) in enumerate(recorder.calls):
            handed = kwargs["state"]
            if op == "selective_scan":
                assert_exact("state", handed, state[layer].ssm)
                assert handed.dtype == (torch.int8 if mode.state is State.INT8 else torch.float32)
            else:
                assert_exact("state", handed.values, state[layer].conv.values)
                assert (handed.scale is not None) == (mode.conv_input is ConvInput.DYNAMIC)
    assert step == prefill


def asked(call):
    args, kwargs, _ = call
    options = {
        name: "a token" if isinstance(value, torch.Tensor) and name == "x_scale" else value
        for name, value in kwargs.items()
        if name != "state" and not (isinstance(value, torch.Tensor) and name != "x_scale")
    }
    return [arg if arg is None else arg.dtype for arg in args], options


@each_mode
def test_a_step_follows_its_own_mode_and_not_the_float_model(demo, mode):
    if mode.name == "fp":
        pytest.skip("the float model is what the others are compared with")
    steps = range(60, 72)
    own, _ = logits_of(demo.model(mode), demo.ids)
    stepped, _ = logits_of(demo.model(mode), demo.ids, steps)
    reference, _ = logits_of(demo.model("fp"), demo.ids)
    tail = slice(61, None)
    assert mean_kl(own[:, tail], stepped[:, tail]) < mean_kl(own[:, tail], reference[:, tail])


def test_a_batch_decodes_as_its_rows_do(small):
    for name in ("0", "2-4", "3", "fp"):
        model = small.model(name)
        whole, _ = run_in_parts(model, small.ids[:, :40], [30, 31, 32])
        for row in range(2):
            alone, _ = run_in_parts(model, small.ids[row : row + 1, :40], [30, 31, 32])
            assert mean_kl(model.logits(whole[row : row + 1]), model.logits(alone)) < 1e-6
