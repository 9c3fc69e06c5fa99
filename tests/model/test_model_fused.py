"""The fused step as a stepper: the reference's blocks in it make the tokens and states of plain steps."""

from functools import partial

import pytest
import torch
from close import assert_exact
from test_model_decode_graph import Tapes, step_by_step, tokens_of

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.kernels.decode.reference import decode_block
from qmamba_cli.kernels.decode.tensors import DecodeColumns
from qmamba_cli.kernels.linear.interleaved import Interleaved
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.model.decode import Decoder
from qmamba_cli.model.dense import dense_model
from qmamba_cli.model.fused import (
    FusedStepper,
    _packed,
    _rows_or_groups,
    block_scales,
    block_tensors,
    cuda_blocks,
    unsupported,
)
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.quantize import Recipe, quantized_model, quantized_tensors
from qmamba_cli.model.state import float_state_model
from qmamba_cli.model.weights import LinearWeights
from qmamba_cli.modes import MODES

QUANTIZED = [mode for mode in MODES.values() if str(mode.precision) == "int8"]
each_quantized = pytest.mark.parametrize("mode", QUANTIZED, ids=lambda mode: mode.name)


def reference_blocks(model):
    columns = DecodeColumns.from_mode(model.mode)

    def run(weights, residual, state):
        decode_block(
            block_tensors(weights),
            block_scales(weights),
            columns,
            residual,
            state,
            norm_eps=model.config.norm_eps,
        )

    return [partial(run, weights) for weights in model.weights.blocks]


@each_quantized
def test_reference_blocks_step_as_the_model_does(demo, mode):
    model = demo.model(mode)
    stepper = FusedStepper(model, reference_blocks(model))
    decoder = Decoder(model, 2, recorder=Tapes(), stepper=stepper)
    decoder.prepare()
    expected = step_by_step(model, demo.ids, 4)
    for _ in range(2):
        assert tokens_of(decoder, demo.ids, 4) == expected
    _, state = model.forward(demo.ids)
    for row in expected[:-1]:
        _, state = model.forward(torch.tensor(row).unsqueeze(1), state)
    for fused, plain in zip(stepper._state, state, strict=True):
        assert_exact("ssm", fused.ssm, plain.ssm)
        assert_exact("conv", fused.conv.values, plain.conv.values)
        assert (fused.conv.scale is None) == (plain.conv.scale is None)


def test_a_packed_w4_matrix_keeps_its_groups(torch_rng):
    packed = PackedInt4(
        codes=torch.randint(256, (6, 20), generator=torch_rng, dtype=torch.uint8),
        multiplier=torch.randint(1, 16, (6, 2), generator=torch_rng, dtype=torch.uint8),
        group_size=32,
        columns=40,
    )
    groups = _rows_or_groups(LinearWeights(packed, torch.ones(6)))
    assert groups.group_size == 32
    assert_exact("matrix", groups.expand(), packed.expand())


def test_what_has_no_fused_step(demo, small):
    assert "precision is fp32" in unsupported(demo.model("fp"), 1)
    assert "takes cuda" in unsupported(demo.model("0"), 1)
    with pytest.raises(ShapeError, match="quantized weights"):
        block_tensors(demo.rotated.blocks[0])
    with pytest.raises(ShapeError, match="every activation scale"):
        block_scales(demo.rotated.blocks[0])


def held_bytes(model):
    """Bytes of the distinct tensors of in_proj and out_proj."""
    found = {}
    for block in model.weights.blocks:
        for weight in (block.in_proj.weight, block.out_proj.weight):
            tensors = [weight.matrix.weight] if isinstance(weight, Interleaved) else [weight]
            found |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(found.values())


@pytest.mark.parametrize("name", ["0", "3"])
def test_packed_blocks_take_the_weights_place(demo, name):
    model = demo.model(MODES[name])
    before, bytes_before = model.forward(demo.ids)[0], held_bytes(model)
    packed = [_packed(model, layer) for layer in range(len(model.weights.blocks))]
    assert all(isinstance(block.out_proj.weight, Interleaved) for block in model.weights.blocks)
    assert held_bytes(model) == bytes_before
    assert_exact("hidden", model.forward(demo.ids)[0], before)
    # A second decoder takes the same tensors, and so does a model that differs in its state alone.
    again = _packed(model, 0)
    assert again.in_proj.weight.data_ptr() == packed[0].in_proj.weight.data_ptr()
    dense = dense_model(model, free_bytes=1 << 40)
    assert all(isinstance(block.in_proj.weight, torch.Tensor) for block in dense.weights.blocks)
    assert_exact("hidden", dense.forward(demo.ids)[0], before)
    assert dense_model(model, free_bytes=0) is model
    assert dense_model(dense, free_bytes=0) is dense


@pytest.mark.gpu
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("batch", [1, 12])
def test_a_prompt_gives_the_same_bits_whatever_form_the_weights_have_on_a_gpu(demo, batch, w_bits):
    cuda, recipe = select_backend("cuda"), Recipe(w_bits=w_bits)
    weights = quantized_model(
        demo.config,
        dict(quantized_tensors(demo.config, demo.tensors.__getitem__, recipe)),
        demo.scales,
        group_size=recipe.group_size,
        device=cuda.device,
        packed=True,
    )
    model = Mamba(weights, MODES["0"], cuda)
    plain = float_state_model(model)
    ids = demo.ids[:1].repeat(batch, 3)
    expected = plain.forward(ids)[0]
    decoder = Decoder(model, batch)
    decoder.prepare()
    assert isinstance(model.weights.blocks[0].in_proj.weight, Interleaved)
    assert_exact("hidden", float_state_model(model).forward(ids)[0], expected)
    for _ in range(3):
        # Launched anew, recorded, replayed.
        assert_exact("prefill", decoder._prefill(ids).hidden, expected[:, -1])
    short = plain.forward(ids[:, :3])[0]
    assert_exact("prefill", decoder._prefill(ids[:, :3]).hidden, short[:, -1])


@pytest.mark.gpu
def test_packing_for_another_conv_input_is_not_mixed_up_on_a_gpu(demo):
    model = demo.model(MODES["0"], select_backend("cuda"))
    cuda_blocks(model, 1)
    other = type(model)(model.weights, MODES["3"], model.backend)
    assert "conv input" in unsupported(other, 1)
    expected = step_by_step(demo.model(MODES["3"], model.backend), demo.ids[:1], 4)
    assert tokens_of(Decoder(other, 1), demo.ids[:1], 4) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
@each_quantized
def test_fused_steps_follow_the_general_ones_on_a_gpu(demo, mode, batch):
    model = demo.model(mode, select_backend("cuda"))
    assert unsupported(model, batch) is None
    ids = demo.ids[:batch]
    decoder = Decoder(model, batch, stepper=FusedStepper(model, cuda_blocks(model, batch)))
    decoder.prepare()
    first = tokens_of(decoder, ids, 24)
    assert tokens_of(decoder, ids, 24) == first, "two runs give the same bits"
    plain = step_by_step(model, ids, 24)
    # One value that rounds the other way may change a near tie, and all that follows it.
    assert first[:2] == plain[:2]
