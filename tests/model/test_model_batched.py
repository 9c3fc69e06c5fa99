"""The step of many rows as a stepper: with the reference's blocks it makes plain steps' tokens and states."""

import pytest
import torch
from close import assert_exact
from test_model_decode_graph import Tapes, step_by_step, tokens_of
from test_model_fused import QUANTIZED, each_quantized

from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.kernels.decode.reference import decode_block
from qmamba_cli.kernels.decode.tensors import DecodeColumns
from qmamba_cli.kernels.decode_batch.plan import make_plan
from qmamba_cli.kernels.decode_batch.tensors import load_state, new_state, state_of
from qmamba_cli.kernels.linear.interleaved import Interleaved
from qmamba_cli.model.batched import BatchedStepper, cuda_stepper, unsupported
from qmamba_cli.model.decode import Decoder, ModelStepper
from qmamba_cli.model.fused import block_scales, block_tensors, packed_blocks

ROWS = 11


def reference_stepper(model):
    """A stepper whose blocks take their states out of the kernels' order and put them back."""
    weights = [(block_tensors(block), block_scales(block)) for block in model.weights.blocks]
    columns, taps = DecodeColumns.from_mode(model.mode), model.config.d_conv

    def step(residual, states):
        for (tensors, scales), held in zip(weights, states, strict=True):
            state = state_of(held, len(residual), taps)
            decode_block(tensors, scales, columns, residual, state, norm_eps=model.config.norm_eps)
            load_state(held, state)

    packed = packed_blocks(model)
    plan = make_plan(packed[0], ROWS)
    return BatchedStepper(model, [new_state(block, plan) for block in packed], step)


@each_quantized
def test_reference_blocks_step_as_the_model_does(demo, mode):
    model = demo.model(mode)
    ids = demo.ids[:, :40].repeat(6, 1)[:ROWS]
    expected = step_by_step(model, ids, 4)
    stepper = reference_stepper(model)
    decoder = Decoder(model, ROWS, recorder=Tapes(), stepper=stepper)
    decoder.prepare()
    for _ in range(2):
        assert tokens_of(decoder, ids, 4) == expected
    _, state = model.forward(ids)
    for row in expected[:-1]:
        _, state = model.forward(torch.tensor(row).unsqueeze(1), state)
    for held, plain in zip(stepper._states, state, strict=True):
        got = state_of(held, ROWS, model.config.d_conv)
        assert_exact("ssm", got.ssm, plain.ssm)
        assert_exact("conv", got.conv.values, plain.conv.values)
        if plain.conv.scale is not None:
            assert_exact("conv scale", got.conv.scale, plain.conv.scale)


def test_what_has_no_step_of_many_rows(demo):
    assert "precision is fp32" in unsupported(demo.model("fp"), 16)
    assert "takes cuda" in unsupported(demo.model("0"), 16)
    assert "takes 9 to 256" in unsupported(demo.model("0"), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [9, 16, 33, 64])
@each_quantized
def test_batched_steps_follow_the_general_ones_on_a_gpu(demo, mode, batch):
    cuda = select_backend("cuda")
    ids = demo.ids[:, :100].repeat(batch, 1)[:batch]
    general = demo.model(mode, cuda)
    expected = tokens_of(Decoder(general, batch, stepper=ModelStepper(general)), ids, 12)
    model = demo.model(mode, cuda)
    assert unsupported(model, batch) is None
    decoder = Decoder(model, batch)
    assert isinstance(decoder._stepper, BatchedStepper)
    assert isinstance(model.weights.blocks[0].in_proj.weight, Interleaved)
    decoder.prepare()
    first = tokens_of(decoder, ids, 12)
    for _ in range(2):
        assert tokens_of(decoder, ids, 12) == first, "every run gives the same bits"
    # One value that rounds the other way may change a near tie, and all that follows it.
    assert first[:2] == expected[:2]


@pytest.mark.gpu
def test_one_pack_serves_few_and_many_rows_on_a_gpu(demo):
    model = demo.model(QUANTIZED[0], select_backend("cuda"))
    Decoder(model, 1)
    held = model.weights.blocks[0].in_proj.weight.matrix.weight.data_ptr()
    assert cuda_stepper(model, 64) is not None
    assert model.weights.blocks[0].in_proj.weight.matrix.weight.data_ptr() == held
