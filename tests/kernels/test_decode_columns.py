"""out_proj of one token by columns: the bits of out_proj by rows, on the emulator; how it is launched."""

import dataclasses

import pytest
from close import assert_exact
from decode_emulator import Emulator
from test_decode import COLUMNS, EPSILON, SHAPES, SMALL, emulate, packed_like, residual_of

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode import plan
from qmamba_cli.kernels.decode.pack import pack_block
from qmamba_cli.kernels.decode.samples import SCALES, random_block, random_state
from qmamba_cli.kernels.decode.scratch import new_scratch
from qmamba_cli.kernels.decode.steps import steps

LAYERS, TOKENS = 3, 2


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("decode"))


CASES = {
    "W4": ("0", {"w_bits": 4, **SMALL}, {}, {}),
    "W8, two passes": ("0", {"w_bits": 8, **SMALL}, {"warps": 2, "blocks": 4}, {"room": 1}),
    "groups of 96, rows that are no tile": (
        "2-4",
        {"w_bits": 4, "group_size": 96, "d_model": 192, "d_inner": 512, "dt_rank": 20, "d_conv": 2},
        {"warps": 2, "blocks": 8},
        {"room": 2},
    ),
    "five tiles a warp, without bias": (
        "2-4",
        {"w_bits": 4, "d_model": 320, "d_inner": 512, "dt_rank": 20, "bias": False},
        {"warps": 4, "blocks": 4},
        {"room": 3, "counted": True},
    ),
    "dynamic, as wide as can be": ("3", {"w_bits": 8, "d_model": 2560, "d_inner": 512, "dt_rank": 4}, {}, {}),
}


@pytest.mark.parametrize(("mode", "sizes", "options", "changed"), CASES.values(), ids=CASES)
def test_columns_give_the_bits_of_rows(emulator, mode, sizes, options, changed):
    changed = dict(changed)
    packed = [
        pack_block(random_block(seed=8 + i, **sizes), SCALES, COLUMNS[mode], norm_eps=EPSILON)
        for i in range(LAYERS)
    ]
    states = [
        random_state(
            batch=1,
            d_inner=sizes["d_inner"],
            columns=COLUMNS[mode],
            seed=3 + i,
            d_conv=sizes.get("d_conv", 4),
        )
        for i in range(LAYERS)
    ]
    before = residual_of(1, sizes["d_model"])
    rows = plan.make_plan(packed[0], 1, columns=False)
    expected, expected_states = emulate(emulator, packed, before, states, rows, TOKENS, chained=True)
    chosen = plan.by_columns(rows, packed[0], **options)
    room = changed.pop("room", chosen.columns.room)
    chosen = dataclasses.replace(chosen, columns=dataclasses.replace(chosen.columns, room=room), **changed)
    got, got_states = emulate(emulator, packed, before, states, chosen, TOKENS, chained=True)
    assert_exact("residual", got, expected)
    for got_state, state in zip(got_states, expected_states, strict=True):
        assert_exact("conv", got_state.conv.values, state.conv.values)
        assert_exact("ssm", got_state.ssm, state.ssm)


def test_buffers_of_the_other_form_are_refused():
    packed = pack_block(random_block(w_bits=8, seed=1, **SMALL), SCALES, COLUMNS["0"], norm_eps=EPSILON)
    state = random_state(batch=1, d_inner=512, columns=COLUMNS["0"], seed=3)
    by_rows = plan.make_plan(packed, 1, columns=False)
    for one, other in ((by_rows, plan.make_plan(packed, 1)), (plan.make_plan(packed, 1), by_rows)):
        with pytest.raises(ShapeError, match="`scratch` is for another plan"):
            steps(packed, residual_of(1, 64), state, new_scratch(packed, 1, one), other)


@pytest.mark.parametrize(("batch", "d_model"), [(2, 64), (1, 2624)])
def test_several_tokens_and_wider_models_go_by_rows(batch, d_model):
    sizes = {"w_bits": 8, "d_model": d_model, "d_inner": 512, "dt_rank": 4}
    packed = pack_block(random_block(seed=1, **sizes), SCALES, COLUMNS["0"], norm_eps=EPSILON)
    assert plan.make_plan(packed, batch).columns is None


def test_a_device_with_little_memory_goes_by_rows():
    small = pack_block(random_block(w_bits=8, seed=1, **SMALL), SCALES, COLUMNS["0"], norm_eps=EPSILON)
    packed = packed_like(small, 1536, 8)
    memory = plan.SharedMemory(multiprocessor=44 * 1024, block=43 * 1024)
    assert plan.make_plan(packed, 1, memory).columns is None


@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_plans_of_published_models(name, w_bits):
    small = pack_block(random_block(w_bits=8, seed=1, **SMALL), SCALES, COLUMNS["0"], norm_eps=EPSILON)
    packed = packed_like(small, SHAPES[name], w_bits)
    chosen = plan.make_plan(packed, 1)
    # A block a multiprocessor, and few multiprocessors without one.
    assert 110 <= packed.hk * chosen.columns.groups <= 132
    assert 4 * plan.WARP * chosen.in_warps >= packed.d_model, "four neighbours a thread"
    memory = plan.SharedMemory()
    scan = plan.scan_bytes(packed, 1)
    for out in (plan.column_bytes(packed, chosen.columns), plan.out_bytes(packed, 1, chosen)):
        sizes = (plan.in_bytes(packed, 1, chosen), scan, out)
        assert max(sizes) <= memory.block
        assert sum(sizes) + 3 * 1024 <= memory.multiprocessor, "three kernels share a multiprocessor"
