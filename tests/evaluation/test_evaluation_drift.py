"""Errors of states and logits along a sequence, on models whose errors are known."""

import pytest
import torch

from qmamba_cli.evaluation.drift import DECODE, PATHS, PREFILL, marks, point, tokens_read, trace


class Counter:
    """Its state is the number of tokens read, times ``gain`` for each of them; its logits favour token 0.

    Args:
        gain: what the state is multiplied by at every token; 1 is exact.
        seam: what it is multiplied by at the end of every call.
        shift: added to all logits.
        favour: logit of token 0.
    """

    vocab_size = 4

    def __init__(self, gain=1.0, seam=1.0, shift=0.0, favour=1.0):
        self.gain, self.seam, self.shift, self.favour = gain, seam, shift, favour
        self.calls = 0

    def forward(self, ids, state=None):
        self.calls += 1
        state = torch.zeros(len(ids), 1, 1) if state is None else state
        for _ in range(ids.shape[1]):
            state = (state + 1) * self.gain
        return torch.ones(*ids.shape, 1), state * self.seam

    def logits(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], 4) + self.shift
        logits[..., 0] += self.favour
        return logits


def read(state):
    return [state.clone(), 2 * state]


def points(model, path, length=12, baseline=None):
    ids = torch.zeros(3, length, dtype=torch.int64)
    baseline = baseline or Counter()
    expected = trace(baseline, ids, read, path=PREFILL)
    pairs = zip(expected, trace(model, ids, read, path=path), strict=True)
    return [point(baseline, reference, model, got) for reference, got in pairs]


@pytest.mark.parametrize("path", PATHS)
def test_the_same_model_does_not_drift(path):
    found = points(Counter(), path)
    assert [one.t for one in found] == [1, 2, 4, 8, 12]
    for one in found:
        assert one.kl == 0 and one.logits_error == 0 and one.state_error == 0
        assert one.kl_ci == (0.0, 0.0)


def test_a_seam_costs_prefill_once_and_decode_at_every_token():
    prefill, decode = (points(Counter(seam=0.5), path) for path in PATHS)
    assert [one.state_error for one in prefill] == pytest.approx([0.5] * 5)
    # (h + 1) / 2 from 0 is 1 - 2^-t; the exact state is t.
    for one in decode:
        assert one.state_error == pytest.approx(1 - (1 - 0.5**one.t) / one.t)
        assert one.layers == pytest.approx([one.state_error] * 2)


def test_errors_of_logits_by_hand():
    shifted = points(Counter(shift=5.0), PREFILL)
    assert all(one.logits_error < 1e-6 and one.kl < 1e-6 for one in shifted), "no probability changes"
    doubled = points(Counter(favour=2.0), DECODE)
    assert [one.logits_error for one in doubled] == pytest.approx([1.0] * 5)
    p, q = (torch.tensor([favour, 0.0, 0.0, 0.0]).double().log_softmax(0) for favour in (1.0, 2.0))
    assert doubled[0].kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_every_token_is_read_and_counted(path, length):
    model, steps = Counter(), []
    ids = torch.zeros(2, length, dtype=torch.int64)
    found = list(trace(model, ids, read, path=path, advance=steps.append))
    assert sum(steps) == tokens_read(length, path)
    assert torch.cat([step.hidden for step in found], dim=1).shape == (2, length, 1)
    assert [step.t for step in found] == marks(length)
    assert model.calls == (length if path == DECODE else len(marks(length)))
    assert [float(step.states[0][0, 0, 0]) for step in found] == marks(length)


def test_a_point_as_json():
    record = points(Counter(seam=0.5), DECODE)[1].record()
    assert set(record) == {"t", "kl", "kl_ci", "logits_error", "state_error", "state_error_layers"}
    assert record["t"] == 2 and len(record["state_error_layers"]) == 2
