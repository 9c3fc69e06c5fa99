"""The fused decode step without a GPU: reference, packing, plans, and the kernels on an emulator."""

import dataclasses
import math

import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid
from decode_emulator import Emulator

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.kernels.causal_conv1d.reference import ConvState
from qmamba_cli.kernels.decode import cuda, plan, reference
from qmamba_cli.kernels.decode import steps as stepping
from qmamba_cli.kernels.decode.pack import pack_block
from qmamba_cli.kernels.decode.samples import (
    SCALES,
    random_block,
    random_state,
    to_device,
    with_channel_columns,
    with_channel_scales,
)
from qmamba_cli.kernels.decode.scratch import new_scratch
from qmamba_cli.kernels.decode.steps import Step, launch_steps, steps
from qmamba_cli.kernels.decode.tensors import DecodeColumns, DecodeState, check_tensors, supported
from qmamba_cli.kernels.decode.unpack import unpack_block, unpack_steps
from qmamba_cli.model.block import BlockState, block_forward
from qmamba_cli.model.weights import BlockWeights, LinearWeights, SiteScales
from qmamba_cli.modes import MODES, Precision
from qmamba_cli.quant.weights import GroupQuantized

EPSILON = 1e-5
INT8_MODES = [name for name, mode in MODES.items() if mode.precision is Precision.INT8]
COLUMNS = {name: DecodeColumns.from_mode(MODES[name]) for name in INT8_MODES}
SMALL = {"d_model": 64, "d_inner": 512, "dt_rank": 4}
SHAPES = {"130m": 768, "370m": 1024, "790m": 1536, "1.4b": 2048, "2.8b": 2560}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("decode"))


@pytest.fixture(scope="module")
def small_block():
    return random_block(w_bits=8, seed=1, **SMALL)


def residual_of(batch: int, d_model: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(batch, d_model, generator=torch.Generator().manual_seed(seed))


def emulated(emulator, blocks, columns, residual, states, changed=None, tokens=1, scales=SCALES, **options):
    """`emulate` of packed ``blocks``, each of which leaves a whole residual."""
    packed = [pack_block(tensors, scales, columns, norm_eps=EPSILON) for tensors in blocks]
    chosen = dataclasses.replace(plan.make_plan(packed[0], residual.shape[0], **options), **(changed or {}))
    return emulate(emulator, packed, residual, states, chosen, tokens, chained=False)


def emulate(emulator, packed, residual, states, chosen, tokens, *, chained):
    """Residual and states after some tokens of a model, from buffers that hold NaN.

    ``chained``: a block may leave a part of its residual for the next one.
    """
    scratch = new_scratch(packed[0], residual.shape[0], chosen)
    for field in dataclasses.fields(scratch):
        tensor = getattr(scratch, field.name)
        if tensor is not None and tensor.is_floating_point():
            tensor.fill_(math.nan)
    residual, states = residual.clone(), [to_device(state, "cpu") for state in states]
    for _ in range(tokens):
        for layer, (block, state) in enumerate(zip(packed, states, strict=True)):
            after = packed[layer - 1] if chained and layer else None
            last = not chained or layer == len(packed) - 1
            emulator.run(steps(block, residual, state, scratch, chosen, layer=layer, after=after, last=last))
            assert not scratch.x_sums.any(), "the sums must be clear for the next block"
        assert scratch.out_sums is None or not scratch.out_sums.any(), "and these for the next token"
    return residual, states


def assert_same_step(got, got_state, residual, state, before):
    assert_grid("conv", got_state.conv.values, state.conv.values, share=tolerances.GRID.share)
    if state.conv.scale is not None:
        assert_close("conv scale", got_state.conv.scale, state.conv.scale, 4 * tolerances.EPS)
    if state.ssm.dtype == torch.int8:
        assert_grid("ssm", got_state.ssm, state.ssm, share=tolerances.GRID.share)
    else:
        assert_close("ssm", got_state.ssm, state.ssm, 1e-5 * float(state.ssm.abs().max()))
    # An int8 value of the chain on a tie would move the whole residual; these samples have none.
    assert_close("residual", got, residual, 1e-5 * float((residual - before).abs().max()))


CASES = {
    "0 W4": ("0", 1, {"w_bits": 4, **SMALL}, {}),
    "2-2 W8": ("2-2", 1, {"w_bits": 8, **SMALL}, {}),
    "2-4 W4": ("2-4", 1, {"w_bits": 4, **SMALL}, {}),
    "3 W8": ("3", 1, {"w_bits": 8, **SMALL}, {}),
    "half a tile, ragged columns, two passes": (
        "0",
        2,
        {"w_bits": 4, "d_model": 192, "d_inner": 1536, "dt_rank": 17, "d_conv": 3, "bias": False},
        {"in_warps": 2, "out_warps": 2, "changed": {"in_room": 1, "out_room": 2}},
    ),
    "groups of 96, slices": (
        "2-4",
        5,
        {"w_bits": 4, "group_size": 96, "d_model": 192, "d_inner": 512, "dt_rank": 20, "d_conv": 2},
        {"in_slice": 1, "out_slice": 1},
    ),
    "eight sequences": (
        "3",
        8,
        {"w_bits": 8, "d_model": 128, "d_inner": 512, "dt_rank": 4, "d_conv": 3},
        {"max_rotated": 8},
    ),
}


@pytest.mark.parametrize(("mode", "batch", "sizes", "options"), CASES.values(), ids=CASES)
def test_the_kernels_agree_with_the_reference(emulator, mode, batch, sizes, options):
    tensors, columns = random_block(seed=8, **sizes), COLUMNS[mode]
    state = random_state(
        batch=batch, d_inner=sizes["d_inner"], columns=columns, seed=3, d_conv=sizes.get("d_conv", 4)
    )
    before = residual_of(batch, sizes["d_model"])
    got, (got_state,) = emulated(emulator, [tensors], columns, before, [state], **options)
    residual = before.clone()
    reference.decode_block(tensors, SCALES, columns, residual, state, norm_eps=EPSILON)
    assert_same_step(got, got_state, residual, state, before)


@pytest.mark.parametrize("mode", ["0", "2-2", "2-4", "3"])
def test_the_kernels_take_a_scale_for_every_channel_of_u(emulator, small_block, mode):
    scales, columns = with_channel_scales(SCALES, 512, seed=5), COLUMNS[mode]
    tensors = dataclasses.replace(small_block, x_proj=with_channel_columns(small_block.x_proj))
    state = random_state(batch=2, d_inner=512, columns=columns, seed=3)
    before = residual_of(2, 64)
    got, (got_state,) = emulated(emulator, [tensors], columns, before, [state], scales=scales)
    one_scale, _ = emulated(emulator, [tensors], columns, before, [state])
    residual = before.clone()
    reference.decode_block(tensors, scales, columns, residual, state, norm_eps=EPSILON)
    assert_same_step(got, got_state, residual, state, before)
    assert float((got - one_scale).norm() / (got - before).norm()) > 1e-3, "the scales must show"


def test_scales_of_another_width_are_refused(small_block):
    with pytest.raises(
        ShapeError, match=r"`x_proj_input` is torch.float32 \(256,\), expected float32 \(512,\)"
    ):
        pack_block(small_block, with_channel_scales(SCALES, 256, seed=5), COLUMNS["0"], norm_eps=EPSILON)


MODELS = {
    "static, 3 blocks": ("0", 1, 3, {}),
    "dynamic, a norm from shared squares": ("3", 3, 2, {"in_warps": 6}),
    "one block": ("2-4", 1, 1, {}),
}


@pytest.mark.parametrize(("mode", "batch", "layers", "options"), MODELS.values(), ids=MODELS)
def test_the_kernels_hand_on_from_block_to_block(emulator, mode, batch, layers, options):
    columns = COLUMNS[mode]
    blocks = [random_block(w_bits=8, seed=20 + i, **SMALL) for i in range(layers)]
    states = [random_state(batch=batch, d_inner=512, columns=columns, seed=i) for i in range(layers)]
    before = residual_of(batch, 64)
    counted = {"counted": True}
    got, got_states = emulated(
        emulator, blocks, columns, before, states, tokens=2, changed=counted, **options
    )
    if layers == 3:
        by_ends, _ = emulated(emulator, blocks, columns, before, states, tokens=2, **options)
        assert_exact("residual", got, by_ends)
    residual = before.clone()
    for _ in range(2):
        for tensors, state in zip(blocks, states, strict=True):
            reference.decode_block(tensors, SCALES, columns, residual, state, norm_eps=EPSILON)
    for got_state, state in zip(got_states, states, strict=True):
        assert_grid("conv", got_state.conv.values, state.conv.values, share=2e-3)
    assert float((got - residual).norm() / (residual - before).norm()) < 2e-2


def test_a_block_that_follows_nothing_is_noticed(emulator, small_block, capfd):
    packed = pack_block(small_block, SCALES, COLUMNS["0"], norm_eps=EPSILON)
    chosen = dataclasses.replace(plan.make_plan(packed, 1), counted=True)
    state = random_state(batch=1, d_inner=512, columns=COLUMNS["0"], seed=3)
    scratch = new_scratch(packed, 1, chosen)
    with pytest.raises(AssertionError, match="decode_in"):
        emulator.run(steps(packed, residual_of(1, 64), state, scratch, chosen, layer=1))
    assert "not full" in capfd.readouterr().err


UNPACKED = {
    "W8": {"w_bits": 8, **SMALL},
    "W4": {"w_bits": 4, **SMALL},
    "W4, half a tile, ragged columns": {"w_bits": 4, "d_model": 192, "d_inner": 1536, "dt_rank": 8},
    "W4, groups of 96": {"w_bits": 4, "group_size": 96, "d_model": 320, "d_inner": 512, "dt_rank": 8},
}


@pytest.mark.parametrize("sizes", UNPACKED.values(), ids=UNPACKED)
def test_packed_weights_unpack_to_the_matrices(emulator, sizes):
    tensors = random_block(seed=6, **sizes)
    packed = pack_block(tensors, SCALES, COLUMNS["0"], norm_eps=EPSILON)
    expected = [
        matrix.expand() if isinstance(matrix, GroupQuantized) else matrix.qweight
        for matrix in (tensors.in_proj, tensors.out_proj)
    ]
    got = [torch.full_like(matrix, 99) for matrix in expected]
    emulator.run(unpack_steps(packed, *got))
    for name, matrix, wanted in zip(("in_proj", "out_proj"), got, expected, strict=True):
        assert_exact(name, matrix, wanted)


def test_unpacking_refuses_other_shapes(small_block):
    packed = pack_block(small_block, SCALES, COLUMNS["0"], norm_eps=EPSILON)
    good = torch.empty(1024, 64, dtype=torch.int8), torch.empty(64, 512, dtype=torch.int8)
    with pytest.raises(ShapeError, match=r"`out_proj` is torch.int8 \(512, 64\)"):
        unpack_steps(packed, good[0], good[1].t())
    with pytest.raises(ShapeError, match="expected a CUDA tensor"):
        unpack_block(packed, *good)


def test_the_emulator_sees_a_write_out_of_bounds(emulator, small_block, monkeypatch, capfd):
    monkeypatch.setattr(plan, "_IN_CONSTANTS", 1)
    state = random_state(batch=1, d_inner=512, columns=COLUMNS["0"], seed=3)
    with pytest.raises(AssertionError, match="decode_in"):
        emulated(emulator, [small_block], COLUMNS["0"], residual_of(1, 64), [state])
    assert "behind the shared memory" in capfd.readouterr().err


def as_weights(tensors) -> BlockWeights:
    def linear(matrix, bias=None):
        weight = matrix.expand() if isinstance(matrix, GroupQuantized) else matrix.qweight
        return LinearWeights(weight, matrix.scale, bias)

    return BlockWeights(
        norm=None,
        in_proj=linear(tensors.in_proj, tensors.in_bias),
        conv_weight=tensors.conv.qweight,
        conv_scale=tensors.conv.scale,
        conv_bias=tensors.conv_bias,
        x_proj=linear(tensors.x_proj),
        dt_proj=linear(tensors.dt_proj),
        dt_bias=tensors.dt_bias,
        A=tensors.A,
        D=tensors.D,
        out_proj=linear(tensors.out_proj, tensors.out_bias),
        rotated=True,
        scales=SiteScales(**dataclasses.asdict(SCALES)),
    )


@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("mode", INT8_MODES)
def test_the_reference_is_the_model_s_block(mode, w_bits):
    tensors, columns = random_block(w_bits=w_bits, seed=5, **SMALL), COLUMNS[mode]
    state = random_state(batch=2, d_inner=512, columns=columns, seed=4)
    residual = residual_of(2, 64)
    expected, wanted = block_forward(
        as_weights(tensors),
        MODES[mode],
        CPU,
        residual.unsqueeze(1),
        BlockState(state.conv, state.ssm),
        norm_eps=EPSILON,
    )
    reference.decode_block(tensors, SCALES, columns, residual, state, norm_eps=EPSILON)
    assert_exact("residual", residual, expected.squeeze(1))
    assert_exact("conv", state.conv.values, wanted.conv.values)
    assert_exact("ssm", state.ssm, wanted.ssm)
    if columns.dynamic_input:
        assert_exact("conv scale", state.conv.scale, wanted.conv.scale)


def test_modes_that_are_equal_in_a_step_have_equal_columns():
    assert COLUMNS["0"] == COLUMNS["2-0"] == COLUMNS["2-1"] == COLUMNS["2-3"]
    assert len(set(COLUMNS.values())) == 4
    with pytest.raises(ShapeError, match="precision=int8"):
        DecodeColumns.from_mode(MODES["fp"])


def test_packed_weights_stay_packed():
    sizes = {"d_model": 256, "d_inner": 512, "dt_rank": 16}
    columns = COLUMNS["0"]
    four, eight = (
        pack_block(random_block(w_bits=bits, seed=1, **sizes), SCALES, columns, norm_eps=EPSILON)
        for bits in (4, 8)
    )
    elements = 3 * 512 * 256
    assert eight.in_proj.weight.numel() + eight.out_proj.weight.numel() == elements
    assert four.in_proj.weight.numel() + four.out_proj.weight.numel() == elements // 2
    # One multiplier a group of 128, in_proj's 8 rows a thread block padded to 16, out_proj's 2 likewise.
    assert four.in_proj.multipliers.numel() == 2 * (1024 * 256 // 128)
    assert four.out_proj.multipliers.numel() == 8 * (256 * 512 // 128)
    assert four.nbytes() < eight.nbytes()


def packed_like(packed, d_model: int, w_bits: int):
    """The sizes of a published model with next to no memory."""
    hk, unit = 2 * d_model // 128, 128 if w_bits == 4 else 64

    def matrix(rows, columns):
        units, tiles = columns // unit, -(-rows // 16)
        multipliers = torch.empty(1, tiles * units * 16, dtype=torch.uint8) if w_bits == 4 else None
        return dataclasses.replace(
            packed.in_proj, bits=w_bits, rows=rows, units=units, multipliers=multipliers
        )

    return dataclasses.replace(
        packed,
        d_model=d_model,
        hk=hk,
        rank=d_model // 16,
        x_rows=d_model // 16 + 32,
        dt_pieces=-(-d_model // 256),
        in_proj=matrix(2 * hk, d_model),
        out_proj=matrix(-(-d_model // 128), 2 * d_model),
    )


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_plans_of_published_models(small_block, name, w_bits, batch):
    packed = packed_like(
        pack_block(small_block, SCALES, COLUMNS["0"], norm_eps=EPSILON), SHAPES[name], w_bits
    )
    chosen = plan.make_plan(packed, batch)
    tiles = -(-packed.in_proj.rows // 16)
    assert tiles * chosen.in_splits <= chosen.in_warps <= plan.MAX_WARPS >= chosen.out_warps
    assert batch <= chosen.in_warps and packed.out_proj.rows * batch <= 32 * chosen.out_warps
    sizes = (
        plan.in_bytes(packed, batch, chosen),
        plan.scan_bytes(packed, batch),
        plan.out_bytes(packed, batch, chosen),
    )
    memory = plan.SharedMemory()
    assert max(sizes) <= memory.block
    # The three kernels of a block share a multiprocessor.
    assert sum(sizes) + 3 * 1024 <= memory.multiprocessor
    need = -(-packed.in_proj.units // chosen.in_splits)
    assert 1 <= chosen.in_room <= need and chosen.out_room >= 1
    one_by_one = chosen.columns is not None or (w_bits == 8 and chosen.in_room < need)
    assert (chosen.in_slice == 1) == (chosen.in_room == 1 or one_by_one)


def test_a_device_with_too_little_memory_is_refused(small_block):
    packed = packed_like(pack_block(small_block, SCALES, COLUMNS["0"], norm_eps=EPSILON), 2560, 8)
    with pytest.raises(ShapeError, match=r"decode_\w+: a block needs \d+ bytes"):
        plan.make_plan(packed, 8, plan.SharedMemory(multiprocessor=48 * 1024, block=47 * 1024))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"batch": 9}, "batch is 9, the fused step takes 1 to 8"),
        ({"d_model": 96}, "d_model is 96, the fused step takes multiples of 64"),
        ({"d_inner": 640}, "d_inner is 640, the fused step takes multiples of 512"),
        ({"d_inner": 128 * 52}, "has no Sylvester factor"),
        ({"d_state": 8}, "d_state is 8"),
        ({"dt_rank": 257}, "dt_rank is 257"),
        ({"d_conv": 5}, "d_conv is 5"),
        ({"group_size": 48}, "group_size is 48"),
    ],
)
def test_supported_says_why_not(changed, reason):
    sizes = {"d_model": 64, "d_inner": 512, "d_state": 16, "dt_rank": 4, "d_conv": 4}
    assert supported(**sizes) is None
    assert reason in supported(**(sizes | changed))


@pytest.mark.parametrize("d_model", SHAPES.values(), ids=SHAPES)
def test_published_models_are_supported(d_model):
    for batch in (1, 8):
        assert (
            supported(
                d_model=d_model, d_inner=2 * d_model, d_state=16, dt_rank=d_model // 16, d_conv=4, batch=batch
            )
            is None
        )


def test_wrong_operands_are_refused(small_block):
    wrong = dataclasses.replace(small_block, D=torch.zeros(7))
    with pytest.raises(ShapeError, match=r"`D` is torch.float32 \(7,\), expected float32 \(512,\)"):
        check_tensors(wrong)
    with pytest.raises(ShapeError, match=r"`in_proj` is \(512, 4\), expected \(1024, 64\)"):
        check_tensors(dataclasses.replace(small_block, in_proj=small_block.dt_proj))
    with pytest.raises(ShapeError, match="group_size is 48"):
        check_tensors(random_block(w_bits=4, group_size=48, seed=0, **SMALL))
    packed = pack_block(small_block, SCALES, COLUMNS["0"], norm_eps=EPSILON)
    chosen = plan.make_plan(packed, 1)
    scratch = new_scratch(packed, 1, chosen)
    good = random_state(batch=1, d_inner=512, columns=COLUMNS["0"], seed=0)
    residual = torch.zeros(1, 64)
    assert len(steps(packed, residual, good, scratch, chosen)) == 3
    for state, message in (
        (DecodeState(good.conv, good.ssm.float()), r"`state.ssm` is torch.float32"),
        (DecodeState(ConvState(good.conv.values, torch.ones(1, 3)), good.ssm), "one scale a token"),
        (DecodeState(ConvState(good.conv.values.float()), good.ssm), r"`state.conv.values` is torch.float32"),
        (random_state(batch=2, d_inner=512, columns=COLUMNS["0"], seed=0), "`state.conv.values`"),
    ):
        with pytest.raises(ShapeError, match=message):
            steps(packed, residual, state, scratch, chosen)
    with pytest.raises(ShapeError, match="contiguous"):
        steps(packed, torch.zeros(64, 2).t()[:1].t().t(), good, scratch, chosen)
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        steps(packed, torch.zeros(65)[1:].view(1, 64), good, scratch, chosen)
    with pytest.raises(ShapeError, match="another batch, plan or model"):
        steps(packed, residual, good, new_scratch(packed, 2, plan.make_plan(packed, 2)), chosen)
    with pytest.raises(ShapeError, match="expected a CUDA tensor"):
        cuda.decode_block(packed, residual, good, scratch, plan=chosen)


def test_steps_are_launched_in_turn_as_they_say(monkeypatch):
    launched = []
    monkeypatch.setattr(stepping, "launch", lambda *args, **options: launched.append((args, options)))
    device = torch.device("cuda", 1)
    given = [
        Step(entry="first", grid=(3, 2, 1), threads=64, args=(None,), shared_bytes=128),
        Step(entry="second", grid=(5, 1, 1), threads=32, args=(), shared_bytes=0),
    ]
    launch_steps("decode/decode.cu", given, device, overlap=True)
    launch_steps("decode/decode.cu", given[:1], device)
    common = {"device": device, "shared_bytes": 128, "grid": (3, 2, 1), "block": (64, 1, 1), "args": (None,)}
    second = {"device": device, "shared_bytes": 0, "grid": (5, 1, 1), "block": (32, 1, 1), "args": ()}
    assert launched == [
        (("decode/decode.cu", "first"), {**common, "overlap": True}),
        (("decode/decode.cu", "second"), {**second, "overlap": True}),
        (("decode/decode.cu", "first"), {**common, "overlap": False}),
    ]
