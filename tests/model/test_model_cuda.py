"""Whole models on the `cuda` backend: the laws of the modes, and agreement with the CPU backend."""

from itertools import islice

import pytest
import torch
from quantized_models import mean_kl
from test_model_laws import assert_runs_exact, prefill_and_decode

from qmamba_cli.kernels.backend import CPU, select_backend
from qmamba_cli.model.generate import generate
from qmamba_cli.modes import MODES
from qmamba_cli.quant.observers import ObserverSet

pytestmark = pytest.mark.gpu

QUANTIZED = [mode.name for mode in MODES.values() if str(mode.precision) == "int8"]


@pytest.fixture(scope="module")
def cuda():
    return select_backend("cuda")


@pytest.mark.parametrize("mode", MODES)
def test_kl_to_the_float_model_is_that_of_the_cpu_backend(demo, cuda, mode):
    reference = demo.model("fp", CPU)
    baseline = reference.logits(reference.hidden(demo.ids))

    def kl(backend):
        model = demo.model(mode, backend)
        return mean_kl(baseline, model.logits(model.hidden(demo.ids)).cpu())

    on_cpu, on_gpu = kl(CPU), kl(cuda)
    if mode == "fp":
        assert on_gpu < 1e-8
    else:
        # A rounding that falls the other way spreads through the layers; the mean over tokens hardly moves.
        assert on_gpu == pytest.approx(on_cpu, rel=0.02)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_two_runs_give_identical_bits(demo, cuda, mode):
    model = demo.model(mode, cuda)
    assert_runs_exact(prefill_and_decode(model, demo.ids), prefill_and_decode(model, demo.ids))


def test_modes_0_and_2_0_are_equal(demo, cuda):
    runs = [prefill_and_decode(demo.model(mode, cuda), demo.ids) for mode in ("0", "2-0")]
    assert_runs_exact(*runs)


def test_modes_2_1_and_2_3_are_equal(demo, cuda):
    runs = [prefill_and_decode(demo.model(mode, cuda), demo.ids) for mode in ("2-1", "2-3")]
    assert_runs_exact(*runs)


def test_modes_2_1_and_2_2_are_equal_in_prefill(demo, cuda):
    one, other = (demo.model(mode, cuda).hidden(demo.ids) for mode in ("2-1", "2-2"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["2-2", "2-4", "3", "fp"])
def test_decode_continues_prefill_where_the_state_is_float(demo, cuda, mode):
    model = demo.model(mode, cuda)
    whole = model.logits(model.hidden(demo.ids)).cpu()
    hiddens, _ = prefill_and_decode(model, demo.ids, steps=16)
    parts = model.logits(torch.cat(hiddens, dim=1)).cpu()
    assert mean_kl(whole, parts) < 1e-3


def test_greedy_text_of_the_float_model_is_that_of_the_cpu_backend(demo, cuda):
    prompt = demo.ids[0, :24].tolist()
    texts = [
        list(islice(generate(demo.model("fp", backend), prompt, max_new_tokens=64), 64))
        for backend in (CPU, cuda)
    ]
    assert texts[0] == texts[1]


def test_calibration_on_the_gpu_finds_the_scales_of_the_cpu(demo, cuda):
    scales = []
    for backend in (CPU, cuda):
        observers = ObserverSet(demo.config.n_layer)
        demo.model("fp", backend).forward(demo.ids, hook=observers.observe)
        scales.append(observers.scales())
    for key, value in scales[0].items():
        # One bin of the histogram is 0.2 % wide; an element at its edge may fall on either side.
        assert scales[1][key] == pytest.approx(value, rel=2.5e-3), key


def test_a_decode_step_is_captured_by_a_cuda_graph(demo, cuda):
    model = demo.model("0", cuda)
    _, state = model.forward(demo.ids[:, :-1])
    token = demo.ids[:, -1:].to(cuda.device)
    expected = model.forward(token, state)[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        captured = model.forward(token, state)[0]
    with torch.inference_mode():
        captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
