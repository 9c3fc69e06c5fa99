import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ArtifactError, QmambaError, ShapeError, UsageError
from qmamba_cli.quant.grid import scale_from_absmax
from qmamba_cli.quant.histogram import Histogram
from qmamba_cli.quant.observers import DEFAULT_ALPHA, Observer, ObserverSet, Reduction
from qmamba_cli.sites import ObserverKind, site_keys

NAME = "layers.3.x_proj:input"
MINMAX, PERCENTILE = ObserverKind.MINMAX, ObserverKind.PERCENTILE
# What calibration observes with; the third kind names how export chose a scale.
KINDS = (MINMAX, PERCENTILE)
SETTINGS = [(kind, reduction) for kind in KINDS for reduction in Reduction]


def observer(
    kind: ObserverKind = PERCENTILE, reduction: Reduction = Reduction.GLOBAL, alpha: float = 0.9
) -> Observer:
    return Observer(kind, name=NAME, alpha=alpha, reduction=reduction)


def batches(seed: int, sizes: list[int]) -> list[torch.Tensor]:
    # Samples of very different size, so that the reductions part.
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(b, 40, 3, generator=generator) * torch.exp2(2 * torch.randn(b, 1, 1, generator=generator))
        for b in sizes
    ]


def quantile(x: torch.Tensor, alpha: float) -> float:
    histogram = Histogram()
    histogram.update(x)
    return histogram.quantile(alpha)


def feed(watched: Observer, parts: list[torch.Tensor]) -> Observer:
    for part in parts:
        watched.update(part)
    return watched


def assert_same_state(got: Observer, expected: Observer) -> None:
    mine, theirs = got.state_arrays(), expected.state_arrays()
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        assert np.array_equal(array, theirs[name]), name


def test_default_alpha_is_the_guides():
    assert Observer(PERCENTILE, name=NAME).alpha == DEFAULT_ALPHA == 0.9995


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_reductions_equal_plain_loops(seed, sizes):
    parts = batches(seed, sizes)
    samples = [sample for part in parts for sample in part]
    quantiles = [quantile(sample, 0.9) for sample in samples]
    average = quantiles[0]
    for value in quantiles[1:]:
        average = average + 0.01 * (value - average)
    assert feed(observer(reduction=Reduction.GLOBAL), parts).absmax() == quantile(torch.cat(parts), 0.9)
    mean = feed(observer(reduction=Reduction.MEAN), parts).absmax()
    assert mean == pytest.approx(sum(quantiles) / len(quantiles), rel=1e-12)
    assert feed(observer(reduction=Reduction.EMA), parts).absmax() == average


@pytest.mark.parametrize("reduction", Reduction)
def test_minmax_takes_the_maximum_whatever_the_reduction_and_alpha(reduction):
    parts = batches(1, [2, 3])
    watched = feed(observer(MINMAX, reduction), parts)
    largest = max(float(part.abs().max()) for part in parts)
    assert watched.absmax() == watched.absmax_at(0.6) == largest
    assert watched.scale() == scale_from_absmax(largest)


@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("kind", KINDS)
def test_the_histogram_is_kept_in_every_case(kind, reduction):
    parts = batches(2, [1, 4, 2])
    whole = Histogram()
    whole.update(torch.cat(parts))
    kept = feed(observer(kind, reduction), parts).histogram
    assert np.array_equal(kept.counts, whole.counts)
    assert (kept.count, kept.absmax) == (whole.count, whole.absmax)


@pytest.mark.parametrize(("kind", "reduction"), SETTINGS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_batching_does_not_matter(kind, reduction, size):
    (x,) = batches(3, [7])
    assert_same_state(
        feed(observer(kind, reduction), list(x.split(size))), feed(observer(kind, reduction), [x])
    )


def test_scale_is_the_absmax_on_the_int8_grid():
    watched = feed(observer(), batches(4, [3]))
    assert watched.scale() == scale_from_absmax(watched.absmax())


def test_another_alpha_equals_a_calibration_with_it():
    parts = batches(5, [3, 2])
    watched = feed(observer(alpha=0.9), parts)
    for alpha in (0.6, 0.9, 0.99, 1.0):
        assert watched.absmax_at(alpha) == feed(observer(alpha=alpha), parts).absmax()
    assert watched.absmax_at(0.6) < watched.absmax()


@pytest.mark.parametrize("reduction", [Reduction.MEAN, Reduction.EMA])
def test_another_alpha_is_refused_where_single_samples_were_reduced(reduction):
    watched = feed(observer(reduction=reduction), batches(6, [3]))
    assert watched.absmax_at(0.9) == watched.absmax()
    with pytest.raises(
        UsageError, match=f"alpha is fixed by reduction={reduction}, got 0.99, expected 0.9"
    ) as caught:
        watched.absmax_at(0.99)
    assert NAME in caught.value.message
    assert "calibrate again" in caught.value.hint


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.01, -0.9, math.nan])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(UsageError, match="alpha out of range"):
        observer(alpha=alpha)
    for kind in KINDS:
        with pytest.raises(UsageError, match="alpha out of range"):
            feed(observer(kind), batches(7, [1])).absmax_at(alpha)


@pytest.mark.parametrize(("kind", "reduction"), SETTINGS)
def test_zero_observations_are_an_error(kind, reduction):
    watched = observer(kind, reduction)
    watched.update(torch.empty(2, 0, 5))
    for ask in (watched.absmax, watched.scale, lambda: watched.absmax_at(0.9)):
        with pytest.raises(QmambaError, match=f"`{NAME}`: no scale without observations"):
            ask()


def test_zero_observations_are_an_error_at_another_alpha():
    with pytest.raises(QmambaError, match=f"`{NAME}`: no scale without observations"):
        observer().absmax_at(0.8)


@pytest.mark.parametrize(("kind", "reduction"), SETTINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_values_name_the_site_and_are_not_observed(kind, reduction, value):
    (x,) = batches(8, [3])
    watched = feed(observer(kind, reduction), [x])
    broken = x.clone()
    broken[2, 5, 1] = value
    with pytest.raises(QmambaError, match=f"`{NAME}`: values are not finite"):
        watched.update(broken)
    assert_same_state(watched, feed(observer(kind, reduction), [x]))


def test_a_scalar_is_refused():
    with pytest.raises(ShapeError, match=f"`{NAME}`: wrong shape, got a scalar"):
        observer().update(torch.tensor(1.0))


@pytest.mark.parametrize(("kind", "reduction"), SETTINGS)
def test_merging_shards_equals_one_pass(kind, reduction):
    parts = batches(9, [2, 3, 1])
    merged = observer(kind, reduction)
    for part in parts:
        merged.merge(feed(observer(kind, reduction), [part]))
    one_pass = feed(observer(kind, reduction), parts)
    assert_same_state(merged, one_pass)
    assert merged.absmax() == one_pass.absmax()


@pytest.mark.parametrize(("kind", "reduction"), [pair for pair in SETTINGS if pair[1] is not Reduction.EMA])
def test_only_ema_depends_on_the_order(kind, reduction):
    parts = batches(10, [2, 3, 1, 1])
    forward, backward = (feed(observer(kind, reduction), order) for order in (parts, parts[::-1]))
    assert forward.absmax() == backward.absmax()


@pytest.mark.parametrize(
    "other",
    [
        Observer(MINMAX, name=NAME, alpha=0.9),
        Observer(PERCENTILE, name="layers.4.x_proj:input", alpha=0.9),
        Observer(PERCENTILE, name=NAME, alpha=0.8),
        Observer(PERCENTILE, name=NAME, alpha=0.9, reduction=Reduction.MEAN),
    ],
    ids=["kind", "site", "alpha", "reduction"],
)
def test_observers_that_differ_do_not_merge(other):
    with pytest.raises(UsageError, match="observers do not merge"):
        observer().merge(other)


@pytest.mark.parametrize(("kind", "reduction"), SETTINGS)
@pytest.mark.parametrize("sizes", [[], [1], [2, 3]], ids=str)
def test_storing_and_restoring_is_exact(kind, reduction, sizes):
    watched = feed(observer(kind, reduction), batches(11, sizes))
    restored = Observer.from_arrays(watched.state_arrays(), kind, name=NAME, alpha=0.9, reduction=reduction)
    assert_same_state(restored, watched)
    if sizes:
        assert restored.absmax() == watched.absmax()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"absmax": None}, "wrong statistics"),
        ({"sample_quantiles": None}, "wrong statistics"),
        ({"extra": np.zeros(1)}, "wrong statistics"),
        ({"first_bin": np.array([-1], dtype=np.int64)}, "counts off the grid"),
        ({"sample_quantiles": np.zeros(2)}, "wrong `sample_quantiles`, got float64"),
        ({"sample_quantiles": np.zeros((1, 2), dtype=np.float32)}, "wrong `sample_quantiles`"),
        ({"sample_quantiles": np.array([1e30], dtype=np.float32)}, "wrong `sample_quantiles`"),
        ({"sample_quantiles": np.array([np.nan], dtype=np.float32)}, "wrong `sample_quantiles`"),
        ({"sample_quantiles": np.zeros(0, dtype=np.float32)}, "expected one a sample"),
    ],
)
def test_broken_arrays_name_the_site(changes, reason):
    arrays = feed(observer(reduction=Reduction.MEAN), batches(12, [2])).state_arrays()
    for name, array in changes.items():
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array
    with pytest.raises(ArtifactError) as caught:
        Observer.from_arrays(arrays, PERCENTILE, name=NAME, alpha=0.9, reduction=Reduction.MEAN)
    assert f"`{NAME}`" in caught.value.message and reason in caught.value.message


def filled_set(reduction: Reduction, seed: int) -> ObserverSet:
    watched = ObserverSet(2, alpha=0.9, reduction=reduction)
    for offset, key in enumerate(watched):
        for part in batches(seed + offset, [2, 1]):
            watched.observe(key, part)
    return watched


def test_a_set_has_one_observer_a_site():
    watched = ObserverSet(2)
    assert tuple(watched) == site_keys(2) and len(watched) == 15
    percentile = {key for key in watched if watched[key].kind is PERCENTILE}
    assert percentile == {
        f"layers.{i}.{name}" for i in range(2) for name in ("x_proj:input", "ssm_state_act:input")
    }
    assert all(watched[key].name == key for key in watched)


def test_a_set_gives_every_scale():
    watched = filled_set(Reduction.GLOBAL, 20)
    assert watched.scales() == {key: watched[key].scale() for key in watched}
    assert watched.absmaxes() == {key: watched[key].absmax() for key in watched}
    other = watched.scales(alpha=0.6)
    assert {key for key in watched if other[key] != watched.scales()[key]} == {
        key for key in watched if watched[key].kind is PERCENTILE
    }


def test_a_set_names_the_site_that_saw_nothing():
    watched = ObserverSet(1)
    for key in tuple(watched)[:-1]:
        watched.observe(key, torch.ones(1, 2))
    with pytest.raises(QmambaError, match="`lm_head:input`: no scale without observations"):
        watched.scales()


@pytest.mark.parametrize("reduction", Reduction)
def test_a_set_is_stored_restored_and_merged_exactly(reduction):
    first, second = filled_set(reduction, 30), filled_set(reduction, 60)
    restored = ObserverSet.from_arrays(first.arrays(), 2, alpha=0.9, reduction=reduction)
    restored.merge(second)
    both = ObserverSet(2, alpha=0.9, reduction=reduction)
    for seed in (30, 60):
        for offset, key in enumerate(both):
            for part in batches(seed + offset, [2, 1]):
                both.observe(key, part)
    for key in both:
        assert_same_state(restored[key], both[key])
    assert restored.scales() == both.scales()


def test_sets_of_different_depth_do_not_merge():
    with pytest.raises(UsageError, match="calibrations do not merge, got 8 sites, expected 15"):
        ObserverSet(2).merge(ObserverSet(1))


def test_a_set_refuses_foreign_and_missing_arrays():
    arrays = filled_set(Reduction.GLOBAL, 40).arrays()
    with pytest.raises(
        ArtifactError, match=r"unknown array, got `layers\.1\..*`, expected sites of 1 layers"
    ):
        ObserverSet.from_arrays(arrays, 1, alpha=0.9)
    del arrays["lm_head:input.counts"]
    with pytest.raises(ArtifactError, match="`lm_head:input`: wrong statistics"):
        ObserverSet.from_arrays(arrays, 2, alpha=0.9)
