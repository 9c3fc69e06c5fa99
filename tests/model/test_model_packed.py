"""Weights as a file stores them: the same model as the expanded form, in the file's own size."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from close import assert_exact
from quantized_models import mean_kl
from random_models import random_checkpoint, small_config

from qmamba_cli.kernels.backend import CPU, select_backend
from qmamba_cli.kernels.linear.packed import PackedInt4
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import Recipe, quantized_model, quantized_tensors
from qmamba_cli.model.weights import ModelWeights, on_device
from qmamba_cli.modes import MODES
from qmamba_cli.sites import site_keys

RECIPES = {
    "w4": Recipe(w_bits=4),
    "w4-g20": Recipe(w_bits=4, group_size=20),
    "w8": Recipe(w_bits=8),
    "w4-16bit": Recipe(w_bits=4, embedding_bits=16),
}
# A core that is not symmetric, an untied head with biases, blocks of a Hadamard matrix.
CONFIGS = {
    "tied": small_config(d_model=48),
    "untied-biases": small_config(d_model=36, proj_bias=True, tie_embeddings=False),
    "blocks": small_config(d_model=90),
}
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def both_forms(config, tensors, scales, recipe) -> tuple[ModelWeights, ModelWeights]:
    stored = dict(quantized_tensors(config, tensors.__getitem__, recipe))
    return tuple(
        quantized_model(config, stored, scales, group_size=recipe.group_size, packed=packed)
        for packed in (False, True)
    )


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def bytes_of(weights: ModelWeights) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(weights)}.values())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_forms_hold_the_same_matrices(config, recipe):
    scales = dict.fromkeys(site_keys(config.n_layer), 0.05)
    expanded, packed = both_forms(config, random_checkpoint(config, seed=12), scales, recipe)
    for one, other in zip(packed.blocks, expanded.blocks, strict=True):
        for name in PROJECTIONS:
            got, expected = getattr(one, name), getattr(other, name)
            assert_exact(name, got.matrix, expected.weight)
            assert_exact(name, got.scale, expected.scale)
            assert isinstance(got.weight, PackedInt4) == (
                recipe.w_bits == 4 and name in ("in_proj", "out_proj")
            )
        for name in ("A", "D", "conv_weight", "conv_scale", "dt_bias"):
            assert_exact(name, getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("mode", ["0", "2-4", "3"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_both_forms_are_one_model(demo, mode, recipe):
    ids = demo.ids[:, :48]
    forms = both_forms(demo.config, demo.tensors, demo.scales, recipe)
    reference = demo.model("fp")
    baseline = reference.logits(reference.hidden(ids))
    apart = []
    for weights in forms:
        model = Mamba(weights, MODES[mode], CPU)
        apart.append(mean_kl(baseline, model.logits(model.hidden(ids))))
    # The rotation of the ends is rounded elsewhere; a rounding that falls the other way spreads.
    assert apart[1] == pytest.approx(apart[0], rel=0.02)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bits", [8, 16])
def test_the_ends_are_the_rotated_ones(config, bits, torch_rng):
    scales = dict.fromkeys(site_keys(config.n_layer), 0.05)
    recipe = Recipe(embedding_bits=bits)
    expanded, packed = both_forms(config, random_checkpoint(config, seed=12), scales, recipe)
    rows = CPU.hadamard(
        CPU.embedding(torch.arange(config.vocab_size), packed.embedding, packed.embedding_scale)
    )
    assert torch.allclose(rows, expanded.embedding, rtol=0, atol=1e-5 * float(expanded.embedding.abs().max()))
    hidden = torch.randn(7, config.d_model, generator=torch_rng)
    one, other = (Mamba(weights, MODES["0"], CPU).logits(hidden) for weights in (packed, expanded))
    assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_a_tied_table_is_held_once_wherever_the_weights_go():
    config = CONFIGS["tied"]
    scales = dict.fromkeys(site_keys(config.n_layer), 0.05)
    _, packed = both_forms(config, random_checkpoint(config), scales, Recipe())
    assert packed.lm_head.weight is packed.embedding
    # A device that is none of the tensors' own.
    elsewhere = on_device(packed, torch.device("meta"))
    assert elsewhere.lm_head.weight is elsewhere.embedding
    assert elsewhere.embedding.device.type == "meta"


def test_packed_weights_take_what_the_file_does(demo):
    recipe = Recipe(w_bits=4)
    stored = dict(quantized_tensors(demo.config, demo.tensors.__getitem__, recipe))
    expanded, packed = both_forms(demo.config, demo.tensors, demo.scales, recipe)
    size = sum(tensor.nbytes for tensor in stored.values())
    # Multipliers have a byte each, A is float32.
    assert bytes_of(packed) < 1.1 * size
    assert bytes_of(expanded) > 2 * size


def test_a_tensor_is_read_when_its_turn_comes():
    config = small_config()
    stored = dict(quantized_tensors(config, random_checkpoint(config).__getitem__, Recipe()))
    seen: list[str] = []

    class Lazy(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            seen.append(name)
            return super().__getitem__(name)

    scales = dict.fromkeys(site_keys(config.n_layer), 0.05)
    quantized_model(config, Lazy(stored), scales, group_size=128, packed=True)
    assert sorted(seen) == sorted(stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotate", [False, True], ids=["trained", "rotated"])
def test_a_half_precision_model_is_near_the_float_one(demo, dtype, rotate):
    ids = demo.ids[:, :48]
    reference = demo.model("fp")
    baseline = reference.logits(reference.hidden(ids))
    weights = float_model(demo.config, demo.tensors.__getitem__, rotate=rotate, dtype=dtype)
    block = weights.blocks[0]
    assert {getattr(block, name).weight.dtype for name in PROJECTIONS} == {weights.embedding.dtype} == {dtype}
    assert {block.A.dtype, block.D.dtype, block.dt_bias.dtype, block.conv_weight.dtype} == {torch.float32}
    model = Mamba(weights, MODES["fp"], CPU)
    hidden, state = model.forward(ids)
    assert hidden.dtype == torch.float32
    # 11 and 8 binary digits.
    assert mean_kl(baseline, model.logits(hidden)) < (1e-4 if dtype == torch.float16 else 5e-3)
    assert state[0].ssm.dtype == torch.float32 and state[0].conv.values.dtype == dtype


def test_an_unrotated_tied_model_shares_its_table(demo):
    tensors = {name: value.to(torch.bfloat16) for name, value in demo.tensors.items()}
    for dtype in (torch.float32, torch.float16):
        weights = float_model(demo.config, tensors.__getitem__, rotate=False, dtype=dtype)
        assert weights.lm_head.weight is weights.embedding


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["0", "2-4", "3"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_gpu_runs_the_stored_form(demo, mode, recipe):
    cuda = select_backend("cuda")
    stored = dict(quantized_tensors(demo.config, demo.tensors.__getitem__, recipe))
    forms = [
        (quantized_model(demo.config, stored, demo.scales, group_size=recipe.group_size), CPU),
        (
            quantized_model(
                demo.config,
                stored,
                demo.scales,
                group_size=recipe.group_size,
                device=cuda.device,
                packed=True,
            ),
            cuda,
        ),
    ]
    reference = demo.model("fp")
    baseline = reference.logits(reference.hidden(demo.ids))
    apart = []
    for weights, backend in forms:
        model = Mamba(weights, MODES[mode], backend)
        apart.append(mean_kl(baseline, model.logits(model.hidden(demo.ids)).cpu()))
        # One row of logits takes another kernel than many.
        hidden = model.hidden(demo.ids[:1, :9])
        one, many = model.logits(hidden[:, -1]), model.logits(hidden)[:, -1]
        assert torch.allclose(one, many, rtol=0, atol=1e-5 * float(many.abs().max()))
    assert apart[1] == pytest.approx(apart[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_model_on_a_gpu(demo, dtype):
    cuda = select_backend("cuda")
    reference = demo.model("fp")
    baseline = reference.logits(reference.hidden(demo.ids))
    weights = float_model(
        demo.config, demo.tensors.__getitem__, rotate=False, dtype=dtype, device=cuda.device
    )
    model = Mamba(weights, MODES["fp"], cuda)
    hidden, state = model.forward(demo.ids[:, :-1])
    step, _ = model.forward(demo.ids[:, -1:], state)
    logits = model.logits(torch.cat([hidden, step], dim=1)).cpu()
    assert mean_kl(baseline, logits) < (1e-4 if dtype == torch.float16 else 5e-3)
