import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import QmambaError, UsageError
from qmamba_cli.quant.clipping import least_error_absmax
from qmamba_cli.quant.grid import fake_quantize, scale_from_absmax
from qmamba_cli.quant.histogram import Histogram


def counted(values: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(values)
    return histogram


def heavy(seed: int, outliers: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(20_000, generator=generator)
    return values * torch.exp(outliers * torch.randn(20_000, generator=generator))


def real_error(values: torch.Tensor, absmax: float, power: float) -> float:
    return float((values - fake_quantize(values, scale_from_absmax(absmax))).double().abs().pow(power).mean())


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    outliers=st.sampled_from([0.0, 0.5, 1.0]),
    power=st.sampled_from([1.0, 1.5, 2.0]),
    unit=st.sampled_from([1e-3, 1.0, 500.0]),
)
def test_the_clip_has_the_least_real_error_among_all_clips(seed, outliers, power, unit):
    values = heavy(seed, outliers) * unit
    histogram = counted(values)
    chosen = least_error_absmax(histogram, power=power)
    assert 0 < chosen <= histogram.absmax
    # The grid of clips and the bins cost a little, no more.
    others = [histogram.absmax * 2.0 ** (-number / 4) for number in range(25)]
    least = min(real_error(values, absmax, power) for absmax in others)
    assert real_error(values, chosen, power) <= 1.05 * least


def test_a_smaller_power_clips_tighter():
    histogram = counted(heavy(1, 1.0))
    clips = [least_error_absmax(histogram, power=power) for power in (1.0, 1.5, 2.0, 4.0)]
    assert clips == sorted(clips) and clips[0] < clips[-1]


def test_nothing_is_clipped_where_clipping_gains_nothing():
    # Every value at the maximum: rounding is exact there, and any clip only loses.
    assert least_error_absmax(counted(torch.full((100,), 2.5))) == 2.5
    assert least_error_absmax(counted(torch.zeros(10))) == 0.0


def test_unusable_arguments_are_refused():
    with pytest.raises(QmambaError, match="needs observations"):
        least_error_absmax(Histogram())
    with pytest.raises(UsageError, match="power"):
        least_error_absmax(counted(torch.ones(3)), power=0.0)
