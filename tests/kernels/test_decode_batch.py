"""The step of many sequences without a GPU: state layouts, plans, and the kernels on an emulator."""

import dataclasses
import math

import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid
from decode_emulator import Emulator
from test_decode import EPSILON, SHAPES, SMALL, packed_like, residual_of

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.decode import reference
from qmamba_cli.kernels.decode.pack import pack_block
from qmamba_cli.kernels.decode.plan import SharedMemory
from qmamba_cli.kernels.decode.samples import SCALES, random_block, random_state
from qmamba_cli.kernels.decode.tensors import DecodeColumns, DecodeState
from qmamba_cli.kernels.decode_batch import cuda, plan
from qmamba_cli.kernels.decode_batch.steps import steps
from qmamba_cli.kernels.decode_batch.tensors import batch_block, load_state, new_scratch, new_state, state_of
from qmamba_cli.modes import MODES

FLIPPED = 2e-2
COLUMNS = {name: DecodeColumns.from_mode(MODES[name]) for name in ("0", "2-2", "2-4", "3")}


@pytest.fixture(scope="module", params=[False, True], ids=["warps", "groups of warps"])
def emulator(request, tmp_path_factory):
    return Emulator.of_batch(tmp_path_factory.mktemp("decode_batch"), wide=request.param)


@pytest.fixture(scope="module")
def small_block():
    return pack_block(random_block(w_bits=8, seed=1, **SMALL), SCALES, COLUMNS["0"], norm_eps=EPSILON)


def emulated(emulator, blocks, columns, residual, states, changed=None, tokens=1):
    """Residual and states after some tokens of a model of ``blocks``, from buffers that hold NaN."""
    packed = [pack_block(tensors, SCALES, columns, norm_eps=EPSILON) for tensors in blocks]
    batch, taps = residual.shape[0], packed[0].taps
    chosen = dataclasses.replace(plan.make_plan(packed[0], batch, wide=emulator.wide), **(changed or {}))
    scratch = new_scratch(packed[0], chosen)
    for field in dataclasses.fields(scratch):
        tensor = getattr(scratch, field.name)
        if tensor is not None and tensor.is_floating_point():
            tensor.fill_(math.nan)
    scratch.out_sums.fill_(0x7FFFFFFF)
    ours = [new_state(block, chosen) for block in packed]
    for to, state in zip(ours, states, strict=True):
        load_state(to, state)
    residual = residual.clone()
    many = [batch_block(block) for block in packed]
    for _ in range(tokens):
        emulator.run(tuple(steps(many, residual, ours, scratch, chosen)))
        assert not scratch.x_sums.any(), "the sums must be clear for the next block"
    return residual, [state_of(state, batch, taps) for state in ours]


def assert_same_step(got, got_state, residual, state, before, flips=0.3):
    assert_grid("conv", got_state.conv.values, state.conv.values, share=tolerances.GRID.share)
    if state.conv.scale is not None:
        assert_close("conv scale", got_state.conv.scale, state.conv.scale, 4 * tolerances.EPS)
    if state.ssm.dtype == torch.int8:
        assert_grid("ssm", got_state.ssm, state.ssm, share=5e-3)
    # An int8 value of the chain on a tie moves all that follows in its sequence, by this much of the whole.
    rows = (got - residual).norm(dim=1) / (residual - before).norm(dim=1)
    flipped = rows > 1e-5
    assert float(rows.max()) < FLIPPED and int(flipped.sum()) <= 1 + flips * len(rows)
    if state.ssm.dtype == torch.float32:
        assert_close("ssm", got_state.ssm[~flipped], state.ssm[~flipped], 1e-5 * float(state.ssm.abs().max()))


CASES = {
    "0 W4": ("0", 9, {"w_bits": 4, **SMALL}, {}),
    "2-2 W8, two groups": ("2-2", 66, {"w_bits": 8, **SMALL}, {}),
    "2-4 W4": ("2-4", 33, {"w_bits": 4, **SMALL}, {}),
    "3 W8": ("3", 40, {"w_bits": 8, **SMALL}, {"scan_width": 2}),
    "half a tile, ragged columns, a ring": (
        "0",
        16,
        {"w_bits": 4, "d_model": 1088, "d_inner": 1536, "dt_rank": 17, "d_conv": 3, "bias": False},
        {"in_room": 4, "out_parts": 2},
    ),
    "a ring of W4, 64 tokens": (
        "0",
        34,
        {"w_bits": 4, "d_model": 2304, "d_inner": 512, "dt_rank": 17},
        {"in_room": 4},
    ),
    "a ring of W8, 64 tokens": (
        "0",
        64,
        {"w_bits": 8, "d_model": 1600, "d_inner": 512, "dt_rank": 4},
        {"in_room": 4, "out_room": 2, "out_parts": 1},
    ),
    "groups of 96, parts": (
        "2-4",
        10,
        {"w_bits": 4, "group_size": 96, "d_model": 192, "d_inner": 512, "dt_rank": 20, "d_conv": 2},
        {"out_parts": 3},
    ),
    "a core of 20, parts of odd units": (
        "0",
        33,
        {"w_bits": 4, "d_model": 64, "d_inner": 2560, "dt_rank": 4},
        {},
    ),
    "rows in two passes": (
        "3",
        12,
        {"w_bits": 8, "d_model": 64, "d_inner": 6144, "dt_rank": 4, "d_conv": 3},
        {},
    ),
}


@pytest.mark.parametrize(("mode", "batch", "sizes", "changed"), CASES.values(), ids=CASES)
def test_the_kernels_agree_with_the_reference(emulator, mode, batch, sizes, changed):
    tensors, columns = random_block(seed=8, **sizes), COLUMNS[mode]
    state = random_state(
        batch=batch, d_inner=sizes["d_inner"], columns=columns, seed=3, d_conv=sizes.get("d_conv", 4)
    )
    before = residual_of(batch, sizes["d_model"])
    got, (got_state,) = emulated(emulator, [tensors], columns, before, [state], changed)
    residual = before.clone()
    reference.decode_block(tensors, SCALES, columns, residual, state, norm_eps=EPSILON)
    assert_same_step(got, got_state, residual, state, before)


def test_tokens_go_through_blocks_in_turn(emulator):
    columns, batch = COLUMNS["0"], 17
    blocks = [random_block(w_bits=8, seed=20 + i, **SMALL) for i in range(2)]
    states = [random_state(batch=batch, d_inner=512, columns=columns, seed=i) for i in range(2)]
    before = residual_of(batch, 64)
    got, got_states = emulated(emulator, blocks, columns, before, states, tokens=2)
    again, _ = emulated(emulator, blocks, columns, before[:9], [first_of(s, 9) for s in states], tokens=2)
    assert_exact("a sequence does not depend on the others", again, got[:9])
    residual = before.clone()
    for _ in range(2):
        for tensors, state in zip(blocks, states, strict=True):
            reference.decode_block(tensors, SCALES, columns, residual, state, norm_eps=EPSILON)
    for got_state, state in zip(got_states, states, strict=True):
        assert_grid("conv", got_state.conv.values, state.conv.values, share=2e-3)
    assert float((got - residual).norm() / (residual - before).norm()) < FLIPPED


def first_of(state: DecodeState, batch: int) -> DecodeState:
    scale = None if state.conv.scale is None else state.conv.scale[:batch].clone()
    return DecodeState(ConvState(state.conv.values[:batch].clone(), scale), state.ssm[:batch].clone())


@pytest.mark.parametrize("batch", [9, 64, 100])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("mode", COLUMNS)
def test_a_state_goes_in_and_out(mode, taps, batch):
    tensors = random_block(w_bits=8, seed=1, d_conv=taps, **SMALL)
    packed = pack_block(tensors, SCALES, COLUMNS[mode], norm_eps=EPSILON)
    state = random_state(batch=batch, d_inner=512, columns=COLUMNS[mode], seed=5, d_conv=taps)
    ours = new_state(packed, plan.make_plan(packed, batch))
    load_state(ours, state)
    again = state_of(ours, batch, taps)
    assert_exact("conv", again.conv.values, state.conv.values)
    assert_exact("ssm", again.ssm, state.ssm)
    if state.conv.scale is not None:
        assert_exact("conv scale", again.conv.scale, state.conv.scale)


@pytest.mark.parametrize("batch", [9, 16, 33, 64, 256])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", [*SHAPES, "widest"])
def test_plans_of_published_models(small_block, name, wide, w_bits, batch):
    packed = packed_like(small_block, SHAPES.get(name, 4096), w_bits)
    chosen, memory = plan.make_plan(packed, batch, wide=wide), SharedMemory()
    assert chosen.product_threads == (640 if wide and batch > 32 else 512)
    rows, units = packed.out_proj.rows, packed.out_proj.units
    assert chosen.groups * chosen.tokens >= batch > (chosen.groups - 1) * chosen.tokens
    assert 16 * chosen.sixteens >= min(batch, chosen.tokens)
    assert 128 % chosen.out_packs == 0 and chosen.out_packs * rows <= 96
    assert 1 <= chosen.out_parts <= units and 128 % chosen.scan_width == 0
    # The ring of weights is at least as long as that of the tokens, or holds all.
    need = -(-packed.in_proj.units // chosen.column_parts) + (w_bits == 4)
    assert min(3 if batch <= 32 else 4, need) <= chosen.in_room <= min(16, need)
    for size in (
        plan.in_bytes(packed, chosen),
        plan.out_bytes(packed, chosen),
        plan.scan_bytes(packed, chosen),
    ):
        assert size <= memory.block


def test_a_device_with_too_little_memory_is_refused(small_block):
    packed = packed_like(small_block, 2560, 8)
    with pytest.raises(ShapeError, match=r"batch_in: a block needs \d+ bytes"):
        plan.make_plan(packed, 64, SharedMemory(multiprocessor=100 * 1024, block=99 * 1024))


@pytest.mark.parametrize("batch", [1, 8, 257])
def test_other_numbers_of_sequences_are_refused(small_block, batch):
    assert plan.unsupported_batch(9) is None and plan.unsupported_batch(256) is None
    with pytest.raises(ShapeError, match=f"batch is {batch}, the step of many sequences takes 9 to 256"):
        plan.make_plan(small_block, batch)


def test_wrong_operands_are_refused(small_block):
    chosen, block = plan.make_plan(small_block, 9), batch_block(small_block)
    scratch, state = new_scratch(small_block, chosen), new_state(small_block, chosen)
    good = random_state(batch=9, d_inner=512, columns=COLUMNS["0"], seed=0)
    load_state(state, good)
    residual = torch.zeros(9, 64)
    assert len(tuple(steps([block, block], residual, [state, state], scratch, chosen))) == 11
    for wrong in (torch.zeros(8, 64), residual.double(), torch.zeros(64, 9).t()):
        with pytest.raises(
            ShapeError, match=r"`residual` is .* expected a contiguous torch.float32 \(9, 64\)"
        ):
            tuple(steps([block], wrong, [state], scratch, chosen))
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        tuple(steps([block], torch.zeros(9 * 64 + 1)[1:].view(9, 64), [state], scratch, chosen))
    floats = dataclasses.replace(state, ssm=state.ssm.float())
    with pytest.raises(ShapeError, match="another mode"):
        tuple(steps([block], residual, [floats], scratch, chosen))
    for other in (first_of(good, 8), good._replace(ssm=good.ssm.float())):
        with pytest.raises(ShapeError, match="does not fit 2 groups of 64"):
            load_state(new_state(small_block, plan.make_plan(small_block, 65)), other)
    with pytest.raises(ShapeError, match="another conv input"):
        load_state(state, good._replace(conv=ConvState(good.conv.values, torch.ones(9, 3))))
    with pytest.raises(ShapeError, match="expected a CUDA tensor"):
        cuda.step_blocks([block], residual, [state], scratch, chosen)
