"""What a quantized tensor costs: known answers, exact zeros, honest intervals."""

import math

import numpy as np
import pytest
import torch

from qmamba_cli.evaluation.batches import window_batches
from qmamba_cli.evaluation.divergence import Outcome, Tally, compare_with_float, interval
from qmamba_cli.evaluation.sensitivity import (
    CSV_COLUMNS,
    Target,
    TensorError,
    against_everything,
    alone,
    csv_lines,
    linear_histogram,
    tensor_error,
)
from qmamba_cli.quant.histogram import Histogram


class Unigram:
    """A model whose logits do not depend on the text."""

    vocab_size = 3

    def __init__(self, *probabilities):
        self._logits = torch.log(torch.tensor(probabilities))

    def hidden(self, ids):
        return torch.zeros(*ids.shape, 1)

    def logits(self, hidden):
        return self._logits.expand(*hidden.shape[:-1], 3)


def outcome(*kl):
    values = np.array(kl, dtype=np.float64)
    return Outcome(kl=values, delta_ll=-values, tokens=np.ones(len(values), dtype=np.int64))


def test_the_error_of_a_grid_by_hand():
    error = TensorError()
    # Steps of 1: 0.25 is lost, 200 is clipped to 127, the rest lies on the grid.
    error.update(torch.tensor([0.25, 3.0, 200.0, -128.0]), 1.0)
    assert error.clip_rate == 0.25
    signal, noise = 0.25**2 + 9 + 200**2 + 128**2, 0.25**2 + 73**2
    assert error.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    error.update(torch.tensor([127.4, -128.4]), 1.0)
    assert error.clipped == 1, "what rounds to an end of the grid is not clipped"


def test_a_uniform_tensor_has_the_textbook_ratio(torch_rng):
    error = TensorError()
    error.update(torch.rand(1 << 16, generator=torch_rng) * 254 - 127, 1.0)
    # Signal (2·127)²/12, noise 1/12.
    assert error.sqnr_db == pytest.approx(20 * math.log10(254), abs=0.1)


def test_nothing_lost_has_no_ratio():
    error = TensorError()
    assert error.sqnr_db is None and error.clip_rate is None
    error.update(torch.tensor([1.0, -2.0]), 1.0)
    assert error.sqnr_db is None and error.clip_rate == 0


def test_divergence_and_likelihood_by_hand():
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    batches = window_batches(torch.tensor([[0, 0, 0], [0, 2, 2], [1, 1, 1]]), batch_size=2)
    steps = []
    same, other = compare_with_float(Unigram(*p), [Unigram(*p), Unigram(*q)], batches, advance=steps.append)
    assert same.kl_mean == 0 and same.delta_ll_mean == 0, "exactly"
    assert sum(steps) == 4
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert other.kl_mean == pytest.approx(kl, rel=1e-6)
    np.testing.assert_allclose(other.kl, 2 * kl, rtol=1e-6)
    np.testing.assert_allclose(other.delta_ll, [-2 * math.log(2), 2 * math.log(2), 0], atol=1e-6)
    assert other.tokens.tolist() == [2, 2, 2]


def test_more_models_than_run_side_by_side():
    models = [Unigram(0.5 - step / 100, 0.25 + step / 100, 0.25) for step in range(11)]
    batches = window_batches(torch.zeros(2, 4, dtype=torch.int64), batch_size=1)
    kls = [one.kl_mean for one in compare_with_float(models[0], models, batches)]
    assert kls[0] == 0
    assert kls == sorted(kls) and len(set(kls)) == 11


class Broken(Unigram):
    """Interrupted when it has read so many batches."""

    def __init__(self, batches, *p):
        super().__init__(*p)
        self.left = batches

    def hidden(self, ids):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().hidden(ids)


def test_an_interrupted_measurement_goes_on_to_the_same_numbers():
    """Eleven models are two steps of each batch; the tenth breaks off in the second step of one."""
    p = [(0.5 - step / 100, 0.25 + step / 100, 0.25) for step in range(11)]
    models = [Unigram(*one) for one in p]
    batches = window_batches(torch.tensor([[0, 1, 2], [2, 0, 2], [1, 1, 1]]), batch_size=1)
    expected = compare_with_float(models[0], models, batches)
    for broken_at in (0, 2):
        tally = Tally.empty(11, batches)
        several = [*models[:9], Broken(broken_at, *p[9]), models[10]]
        with pytest.raises(KeyboardInterrupt):
            compare_with_float(models[0], several, batches, tally=tally)
        assert (tally.done, tally.units) == (2 * broken_at + 1, 11 * broken_at + 8)
        found = tally.outcomes(batches)
        # Without a finished batch, the models that have read the first; else all, on the finished ones.
        assert [outcome is None for outcome in found] == [False] * 8 + [broken_at == 0] * 3
        for outcome, whole in zip(found, expected, strict=True):
            if outcome is not None:
                assert outcome.kl.tolist() == whole.kl[: max(broken_at, 1)].tolist()
                assert outcome.tokens.tolist() == [2] * max(broken_at, 1)
        resumed = compare_with_float(models[0], models, batches, tally=tally)
        for outcome, whole in zip(resumed, expected, strict=True):
            assert outcome.kl.tolist() == whole.kl.tolist()
            assert outcome.delta_ll.tolist() == whole.delta_ll.tolist()


def test_the_interval_covers_at_its_rate():
    random = np.random.default_rng(7)
    tokens = np.full(60, 10)
    hits = 0
    for _ in range(200):
        sums = random.normal(5.0, 2.0, size=60)
        low, high = interval(sums, tokens, resamples=400)
        hits += low <= 0.5 <= high
    # 95 % of 200 is 190; four standard errors of a binomial share below and above, less what a percentile
    # bootstrap of 60 lacks.
    assert 174 <= hits <= 199


def test_the_interval_is_the_same_each_time_and_needs_documents():
    values, tokens = np.array([1.0, 2.0, 4.0]), np.array([1, 1, 2])
    assert interval(values, tokens) == interval(values, tokens)
    low, high = interval(values, tokens)
    assert 1.0 <= low <= 7 / 4 <= high <= 2.0
    assert interval(values[:1], tokens[:1]) is None
    assert interval(np.array([1.0, math.inf]), tokens[:2]) is None


def test_the_most_expensive_tensor_comes_first():
    a, b, broken = Target(site="a"), Target(site="b"), Target(site="broken")
    rows = alone({a: outcome(0.1, 0.3), b: outcome(0.6, 0.6)}, {}, layers=1)
    assert [row.target for row in rows] == [b, a]
    assert [row.share for row in rows] == pytest.approx([0.75, 0.25])
    rows = alone({a: outcome(0.1), broken: outcome(math.nan)}, {}, layers=1)
    assert rows[0].target == broken, "a model that broke down is the worst there is"


def test_what_helps_most_when_left_out_comes_first():
    a, b = Target(site="a"), Target(site="b")
    rows = against_everything({a: outcome(0.9), b: outcome(0.4)}, outcome(1.0), {}, layers=1)
    assert [row.target for row in rows] == [b, a]
    assert [row.share for row in rows] == pytest.approx([0.6, 0.1])
    assert [row.gain for row in rows] == pytest.approx([0.6, 0.1])


def test_a_gain_is_paired():
    """The documents differ by far more than the gain, which is the same on each of them."""
    everything = outcome(*np.linspace(1, 9, 20))
    (row,) = against_everything({Target(site="a"): outcome(*np.linspace(0.9, 8.9, 20))}, everything, {}, 1)
    assert row.gain == pytest.approx(0.1) and row.gain_ci == pytest.approx((0.1, 0.1))
    assert row.kl_ci[1] - row.kl_ci[0] > 1
    assert set(row.record()) >= {"gain", "gain_ci"}


def test_all_layers_at_once_have_the_mean_of_the_layers():
    errors = {Target(site="a", layer=layer): TensorError() for layer in range(2)}
    for layer, noise in ((0, 1.0), (1, 100.0)):
        error = errors[Target(site="a", layer=layer)]
        error.signal, error.noise, error.clipped, error.count = 1000.0, noise, layer, 4
    assert tensor_error(Target(site="a"), errors, 2) == (pytest.approx(20), 1 / 8)
    assert tensor_error(Target(site="a", layer=1), errors, 2) == (pytest.approx(10), 1 / 4)
    assert tensor_error(Target(site="b"), errors, 2) == (None, None)


def test_a_histogram_on_equal_steps_keeps_every_value():
    histogram = Histogram()
    values = torch.tensor([0.0, 0.3, 0.3, 1.7, -2.9, 4.0])
    histogram.update(values)
    edges, counts = linear_histogram(histogram, 4)
    assert edges == pytest.approx([0, 1, 2, 3, 4])
    assert counts == [3, 1, 1, 1]
    edges, counts = linear_histogram(Histogram(), 4)
    assert sum(counts) == 0 and edges[-1] > 0


def test_rows_as_csv():
    a, b = Target(site="a", layer=3), Target(site="b", part="z")
    rows = [*alone({a: outcome(0.5)}, {}, 4), *alone({b: outcome(0.25, 0.25)}, {}, 4)]
    first, second = (line.split(",") for line in csv_lines(rows, view="alone"))
    assert len(first) == len(second) == len(CSV_COLUMNS)
    assert first[:5] == ["alone", "a", "", "3", "0.5"]
    assert second[:7] == ["alone", "b", "z", "", "0.25", "0.25", "0.25"]
    assert first[5:7] == ["", ""], "one document has no interval"


@pytest.mark.parametrize(
    ("target", "label"),
    [
        (Target(site="x_proj:input"), "x_proj:input"),
        (Target(site="x_proj:input", layer=17), "layer 17, x_proj:input"),
        (Target(site="in_proj:output", part="z"), "in_proj:output[z]"),
    ],
)
def test_a_target_has_a_name_for_people(target, label):
    assert target.label == label
