"""The step of many sequences on a GPU, against the reference and against itself."""

import dataclasses
import math

import pytest
import torch
from close import assert_exact
from test_decode_batch import assert_same_step, first_of
from test_decode_cuda import COLUMNS, EPSILON, FLIPPED, SHAPES, relative

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.decode import reference
from qmamba_cli.kernels.decode.pack import pack_block
from qmamba_cli.kernels.decode.samples import SCALES, random_block, random_state, to_device
from qmamba_cli.kernels.decode_batch import cuda
from qmamba_cli.kernels.decode_batch.plan import make_plan
from qmamba_cli.kernels.decode_batch.tensors import (
    batch_block,
    load_state,
    new_scratch,
    new_state,
    state_of,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]


def stepped(tensors, columns, residual, state, **options):
    """Residual and state after one token, from buffers that hold NaN."""
    packed = pack_block(to_device(tensors, "cuda"), SCALES, columns, norm_eps=EPSILON)
    device = packed.device
    plan = make_plan(
        packed, residual.shape[0], cuda.shared_memory(device), wide=cuda.is_wide(device), **options
    )
    scratch, ours = new_scratch(packed, plan), new_state(packed, plan)
    for field in dataclasses.fields(scratch):
        tensor = getattr(scratch, field.name)
        if tensor is not None and tensor.is_floating_point():
            tensor.fill_(math.nan)
    load_state(ours, to_device(state, "cuda"))
    got = residual.cuda()
    cuda.step_blocks([batch_block(packed)], got, [ours], scratch, plan)
    assert not scratch.x_sums.any()
    return got.cpu(), to_device(state_of(ours, len(got), packed.taps), "cpu")


def sample(name, mode, w_bits, batch):
    sizes, columns = SHAPES[name], COLUMNS[mode]
    tensors = random_block(w_bits=w_bits, seed=2, **sizes)
    taps = sizes.get("d_conv", 4)
    state = random_state(batch=batch, d_inner=sizes["d_inner"], columns=columns, seed=3, d_conv=taps)
    residual = torch.randn(batch, sizes["d_model"], generator=torch.Generator().manual_seed(4))
    return tensors, columns, residual, state


def one_step(name, mode, w_bits, batch, **options):
    tensors, columns, residual, state = sample(name, mode, w_bits, batch)
    got, got_state = stepped(tensors, columns, residual, state, **options)
    before = residual.clone()
    reference.decode_block(tensors, SCALES, columns, residual, state, norm_eps=EPSILON)
    assert_same_step(got, got_state, residual, state, before, flips=1.0)
    return got, got_state


@pytest.mark.parametrize("batch", [9, 16, 33, 64])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("mode", COLUMNS)
@pytest.mark.parametrize("name", ["smallest", "130m"])
def test_every_column_and_batch(name, mode, w_bits, batch):
    one_step(name, mode, w_bits, batch)


@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name, w_bits):
    one_step(name, "0" if w_bits == 4 else "2-4", w_bits, 17)


@pytest.mark.parametrize(("name", "mode", "w_bits", "batch"), [("2.8b", "0", 4, 64), ("odd", "3", 4, 130)])
def test_full_and_several_groups(name, mode, w_bits, batch):
    one_step(name, mode, w_bits, batch)


def test_plans_give_the_same_bits():
    options = ({}, {"product_bytes": 100 * 1024}, {"out_parts": 1}, {"scan_width": 1})
    results = [one_step("370m", "0", 4, 40, **option) for option in options]
    for got, state in results[1:]:
        assert_exact("ssm", state.ssm, results[0][1].ssm)
        assert_exact("residual", got, results[0][0])


def test_a_plan_of_another_device_is_refused():
    packed = pack_block(
        random_block(w_bits=8, seed=1, device="cuda", **SHAPES["smallest"]),
        SCALES,
        COLUMNS["0"],
        norm_eps=EPSILON,
    )
    plan = cuda.default_plan(packed, 64)
    scratch, state = new_scratch(packed, plan), new_state(packed, plan)
    other = dataclasses.replace(plan, wide=not plan.wide)
    with pytest.raises(ShapeError, match="a plan with wide="):
        cuda.step_blocks([batch_block(packed)], torch.zeros(64, 64, device="cuda"), [state], scratch, other)


@pytest.mark.parametrize("batch", [9, 32, 80])
def test_a_sequence_does_not_depend_on_the_others(batch):
    tensors, columns, residual, state = sample("130m", "3", 4, 130)
    whole, whole_state = stepped(tensors, columns, residual, state)
    part, part_state = stepped(tensors, columns, residual[:batch], first_of(state, batch))
    assert_exact("residual", part, whole[:batch])
    assert_exact("ssm", part_state.ssm, whole_state.ssm[:batch])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("mode", "w_bits", "batch"), [("0", 4, 64), ("2-4", 8, 16), ("3", 4, 33)])
@pytest.mark.graph
def test_overlapping_launches_and_graphs_give_the_bits_of_single_launches(mode, w_bits, batch, layers):
    tokens = torch.randn(12, batch, 768, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    columns, results = COLUMNS[mode], []
    packed = [
        pack_block(
            random_block(w_bits=w_bits, seed=i, device="cuda", **SHAPES["130m"]),
            SCALES,
            columns,
            norm_eps=EPSILON,
        )
        for i in range(layers)
    ]
    blocks = [batch_block(block) for block in packed]
    for way in ("alone", "overlapping", "graph", "graph"):
        plan = dataclasses.replace(cuda.default_plan(packed[0], batch), overlap=way != "alone")
        scratch = new_scratch(packed[0], plan)
        states = [new_state(block, plan) for block in packed]
        start = [
            random_state(batch=batch, d_inner=1536, columns=columns, seed=i, device="cuda")
            for i in range(layers)
        ]
        residual = tokens[0].clone()

        def step(residual=residual, states=states, scratch=scratch, plan=plan):
            cuda.step_blocks(blocks, residual, states, scratch, plan)

        if way == "graph":
            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for to, state in zip(states, start, strict=True):
            load_state(to, state)
        outputs = []
        for token in tokens:
            residual.copy_(token)
            graph.replay() if way == "graph" else step()
            outputs.append(residual.clone())
        results.append((torch.stack(outputs), [state_of(state, batch, 4).ssm for state in states]))
    for outputs, ssm in results[1:]:
        assert_exact("residual", outputs, results[0][0])
        for got, expected in zip(ssm, results[0][1], strict=True):
            assert_exact("ssm", got, expected)


def test_tokens_follow_the_reference_through_blocks():
    columns, batch = COLUMNS["2-2"], 24
    tensors = [random_block(w_bits=8, seed=i, **SHAPES["demo"]) for i in range(2)]
    packed = [pack_block(to_device(t, "cuda"), SCALES, columns, norm_eps=EPSILON) for t in tensors]
    plan = cuda.default_plan(packed[0], batch)
    scratch, ours = new_scratch(packed[0], plan), [new_state(block, plan) for block in packed]
    states = [random_state(batch=batch, d_inner=512, columns=columns, seed=i) for i in range(2)]
    for to, state in zip(ours, states, strict=True):
        load_state(to, to_device(state, "cuda"))
    residual = torch.randn(batch, 256, generator=torch.Generator().manual_seed(4))
    got, before = residual.cuda(), residual.clone()
    for _ in range(3):
        cuda.step_blocks([batch_block(block) for block in packed], got, ours, scratch, plan)
        for block, state in zip(tensors, states, strict=True):
            reference.decode_block(block, SCALES, columns, residual, state, norm_eps=EPSILON)
    assert relative(got.cpu() - before, residual - before) < FLIPPED
