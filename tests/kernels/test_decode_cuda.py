"""The fused decode step on a GPU, against the reference and against itself."""

import dataclasses
import gc

import pytest
import tolerances
import torch
from close import assert_close, assert_exact, assert_grid

from qmamba_cli.kernels.decode import cuda, reference
from qmamba_cli.kernels.decode.pack import pack_block
from qmamba_cli.kernels.decode.plan import make_plan
from qmamba_cli.kernels.decode.samples import (
    SCALES,
    random_block,
    random_state,
    to_device,
    with_channel_columns,
    with_channel_scales,
)
from qmamba_cli.kernels.decode.tensors import DecodeColumns
from qmamba_cli.kernels.decode.unpack import unpack_block
from qmamba_cli.modes import MODES
from qmamba_cli.quant.weights import GroupQuantized

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

EPSILON = 1e-5
COLUMNS = {name: DecodeColumns.from_mode(MODES[name]) for name in ("0", "2-2", "2-4", "3")}
SHAPES = {
    "smallest": {"d_model": 64, "d_inner": 512, "dt_rank": 4},
    "demo": {"d_model": 256, "d_inner": 512, "dt_rank": 16},
    "130m": {"d_model": 768, "d_inner": 1536, "dt_rank": 48},
    "370m": {"d_model": 1024, "d_inner": 2048, "dt_rank": 64},
    "790m": {"d_model": 1536, "d_inner": 3072, "dt_rank": 96},
    "1.4b": {"d_model": 2048, "d_inner": 4096, "dt_rank": 128},
    "2.8b": {"d_model": 2560, "d_inner": 5120, "dt_rank": 160},
    "odd": {"d_model": 192, "d_inner": 1536, "dt_rank": 17, "d_conv": 3, "group_size": 96, "bias": False},
    "widest": {"d_model": 4096, "d_inner": 8192, "dt_rank": 256, "d_conv": 2},
}
# A flip of one int8 value of the chain (class grid) moves every value after it: by this much of the whole.
FLIPPED = 2e-2


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def assert_same_step(got, got_state, residual, state, before):
    assert_grid("conv", got_state.conv.values.cpu(), state.conv.values, share=tolerances.GRID.share)
    if state.conv.scale is not None:
        # The largest value of a token, divided and rounded once more.
        assert_close("conv scale", got_state.conv.scale.cpu(), state.conv.scale, 1e-5)
    if state.ssm.dtype == torch.int8:
        off = (got_state.ssm.cpu().int() - state.ssm.int()).abs()
        assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 5e-3
    else:
        assert relative(got_state.ssm.cpu(), state.ssm) < FLIPPED
    assert relative(got.cpu() - before, residual - before) < FLIPPED


def one_step(name, mode, w_bits, batch, by_channel=False, **options):
    sizes, columns, scales = SHAPES[name], COLUMNS[mode], SCALES
    tensors = random_block(w_bits=w_bits, seed=2, **sizes)
    if by_channel:
        scales = with_channel_scales(SCALES, sizes["d_inner"], seed=7)
        tensors = dataclasses.replace(tensors, x_proj=with_channel_columns(tensors.x_proj))
    packed = pack_block(to_device(tensors, "cuda"), to_device(scales, "cuda"), columns, norm_eps=EPSILON)
    state = random_state(
        batch=batch, d_inner=sizes["d_inner"], columns=columns, seed=3, d_conv=sizes.get("d_conv", 4)
    )
    residual = torch.randn(batch, sizes["d_model"], generator=torch.Generator().manual_seed(4))
    chosen = make_plan(packed, batch, cuda.shared_memory(packed.device), **options)
    scratch = cuda.make_scratch(packed, batch, chosen)
    got, got_state, before = residual.cuda(), to_device(state, "cuda"), residual.clone()
    cuda.decode_block(packed, got, got_state, scratch, plan=chosen)
    reference.decode_block(tensors, scales, columns, residual, state, norm_eps=EPSILON)
    assert_same_step(got, got_state, residual, state, before)
    assert not scratch.x_sums.any()
    if chosen.meet:
        assert scratch.x_absmax.view(torch.int32).eq(-1).all()
    return got, got_state


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("mode", COLUMNS)
@pytest.mark.parametrize("name", ["smallest", "130m"])
def test_every_column_and_batch(name, mode, w_bits, batch):
    one_step(name, mode, w_bits, batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mode", COLUMNS)
@pytest.mark.parametrize("name", ["demo", "130m", "odd"])
def test_a_scale_for_every_channel_of_u(name, mode, batch):
    one_step(name, mode, 4, batch, by_channel=True)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, w_bits, batch):
    one_step(name, "2-4" if batch == 2 else "0", w_bits, batch)


def test_plans_give_the_same_bits():
    options = (
        {},
        {"in_warps": 10, "out_warps": 16},
        {"in_slice": 1, "out_slice": 1},
        {"max_rotated": 8},
    )
    results = [one_step("370m", "0", 4, 4, **option) for option in options]
    for got, state in results[1:]:
        assert_exact("ssm", state.ssm, results[0][1].ssm)
        assert_exact("residual", got, results[0][0])


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("name", ["smallest", "odd", "2.8b", "widest"])
def test_blocks_that_meet_give_the_bits_of_those_that_hand_on(name, w_bits, batch):
    met, state = one_step(name, "3", w_bits, batch, meet=True)
    handed_on, expected = one_step(name, "3", w_bits, batch, meet=False)
    assert_exact("residual", met, handed_on)
    assert_exact("ssm", state.ssm, expected.ssm)
    assert_exact("conv", state.conv.values, expected.conv.values)
    assert_exact("conv scale", state.conv.scale, expected.conv.scale)


def chain(mode: str, w_bits: int, batch: int, layers: int):
    columns = COLUMNS[mode]
    blocks = [
        pack_block(
            random_block(w_bits=w_bits, seed=i, device="cuda", **SHAPES["130m"]),
            SCALES,
            columns,
            norm_eps=EPSILON,
        )
        for i in range(layers)
    ]
    states = [
        random_state(batch=batch, d_inner=1536, columns=columns, seed=i, device="cuda") for i in range(layers)
    ]
    return blocks, states


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize(("mode", "w_bits", "batch"), [("0", 4, 1), ("2-4", 8, 1), ("3", 4, 1), ("3", 8, 8)])
@pytest.mark.graph
def test_overlapping_launches_and_graphs_give_the_bits_of_single_launches(mode, w_bits, batch, layers):
    tokens = torch.randn(12, batch, 768, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    results = []
    for way in ("alone", "rows", "ends", "overlapping", "graph", "graph"):
        blocks, states = chain(mode, w_bits, batch, layers)
        chosen = cuda.default_plan(blocks[0], batch)
        assert (chosen.columns is not None) == (batch == 1)
        if way == "rows":
            chosen = dataclasses.replace(chosen, columns=None)
        chosen = dataclasses.replace(chosen, overlap=way != "alone", counted=way in ("overlapping", "graph"))
        scratch = cuda.make_scratch(blocks[0], batch, chosen)
        residual = tokens[0].clone()

        def step(blocks=blocks, states=states, residual=residual, scratch=scratch, chosen=chosen, way=way):
            for layer, (block, state) in enumerate(zip(blocks, states, strict=True)):
                after, last = blocks[layer - 1] if layer else None, layer == len(blocks) - 1
                cuda.decode_block(
                    block, residual, state, scratch, plan=chosen, layer=layer, after=after, last=last
                )
                if way == "alone":
                    torch.cuda.synchronize()

        outputs = []
        if way == "graph":
            before = [to_device(state, "cuda") for state in states]
            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for state, saved in zip(states, before, strict=True):
                state.conv.values.copy_(saved.conv.values)
                state.ssm.copy_(saved.ssm)
                if state.conv.scale is not None:
                    state.conv.scale.copy_(saved.conv.scale)
        for token in tokens:
            residual.copy_(token)
            if way == "graph":
                graph.replay()
            else:
                step()
            outputs.append(residual.clone())
        results.append((torch.stack(outputs), [state.ssm for state in states]))
    for outputs, ssm in results[1:]:
        assert_exact("residual", outputs, results[0][0])
        for got, expected in zip(ssm, results[0][1], strict=True):
            assert_exact("ssm", got, expected)


@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_packed_weights_unpack_to_the_matrices(name, w_bits):
    tensors = random_block(w_bits=w_bits, seed=2, device="cuda", **SHAPES[name])
    packed = pack_block(tensors, SCALES, COLUMNS["0"], norm_eps=EPSILON)
    expected = [
        matrix.expand() if isinstance(matrix, GroupQuantized) else matrix.qweight
        for matrix in (tensors.in_proj, tensors.out_proj)
    ]
    got = [torch.empty_like(matrix) for matrix in expected]
    unpack_block(packed, *got)
    for part, matrix, wanted in zip(("in_proj", "out_proj"), got, expected, strict=True):
        assert_exact(part, matrix, wanted)


def test_blocks_meet_for_one_set_of_buffers_of_a_device():
    packed = pack_block(
        random_block(w_bits=4, seed=9, device="cuda", **SHAPES["smallest"]),
        SCALES,
        COLUMNS["3"],
        norm_eps=EPSILON,
    )
    gc.collect()
    plan, first = cuda.plan_beside_others(packed, 1)
    assert plan.meet == cuda.default_plan(packed, 1).meet and first.x_absmax is not None
    assert not cuda.plan_beside_others(packed, 2)[0].meet
    del first
    gc.collect()
    assert cuda.plan_beside_others(packed, 2)[0].meet == plan.meet


def test_a_sequence_does_not_depend_on_the_others():
    columns = COLUMNS["2-4"]
    packed = pack_block(
        random_block(w_bits=4, seed=9, device="cuda", **SHAPES["130m"]), SCALES, columns, norm_eps=EPSILON
    )
    state = random_state(batch=8, d_inner=1536, columns=columns, seed=1, device="cuda")
    residual = torch.randn(8, 768, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    whole, whole_state = residual.clone(), to_device(state, "cuda")
    cuda.decode_block(packed, whole, whole_state, cuda.make_scratch(packed, 8))
    for start, stop in ((0, 1), (3, 5), (4, 8)):
        part = residual[start:stop].clone()
        conv = state.conv._replace(values=state.conv.values[start:stop].clone())
        part_state = state._replace(conv=conv, ssm=state.ssm[start:stop].clone())
        cuda.decode_block(packed, part, part_state, cuda.make_scratch(packed, stop - start))
        # The sum of squares is shared among the warps of a token, whose number depends on the batch.
        assert relative(part, whole[start:stop]) < FLIPPED
        assert relative(part_state.ssm, whole_state.ssm[start:stop]) < FLIPPED
