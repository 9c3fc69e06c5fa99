import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import ShapeError
from qmamba_cli.quant.packing import pack_int4, pack_uint4, unpack_int4, unpack_uint4

CASES = {
    "int4": (pack_int4, unpack_int4, torch.int8, -8, 7),
    "uint4": (pack_uint4, unpack_uint4, torch.uint8, 0, 15),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def matrix(rows: int, k: int, seed: int, dtype: torch.dtype, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, k), generator=generator).to(dtype)


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 5), k=st.integers(0, 33), seed=st.integers(0, 2**32 - 1))
def test_unpack_after_pack_is_the_identity(name, rows, k, seed):
    pack, unpack, dtype, low, high = CASES[name]
    values = matrix(rows, k, seed, dtype, low, high)
    packed = pack(values)
    assert packed.shape == (rows, (k + 1) // 2) and packed.dtype == torch.uint8
    restored = unpack(packed, k)
    assert restored.dtype == dtype and torch.equal(restored, values)


def test_every_pair_of_codes_round_trips(case):
    pack, unpack, dtype, low, high = case
    every = torch.arange(low, high + 1).to(dtype)
    pairs = torch.cartesian_prod(every, every)
    packed = pack(pairs)
    assert len(set(packed[:, 0].tolist())) == 256
    assert torch.equal(unpack(packed, 2), pairs)


def test_bytes_are_laid_out_as_documented(case):
    pack, _, dtype, low, high = case
    for first in range(low, high + 1):
        for second in range(low, high + 1):
            row = torch.tensor([[first, second, first]]).to(dtype)
            expected = [(first & 15) | (second & 15) << 4, first & 15]
            assert pack(row).tolist() == [expected]


def test_rows_are_packed_separately(case):
    pack, _, dtype, low, high = case
    values = matrix(4, 7, 1, dtype, low, high)
    assert torch.equal(pack(values), torch.cat([pack(row[None]) for row in values]))


def test_strided_input_is_read_rightly(case):
    pack, unpack, dtype, low, high = case
    values = matrix(9, 6, 2, dtype, low, high)
    assert torch.equal(pack(values.t()), pack(values.t().contiguous()))
    packed = pack(values)
    assert torch.equal(unpack(packed.t().contiguous().t(), 6), values)


def test_pack_leaves_its_argument_alone(case):
    pack, _, dtype, low, high = case
    values = matrix(2, 6, 3, dtype, low, high)
    before = values.clone()
    pack(values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("bad", [-9, 8, 127, -128])
def test_pack_int4_refuses_codes_out_of_range(bad):
    with pytest.raises(ShapeError, match=r"value out of range, got values in .*, expected \[-8, 7\]"):
        pack_int4(torch.tensor([[0, bad]], dtype=torch.int8))


@pytest.mark.parametrize("bad", [16, 255])
def test_pack_uint4_refuses_values_out_of_range(bad):
    with pytest.raises(ShapeError, match=r"value out of range, got values in .*, expected \[0, 15\]"):
        pack_uint4(torch.tensor([[0, bad]], dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bool], ids=str)
def test_pack_refuses_another_dtype(case, dtype):
    with pytest.raises(ShapeError, match="wrong tensor, got"):
        case[0](torch.zeros(2, 2, dtype=dtype))


def test_pack_refuses_another_rank(case):
    with pytest.raises(ShapeError, match=r"expected .* \(rows, k\)"):
        case[0](torch.zeros(4, dtype=case[2]))


@pytest.mark.parametrize(("shape", "k"), [((2, 3), 4), ((2, 3), 7), ((2, 0), 1), ((2, 1), -1), ((6,), 12)])
def test_unpack_refuses_a_width_that_does_not_fit(case, shape, k):
    with pytest.raises(ShapeError, match="4-bit unpacking: wrong tensor"):
        case[1](torch.zeros(shape, dtype=torch.uint8), k)


def test_unpack_refuses_another_dtype(case):
    with pytest.raises(ShapeError, match="4-bit unpacking: wrong tensor"):
        case[1](torch.zeros(2, 2, dtype=torch.int8), 4)


def test_unpack_refuses_padding_that_is_not_zero(case):
    with pytest.raises(ShapeError, match="padding must be zero"):
        case[1](torch.tensor([[0x00, 0x10]], dtype=torch.uint8), 3)
