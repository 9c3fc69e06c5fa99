"""Float weights to the tensors of a quantized file and back."""

import re

import pytest
import torch
from close import assert_exact
from quantized_models import mean_kl, quantize
from random_models import random_checkpoint, small_config

from qmamba_cli.errors import CheckpointError, UsageError
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model, rotate_inputs
from qmamba_cli.model.quantize import Recipe, planned_tensors, quantized_tensors, weight_schemes
from qmamba_cli.modes import MODES
from qmamba_cli.quant.weights import quantize_groups, quantize_rows
from qmamba_cli.sites import site_keys

CONFIGS = {
    "tied": small_config(),
    "untied-biases": small_config(d_model=36, proj_bias=True, tie_embeddings=False),
    "no-conv-bias": small_config(d_model=33, conv_bias=False, d_conv=3),
}
RECIPES = {
    "w8": Recipe(w_bits=8),
    "w4-g128": Recipe(w_bits=4),
    # Ragged for every width here.
    "w4-g20": Recipe(w_bits=4, group_size=20),
    "w4-16bit": Recipe(w_bits=4, embedding_bits=16),
}


def ones(config):
    return dict.fromkeys(site_keys(config.n_layer), 0.05)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_read_back_is_the_quantized_rotated_model(config, recipe):
    tensors = random_checkpoint(config, seed=12)
    real = float_model(config, tensors.__getitem__)
    got = quantize(config, tensors, ones(config), recipe)
    for block, wanted in zip(got.blocks, real.blocks, strict=True):
        for name in ("in_proj", "out_proj"):
            linear, exact = getattr(block, name), getattr(wanted, name)
            if recipe.w_bits == 8:
                rows = quantize_rows(exact.weight)
                codes, scale = rows.qweight, rows.scale
            else:
                groups = quantize_groups(exact.weight, recipe.group_size)
                codes, scale = groups.expand(), groups.scale
            assert_exact(f"{name}.weight", linear.weight, codes)
            assert_exact(f"{name}.scale", linear.scale, scale)
            assert (linear.bias is None) == (not config.proj_bias)
            if config.proj_bias:
                assert_exact(f"{name}.bias", linear.bias, exact.bias)
        for name in ("x_proj", "dt_proj"):
            rows = quantize_rows(getattr(wanted, name).weight)
            assert_exact(name, getattr(block, name).weight, rows.qweight)
            assert_exact(name, getattr(block, name).scale, rows.scale)
            # dt_proj's bias is added inside the scan.
            assert getattr(block, name).bias is None
        taps = quantize_rows(wanted.conv_weight)
        assert_exact("conv_weight", block.conv_weight, taps.qweight)
        assert_exact("conv_scale", block.conv_scale, taps.scale)
        for name in ("A", "D", "dt_bias", *(["conv_bias"] if config.conv_bias else [])):
            assert_exact(name, getattr(block, name), getattr(wanted, name))
        assert block.rotated and block.norm is None
    assert got.norm_f is None


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tables_are_stored_unrotated_and_read_rotated(config, bits):
    tensors = random_checkpoint(config, seed=12)
    recipe = Recipe(w_bits=8, embedding_bits=bits)
    got = quantize(config, tensors, ones(config), recipe)
    gamma = tensors["backbone.norm_f.weight"]

    def stored(name: str) -> torch.Tensor:
        return quantize_rows(tensors[name]).dequantize() if bits == 8 else tensors[name].half().float()

    embedding = stored("backbone.embeddings.weight")
    head = embedding if config.tie_embeddings else stored("lm_head.weight")
    assert_exact("embedding", got.embedding, rotate_inputs(embedding))
    assert_exact("lm_head", got.lm_head.weight, rotate_inputs(head, gamma))
    # One table serves a tied head.
    names = {name for name, _ in quantized_tensors(config, tensors.__getitem__, recipe)}
    assert any(name.startswith("lm_head.") for name in names) != config.tie_embeddings

    # A rotation keeps the error of a row: half a step an element at 8 bits.
    exact = float_model(config, tensors.__getitem__).embedding
    absmax = tensors["backbone.embeddings.weight"].abs().amax(1)
    step = absmax / 127 if bits == 8 else absmax * 2.0**-10
    error = (got.embedding - exact).norm(dim=1)
    assert bool((error <= step / 2 * config.d_model**0.5 * 1.01).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_tables_and_a_log_keep_the_dtype_of_the_checkpoint(dtype):
    config = small_config()
    tensors = {name: value.to(dtype) for name, value in random_checkpoint(config, seed=12).items()}
    stored = dict(quantized_tensors(config, tensors.__getitem__, Recipe(embedding_bits=16)))
    assert_exact("embeddings", stored["embeddings.weight"], tensors["backbone.embeddings.weight"])
    assert_exact("A_log", stored["layers.1.A_log"], tensors["backbone.layers.1.mixer.A_log"])


def test_ignored_modules_keep_the_finer_format():
    config = small_config(tie_embeddings=False)
    tensors = random_checkpoint(config, seed=12)
    recipe = Recipe(w_bits=4, ignore=(r"layers\.0\..*", "lm_head"))
    schemes = weight_schemes(config, recipe)
    assert schemes["layers.0.in_proj"] == schemes["layers.0.out_proj"] == "w8-row"
    assert schemes["layers.1.in_proj"] == schemes["layers.1.out_proj"] == "w4-g128"
    assert (schemes["embeddings"], schemes["lm_head"]) == ("w8-row", "16-bit")
    got = quantize(config, tensors, ones(config), recipe)
    real = float_model(config, tensors.__getitem__)
    for layer, expected in ((0, quantize_rows), (1, quantize_groups)):
        rows = expected(real.blocks[layer].in_proj.weight)
        codes = rows.qweight if layer == 0 else rows.expand()
        assert_exact("in_proj", got.blocks[layer].in_proj.weight, codes)


def test_an_expression_must_match_the_whole_name():
    recipe = Recipe(ignore=("in_proj", r"layers\.1"))
    assert recipe.projection_bits("layers.1.in_proj") == 4
    assert Recipe(ignore=(r".*in_proj",)).projection_bits("layers.1.in_proj") == 8


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_schemes_name_every_module_and_its_format(config, recipe):
    stored = dict(quantized_tensors(config, random_checkpoint(config).__getitem__, recipe))
    for module, scheme in weight_schemes(config, recipe).items():
        kinds = {name.rpartition(".")[2]: tensor for name, tensor in stored.items() if
                 name.rpartition(".")[0] == module}  # fmt: skip
        if scheme.startswith("w4"):
            assert kinds["qweight"].dtype == kinds["multiplier"].dtype == torch.uint8
            assert scheme == f"w4-g{recipe.group_size}"
        elif scheme == "16-bit":
            assert kinds["weight"].dtype == torch.float16
        else:
            assert kinds["qweight"].dtype == torch.int8 and "multiplier" not in kinds
    weights = {name.rpartition(".")[0] for name in stored if name.endswith(("qweight", "embeddings.weight"))}
    assert weights == set(weight_schemes(config, recipe)) or not config.tie_embeddings


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_is_what_quantizing_gives(config, recipe, dtype):
    tensors = {name: value.to(dtype) for name, value in random_checkpoint(config).items()}
    stored = dict(quantized_tensors(config, tensors.__getitem__, recipe))
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    assert planned_tensors(config, recipe, dtype) == sizes


def test_quantizing_twice_gives_the_same_bits():
    config = CONFIGS["untied-biases"]
    tensors = random_checkpoint(config, seed=12)
    first, second = (list(quantized_tensors(config, tensors.__getitem__, Recipe())) for _ in range(2))
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, one), (_, other) in zip(first, second, strict=True):
        assert_exact(name, one, other)


def test_layers_are_reported_as_they_are_done():
    config, seen = small_config(), []
    names = (name for name, _ in quantized_tensors(
        config, random_checkpoint(config).__getitem__, Recipe(), on_layer=lambda: seen.append(1)
    ))  # fmt: skip
    done = {name: len(seen) for name in names}
    assert done["layers.0.D"] == 0 and done["layers.1.D"] == 1 and len(seen) == 2


def test_a_broken_weight_is_named():
    config = small_config()
    tensors = random_checkpoint(config)
    tensors["backbone.layers.1.mixer.x_proj.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.x_proj"):
        dict(quantized_tensors(config, tensors.__getitem__, Recipe()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 3}, "--w-bits"),
        ({"embedding_bits": 4}, "--embedding-bits"),
        ({"group_size": 0}, "--group-size"),
        ({"ignore": ("(",)}, "--ignore"),
    ],
)
def test_recipes_that_are_refused(options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Recipe(**options)


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
def test_weights_must_suit_the_mode(small, mode):
    wrong = small.quantized if mode.name == "fp" else small.rotated
    with pytest.raises(UsageError, match=re.escape(f"mode {mode.name} has precision=")):
        Mamba(wrong, mode, CPU)


def test_four_bits_cost_more_than_eight_and_stay_a_model(demo):
    logits = {"fp": demo.model("fp").logits(demo.model("fp").hidden(demo.ids))}
    for bits in (8, 4):
        weights = quantize(demo.config, demo.tensors, demo.scales, Recipe(w_bits=bits))
        model = Mamba(weights, MODES["0"], CPU)
        logits[bits] = model.logits(model.hidden(demo.ids))
    coarse, fine = mean_kl(logits["fp"], logits[4]), mean_kl(logits["fp"], logits[8])
    assert fine * 2 < coarse < 0.5


def test_eight_bit_embeddings_cost_little(demo):
    kl = {}
    reference = demo.model("fp").logits(demo.model("fp").hidden(demo.ids))
    for bits in (8, 16):
        weights = quantize(demo.config, demo.tensors, demo.scales, Recipe(w_bits=8, embedding_bits=bits))
        model = Mamba(weights, MODES["0"], CPU)
        kl[bits] = mean_kl(reference, model.logits(model.hidden(demo.ids)))
    assert kl[8] == pytest.approx(kl[16], rel=0.1)
