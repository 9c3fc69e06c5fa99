import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import CheckpointError, ShapeError
from qmamba_cli.quant import weights as module
from qmamba_cli.quant.grid import MIN_SCALE, quantize, scale_from_absmax
from qmamba_cli.quant.weights import GroupQuantized, quantize_groups, quantize_rows

EPS = float(np.finfo(np.float32).eps)
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 40))
SEEDS = st.integers(0, 2**32 - 1)


def matrix(rows: int, k: int, seed: int) -> torch.Tensor:
    # Rows and columns of different size, some zeros: groups of a row want different multipliers.
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, k, generator=generator)
    weight *= torch.exp2(2 * torch.randn(rows, 1, generator=generator))
    weight *= torch.exp2(torch.randn(1, k, generator=generator))
    return weight * (torch.rand(rows, k, generator=generator) > 0.1)


def group_errors(group: np.ndarray, scale: np.float32) -> list[float]:
    """Squared error of the float32 group for each multiplier 1 ... 15, summed exactly, by plain loops."""
    errors = []
    for m in range(1, 16):
        inv_step = np.float32(1) / (scale * np.float32(m))
        terms = []
        for w in group:
            code = min(max(int(np.rint(w * inv_step)), -8), 7)
            terms.append(float(np.float32(code * m) * scale - w) ** 2)
        errors.append(math.fsum(terms))
    return errors


def errors_by_group(difference: torch.Tensor, group_size: int) -> torch.Tensor:
    parts = difference.double().square().split(group_size, dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=SEEDS)
def test_rows_equal_the_int8_grid_row_by_row(shape, seed):
    weight = matrix(*shape, seed)
    result = quantize_rows(weight)
    assert result.qweight.dtype == torch.int8 and result.scale.dtype == torch.float32
    for row, qrow, scale in zip(weight, result.qweight, result.scale.tolist(), strict=True):
        assert scale == scale_from_absmax(float(row.abs().max()))
        assert torch.equal(qrow, quantize(row, scale))


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=SEEDS)
def test_row_error_is_at_most_half_a_step(shape, seed):
    weight = matrix(*shape, seed)
    result = quantize_rows(weight)
    error = (result.dequantize().double() - weight.double()).abs() / result.scale.double().unsqueeze(1)
    # Four float32 roundings of numbers of at most 127 steps.
    assert float(error.max()) <= 0.5 + 127 * 4 * EPS


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 3), k=st.integers(1, 20), group_size=st.sampled_from([1, 3, 8, 128]), seed=SEEDS)
def test_search_finds_the_least_error_of_all_multipliers(rows, k, group_size, seed):
    weight = matrix(rows, k, seed)
    result = quantize_groups(weight, group_size)
    for i in range(rows):
        scale = np.float32(result.scale[i])
        expected_scale = np.float32(weight[i].abs().max()) / np.float32(7) / np.float32(15)
        assert scale == max(expected_scale, np.float32(MIN_SCALE))
        for j, start in enumerate(range(0, k, group_size)):
            errors = group_errors(weight[i, start : start + group_size].numpy(), scale)
            chosen = int(result.multiplier[i, j])
            # The sums differ from the exact ones by a few float64 roundings.
            assert errors[chosen - 1] <= min(errors) * (1 + 1e-13)
            assert all(error > errors[chosen - 1] * (1 - 1e-13) for error in errors[: chosen - 1])


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, group_size=st.sampled_from([1, 5, 16, 128]), seed=SEEDS)
def test_codes_are_the_nearest_ones(shape, group_size, seed):
    weight = matrix(*shape, seed)
    result = quantize_groups(weight, group_size)
    k = shape[1]
    wide = result.multiplier.repeat_interleave(group_size, dim=1)[:, :k].double()
    steps = weight.double() / (result.scale.double().unsqueeze(1) * wide)
    distance = (result.codes.double() - steps.clamp(-8, 7)).abs()
    # Three float32 roundings, on numbers of up to 8 steps where nothing is clamped.
    assert float(distance.max()) <= 0.5 + 8 * 3 * EPS


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, group_size=st.sampled_from([1, 5, 16, 128]), seed=SEEDS)
def test_expanded_matrix_is_int8_with_one_scale_a_row(shape, group_size, seed):
    result = quantize_groups(matrix(*shape, seed), group_size)
    expanded = result.expand()
    assert expanded.dtype == torch.int8 and tuple(expanded.shape) == shape
    for i in range(shape[0]):
        for j in range(shape[1]):
            product = int(result.codes[i, j]) * int(result.multiplier[i, j // group_size])
            assert int(expanded[i, j]) == product
    real = expanded.to(torch.float32) * result.scale.unsqueeze(1)
    assert torch.equal(result.dequantize(), real)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, group_size=st.sampled_from([4, 16, 128]), seed=SEEDS)
def test_search_is_no_worse_than_a_rounded_multiplier(shape, group_size, seed):
    weight = matrix(*shape, seed)
    result = quantize_groups(weight, group_size)
    scale = result.scale.unsqueeze(1)
    maxima = torch.stack([part.abs().amax(dim=1) for part in weight.split(group_size, dim=1)], dim=1)
    rounded = (maxima / 7 / scale).round().clamp(1, 15).repeat_interleave(group_size, dim=1)[:, : shape[1]]
    plain = (weight / (scale * rounded)).round().clamp(-8, 7) * rounded * scale
    searched = errors_by_group(result.dequantize() - weight, group_size)
    # A code that falls on a tie may round differently; such codes err by half a step either way.
    assert bool((searched <= errors_by_group(plain - weight, group_size) * (1 + 1e-5)).all())


def test_search_gains_on_gaussian_weights(generator):
    weight = torch.randn(64, 256, generator=generator)
    result = quantize_groups(weight)
    free_step = weight.view(64, 2, 128).abs().amax(dim=2).repeat_interleave(128, dim=1) / 7
    plain = (weight / free_step).round().clamp(-8, 7) * free_step
    gain = float((result.dequantize() - weight).square().sum() / (plain - weight).square().sum())
    assert gain < 0.9


def test_expand_fits_int8_at_every_code_and_multiplier():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(15, 1)
    multiplier = torch.arange(1, 16, dtype=torch.uint8).unsqueeze(1)
    result = GroupQuantized(codes=codes, multiplier=multiplier, scale=torch.ones(15), group_size=16)
    expected = [[m * code for code in range(-8, 8)] for m in range(1, 16)]
    assert result.expand().tolist() == expected


def test_of_equal_multipliers_the_smallest_is_chosen():
    # In steps of the row's scale, 1: [2, 0] is exact as 2 * 1 and 1 * 2, [0, 0] as anything.
    result = quantize_groups(torch.tensor([[105.0, 0.0, 2.0, 0.0, 0.0, 0.0]]), 2)
    assert result.multiplier.tolist() == [[15, 1, 1]]
    assert result.codes.tolist() == [[7, 0, 2, 0, 0, 0]]


def test_zero_rows_are_well_defined():
    weight = torch.zeros(2, 5)
    weight[1, 0] = 3.0
    rows, groups = quantize_rows(weight), quantize_groups(weight, 2)
    for result in (rows, groups):
        assert float(result.scale[0]) == float(np.float32(MIN_SCALE))
        assert torch.equal(result.dequantize()[0], weight[0])
    assert groups.multiplier[0].tolist() == [1, 1, 1]
    assert groups.multiplier[1].tolist() == [15, 1, 1]


def test_tiny_and_huge_weights_stay_finite():
    weight = torch.tensor([[1e-45, -1e-9], [3e38, -1e38]])
    for result in (quantize_rows(weight), quantize_groups(weight, 1)):
        real = result.dequantize()
        assert bool(real.isfinite().all())
        assert real[1].tolist() == pytest.approx([3e38, -1e38], rel=0.01)


@pytest.mark.parametrize("k", [1, 127, 128, 129, 300])
def test_a_ragged_last_group_equals_a_group_of_its_own(k, generator):
    weight = torch.randn(5, k, generator=generator)
    # The row's scale must not depend on where the cut is.
    weight[:, 0] = 9.0
    result = quantize_groups(weight)
    assert result.multiplier.shape == (5, -(-k // 128))
    start = (k - 1) // 128 * 128
    tail = torch.cat([torch.full((5, 1), 9.0), weight[:, start:]], dim=1)
    alone = quantize_groups(torch.nn.functional.pad(tail, (127, 0)))
    assert torch.equal(alone.codes[:, 128:], result.codes[:, start:])
    assert torch.equal(alone.multiplier[:, 1], result.multiplier[:, -1])


def test_chunks_and_threads_do_not_show(monkeypatch, generator):
    weight = torch.randn(37, 300, generator=generator)
    rows, groups = quantize_rows(weight), quantize_groups(weight)
    threads = torch.get_num_threads()
    for chunk, count in ((1, 1), (1000, 2), (1 << 20, 1)):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
        torch.set_num_threads(count)
        try:
            rows_again, groups_again = quantize_rows(weight), quantize_groups(weight)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(rows_again.qweight, rows.qweight)
        assert torch.equal(rows_again.scale, rows.scale)
        assert torch.equal(groups_again.codes, groups.codes)
        assert torch.equal(groups_again.multiplier, groups.multiplier)
        assert torch.equal(groups_again.scale, groups.scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_does_not_show(generator):
    weight = torch.randn(64, 300, generator=generator)
    rows, groups = quantize_rows(weight), quantize_groups(weight)
    rows_there, groups_there = quantize_rows(weight.cuda()), quantize_groups(weight.cuda())
    assert torch.equal(rows_there.qweight.cpu(), rows.qweight)
    assert torch.equal(rows_there.scale.cpu(), rows.scale)
    assert torch.equal(groups_there.codes.cpu(), groups.codes)
    assert torch.equal(groups_there.multiplier.cpu(), groups.multiplier)
    assert torch.equal(groups_there.scale.cpu(), groups.scale)
    assert torch.equal(groups_there.dequantize().cpu(), groups.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_float_dtypes_are_taken_as_float32(dtype, generator):
    weight = torch.randn(6, 20, generator=generator).to(dtype)
    assert torch.equal(quantize_rows(weight).qweight, quantize_rows(weight.float()).qweight)
    assert torch.equal(quantize_groups(weight, 8).codes, quantize_groups(weight.float(), 8).codes)


def test_strided_weights_are_read_rightly_and_left_alone(generator):
    weight = torch.randn(20, 6, generator=generator)
    before = weight.clone()
    assert torch.equal(
        quantize_groups(weight.t(), 8).codes, quantize_groups(weight.t().contiguous(), 8).codes
    )
    assert torch.equal(quantize_rows(weight.t()).qweight, quantize_rows(weight.t().contiguous()).qweight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("quantizer", [quantize_rows, quantize_groups])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_refused_by_name(quantizer, value):
    weight = torch.ones(3, 4)
    weight[2, 1] = value
    with pytest.raises(
        CheckpointError, match=r"`in_proj.weight`: weights are not finite, got [01] NaN and [01]"
    ):
        quantizer(weight, name="in_proj.weight")


@pytest.mark.parametrize("quantizer", [quantize_rows, quantize_groups])
@pytest.mark.parametrize(
    "weight", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.int8), torch.ones(0, 4)]
)
def test_anything_but_a_float_matrix_is_refused(quantizer, weight):
    with pytest.raises(ShapeError, match=r"`weight`: wrong tensor, got .*, expected a floating matrix"):
        quantizer(weight)


def test_a_group_size_below_one_is_refused():
    with pytest.raises(ShapeError, match="wrong group size, got 0, expected at least 1"):
        quantize_groups(torch.ones(2, 2), 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"codes": torch.zeros(2, 5)}, "`codes`: wrong tensor"),
        ({"codes": torch.full((2, 5), 8, dtype=torch.int8)}, "`codes`: value out of range"),
        ({"multiplier": torch.ones(2, 1, dtype=torch.uint8)}, "`multiplier`: wrong tensor"),
        ({"multiplier": torch.ones(2, 2, dtype=torch.int8)}, "`multiplier`: wrong tensor"),
        ({"multiplier": torch.zeros(2, 2, dtype=torch.uint8)}, "`multiplier`: value out of range"),
        ({"multiplier": torch.full((2, 2), 16, dtype=torch.uint8)}, "`multiplier`: value out of range"),
        ({"scale": torch.ones(3)}, "`scale`: wrong tensor"),
        ({"scale": torch.ones(2, dtype=torch.float64)}, "`scale`: wrong tensor"),
        ({"group_size": 0}, "wrong group size"),
    ],
)
def test_a_group_quantized_matrix_checks_its_parts(changes, reason):
    parts = {
        "codes": torch.zeros(2, 5, dtype=torch.int8),
        "multiplier": torch.ones(2, 2, dtype=torch.uint8),
        "scale": torch.ones(2),
        "group_size": 4,
    }
    assert GroupQuantized(**parts).expand().shape == (2, 5)
    with pytest.raises(ShapeError, match=reason):
        GroupQuantized(**(parts | changes))
