import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ArtifactError, QmambaError, ShapeError, UsageError
from qmamba_cli.quant import histogram as module
from qmamba_cli.quant.histogram import N_BINS, Histogram

ALPHAS = st.sampled_from([0.5001, 0.75, 0.9, 0.99, 0.9995, 0.99999, 1.0])
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
# A bin's midpoint lies within 2^-10 of the bin's lower edge from everything in the bin.
BOUND = 2.0**-10
UNDERFLOW, OVERFLOW = 2.0**-32, 2.0**32


def of(*tensors: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for x in tensors:
        histogram.update(x)
    return histogram


def assert_equal(got: Histogram, expected: Histogram) -> None:
    assert np.array_equal(got.counts, expected.counts)
    assert (got.count, got.absmax) == (expected.count, expected.absmax)


def order_statistic(x: torch.Tensor, alpha: float) -> float:
    ordered = x.to(torch.float32).abs().reshape(-1).sort().values
    rank = math.ceil(Fraction(str(alpha)) * ordered.numel())
    return float(ordered[rank - 1])


def assert_quantile_is_close(x: torch.Tensor, alpha: float) -> None:
    histogram = of(x)
    exact, got = order_statistic(x, alpha), histogram.quantile(alpha)
    assert got <= histogram.absmax
    if exact < UNDERFLOW:
        assert got in (0.0, histogram.absmax)
    elif exact < OVERFLOW:
        assert abs(got - exact) <= BOUND * exact
    else:
        assert got == histogram.absmax


def wide(seed: int, size: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randn(size, generator=generator) * spread
    return torch.randn(size, generator=generator) * torch.exp2(exponents)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(1, 5000), spread=st.sampled_from([0, 1, 8]), alpha=ALPHAS
)
def test_quantile_is_within_a_thousandth_of_the_order_statistic(seed, size, spread, alpha):
    assert_quantile_is_close(wide(seed, size, spread), alpha)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(FLOATS, min_size=1, max_size=60), alpha=ALPHAS)
def test_quantile_of_any_float32_values(values, alpha):
    # Hypothesis likes zeros, denormals, powers of two and the largest floats.
    assert_quantile_is_close(torch.tensor(values), alpha)


@pytest.mark.parametrize("exponent", range(-32, 32))
def test_bound_holds_at_both_ends_of_every_power_of_two(exponent):
    edges = torch.tensor(
        [2.0**exponent * mantissa for mantissa in (1.0, 1.0009765, 1.0019531, 1.5, 1.9999999)]
    )
    for value in edges:
        # A larger companion, so that the quantile is read from the bin and not from the absmax.
        x = torch.stack([value, value, torch.tensor(2.0**33)])
        got = of(x).quantile(0.6)
        assert abs(got - float(value)) <= BOUND * float(value)


@settings(deadline=None, max_examples=40)
@given(values=st.lists(FLOATS, min_size=1, max_size=40))
def test_alpha_one_is_the_exact_absmax(values):
    x = torch.tensor(values)
    assert of(x).quantile(1.0) == float(x.abs().max())


@settings(deadline=None, max_examples=40)
@given(values=st.lists(FLOATS, min_size=1, max_size=40))
def test_quantile_grows_with_alpha(values):
    histogram = of(torch.tensor(values))
    quantiles = [histogram.quantile(alpha) for alpha in (0.51, 0.7, 0.9, 0.99, 1.0)]
    assert quantiles == sorted(quantiles)


def test_rank_takes_alpha_as_the_decimal_it_is_written_as():
    x = torch.ones(2000)
    x[0] = 1000.0
    assert of(x).quantile(0.9995) == pytest.approx(1.0, rel=BOUND)
    assert of(x[:1999]).quantile(0.9995) == 1000.0
    # In binary 0.56 * 25 comes out just above 14.
    ladder = 2.0 ** torch.arange(25.0)
    assert of(ladder).quantile(0.56) == pytest.approx(2.0**13, rel=BOUND)


def test_a_quantile_in_the_bin_of_the_absmax_does_not_exceed_it():
    # The midpoint of 1.0's bin is 1 + 2^-10.
    assert of(torch.ones(10)).quantile(0.9) == 1.0


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
    spread=st.sampled_from([0, 3, 12]),
)
def test_merging_equals_one_pass_in_any_order(seed, cuts, spread):
    x = wide(seed, 3000, spread)
    parts = torch.tensor_split(x, sorted(cuts))
    one_pass = of(x)
    for order in itertools.islice(itertools.permutations(parts), 6):
        merged = Histogram()
        for part in order:
            merged.merge(of(part))
        assert_equal(merged, one_pass)
    assert_equal(of(*parts), one_pass)
    assert_equal(of(x.flip(0)), one_pass)


def test_slices_do_not_show(monkeypatch, generator):
    x = torch.randn(7, 31, generator=generator)
    whole = of(x)
    monkeypatch.setattr(module, "_SLICE", 10)
    assert_equal(of(x), whole)


def test_shape_and_strides_do_not_matter(generator):
    x = torch.randn(4, 6, 10, generator=generator)
    assert_equal(of(x.transpose(0, 2)), of(x.reshape(-1)))
    assert_equal(of(x[:, ::2]), of(x[:, ::2].clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_float_dtypes_are_taken_as_float32(dtype, generator):
    x = torch.randn(300, generator=generator).to(dtype)
    assert_equal(of(x), of(x.to(torch.float32)))


def test_update_leaves_its_argument_alone(generator):
    x = torch.randn(50, generator=generator)
    before = x.clone()
    of(x)
    assert torch.equal(x, before)


def test_ends_of_the_grid():
    x = torch.tensor([0.0, -0.0, 1e-45, 2.0**-33, 2.0**-32, 2.0**32 * 0.9999999, 2.0**32, -3e38])
    histogram = of(x)
    assert histogram.counts[0] == 4
    assert histogram.counts[1] == 1
    assert histogram.counts[N_BINS - 2] == 1
    assert histogram.counts[N_BINS - 1] == 2
    assert int(histogram.counts.sum()) == histogram.count == 8
    assert histogram.absmax == float(np.float32(3e38))
    # The 7th value lies above the grid; only the absmax is known of it.
    assert histogram.quantile(0.875) == histogram.absmax


def test_zeros_have_quantile_zero():
    assert of(torch.zeros(10)).quantile(0.9) == 0.0
    assert of(torch.zeros(10)).quantile(1.0) == 0.0


def test_nothing_is_counted_from_an_empty_tensor():
    histogram = of(torch.empty(3, 0))
    assert_equal(histogram, Histogram())
    with pytest.raises(QmambaError, match="a quantile needs observations, got 0"):
        histogram.quantile(0.9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 15, 24])
def test_broken_values_are_refused_and_nothing_is_counted(value, index, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 10)
    histogram = of(torch.ones(3))
    x = torch.ones(5, 5)
    x.view(-1)[index] = value
    with pytest.raises(
        QmambaError, match=r"`layers\.3\.x`: values are not finite, got [01] NaN and [01] infinite of 25"
    ):
        histogram.update(x, name="layers.3.x")
    assert_equal(histogram, of(torch.ones(3)))


def test_integers_are_refused():
    with pytest.raises(ShapeError, match=r"`x`: wrong dtype, got torch\.int64, expected a floating dtype"):
        Histogram().update(torch.ones(3, dtype=torch.int64), name="x")


@pytest.mark.parametrize("alpha", [0.5, 0.0, -1.0, 1.0000001, math.nan, math.inf])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(UsageError, match=r"alpha out of range, got .*, expected a number in \(0\.5, 1\]"):
        of(torch.ones(3)).quantile(alpha)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(FLOATS, max_size=30))
def test_storing_and_restoring_is_exact(values):
    histogram = of(torch.tensor(values))
    arrays = histogram.to_arrays()
    assert_equal(Histogram.from_arrays(arrays), histogram)
    assert_equal(Histogram.from_span(*histogram.span(), histogram.absmax), histogram)
    counts = arrays["counts"]
    assert counts.dtype == np.int64
    assert counts.size == 0 or (counts[0] > 0 and counts[-1] > 0)


def test_a_restored_histogram_can_be_continued(generator):
    x = torch.randn(100, generator=generator)
    restored = Histogram.from_arrays(of(x[:50]).to_arrays())
    restored.update(x[50:])
    assert_equal(restored, of(x))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"counts": None}, "array missing, expected `counts`"),
        ({"first_bin": None}, "array missing, expected `first_bin`"),
        ({"absmax": None}, "array missing, expected `absmax`"),
        ({"counts": np.ones(3, dtype=np.int32)}, "wrong counts, got int32"),
        ({"counts": np.ones((1, 3), dtype=np.int64)}, "wrong counts, got int64 of shape"),
        ({"counts": np.array([-1, 2], dtype=np.int64)}, "counts off the grid"),
        ({"first_bin": np.array([N_BINS - 1], dtype=np.int64)}, "counts off the grid"),
        ({"first_bin": np.array([-1], dtype=np.int64)}, "counts off the grid"),
        ({"first_bin": np.array([1], dtype=np.int32)}, "wrong `first_bin`, got int32"),
        ({"first_bin": np.array([1, 2], dtype=np.int64)}, "wrong `first_bin`, got int64 of shape"),
        ({"absmax": np.array([1.0])}, "wrong `absmax`, got float64"),
        ({"absmax": np.array([5.0], dtype=np.float32)}, "absmax contradicts the counts, got 5.0"),
        ({"absmax": np.array([np.nan], dtype=np.float32)}, "absmax contradicts the counts, got nan"),
        ({"absmax": np.array([-4.0], dtype=np.float32)}, "absmax contradicts the counts, got -4.0"),
    ],
)
def test_broken_arrays_are_refused(changes, reason):
    arrays = of(torch.tensor([1.0, 2.0, 4.0])).to_arrays()
    for name, array in changes.items():
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    with pytest.raises(ArtifactError) as caught:
        Histogram.from_arrays(arrays)
    assert reason in caught.value.message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_tensor_gives_the_same_histogram(generator):
    x = torch.randn(3, 500, 101, generator=generator) * 1e3
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal(of(x.to("cuda", dtype)), of(x.to(dtype)))
    x[1, 2, 3] = math.nan
    with pytest.raises(QmambaError, match="got 1 NaN"):
        of(x.cuda())
